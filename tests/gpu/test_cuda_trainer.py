"""What only a GPU can show of the trainer: no step waits for the device, and CUDA graphs train the same network."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from s2sam.track.base import Loggers
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, SparseConfig, TrainConfig
from s2sam.train.folder import RunFolder
from s2sam.train.loop import Trainer, run
from s2sam.train.state import build
from s2sam.train.step import train_step

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(600),
]

SMALL = TrainConfig(
    model="resnet20",
    model_options={"width": 0.5, "shortcut": "A"},
    epochs=3,
    batch_size=32,
    device=DEVICE,
    data_options=DataConfig(train_size=320, val_fraction=0.0, cutout=2, mixup=0.0, label_smoothing=0.1),
    sam=SamConfig(stats_every=0),
    sparse=SparseConfig(options={"delta_t": 1000}),
    optim=OptimConfig(fused=True, ema=0.9),
)
MODES = ["none", "default", "reduce-overhead"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("method", "sharpness"), [("dense", "none"), ("rigl", "s2sam")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_does_not_wait_for_the_device(tmp_path, mode, method, sharpness, precision):
    config = dataclasses.replace(
        SMALL, method=method, sharpness=sharpness, compile=mode, precision=precision, channels_last=True
    )
    state = build(config)
    trainer = Trainer(state, Loggers([]), RunFolder(tmp_path))
    trainer.epoch()  # graphs, first gradients, memory
    state.model.train()
    try:
        for index, (x, y) in enumerate(state.batches):
            torch.cuda.set_sync_debug_mode("default" if index in (0, len(state.batches) - 1) else "error")
            with trainer.timer.step():
                logits, loss = train_step(state, *state.mix(x, y))
            trainer.after_step(logits, y, loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 20


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("sharpness", ["none", "s2sam", "sam"])
def test_a_compiled_network_takes_the_same_steps(mode, sharpness):
    config = dataclasses.replace(SMALL, method="rigl", sharpness=sharpness, sparse=SparseConfig(options={"delta_t": 4}))
    losses = []
    for compiled in (mode, "none"):
        state = build(dataclasses.replace(config, compile=compiled))
        state.model.train()
        losses.append([])
        for x, y in list(state.batches)[:8]:
            losses[-1].append(float(train_step(state, x, y)[1]))
            state.advance()
        state.sparsifier.verify()
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0][0] != losses[0][-1]


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_run(tmp_path, mode):
    config = dataclasses.replace(
        SMALL, method="rigl", compile=mode, sparse=SparseConfig(options={"delta_t": 4}), out=str(tmp_path / "run"),
        data_options=DataConfig(train_size=300, val_fraction=0.1), sam=SamConfig(stats_every=5),
    )  # fmt: skip
    final = run(config)
    assert (tmp_path / "run" / "DONE").exists()
    assert final["sparsity"] == pytest.approx(0.9, abs=0.01)
    assert final["test_top1"] > 0.15


def test_the_average_of_the_weights_follows():
    state = build(SMALL)
    state.model.train()
    for x, y in state.batches:
        train_step(state, x, y)
        state.advance()
    mean, now = next(state.ema.module.parameters()), next(state.model.parameters())
    assert mean.device.type == DEVICE
    assert 0 < float((mean - now).detach().norm()) < float(now.detach().norm())
