"""A run that is killed anywhere and resumed is, bit by bit, the run that was never killed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s2sam import registry
from s2sam.train import loop
from s2sam.train.checkpoint import load_checkpoint
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, ScheduleConfig, SparseConfig, TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
from forked import forked, killed, run, same, warm_up

METHODS = ["dense", *(row.name for row in registry.list_methods())]
EPOCHS, STEPS, PARTS = 2, 4, 2  # epochs, steps of an epoch, micro-batches of a step
TINY = TrainConfig(
    epochs=EPOCHS,
    batch_size=32,
    checkpoint_every=2,
    data_options=DataConfig(train_size=128, mixup=0.2, cutout=2),
    model_options={"width": 0.125},
    sam=SamConfig(stats_every=1),
    sparse=SparseConfig(options={"delta_t": 2, "rounds": 5, "rate": 0.7}),
    optim=OptimConfig(accumulate=PARTS, clip_norm=1.0, ema=0.5),
)
TIMES = {"seconds", "images_per_second", "step_seconds", "logs"}


@pytest.fixture(autouse=True, scope="module")
def _warm(tmp_path_factory):
    warm_up(dataclasses.replace(TINY, out=str(tmp_path_factory.mktemp("warm"))))


def records(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def final_state(folder):
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    state["record"] = {key: value for key, value in state["record"].items() if key not in TIMES}
    state["config"] = {key: value for key, value in state["config"].items() if key != "out"}
    return {key: value for key, value in state.items() if key not in TIMES}


def assert_same_run(a, b):
    assert (b / "DONE").exists()
    one, other = final_state(a), final_state(b)
    assert one.keys() == other.keys()
    assert [key for key in one if not same(one[key], other[key])] == []
    for name in ("model.safetensors", "masks.safetensors", "ema.safetensors"):
        assert (a / name).exists() == (b / name).exists()
        assert not (a / name).exists() or (a / name).read_bytes() == (b / name).read_bytes()
    assert records(a) == records(b)
    heads = [(f / "summary.csv").read_text().splitlines() for f in (a, b)]
    assert heads[0][0] == heads[1][0]
    assert [row.split(",")[0] for row in heads[1]] == ["epoch", *map(str, range(1, EPOCHS + 1))]


@pytest.mark.parametrize(
    ("method", "optimizer", "sharpness"),
    [
        *itertools.product(METHODS, ["sgd", "adamw"], ["none", "s2sam", "sam"]),
        *((method, ("sgd", "adamw")[i % 2], "echo") for i, method in enumerate(METHODS)),
    ],
)
def test_killed_and_resumed_is_the_unbroken_run(tmp_path, method, optimizer, sharpness):
    optim = dataclasses.replace(TINY.optim, name=optimizer)
    config = dataclasses.replace(
        TINY, method=method, sharpness=sharpness, optim=optim, lr=0.1 if optimizer == "sgd" else 1e-3,
        sparsity=0.75 if method in ("nm", "nm-rigl", "sr-ste") else TINY.sparsity,
    )  # fmt: skip
    whole, broken = (dataclasses.replace(config, out=str(tmp_path / name)) for name in ("whole", "broken"))
    assert forked(lambda: run(whole)) == 0
    forwards = records(tmp_path / "whole")[-1]["n_steps"] * PARTS * (2 if sharpness == "sam" else 1)
    draw = random.Random(f"{method} {optimizer} {sharpness}")
    for at in (draw.randint(2, forwards), draw.randint(1, PARTS * STEPS)):
        assert killed(broken, at) in (-signal.SIGKILL, 0)
    assert (tmp_path / "broken" / "DONE").exists() or forked(lambda: run(broken)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def resumed_at(folder):
    return [entry["step"] for entry in json.loads((folder / "env.json").read_text()).get("resumed", [])]


@pytest.mark.parametrize(
    ("precision", "schedule"), [("bf16", "onecycle"), ("fp16", "step")], ids=["bf16-onecycle", "fp16-step"]
)
def test_scaler_and_schedule_resume_exactly(tmp_path, precision, schedule):
    config = dataclasses.replace(
        TINY, precision=precision, schedule=ScheduleConfig(name=schedule), model="resnet20", epochs=1,
        model_options={"width": 0.25, "shortcut": "A"}, checkpoint_every=1, method="rigl", channels_last=True,
    )  # fmt: skip
    whole, broken = (dataclasses.replace(config, out=str(tmp_path / name)) for name in ("whole", "broken"))
    assert forked(lambda: run(whole)) == 0
    assert killed(broken, 6) == -signal.SIGKILL
    assert forked(lambda: run(broken)) == 0
    assert resumed_at(tmp_path / "broken") == [2]
    one, other = final_state(tmp_path / "whole"), final_state(tmp_path / "broken")
    assert [key for key in one if not same(one[key], other[key])] == []
    assert records(tmp_path / "whole") == records(tmp_path / "broken")
    assert (one["scaler"] != {}) is (precision == "fp16")


def test_a_fresh_process_goes_on_exactly(tmp_path):
    config = dataclasses.replace(TINY, method="rigl", sharpness="s2sam")
    whole, broken = (dataclasses.replace(config, out=str(tmp_path / name)) for name in ("whole", "broken"))
    assert forked(lambda: run(whole)) == 0
    assert killed(broken, 2 * PARTS * 3) == -signal.SIGKILL
    done = subprocess.run(
        [sys.executable, "-m", "s2sam", "train", "--config", str(tmp_path / "broken" / "config.yaml")],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "going on after step 4 of 8, from" in done.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_sigterm_saves_and_ends_and_sigusr1_saves_and_goes_on(tmp_path):
    config = dataclasses.replace(TINY, checkpoint_every=0, out=str(tmp_path / "run"))
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    assert forked(lambda: run(whole)) == 0
    assert killed(config, 5, signal.SIGTERM) == 143
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert load_checkpoint(last)["step"] == 3  # the step under way is finished first
    assert not (tmp_path / "run" / "DONE").exists()

    def usr1_then_kill():
        step, calls = loop.train_step, itertools.count(4)

        def signalling(*args):
            now = next(calls)
            if now == 5:
                os.kill(os.getpid(), signal.SIGUSR1)
            if now == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)

        loop.train_step = signalling
        run(config)

    assert forked(usr1_then_kill) == -signal.SIGKILL
    assert load_checkpoint(last)["step"] == 5
    assert forked(lambda: run(config)) == 0
    assert resumed_at(tmp_path / "run") == [3, 5]
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("moment", ["evaluate_split", "finish"])
def test_killed_while_nothing_is_trained(tmp_path, moment):
    config = dataclasses.replace(TINY, out=str(tmp_path / "run"))
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    assert forked(lambda: run(whole)) == 0

    def dying():
        setattr(loop, moment, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
        run(config)

    assert forked(dying) == -signal.SIGKILL
    assert forked(lambda: run(config)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert records(tmp_path / "run")[-1]["kind"] == "final"


@pytest.mark.parametrize("name", ["best.pt", "last.pt"])
def test_killed_while_a_checkpoint_is_written(tmp_path, name):
    config = dataclasses.replace(TINY, out=str(tmp_path / "run"))
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    assert forked(lambda: run(whole)) == 0

    def dying():
        replace = os.replace

        def half(source, target):
            if Path(target).name == name and loop_step[0] >= STEPS:
                Path(source).write_bytes(Path(source).read_bytes()[:100])
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        loop_step, save = [0], loop.Trainer.save

        def saving(trainer, target):
            loop_step[0] = trainer.state.step
            save(trainer, target)

        os.replace, loop.Trainer.save = half, saving
        run(config)

    assert forked(dying) == -signal.SIGKILL
    assert list((tmp_path / "run" / "checkpoints").glob(".*.tmp"))
    assert forked(lambda: run(config)) == 0
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_skipped_steps_and_dropout_are_remembered(tmp_path, monkeypatch):
    """A batch of NaN before the kill is still counted after it, and dropout draws on where it was."""
    step = loop.train_step

    def poisoned(state, x, y):
        torch.nn.functional.dropout(torch.ones(8))  # draws from the global state, as a network with dropout does
        return step(state, x * float("nan") if state.step == 1 else x, y)

    monkeypatch.setattr(loop, "train_step", poisoned)
    monkeypatch.setattr("s2sam.models.mlp.MLP.forward", lambda self, x: self.classifier(x.flatten(1)[:, :32]))
    config = dataclasses.replace(TINY, method="static", optim=dataclasses.replace(TINY.optim, ema=0.0))
    whole, broken = (dataclasses.replace(config, out=str(tmp_path / name)) for name in ("whole", "broken"))
    assert forked(lambda: run(whole)) == 0
    assert killed(broken, 2 * PARTS + 2) == -signal.SIGKILL
    torch.rand(5)
    assert forked(lambda: run(broken)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "broken")
    skipped = [row["skipped"] for row in records(tmp_path / "broken") if row["kind"] == "step"]
    assert skipped == [0.0] + [1.0] * (EPOCHS * STEPS - 1)


def test_another_thread_trains_without_signals(tmp_path):
    import threading

    config = dataclasses.replace(TINY, epochs=1, out=str(tmp_path / "run"))
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run, args=(config,))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "DONE").exists()
    assert signal.getsignal(signal.SIGTERM) is before
