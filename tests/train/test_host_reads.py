"""Who waits for the device: counted on a CPU as reads of tensors by the host, and as transfers to another device."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s2sam.data.augment import Augment
from s2sam.data.loader import Batches
from s2sam.tensors import upload
from s2sam.track.base import Loggers
from s2sam.train import loop
from s2sam.train.averages import Ema
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, SparseConfig, TrainConfig
from s2sam.train.divergence import check_skips
from s2sam.train.folder import RunFolder
from s2sam.train.loop import Trainer, run
from s2sam.train.state import build

DELTA_T = 4
TINY = TrainConfig(
    epochs=2,
    batch_size=32,
    data_options=DataConfig(train_size=320, val_fraction=0.0, cutout=2, label_smoothing=0.1),  # 10 steps an epoch
    model_options={"width": 0.125},
    sam=SamConfig(stats_every=0),
    sparse=SparseConfig(options={"delta_t": DELTA_T}),
)
READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount")


class Counter(TorchDispatchMode):
    """Counts operations whose result the host has to know, and copies from one device to another."""

    def __init__(self):
        super().__init__()
        self.reads, self.transfers = 0, 0

    def counted(self, method):
        """The method of a tensor, counted as a read."""

        def call(tensor, *args, **options):
            self.reads += 1
            return method(tensor, *args, **options)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        self.reads += name in READS
        result = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            self.transfers += source.device != result.device
        return result


def reads_by_step(config, monkeypatch, folder):
    """How often the host reads in each step of an epoch, from one end of :meth:`Trainer.after_step` to the next."""
    counter, ends = Counter(), []
    for name in ("tolist", "numpy", "cpu"):  # on a CPU these are no operations
        monkeypatch.setattr(torch.Tensor, name, counter.counted(getattr(torch.Tensor, name)))
    trainer = Trainer(build(config), Loggers([]), RunFolder(folder))
    after_step = trainer.after_step

    def noted(*args):
        after_step(*args)
        ends.append(counter.reads)

    monkeypatch.setattr(trainer, "after_step", noted)
    with counter:
        trainer.epoch()
    assert trainer.state.step == len(ends) == 10
    assert counter.reads > ends[-1]  # the end of an epoch is read, and the counter sees it
    return [b - a for a, b in itertools.pairwise(ends)]  # steps 2 to 10


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("sharpness", ["none", "s2sam"])
@pytest.mark.parametrize("method", ["dense", "rigl", "gmp"])
def test_a_step_reads_what_the_contract_says(monkeypatch, tmp_path, method, sharpness, fused):
    config = dataclasses.replace(TINY, method=method, sharpness=sharpness, optim=OptimConfig(fused=fused))
    reads = reads_by_step(config, monkeypatch, tmp_path)
    finite = 1 if sharpness == "s2sam" and not fused else 0
    quiet = [n for step, n in enumerate(reads, start=2) if method == "dense" or step % DELTA_T]
    if sharpness == "s2sam" and fused:
        assert quiet.pop() == 1  # the end of the epoch: has any step moved the weights?
    assert quiet
    assert set(quiet) == {finite}, reads
    if method == "rigl":
        assert all(n > finite for step, n in enumerate(reads, start=2) if step % DELTA_T == 0)  # a change is logged


@pytest.mark.parametrize("fused", [False, True])
def test_two_gradients_are_looked_at_by_the_host(monkeypatch, tmp_path, fused):
    config = dataclasses.replace(TINY, method="static", sharpness="sam", optim=OptimConfig(fused=fused))
    assert set(reads_by_step(config, monkeypatch, tmp_path)) == {2}


def test_records_are_read_when_they_are_due(monkeypatch, tmp_path):
    config = dataclasses.replace(TINY, method="dense", sharpness="none", sam=SamConfig(stats_every=3))
    reads = reads_by_step(config, monkeypatch, tmp_path)
    assert [step for step, n in enumerate(reads, start=1) if n] == [3, 6, 9]  # counted from 0


@pytest.mark.parametrize(("kind", "size"), [("crop+flip", 4), ("crop", 0), ("none", 3)])
def test_one_transfer_a_batch_and_one_an_epoch(kind, size):
    x, y = torch.zeros(40, 3, 16, 16, dtype=torch.uint8), torch.zeros(40, dtype=torch.int64)
    mean = torch.full((3,), 0.5)
    augment = Augment(mean.to("meta"), mean.to("meta"), kind, cutout=size)
    batches = Batches(x.to("meta"), y.to("meta"), 8, torch.Generator().manual_seed(0), augment)
    counter = Counter()
    with counter:
        assert [len(x) for x, _ in batches] == [8] * 5
    assert counter.transfers == 6
    with counter:
        augment(x[:8].to("meta", copy=True))
    assert counter.transfers == 7  # that of the images alone: what only normalises draws nothing


def test_a_transfer_to_a_gpu_goes_through_pinned_memory(monkeypatch):
    calls = []
    pinned = torch.ones(2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: calls.append("pin") or pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: calls.append((t is pinned, a, k)) or t)
    upload(torch.zeros(2), torch.device("cuda"))
    assert calls == ["pin", (True, (torch.device("cuda"),), {"non_blocking": True})]


def test_the_average_is_that_of_torch_and_copies_nothing():
    state = build(dataclasses.replace(TINY, method="dense"))
    ours, theirs = Ema(state.model, 0.7), Ema(state.model, 0.7)
    for step in range(4):
        with torch.no_grad():
            for tensor in state.model.state_dict().values():
                tensor.add_(step + 1)
        ours.update(state.model)
        theirs.averaged.update_parameters(state.model)
    assert int(ours.averaged.n_averaged) == 4
    for name, value in theirs.averaged.state_dict().items():
        assert torch.equal(value, ours.averaged.state_dict()[name]), name
    counter = Counter()
    meta = Ema(state.model.to("meta"), 0.7)
    meta.update(state.model)
    with counter:
        meta.update(state.model)
    assert counter.transfers == 0


# The fused step


def weights(state):
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def steps(state, poison=()):
    """One epoch, with gradients of NaN in some steps."""
    hook = state.model.classifier.weight.register_hook(lambda g: g * math.nan if state.step in poison else g)
    for x, y in state.batches:
        loop.train_step(state, x, y)
        if state.skipped is not None:
            state.skipped.count()
            check_skips(state)
        state.advance()
    hook.remove()
    return state


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize(("method", "sharpness"), [("dense", "none"), ("rigl", "s2sam"), ("static", "sam")])
def test_the_fused_step_is_the_same_step(name, method, sharpness):
    optim = OptimConfig(name=name, clip_norm=1.0)
    config = dataclasses.replace(
        TINY, method=method, sharpness=sharpness, optim=optim, lr=0.1 if name == "sgd" else 1e-3
    )
    states = [
        steps(build(dataclasses.replace(config, optim=dataclasses.replace(optim, fused=f)))) for f in (False, True)
    ]
    assert states[1].optimizer.param_groups[0]["fused"]
    torch.testing.assert_close(weights(states[0]), weights(states[1]), atol=1e-5, rtol=1e-4)
    if states[0].sparsifier is not None:
        states[1].sparsifier.verify()
        assert all(torch.equal(m, states[1].sparsifier.masks[n]) for n, m in states[0].sparsifier.masks.items())


def test_skipped_fused_steps_are_counted_on_the_device():
    config = dataclasses.replace(TINY, method="static", optim=OptimConfig(fused=True))
    state = steps(build(config), poison=(3, 4, 9))
    plain = steps(build(dataclasses.replace(config, optim=OptimConfig())), poison=(3, 4, 9))
    assert isinstance(state.skipped.total, torch.Tensor)
    assert (int(state.skipped.total), int(state.skipped.row)) == (plain.skipped.total, plain.skipped.row) == (3, 1)
    torch.testing.assert_close(weights(state), weights(plain), atol=1e-5, rtol=1e-4)
    saved = state.state_dict()
    assert saved["skipped"] == [3, 1]
    assert [type(n) for n in saved["skipped"]] == [int, int]
    other = build(config)
    other.load_state_dict(saved)
    steps(other, poison=(10,))
    assert (int(other.skipped.total), int(other.skipped.row)) == (4, 0)


def test_an_epoch_of_skipped_fused_steps_is_the_end_of_a_run(tmp_path, monkeypatch):
    step, broken = loop.train_step, []

    def poisoned(state, x, y):
        if not broken:
            broken.append(state.model.classifier.weight.register_hook(lambda g: g * math.nan if state.step >= 5 else g))
        return step(state, x, y)

    monkeypatch.setattr(loop, "train_step", poisoned)
    config = dataclasses.replace(TINY, method="static", optim=OptimConfig(fused=True), out=str(tmp_path / "run"))
    with pytest.raises(RuntimeError, match=r"no gradient was finite in the last 10 steps, none of .* at step 19 "):
        run(config)
    assert not (tmp_path / "run" / "DONE").exists()


def test_fp16_with_a_fused_step():
    config = dataclasses.replace(TINY, method="static", precision="fp16", optim=OptimConfig(fused=True))
    state, plain = build(config), build(dataclasses.replace(config, optim=OptimConfig()))
    for one in (state, plain):
        one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # some overflows first
        steps(one)
    assert int(state.skipped.total) == plain.skipped.total > 2
    assert state.scaler.get_scale() == plain.scaler.get_scale()
    assert not state.sharpness.is_displaced
    torch.testing.assert_close(weights(state), weights(plain), atol=1e-4, rtol=1e-3)
