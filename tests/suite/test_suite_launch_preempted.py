"""Under submitit a preempted run saves, is requeued and goes on: with submitit's own handlers and real signals."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch

from s2sam.suite import launch_slurm
from s2sam.suite.launch_slurm import Task, slurm_runner
from s2sam.suite.pool import train_one
from s2sam.train import loop
from s2sam.train.checkpoint import load_checkpoint

submitit = pytest.importorskip("submitit", reason="pip install 's2sam[slurm]'")
REQUEUED = 144  #: exit code by which submitit's local executor knows a requeued job


@pytest.fixture
def planned(small, plan_of):
    """A run of 2 epochs of 6 steps."""
    small["base"] |= {"epochs": 2, "batch_size": 32}
    return plan_of(small, seeds=[0]).runs()[1]


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """`begin(planned, minutes, timeouts)` -> a job of submitit in this process, with its handlers; and its paths."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}

    def make(planned, minutes=60, timeouts=3):
        for name, value in {"EXECUTOR": "local", "LOCAL_JOB_ID": "7", "FOLDER": str(tmp_path / "jobs")}.items():
            monkeypatch.setenv(f"SUBMITIT_{name}", value)
        environment = submitit.JobEnvironment()
        environment.paths.folder.mkdir(exist_ok=True)
        delayed = submitit.helpers.DelayedSubmission(Task(), planned.name, planned.config)
        delayed.set_timeout(minutes, timeouts)
        environment._handle_signals(environment.paths, delayed)
        return delayed, environment.paths

    yield make
    for number, handler in before.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)


@pytest.fixture
def sending(monkeypatch):
    """`sending({step: signals})`: this process gets those signals within that step; later calls replace it."""
    train_step = loop.train_step

    def plan(signals):
        def step(state, x, y):
            for number in signals.get(state.step, ()):
                os.kill(os.getpid(), number)
            return train_step(state, x, y)

        monkeypatch.setattr(loop, "train_step", step)

    return plan


def last(config):
    return load_checkpoint(config.folder / "checkpoints" / "last.pt")


@pytest.mark.parametrize(("name", "signals"), [
    ("USR2", ("SIGUSR2",)), ("USR2", ("SIGTERM", "SIGUSR2")), ("USR2", ("SIGUSR2", "SIGTERM", "SIGUSR1")),
    ("USR1", ("SIGUSR1",)), ("TERM", ("SIGTERM",)),
])  # fmt: skip
def test_a_preempted_job_saves_is_requeued_and_goes_on(name, signals, planned, begin, sending, tmp_path, monkeypatch):
    monkeypatch.setattr(submitit.JobEnvironment, "USR_SIG", name)
    delayed, paths = begin(planned)
    handler = signal.getsignal(getattr(signal, f"SIG{name}"))
    sending({3: [getattr(signal, number) for number in signals]})
    with pytest.raises(SystemExit) as ended:
        delayed.result()
    assert ended.value.code == REQUEUED
    assert signal.getsignal(getattr(signal, f"SIG{name}")) == handler
    assert last(planned.config)["step"] == 4  # the step under way was finished, and nothing after it

    sending({})
    name, final, reason = submitit.helpers.DelayedSubmission.load(paths.submitted_pickle).result()
    assert (name, reason) == (planned.name, "") and final is not None
    env = json.loads((planned.config.folder / "env.json").read_text())
    assert [entry["step"] for entry in env["resumed"]] == [4]
    whole = dataclasses.replace(planned.config, out=str(tmp_path / "whole"))
    train_one("whole", whole)
    trained = last(planned.config)["model"]
    assert all(torch.equal(value, trained[key]) for key, value in last(whole)["model"].items())


def test_sigterm_alone_saves_and_the_run_goes_on(planned, begin, sending, monkeypatch):
    """It is also what `scancel` sends: who cancels a job does not want it back."""
    delayed, paths = begin(planned)
    sending({3: [signal.SIGTERM]})
    signalled, saved = loop.train_step, {}

    def step(state, x, y):
        if state.step in (3, 4):
            path = planned.config.folder / "checkpoints" / "last.pt"
            saved[state.step] = load_checkpoint(path)["step"] if path.exists() else 0
        return signalled(state, x, y)

    monkeypatch.setattr(loop, "train_step", step)
    name, final, reason = delayed.result()
    assert (name, reason) == (planned.name, "") and final is not None
    assert saved == {3: 0, 4: 4}
    assert not paths.submitted_pickle.exists()  # nothing was submitted again
    assert "resumed" not in json.loads((planned.config.folder / "env.json").read_text())


def test_a_run_that_times_out_too_often_is_saved_and_says_so(planned, begin, sending):
    delayed, _ = begin(planned, minutes=0, timeouts=0)
    sending({3: [signal.SIGUSR2]})
    name, final, reason = delayed.result()
    assert (name, final) == (planned.name, None)
    assert reason == "UncompletedJobError: Job not requeued because: timed-out too many times."
    assert last(planned.config)["step"] == 4


def test_a_process_of_submitit_is_requeued(tmp_path, monkeypatch):
    log = tmp_path / "log"

    class Counting(Task):  # in place of a run, which imports for seconds; defined here it travels to the job by value
        def __call__(self, name, config):
            import os
            import signal

            from s2sam.train.signals import Signals

            lines = log.read_text().splitlines() if log.exists() else []
            sent = {} if lines else {2: [signal.SIGTERM], 4: [signal.SIGTERM, signal.SIGUSR2]}
            with Signals().listening() as signals, log.open("a", buffering=1) as file:
                for step in range(len(lines), 6):
                    for number in sent.get(step, ()):
                        os.kill(os.getpid(), number)
                    file.write(f"{os.getpid()} {step} {signals.pending}\n")
                    signals.obey()
            return name, {"steps": 6}, ""

    monkeypatch.setattr(launch_slurm, "Task", Counting)
    outcomes = list(slurm_runner(tmp_path / "jobs", cluster="local")({"a": None}, 1))
    assert outcomes == [("a", {"steps": 6}, "")]
    process, step, pending = zip(*(line.split() for line in log.read_text().splitlines()), strict=True)
    assert step == ("0", "1", "2", "3", "4", "5")
    assert [int(number) for number in pending] == [0, 0, signal.SIGTERM, 0, signal.SIGUSR2, 0]
    assert len({*process[:5]}) == 1 and process[5] != process[4]
