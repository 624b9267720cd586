"""Speed is compared within rounds of one process; the ratios are the medians worked out by hand."""

from __future__ import annotations

import json
from statistics import median

import pytest

from s2sam.cli.table import dry_run
from s2sam.report.stats import median_interval
from s2sam.suite.execute import run_plan
from s2sam.suite.text import runs_csv, to_markdown
from s2sam.suite.throughput import build_throughput, steps_of


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


def test_few_rounds_have_no_interval(speed, plan_of):
    plan = plan_of(speed)
    rounds = {"SGD": [0.01] * 3, "S2-SAM": [0.01, 0.011, 0.012], "SAM": [0.02] * 3}
    assert median_interval([1.0, 1.1, 1.2]) is None
    assert build_throughput(plan, {plan.cells[0]: rounds}).entries[1].interval is None


def test_it_measures_once_and_reads_afterwards(speed, plan_of, console, capsys):
    plan = plan_of(speed)
    with pytest.raises(ValueError, match=r"not measured yet: digits, Static 90 %"):
        run_plan(plan, console=console, read_only=True)
    table = run_plan(plan, console=console)
    path = plan.out / "rounds" / "digits_static_90.json"
    content = json.loads(path.read_text())
    assert [len(seconds) for seconds in content["seconds_per_step"].values()] == [3, 3, 3]
    assert content["environment"]["hardware"]["threads"] == 1 or content["environment"]["hardware"]["threads"] > 0
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


def test_missing_cells_are_not_measured(speed, plan_of, console):
    speed["rows"] = {"Some": {"method": "some-day"}}
    table = run_plan(plan_of(speed | {"planned": ["some-day"]}), console=console)
    assert {entry.state for entry in table.entries} == {"missing: the method some-day does not exist here yet"}
