"""Speed is compared within rounds of one process; the ratios are the medians worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import random
import re
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from s2sam.cli.table import dry_run
from s2sam.report import measure
from s2sam.report.stats import median_interval
from s2sam.suite.execute import run_plan
from s2sam.suite.page import render
from s2sam.suite.text import cells_csv, runs_csv, to_markdown
from s2sam.suite.throughput import build_throughput, steps_of

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutations import changed, damaged


@pytest.fixture
def speed(small):
    small["columns"]["SAM"] = {"sharpness": "sam", "rho": 0.05}
    small["seeds"] = [0]
    return small | {"measure": "throughput", "budgets": {"full": {"rounds": 3}}}


def test_ratios_are_taken_within_rounds(speed, plan_of):
    plan = plan_of(speed)
    base = [0.010, 0.012, 0.030, 0.010, 0.011, 0.010, 0.010, 0.010, 0.010, 0.010]
    rounds = {"SGD": base, "S2-SAM": [1.1 * s for s in base], "SAM": [2 * s for s in base]}
    table = build_throughput(plan, {plan.cells[0]: rounds})
    sgd, s2sam, sam = table.entries
    assert (sgd.center, sgd.difference) == (64 / median(base), None)
    assert (s2sam.difference, sam.difference) == (pytest.approx(1.1), pytest.approx(2.0))
    assert s2sam.center == pytest.approx(64 / median(base) / 1.1)
    assert (s2sam.interval.low, s2sam.interval.high) == pytest.approx((1.1, 1.1))
    assert sam.interval.level == pytest.approx(0.975)  # two comparisons together 95 %
    assert "6250 images/s (2.00x" not in to_markdown(table)
    assert "3200 images/s (2.00x [2.00, 2.00])" in to_markdown(table)


def test_an_interval_without_one_shows_a_difference_and_a_longer_step_is_worse(speed, plan_of):
    noise = [0.97, 1.03, 0.98, 1.02, 0.99, 1.01, 0.96, 1.04, 0.95, 1.05, 0.97, 1.03]
    base = [0.01] * len(noise)
    quick, slow, same = ([factor * b * e for b, e in zip(base, noise, strict=True)] for factor in (0.7, 1.44, 1.0))
    speed["columns"]["Same"] = {"sharpness": "none", "optim.nesterov": True}
    speed["baselines"] = ["Same"]
    plan = plan_of(speed)
    table = build_throughput(plan, {plan.cells[0]: {"SGD": base, "S2-SAM": quick, "SAM": slow, "Same": same}})
    lines = list(csv.DictReader(io.StringIO(cells_csv(table))))
    assert {line["column"]: line["shows"] for line in lines} == {"SGD": "0", "S2-SAM": "-1", "SAM": "1", "Same": "0"}
    for line in lines[1:]:
        low, high = float(line["low"]), float(line["high"])
        assert int(line["shows"]) == (low > 1) - (high < 1)
    classes = re.findall(r'<td class="(\w+)">\d+ images/s<small>([\d.]+)x', render(table))
    assert classes == [("up", "0.70"), ("down", "1.44")]


def test_few_rounds_have_no_interval(speed, plan_of):
    plan = plan_of(speed)
    rounds = {"SGD": [0.01] * 3, "S2-SAM": [0.01, 0.011, 0.012], "SAM": [0.02] * 3}
    assert median_interval([1.0, 1.1, 1.2]) is None
    entry = build_throughput(plan, {plan.cells[0]: rounds}).entries[1]
    assert (entry.interval, entry.shows) == (None, 0)


def test_it_measures_once_and_reads_afterwards(speed, plan_of, console, capsys):
    plan = plan_of(speed)
    with pytest.raises(ValueError, match=r"not measured yet: digits, Static 90 %"):
        run_plan(plan, console=console, read_only=True)
    torch.set_num_threads(2)
    try:
        table = run_plan(plan, console=console)
    finally:
        torch.set_num_threads(1)
    path = plan.out / "rounds" / "digits_static_90.json"
    content = json.loads(path.read_text())
    assert [len(seconds) for seconds in content["seconds_per_step"].values()] == [3, 3, 3]
    assert content["environment"]["hardware"]["threads"] == 1  # with which it was measured
    again = run_plan(plan_of(speed), console=console, read_only=True)
    assert to_markdown(again) == to_markdown(table)
    assert any(note.startswith("All runs were made by s2sam ") for note in table.notes)
    assert dry_run(plan) == 0
    assert capsys.readouterr().out == f"measured\t{path}\n1 cells, 1 measured\n"
    assert len(runs_csv(table).splitlines()) == 1 + 3 * 3
    speed["base"]["batch_size"] = 32
    with pytest.raises(ValueError, match="not measured yet"):
        run_plan(plan_of(speed), console=console, read_only=True)


def test_a_round_holds_a_change_of_the_topology(small, plan_of):
    small["rows"] = {"RigL": {"method": "rigl", "sparse.options": {"delta_t": 60}}}
    plan = plan_of(small)
    configs = {column: plan.config(plan.cells[0], column, 0) for column in plan.suite.columns}
    assert steps_of(configs) == 60


@pytest.mark.parametrize(("interval", "steps"), [(60, 60), (25, 50), (201, 200), (5, 20)])
def test_a_round_of_echo_has_as_many_first_visits_as_second_ones(small, plan_of, interval, steps):
    small["rows"] = {"RigL": {"method": "rigl", "sparse.options": {"delta_t": interval}}}
    small["columns"]["Echo"] = {"sharpness": "echo"}
    plan = plan_of(small)
    configs = {column: plan.config(plan.cells[0], column, 0) for column in plan.suite.columns}
    assert steps_of(configs) == steps
    del configs["Echo"]
    assert steps_of(configs) == min(200, max(20, interval))


def test_echo_is_fed_each_batch_twice_and_displaced_in_second_visits(small, plan_of, monkeypatch):
    """Also where a training has an odd number of steps, after which the next one begins with a first visit."""
    small["base"] |= {"epochs": 1, "data_options": {"train_size": 180}}  # three batches
    small["columns"] = {"SGD": {"sharpness": "none"}, "Echo": {"sharpness": "echo", "rho": 0.04}}
    plan, seen = plan_of(small), {}

    def recording(state, x, y):
        before = [p.detach().clone() for p in state.model.parameters()]
        moved = []
        handle = state.model.register_forward_hook(
            lambda *_: moved.append(not all(map(torch.equal, before, state.model.parameters())))
        )
        train_step(state, x, y)
        handle.remove()
        seen.setdefault(state.config.sharpness, []).append((x.clone(), *moved))
        return x, y

    train_step = measure.train_step
    monkeypatch.setattr(measure, "train_step", recording)
    configs = {column: plan.config(plan.cells[0], column, 0) for column in plan.suite.columns}
    found = measure.measure_rounds(configs, rounds=2, steps=4, warm_up=1)
    assert [len(seconds) for seconds in found.values()] == [2, 2]
    assert [moved for _, moved in seen["echo"]] == [False, True, False] * 3
    echo, plain = ([x for x, _ in seen[kind]] for kind in ("echo", "none"))
    assert len(echo) == len(plain) == 9
    assert not any(moved for _, moved in seen["none"])
    for first in (0, 3, 6):
        assert torch.equal(echo[first], echo[first + 1]) and not torch.equal(echo[first], echo[first + 2])
    assert torch.equal(echo[0], plain[0]) and torch.equal(echo[2], plain[1])


def test_images_of_echo_count_at_each_visit_and_the_distinct_ones_are_said(speed, plan_of):
    speed["columns"]["Echo"] = {"sharpness": "echo"}
    plan = plan_of(speed | {"not_in_paper": ["Echo"]})
    rounds = {column: [0.01] * 10 for column in plan.suite.columns} | {"SAM": [0.02] * 10, "Echo": [0.016] * 10}
    table = build_throughput(plan, {plan.cells[0]: rounds})
    *others, echo = table.entries
    assert (echo.center, echo.distinct, echo.difference) == (4000, 2000, pytest.approx(1.6))  # 64 images in 16 ms
    assert [entry.distinct for entry in others] == [None] * 3
    assert "4000 images/s, 2000 distinct (1.60x [1.60, 1.60])" in to_markdown(table)
    assert "4000 images/s, 2000 distinct<small>1.60x [1.60, 1.60]</small>" in render(table)
    assert "its images are counted in both, so that half of the images a second are distinct" in to_markdown(table)
    lines = {line["column"]: line for line in csv.DictReader(io.StringIO(cells_csv(table)))}
    assert {name: line["distinct_images_per_second"] for name, line in lines.items()} == {
        "SGD": "", "S2-SAM": "", "SAM": "", "Echo": "2000.0",
    }  # fmt: skip
    assert lines["Echo"]["value"] == "4000.0" and lines["SAM"]["value"] == "3200.0"
    found = {
        (line["column"], line["images_per_second"], line["distinct_images_per_second"])
        for line in csv.DictReader(io.StringIO(runs_csv(table)))
    }
    assert found == {
        ("SGD", "6400.0", ""),
        ("S2-SAM", "6400.0", ""),
        ("SAM", "3200.0", ""),
        ("Echo", "4000.0", "2000.0"),
    }


def test_columns_that_were_measured_beside_others_are_not_measured_again(speed, plan_of, console):
    table = run_plan(plan_of(speed), console=console)
    path = plan_of(speed).out / "rounds" / "digits_static_90.json"
    before = path.read_bytes()
    part = plan_of(speed | {"budgets": {"full": {"rounds": 3, "columns": ["SGD", "SAM"]}}})
    read = run_plan(part, console=console)
    assert path.read_bytes() == before
    assert [(e.column, e.center, e.difference) for e in read.entries] == [
        (e.column, e.center, e.difference) for e in table.entries if e.column != "S2-SAM"
    ]
    assert read.comparisons == 1
    speed["columns"]["Echo"] = {"sharpness": "echo"}
    with pytest.raises(ValueError, match="not measured yet"):
        run_plan(plan_of(speed), console=console, read_only=True)


def test_missing_cells_are_not_measured(speed, plan_of, console):
    speed["rows"] = {"Some": {"method": "some-day"}}
    table = run_plan(plan_of(speed | {"planned": ["some-day"]}), console=console)
    assert {entry.state for entry in table.entries} == {"missing: the method some-day does not exist here yet"}


@pytest.mark.parametrize("seed", range(3))
def test_damaged_measurements_are_not_read_but_named(speed, plan_of, console, seed):
    draw, plan = random.Random(seed), plan_of(speed)
    path = plan.out / "rounds" / "digits_static_90.json"
    configs = {column: plan.config(plan.cells[0], column, 0).as_dict() for column in plan.suite.columns}
    whole = {
        "seconds_per_step": {column: [0.01, 0.02, 0.03] for column in configs},
        "configs": configs,
        "environment": {"versions": {"s2sam": "1", "torch": "2"}, "git_commit": "abc", "hardware": {"cpu": "x"}},
    }
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(whole))
    assert run_plan(plan, console=console, read_only=True).entries
    refused = 0
    for turn in range(60):
        text = json.dumps(changed(whole, draw)).encode()
        path.write_bytes(text if turn % 3 else damaged(json.dumps(whole).encode(), draw))
        said = ""
        try:
            run_plan(plan, console=console, read_only=True)
        except ValueError as error:
            said = str(error)
        refused += bool(said)
        assert not said or said.startswith("not measured yet: digits, Static 90 %")
    assert refused > 20
