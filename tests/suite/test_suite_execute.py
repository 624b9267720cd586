"""Runs of a table: finished ones are reused, begun ones go on, missing ones are named, failures stop nobody else."""

from __future__ import annotations

import json

import pytest

from s2sam.suite.execute import ensure, is_done, run_plan
from s2sam.suite.pool import train_one
from s2sam.suite.text import to_markdown


def stamps(plan):
    return {p.name: (p.config.folder / "metrics.jsonl").stat().st_mtime_ns for p in plan.runs()}


def test_finished_runs_are_reused_and_the_table_is_that_of_the_runs(small, plan_of, console):
    plan = plan_of(small)
    table = run_plan(plan, console=console)
    before = stamps(plan)
    assert len(before) == 4
    for entry in table.entries:
        finals = [run.final["test_top1"] for p, run in table.runs.items() if p.column == entry.column]
        assert entry.center == pytest.approx(sum(finals) / 2)
    again = run_plan(plan_of(small), console=console, read_only=True)
    assert stamps(plan) == before
    assert to_markdown(again) == to_markdown(table)
    assert "4 finished runs of 4 are reused" in console.file.getvalue()


def test_read_only_names_what_is_missing(small, plan_of, console):
    small["seeds"] = [0, 1, 2, 3]
    plan = plan_of(small)
    train_one("first", plan.runs()[0].config)
    with pytest.raises(ValueError, match="7 of 8 runs are missing: digits_static_90_s2-sam_seed0, .* and 2 more"):
        run_plan(plan, console=console, read_only=True)
    assert len(list((plan.out / "runs").iterdir())) == 1


def test_a_run_that_was_broken_off_goes_on(small, plan_of, console):
    small["base"]["epochs"] = 2
    plan = plan_of(small, seeds=[0])
    run_plan(plan, console=console)
    broken = plan.runs()[0].config.folder
    whole = (broken / "metrics.jsonl").read_text()
    (broken / "DONE").unlink()
    run_plan(plan, console=console)
    assert json.loads((broken / "env.json").read_text())["resumed"][0]["step"] > 0
    left, right = (json.loads(text.splitlines()[-1]) for text in (whole, (broken / "metrics.jsonl").read_text()))
    assert (left["test_top1"], left["test_loss"]) == (right["test_top1"], right["test_loss"])


def test_a_finished_run_of_other_settings_is_not_taken(small, plan_of, console):
    plan = plan_of(small, seeds=[0])
    run_plan(plan, console=console)
    small["base"]["lr"] = 0.05
    with pytest.raises(ValueError, match=r"holds a finished run with other settings: lr is 0.1 there and 0.05 here"):
        run_plan(plan_of(small, seeds=[0]), console=console)


def test_a_damaged_run_is_named(small, plan_of, console):
    plan = plan_of(small, seeds=[0])
    run_plan(plan, console=console)
    first = plan.runs()[0]
    (first.config.folder / "metrics.jsonl").write_text('{"kind": "fin')
    with pytest.raises(ValueError, match=f"{first.name}/metrics.jsonl is torn"):
        is_done(first)


def test_a_failure_is_named_and_the_others_go_on(small, plan_of, console):
    plan = plan_of(small)
    bad = plan.runs()[1]
    bad.config.folder.mkdir(parents=True)
    (bad.config.folder / "letter.txt").write_text("mine")
    table = run_plan(plan, console=console)
    assert [p.name for p in table.failed] == [bad.name]
    assert len(table.runs) == 3
    assert f"Failed: {bad.name}: ValueError" in to_markdown(table)
    assert (bad.config.folder / "letter.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_known_before_anything_is_trained(small, plan_of, console, tmp_path):
    (tmp_path / "letter").write_text("mine")
    for out in (tmp_path / "letter", tmp_path / "letter" / "inside"):
        with pytest.raises(ValueError, match="a file stands there; choose another --out"):
            run_plan(plan_of(small, out=out), console=console)
    assert "failed" not in console.file.getvalue()
    assert (tmp_path / "letter").read_text() == "mine"


def test_a_device_that_is_not_here_is_refused_unless_another_machine_trains(small, plan_of, console, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = plan_of(small, seeds=[0], device="cuda")
    with pytest.raises(ValueError, match="no CUDA device here"):
        run_plan(plan, console=console)
    assert not plan.out.exists()
    table = run_plan(plan, console=console, runner=lambda configs, jobs: iter(()))
    assert len(table.failed) == 2


def test_another_runner_may_bring_the_outcomes(small, plan_of, console):
    plan = plan_of(small, seeds=[0])

    def runner(configs, jobs):
        assert jobs == 3
        for name, config in reversed(configs.items()):
            yield train_one(name, config)

    runs, failed = ensure(plan.runs(), console=console, jobs=3, runner=runner)
    assert (len(runs), failed) == (2, {})


def test_a_run_that_never_comes_back_is_a_failure(small, plan_of, console):
    runs, failed = ensure(plan_of(small, seeds=[0]).runs(), console=console, runner=lambda configs, jobs: iter(()))
    assert runs == {}
    assert set(failed.values()) == {"RuntimeError: it never came back"}
