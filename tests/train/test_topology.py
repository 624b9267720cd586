"""Records of the masks: every change while there are few, about a thousand a run where there are many."""

from __future__ import annotations

import dataclasses
import json

import pytest
from safetensors.torch import load_file

from s2sam.train import topology
from s2sam.train.config import DataConfig, OptimConfig, SparseConfig, TrainConfig
from s2sam.train.loop import run
from s2sam.train.topology import TopologyLog

TINY = TrainConfig(
    method="top-kast",
    sharpness="none",
    epochs=2,
    batch_size=32,
    data_options=DataConfig(train_size=320, val_fraction=0.0),  # 10 steps an epoch
    model_options={"width": 0.125},
    sparse=SparseConfig(options={"delta_t": 1}),
)


class Moving:
    """Stands in for a sparsifier that drops 2 weights and grows 1 at each change."""

    def __init__(self):
        self.updates, self.last_update = 0, None

    def change(self):
        self.updates += 1
        self.last_update = type("Info", (), {"dropped": {"a": 2}, "grown": {"a": 1}})()

    def density(self):
        return {"a": 0.5}

    def survival(self):
        return 1.0

    def explored(self):
        return 0.5


def records(every, n_steps):
    """What is told of a run that changes its masks every `every` steps."""
    moving = Moving()
    log, found = TopologyLog(moving, n_steps), []
    for step in range(1, n_steps + 1):
        if step % every == 0:
            moving.change()
        assert log.changed() == (step % every == 0)
        assert not log.changed()
        found.append(log.record(step))
    return [r for r in found if r is not None]


def test_few_changes_are_all_told():
    found = records(100, 62_400)  # RigL on CIFAR: 160 epochs of 390 steps
    assert [r["step"] for r in found] == list(range(100, 62_401, 100))
    assert {(r["dropped"], r["grown"]) for r in found} == {(2, 1)}


@pytest.mark.parametrize(("every", "n_steps"), [(1, 62_400), (7, 62_400), (1, 999), (3, 5_000)])
def test_many_changes_are_summed_up_and_the_last_is_told(every, n_steps):
    found = records(every, n_steps)
    changes = n_steps // every
    assert min(changes, 500) <= len(found) <= 1101
    assert sum(r["dropped"] for r in found) == 2 * changes
    assert sum(r["grown"] for r in found) == changes
    assert found[-1]["step"] - n_steps // every * every < max(every, n_steps // 1000) + 1


def test_a_run_that_changes_in_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(topology, "RECORDS", 5)
    out = tmp_path / "run"
    final = run(dataclasses.replace(TINY, optim=OptimConfig(ema=0.5), out=str(out)))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = [r for r in lines if r["kind"] == "topology"]
    assert [r["step"] for r in told] == [0, 4, 8, 12, 16, 20]
    assert all(r["dropped"] == r["grown"] > 0 for r in told[1:])
    masks = load_file(out / "masks.safetensors")
    assert told[-1]["density"] == {name: int(m.sum()) / m.numel() for name, m in masks.items()}
    assert (final["survival"], final["explored"]) == (told[-1]["survival"], told[-1]["explored"])
    assert final["survival"] < 1
    assert final["explored"] > 1 - final["sparsity"]
    averaged = load_file(out / "ema.safetensors")
    assert all(not averaged[name][~mask].any() for name, mask in masks.items())


def test_the_average_follows_changes_that_are_not_told(tmp_path, monkeypatch):
    from s2sam.sparse.base import Sparsifier

    calls = []
    apply_to = Sparsifier.apply_to
    monkeypatch.setattr(topology, "RECORDS", 1)
    monkeypatch.setattr(Sparsifier, "apply_to", lambda self, model: calls.append(1) or apply_to(self, model))
    run(dataclasses.replace(TINY, optim=OptimConfig(ema=0.5), out=str(tmp_path / "run")))
    assert len(calls) >= 19  # every step but the last, which changes nothing


def test_dense_runs_have_neither(tmp_path):
    final = run(dataclasses.replace(TINY, method="dense", sparse=SparseConfig(), out=str(tmp_path / "run")))
    assert not {"survival", "explored"} & set(final)
