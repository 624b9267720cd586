"""Side-by-side step times: every arm in every round, SAM the dearest, the order rotated."""

from __future__ import annotations

import pytest

from s2sam.report import measure
from s2sam.train.config import TrainConfig


@pytest.fixture
def configs():
    return {
        "plain": TrainConfig(method="dense", sharpness="none", device="cpu"),
        "s2sam": TrainConfig(method="rigl", sharpness="s2sam", device="cpu"),
        "sam": TrainConfig(method="static", sharpness="sam", device="cpu"),
    }


def test_every_arm_takes_its_steps_in_every_round(configs, monkeypatch):
    taken = []
    real = measure.train_step

    def counted(state, x, y):
        taken.append((state.config.method, state.config.sharpness, state.config.sam.stats_every))
        return real(state, x, y)

    monkeypatch.setattr(measure, "train_step", counted)
    rounds = measure.measure_rounds(configs, rounds=3, steps=2, warm_up=1)
    assert {name: len(seconds) for name, seconds in rounds.items()} == {"plain": 3, "s2sam": 3, "sam": 3}
    assert all(s > 0 for seconds in rounds.values() for s in seconds)
    methods = [method for method, _, _ in taken]
    assert methods[:3] == ["dense", "rigl", "static"]  # warm-up
    assert methods[3::2] == ["dense", "rigl", "static", "rigl", "static", "dense", "static", "dense", "rigl"]
    assert {every for _, _, every in taken} == {0}  # what S2SAM measures about itself is no part of its cost


def test_more_steps_than_an_epoch_go_on(configs):
    rounds = measure.measure_rounds({"plain": configs["plain"]}, rounds=1, steps=30, warm_up=0)
    assert len(rounds["plain"]) == 1
