"""Mode tuned: equal searches, chosen on validation images, measured on fresh seeds, declared on the table."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path

import pytest

from s2sam.suite.execute import run_plan
from s2sam.suite.plan import make_plan
from s2sam.suite.schema import load_suite, parse_suite
from s2sam.suite.text import runs_csv, to_markdown
from s2sam.suite.tuned import check_tuned, choose, edge_notes, plan_trials

ROOT = Path(__file__).parents[2]
TABLES = [path for folder in ("results", "studies") for path in sorted((ROOT / folder).rglob("*.yaml"))]
SEARCHES = [path for path in TABLES if "\ntuned:" in path.read_text()]
GRIDS = {"SGD": {"lr": [0.05, 0.1]}, "S2-SAM": {"rho": [0.01, 0.05]}}


@pytest.fixture
def searched(small):
    return small | {"tuned": {"seeds": [7, 8], "grids": GRIDS}}


def test_unequal_searches_are_refused(searched):
    searched["tuned"]["grids"] = GRIDS | {"S2-SAM": {"rho": [0.01, 0.05, 0.1]}}
    with pytest.raises(ValueError, match="equally many trials in every column, not SGD 2, S2-SAM 3"):
        check_tuned(parse_suite(searched))


@pytest.mark.parametrize(
    ("grids", "sentence"),
    [
        ({"SGD": {"lr": [0.1]}}, "S2-SAM has none"),
        (GRIDS | {"SGD": {"epochs": [1, 2]}}, "unknown key to tune in the grid of SGD 'epochs'"),
        (GRIDS | {"SGD": {"data_options.train_size": [1, 2]}}, "unknown key to tune"),
        (GRIDS | {"SGD": {"lr": [0.1, 0.1]}}, "lr in the grid of SGD has a value twice"),
    ],
)
def test_searches_that_are_not_fair_are_refused(searched, grids, sentence):
    searched["tuned"]["grids"] = grids
    with pytest.raises(ValueError, match=sentence):
        check_tuned(parse_suite(searched))


@pytest.mark.parametrize("path", SEARCHES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_committed_searches_give_every_column_equally_many_trials(path, tmp_path):
    plan = make_plan(load_suite(path), budget="smoke", mode="tuned", out=tmp_path)
    counts = Counter((p.cell, p.column) for p in plan_trials(plan))
    assert len(set(counts.values())) == 1
    assert {column for _, column in counts} == set(plan.suite.columns)


def test_a_table_without_a_search_says_so(small, plan_of):
    with pytest.raises(ValueError, match="declares no search"):
        plan_trials(plan_of(small, mode="tuned"))


def test_screening_seeds_measure_nothing(searched, plan_of):
    with pytest.raises(ValueError, match="seed 7 screens settings"):
        plan_trials(plan_of(searched, mode="tuned", seeds=[7, 9]))


def test_validation_chooses_and_test_accuracy_does_not(searched, plan_of, invented):
    plan = plan_of(searched, mode="tuned")
    trials = plan_trials(plan)
    assert len(trials) == 2 * 2 * 2
    assert {p.config.seed for p in trials} == {7, 8}
    runs = {p: invented(p, top1=1.0 - p.trial / 2, val_top1=0.5 + p.trial / 4) for p in trials}
    choices = choose(plan, runs)
    assert {column: choice.settings for (_, column), choice in choices.items()} == {
        "SGD": {"lr": 0.1}, "S2-SAM": {"rho": 0.05},
    }  # fmt: skip
    final = plan.runs({key: choice.settings for key, choice in choices.items()})
    assert {(p.column, p.config.lr, p.config.rho, p.config.seed) for p in final} == {
        ("SGD", 0.1, 0.05, 0), ("SGD", 0.1, 0.05, 1), ("S2-SAM", 0.1, 0.05, 0), ("S2-SAM", 0.1, 0.05, 1),
    }  # fmt: skip


def test_choices_on_an_edge_of_the_grid_are_said(searched, plan_of, invented):
    searched["tuned"]["grids"] = {"SGD": {"lr": [0.05, 0.1, 0.2]}, "S2-SAM": {"rho": [0.01, 0.02, 0.05]}}
    plan = plan_of(searched, mode="tuned")
    best = {"SGD": 2, "S2-SAM": 1}
    runs = {p: invented(p, 0.5, val_top1=float(p.trial == best[p.column])) for p in plan_trials(plan)}
    notes = edge_notes(plan, choose(plan, runs))
    assert len(notes) == 1
    assert notes[0].startswith("On the edge of its grid: SGD chose lr 0.2 in 1 of 1 cells")


def test_ties_go_to_the_first_and_failed_trials_are_out(searched, plan_of, invented):
    plan = plan_of(searched, mode="tuned")
    trials = plan_trials(plan)
    equal = {p: invented(p, 0.9) for p in trials}
    assert {choice.trial for choice in choose(plan, equal).values()} == {0}
    lame = {p: run for p, run in equal.items() if not (p.trial == 0 and p.config.seed == 7)}
    assert {choice.trial for choice in choose(plan, lame).values()} == {1}
    with pytest.raises(ValueError, match=r"no trial of digits, Static 90 %, SGD went through"):
        choose(plan, {p: run for p, run in equal.items() if p.column != "SGD"})
    with pytest.raises(ValueError, match="val_fraction above 0"):
        choose(plan, {p: invented(p, 0.9, val_top1=None) for p in trials})


def test_the_table_declares_the_search(searched, plan_of, console):
    searched["tuned"]["seeds"] = [7]
    table = run_plan(plan_of(searched, mode="tuned"), console=console)
    assert (len(table.runs), table.entries[0].n) == (4, 2)
    markdown = to_markdown(table)
    assert (
        "Mode tuned: in every cell each column tried 2 settings (SGD: lr [0.05, 0.1]; S2-SAM: rho [0.01, 0.05])"
        in markdown
    )
    assert "on the screening seeds 7" in markdown
    assert "not of searching again" in markdown
    assert "the test images did not (what the trials reach on them stands in their run folders only)" in markdown
    assert "Mode matched" not in markdown
    lines = list(csv.DictReader(io.StringIO(runs_csv(table))))
    assert [(line["trial"], line["seed"]) for line in lines if line["column"] == "SGD"] == [
        ("0", "7"), ("1", "7"), ("", "0"), ("", "1"),
    ]  # fmt: skip
    trials, runs = (
        [line for line in lines if bool(line["trial"]) is trial] for trial in (True, False)
    )  # fmt: skip
    assert {(line["test_top1"], line["test_loss"]) for line in trials} == {("", "")}
    assert all(line["val_top1"] for line in lines) and all(line["test_top1"] for line in runs)
    told = dict(re.findall(r"\] (\S+): (\d+\.\d) %", console.file.getvalue()))
    for which, planned in (("val_top1", table.screening), ("test_top1", table.runs)):
        assert {p.name: told[p.name] for p in planned} == {
            p.name: f"{100 * run.final[which]:.1f}" for p, run in planned.items()
        }
    chosen = table.entries[0].setting
    assert chosen.startswith("lr 0.")
    assert f"Chosen for digits, Static 90 %, SGD: {chosen}." in markdown
    lr = float(chosen.split()[1])
    assert {run.config["lr"] for p, run in table.runs.items() if p.column == "SGD"} == {lr}
