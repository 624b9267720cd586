"""Steps that a GradScaler or S2SAM skips: a run still ends at the sparsity it was given, killed and resumed or not."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from s2sam.sparse.base import Sparsifier
from s2sam.train import loop
from s2sam.train import step as step_module
from s2sam.train.checkpoint import load_checkpoint
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, SparseConfig, TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
from forked import forked, run, same

STEPS = 8
GMP = {"t_start": 0.0, "t_end": 1.0, "delta_t": 2}
MEST = {"variant": "em_s", "phases": [0.3, 1.0], "delta_t": 2}
TINY = TrainConfig(
    epochs=2, batch_size=32, data_options=DataConfig(train_size=128), model_options={"width": 0.25},
    method="gmp", sharpness="none", sparse=SparseConfig(options=GMP), optim=OptimConfig(ema=0.5),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(loop, "environment", lambda device: {})


def poison(monkeypatch, steps, die_at=None):
    """Gradients with an infinity in these steps, and a SIGKILL in another."""
    gradients = step_module.gradients

    def poisoned(state, x, y):
        if state.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        found = gradients(state, x, y)
        if state.step in steps:
            next(state.model.parameters()).grad.view(-1)[0] = torch.inf
        return found

    monkeypatch.setattr(step_module, "gradients", poisoned)


def topology(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["dropped"]) for row in rows if row["kind"] == "topology"]


def active(folder):
    masks = load_file(folder / "masks.safetensors")
    return sum(int(mask.sum()) for mask in masks.values()), sum(mask.numel() for mask in masks.values())


@pytest.mark.parametrize(("precision", "sharpness"), [("fp16", "none"), ("fp32", "s2sam"), ("fp16", "s2sam")])
@pytest.mark.parametrize(("method", "options"), [("gmp", GMP), ("mest", MEST)], ids=["gmp", "mest"])
@pytest.mark.parametrize("steps", [{7}, {5, 6, 7}, {0, 1, 2}], ids=["last", "end", "start"])
def test_the_target_is_met_whatever_is_skipped(tmp_path, monkeypatch, precision, sharpness, method, options, steps):
    config = dataclasses.replace(
        TINY, precision=precision, sharpness=sharpness, method=method, sparse=SparseConfig(options=options),
        out=str(tmp_path / "run"),
    )  # fmt: skip
    poison(monkeypatch, steps)
    final = run(config)
    folder = tmp_path / "run"
    left, total = active(folder)
    assert left == round((1 - config.sparsity) * total)
    assert final["sparsity"] == pytest.approx(config.sparsity, abs=1 / total)
    for name in ("model", "ema"):
        weights = load_file(folder / f"{name}.safetensors")
        for key, mask in load_file(folder / "masks.safetensors").items():
            assert weights[key][~mask].abs().sum() == 0
            assert weights[key][mask].abs().sum() > 0
    step, dropped = topology(folder)[-1]
    assert step == STEPS
    assert dropped > 0


def test_a_run_that_misses_its_target_is_no_finished_run(tmp_path, monkeypatch):
    poison(monkeypatch, {7})
    monkeypatch.setattr(Sparsifier, "catch_up", lambda self: False)
    with pytest.raises(RuntimeError, match=r"ends at sparsity 0\.\d+ and method 'gmp' means 0\.9000") as error:
        run(dataclasses.replace(TINY, sharpness="s2sam", out=str(tmp_path / "run")))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "DONE").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("die_at", [4, 7])
def test_killed_between_skipped_steps_it_is_still_the_unbroken_run(tmp_path, monkeypatch, die_at):
    whole, broken = (
        dataclasses.replace(TINY, precision="fp16", checkpoint_every=1, out=str(tmp_path / name))
        for name in ("whole", "broken")
    )
    poison(monkeypatch, {1, 2, 3, 6, 7})
    run(whole)
    with monkeypatch.context() as patch:
        poison(patch, {1, 2, 3, 6, 7}, die_at)
        assert forked(lambda: run(broken)) == -signal.SIGKILL
    run(broken)
    a, b = (load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "broken"))
    assert a["sparsifier"]["steps"] == [STEPS]
    for key in ("model", "sparsifier", "optimizer", "scaler", "scheduler", "ema", "skipped", "rng"):
        assert same(a[key], b[key]), key
    assert topology(tmp_path / "whole") == topology(tmp_path / "broken")
    assert active(tmp_path / "whole") == active(tmp_path / "broken")


@pytest.mark.parametrize("steps", [{7}, {0, 3, 4}])
def test_a_schedule_of_rho_keeps_to_the_time_of_the_run(tmp_path, monkeypatch, steps):
    sam = SamConfig(rho_schedule="rising", stats_every=1)
    config = dataclasses.replace(TINY, precision="fp16", sharpness="s2sam", sam=sam, out=str(tmp_path / "run"))
    poison(monkeypatch, steps)
    run(config)
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert saved["optimizer"]["param_groups"][0]["s2sam_step"] == STEPS
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {row["step"]: row["displacement"] for row in rows if row["kind"] == "step" and "displacement" in row}
    taken = [step for step in range(2 if 0 in steps else 1, STEPS) if step not in steps]
    assert [found[step] for step in taken] == pytest.approx([config.rho * step / STEPS for step in taken], rel=1e-3)
