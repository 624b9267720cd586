"""Runs with sharpness echo: as many steps as others on half the distinct batches, settings that do not go with it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from s2sam.hooks import step_hooks
from s2sam.sam.single_step import ECHO_SCALE, S2SAM
from s2sam.train import config as config_module
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, ScheduleConfig, SparseConfig, TrainConfig
from s2sam.train.loop import run
from s2sam.train.state import build
from s2sam.train.step import train_step

TINY = TrainConfig(
    epochs=2, batch_size=32, method="static", sharpness="echo", rho=0.05, checkpoint_every=0,
    data_options=DataConfig(train_size=128), model_options={"width": 0.125}, sam=SamConfig(stats_every=1),
)  # fmt: skip


def steps(config, n=None):
    """(images, displacement if it was measured) of each step, from the trainer's own parts."""
    state = build(config)
    found = []
    for _ in range(config.epochs):
        for batch in state.batches:
            x, y = state.mix(*batch)
            train_step(state, x, y)
            measured = isinstance(state.sharpness, S2SAM) and state.sharpness.measures(state.step)
            found.append((x, state.sharpness.stats["displacement"] if measured else 0.0))
            state.advance()
    return state, found


def test_every_batch_comes_twice_and_the_second_visit_is_displaced():
    sam = SamConfig(stats_every=1, scale="norm")
    data = DataConfig(train_size=128, mixup=0.2, augment="crop")
    state, found = steps(dataclasses.replace(TINY, data_options=data, sam=sam))
    assert len(found) == state.n_steps == 2 * len(state.batches)
    for (x, _), (again, displacement) in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(x, again)
        assert displacement == pytest.approx(0.05, rel=1e-3)
    assert not torch.equal(found[0][0], found[2][0])


def test_the_scale_of_the_trainer_is_that_of_the_preset():
    assert config_module.ECHO_SCALE == ECHO_SCALE == TINY.sam.scale
    assert TrainConfig().sam.scale == TrainConfig(sharpness="sam").sam.scale == "norm"
    assert TrainConfig(sharpness="echo", sam=SamConfig(scale="rms")).sam.scale == "rms"


def test_rigl_changes_its_masks_in_first_visits():
    config = dataclasses.replace(TINY, method="rigl", epochs=8, sparse=SparseConfig(options={"delta_t": 4}))
    state = build(config)
    assert step_hooks(state.optimizer).visits == 2
    found = []
    for _ in range(config.epochs):
        for batch in state.batches:
            before = state.sparsifier.updates
            train_step(state, *state.mix(*batch))
            state.advance()
            if state.sparsifier.updates > before:
                found.append(state.step)
    assert len(found) >= 4 and all(step % 2 == 1 for step in found)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": OptimConfig(accumulate=4)},
        {"optim": OptimConfig(ema=0.9)},
        {"optim": OptimConfig(fused=True)},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"method": "lt", "sparsity": 0.5, "epochs": 1, "batch_size": 50, "sparse": SparseConfig(options={"rounds": 2})},
        {"method": "dense", "schedule": ScheduleConfig(name="onecycle")},
    ],
    ids=["accumulate", "ema", "fused", "bf16", "fp16", "lt", "dense"],
)
def test_it_goes_with_what_the_trainer_has(tmp_path, changes):
    final = run(dataclasses.replace(TINY, out=str(tmp_path / "run"), **changes))
    assert (tmp_path / "run" / "DONE").exists() and 0 < final["test_top1"] <= 1


def test_trainings_of_an_odd_number_of_steps_begin_with_a_first_visit():
    """LT trains several times: 3 steps each here, on batches 1 1 2, then anew."""
    config = dataclasses.replace(
        TINY, method="lt", sparsity=0.5, epochs=1, batch_size=50, sparse=SparseConfig(options={"rounds": 1})
    )
    state = build(config)
    if len(state.batches) % 2 == 0:
        pytest.fail(f"this test wants an odd number of steps, got {len(state.batches)}")
    radii, images = [], []
    while True:
        for batch in state.batches:
            radii.append(state.sharpness._slots[0].factor(state.sharpness.step))
            train_step(state, *state.mix(*batch))
            images.append(batch[0])
            state.advance()
        state.epoch = 1
        if not state.next_level():
            break
    n = len(state.batches)
    assert n % 2 == 1 and len(radii) >= 2 * n
    assert [r > 0 for r in radii] == [bool(i % n % 2) for i in range(len(radii))]
    assert torch.equal(images[0], images[n]) and torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("sam", "words"),
    [
        ({"direction": "momentum"}, "sam.direction momentum is for sharpness s2sam; with echo leave it at gradient"),
        ({"sign": -1}, "sam.sign -1 is for sharpness s2sam"),
        ({"rho_schedule": "late"}, "sam.rho_schedule late is for sharpness s2sam"),
        ({"clean_growth": True}, "sam.clean_growth True is for sharpness s2sam"),
    ],
)
def test_settings_that_do_not_go_with_it_are_named(sam, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(sharpness="echo", sam=SamConfig(**sam))


def test_a_radius_that_ends_the_training_is_named(tmp_path):
    config = dataclasses.replace(
        TINY, rho=1e30, epochs=3, model_options={"width": 0.125, "norm": False}, out=str(tmp_path)
    )
    with pytest.raises(RuntimeError, match=r"training diverged: .* lower --rho \(now 1e\+30, sharpness echo\)"):
        run(config)


def test_a_loader_of_one_batch(tmp_path):
    config = dataclasses.replace(TINY, batch_size=512, epochs=4, out=str(tmp_path))
    state, found = steps(config)
    assert len(state.batches) == 1 and [r > 0 for _, r in found] == [False, True] * 2


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 3, 5, 7]), (2, [1, 3, 5, 7]), (3, [1, 5]), (0, [])])
def test_step_records_are_of_second_visits(tmp_path, every, expected):
    """The first ones are not displaced: a run would look as if nothing were."""
    run(dataclasses.replace(TINY, sam=SamConfig(stats_every=every), out=str(tmp_path)))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in found] == expected
    assert all(row["displacement"] > 0 for row in found)
