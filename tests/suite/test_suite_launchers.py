"""Existing engines only: submitit (in this process) and Ray (on this machine); a missing package is one sentence."""

from __future__ import annotations

import sys

import pytest

from s2sam.suite.execute import ensure
from s2sam.suite.launch_ray import ray_runner
from s2sam.suite.launch_slurm import Task, slurm_runner


@pytest.mark.parametrize(
    ("package", "make"), [("submitit", lambda tmp: slurm_runner(tmp)), ("ray", lambda tmp: ray_runner())]
)
def test_a_missing_package_is_one_sentence(package, make, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=rf"needs the package {package}; pip install 's2sam\[(slurm|ray)\]'"):
        make(tmp_path)


def test_slurm_runs_every_run_and_names_failures(small, plan_of, console, tmp_path):
    pytest.importorskip("submitit", reason="pip install 's2sam[slurm]'")
    plan = plan_of(small, seeds=[0])
    bad = plan.runs()[1]
    bad.config.folder.mkdir(parents=True)
    (bad.config.folder / "letter.txt").touch()
    runner = slurm_runner(tmp_path / "slurm", {"timeout_min": 5}, cluster="debug")
    runs, failed = ensure(plan.runs(), console=console, jobs=2, runner=runner)
    assert [p.column for p in runs] == ["SGD"]
    assert [(p.column, reason.partition(":")[0]) for p, reason in failed.items()] == [("S2-SAM", "ValueError")]


def test_a_preempted_job_is_submitted_again(small, plan_of):
    submitit = pytest.importorskip("submitit", reason="pip install 's2sam[slurm]'")
    planned = plan_of(small).runs()[0]
    again = Task().checkpoint(planned.name, planned.config)
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert (type(again.function), again.args) == (Task, (planned.name, planned.config))


def test_ray_runs_every_run(small, plan_of, console, monkeypatch):
    pytest.importorskip("ray", reason="pip install 's2sam[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    runs, failed = ensure(plan_of(small, seeds=[0]).runs(), console=console, jobs=2, runner=ray_runner())
    assert (len(runs), failed) == (2, {})
