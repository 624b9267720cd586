"""The pool: outcomes as they come, and Ctrl-C, which saves what is under way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref

import pytest
import yaml

from s2sam.suite import pool
from s2sam.suite.pool import cores, finished, gpu_is_lost, reusable, run_here, train_one
from s2sam.train import fast, loop
from s2sam.train.config import DataConfig, SamConfig, TrainConfig
from s2sam.train.signals import Preempted

SCRIPT = "import sys; from s2sam.cli.main import main; sys.exit(main(sys.argv[1:]))"


def tiny(out, **changes):
    return TrainConfig(
        out=str(out), epochs=1, model_options={"width": 0.25}, sam=SamConfig(stats_every=0),
        data_options=DataConfig(train_size=100), **changes,
    )  # fmt: skip


def test_a_failure_is_text_and_does_not_stop_the_others(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").touch()
    outcomes = list(run_here({name: tiny(tmp_path / name) for name in "abc"}, 1))
    assert [name for name, _, _ in outcomes] == ["a", "b", "c"]
    assert [final is None for _, final, _ in outcomes] == [False, True, False]
    assert outcomes[1][2].startswith("ValueError: ")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError("no 2.93 GiB"), "MemoryError: no 2.93 GiB"),
        (MemoryError(), "MemoryError"),
        (KeyError("lr"), "KeyError: 'lr'"),
        (ArithmeticError("odd"), "ArithmeticError: odd"),
    ],
)
def test_whatever_goes_wrong_in_one_run_is_its_own_failure(tmp_path, monkeypatch, error, reason):
    train = loop.run

    def run(config, **options):
        if config.seed == 1:
            raise error
        return train(config, **options)

    monkeypatch.setattr(loop, "run", run)
    outcomes = list(run_here({str(seed): tiny(tmp_path / str(seed), seed=seed) for seed in (1, 2)}, 1))
    assert outcomes[0] == ("1", None, reason)
    assert (outcomes[1][0], outcomes[1][1]["test_images"]) == ("2", 359)


@pytest.mark.parametrize("order", [Preempted(signal.SIGTERM), KeyboardInterrupt()])
def test_an_order_to_end_is_no_failure(tmp_path, monkeypatch, order):
    def run(config, **options):
        raise order

    monkeypatch.setattr(loop, "run", run)
    with pytest.raises(type(order)):
        train_one("a", tiny(tmp_path / "a"))


@pytest.mark.parametrize("compiled", ["none", "default"])
def test_the_networks_of_finished_runs_are_let_go(tmp_path, monkeypatch, compiled):
    networks = []

    def build(*args, **options):
        state = state_of(*args, **options)
        networks.append(weakref.ref(state.model))
        return state

    state_of = loop.build
    monkeypatch.setattr(loop, "build", build)
    monkeypatch.setattr(fast, "BACKEND", "eager")  # of torch.compile; needs no compiler
    assert train_one("a", tiny(tmp_path / "a", compile=compiled, method="dense"))[2] == ""
    assert [network() for network in networks] == [None]


@pytest.fixture
def lost_gpu(monkeypatch):
    """A process in which every call on the GPU fails."""

    def synchronize():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", synchronize)


def test_a_gpu_that_answers_or_was_never_asked_is_not_lost(monkeypatch):
    assert not gpu_is_lost()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    assert not gpu_is_lost()


def test_a_worker_that_lost_its_gpu_hands_over_its_failure_and_takes_no_further_run(tmp_path, monkeypatch, lost_gpu):
    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    assert gpu_is_lost()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "letter.txt").touch()
    assert train_one("a", tiny(tmp_path / "a"))[2].startswith("ValueError: ")
    with pytest.raises(SystemExit) as ended:
        pool._train_in_worker("b", tiny(tmp_path / "b"), False)
    assert ended.value.code == 1
    assert not (tmp_path / "b").exists()


def test_runs_after_one_that_lost_the_gpu_go_on_in_a_fresh_process(tmp_path, monkeypatch, lost_gpu):
    failure = ("RuntimeError: CUDA error: device-side assert triggered",)
    monkeypatch.setattr(pool, "train_one", lambda name, config, fresh: (name, None, *failure))
    monkeypatch.setattr(pool, "_train_in_worker", exec)  # the name of a run is a program, its result None
    path = tmp_path / "process"
    program = f"import os, pathlib; pathlib.Path({str(path)!r}).write_text(str(os.getpid()))"
    assert list(run_here({"a": {}, program: {}}, 1, fresh={})) == [("a", None, *failure), None]
    assert int(path.read_text()) != os.getpid()


def test_finished_means_the_same_settings_and_reusable_the_same_versions(tmp_path):
    config = tiny(tmp_path / "a")
    assert finished(config) is None
    train_one("a", config)
    assert finished(config).final["test_images"] == 359
    assert reusable(config)
    assert finished(tiny(tmp_path / "a", lr=0.2)) is None
    env = json.loads((tmp_path / "a" / "env.json").read_text())
    env["versions"]["torch"] = "1.0"
    (tmp_path / "a" / "env.json").write_text(json.dumps(env))
    assert finished(config)
    assert not reusable(config)


def test_a_process_ended_from_outside_takes_only_its_own_run_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_train_in_worker", exec)  # the name of a run is a program, its result None
    always = "import os; os.kill(os.getpid(), 9)"
    once = f"import os, pathlib; p = pathlib.Path({str(tmp_path / 'once')!r}); p.exists() or (p.touch(), os._exit(1))"
    fine = [f"import pathlib; pathlib.Path({str(tmp_path / str(i))!r}).touch()" for i in range(6)]
    names = [once, fine[0], always, *fine[1:]]
    outcomes = list(run_here({name: {} for name in names}, 2, fresh={}))
    assert [outcome for outcome in outcomes if outcome] == [(always, None, pool.KILLED)]
    assert len(outcomes) == len(names)
    assert {path.name for path in tmp_path.iterdir()} == {"once", *map(str, range(6))}


def test_there_is_a_core():
    assert cores() >= 1


def begin(tmp_path, small, jobs):
    """A long table in a process group of its own, after it has begun `jobs` runs; none has finished an epoch."""
    small["base"] |= {"epochs": 4000, "batch_size": 2, "data_options": {}}  # 647 steps an epoch
    small["seeds"] = [0]
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(small))
    command = [sys.executable, "-c", SCRIPT, "table", "t.yaml", "--out", "out", "--jobs", str(jobs), "--device", "cpu"]
    process = subprocess.Popen(
        command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("out/runs/*/config.yaml"))) < jobs and time.monotonic() < end:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


def saved_steps(tmp_path):
    import torch

    paths = sorted(tmp_path.glob("out/runs/*/checkpoints/last.pt"))
    return [torch.load(path, weights_only=True)["step"] for path in paths]


def gone(group):
    """True if no process of the group is left within a few seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_saves_what_is_under_way(tmp_path, small, jobs):
    process = begin(tmp_path, small, jobs)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors.strip()) == (130, "s2sam: interrupted")
    assert len(saved_steps(tmp_path)) == jobs
    assert min(saved_steps(tmp_path)) > 0
    assert not list(tmp_path.glob("out/runs/*/DONE"))
    assert gone(process.pid)
