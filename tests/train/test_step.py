"""One step: micro-batches, precision, clipping, averages, and what a skipped step leaves alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from s2sam.models import create_model
from s2sam.train import precision
from s2sam.train.averages import BN_BATCHES, Ema, recalibrated
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, SparseConfig, TrainConfig
from s2sam.train.loop import run
from s2sam.train.precision import check_precision, to_channels_last
from s2sam.train.state import build
from s2sam.train.step import micro_batches, train_step

TINY = TrainConfig(
    epochs=2,
    batch_size=32,
    data_options=DataConfig(train_size=128),
    model_options={"width": 0.125},
    sam=SamConfig(stats_every=1),
    sparse=SparseConfig(options={"delta_t": 3}),
)
PLAIN = dataclasses.replace(TINY, method="dense", sharpness="none")


def without_batchnorm(state):
    """BatchNorm sees the micro-batch; without it, accumulation is exact."""
    for module in state.model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.forward = lambda x: x
    return state


def change(config, **changes):
    for key, value in changes.items():
        group = getattr(config, key)
        config = dataclasses.replace(config, **{key: dataclasses.replace(group, **value)})
    return config


def steps(state, n):
    batches = itertools.chain.from_iterable(itertools.repeat(state.batches))
    return [train_step(state, x, y) for x, y in itertools.islice(batches, n)]


def weights(state):
    return [p.detach().clone() for p in state.model.parameters()]


@pytest.mark.parametrize("n", range(2, 70))
def test_micro_batches_are_of_even_size_and_never_single(n):
    x = torch.arange(n)
    parts = [x_part for x_part, y_part in micro_batches(x, x, 64, 4) if torch.equal(x_part, y_part)]
    assert torch.equal(torch.cat(parts), x)
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 2
    assert max(sizes) <= 16 or n < 4


@pytest.mark.parametrize("sharpness", ["none", "s2sam", "sam"])
@pytest.mark.parametrize("method", ["dense", "rigl"])
def test_micro_batches_make_the_step_of_the_whole_batch(method, sharpness):
    config = dataclasses.replace(TINY, method=method, sharpness=sharpness, lr=0.01)
    one, four = (without_batchnorm(build(change(config, optim={"accumulate": n}))) for n in (1, 4))
    forwards = [0, 0]
    for index, state in enumerate((one, four)):
        state.model.register_forward_hook(lambda *_, i=index: forwards.__setitem__(i, forwards[i] + 1))
    for (logits, loss), (other, mean) in zip(steps(one, 5), steps(four, 5), strict=True):
        assert torch.allclose(logits, other, atol=1e-5)
        assert float(loss) == pytest.approx(float(mean), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(one), weights(four), strict=True))
    assert forwards == [5 * n * (2 if sharpness == "sam" else 1) for n in (1, 4)]


def test_the_displacement_is_the_same_for_all_micro_batches():
    state = build(change(TINY, optim={"accumulate": 4}))
    steps(state, 1)
    seen = []
    weight = state.model.classifier.weight
    state.model.classifier.register_forward_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    clean = weight.detach().clone()
    steps(state, 1)
    assert len(seen) == 4
    assert all(torch.equal(w, seen[0]) for w in seen)
    assert not torch.equal(seen[0], clean)


def test_label_smoothing_and_soft_labels():
    state = build(change(PLAIN, data_options={"label_smoothing": 0.2}))
    x, y = next(iter(state.batches))
    hot = F.one_hot(y, 10) * 0.8 + 0.02
    other = build(PLAIN)
    (logits, loss), (same, soft) = train_step(state, x, y), train_step(other, x, hot)
    assert torch.equal(logits, same)
    assert float(loss) == pytest.approx(float(soft), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(state), weights(other), strict=True))


def test_mixup_and_cutout_reach_the_network():
    config = change(PLAIN, data_options={"mixup": 0.4, "cutout": 3, "augment": "none"})
    state, plain = build(config), build(change(config, data_options={"mixup": 0.0, "cutout": 0}))
    x, y = state.mix(*next(iter(state.batches)))
    raw, labels = plain.mix(*next(iter(plain.batches)))
    assert (y.shape, labels.shape) == ((32, 10), (32,))
    assert torch.allclose(y.sum(1), torch.ones(32))
    assert int(((y > 0).sum(1) == 2).sum()) > 10  # most are mixed with another class
    assert int((x == 0).sum()) > int((raw == 0).sum())
    _, loss = train_step(state, x, y)
    assert math.isfinite(float(loss))
    assert plain.mix(raw, labels) == (raw, labels)


def norm_of_step(state, x, y):
    """The norm of (w_t - w_{t+1}) / lr over all weights, with plain SGD that of the gradient used."""
    before = weights(state)
    train_step(state, x, y)
    moved = [(b - a) / state.optimizer.param_groups[0]["lr"] for a, b in zip(weights(state), before, strict=True)]
    return torch.stack([m.norm() for m in moved]).norm(), moved


def test_clipping_is_over_the_active_weights():
    sgd = {"momentum": 0.0, "weight_decay": 0.0}
    config = change(dataclasses.replace(TINY, method="static", sharpness="none"), optim=sgd)
    free, short = build(config), build(change(config, optim={"clip_norm": 0.1}))
    x, y = next(iter(free.batches))
    norm, gradient = norm_of_step(free, x, y)
    clipped, other = norm_of_step(short, x, y)
    assert float(norm) > 0.2
    assert float(clipped) == pytest.approx(0.1, rel=1e-3)  # pruned weights would have taken their share
    for a, b in zip(gradient, other, strict=True):
        assert torch.allclose(a * 0.1 / norm, b, atol=1e-4)


@pytest.mark.parametrize("sharpness", ["s2sam", "sam"])
def test_clipping_leaves_the_displacement_alone(sharpness):
    config = dataclasses.replace(TINY, method="static", sharpness=sharpness, lr=0.0)
    seen = []
    for clip in (0.0, 1e-3):
        state = build(change(config, optim={"clip_norm": clip}))
        weight, found = state.model.classifier.weight, []
        state.model.classifier.register_forward_pre_hook(lambda *_, w=weight, f=found: f.append(w.detach().clone()))
        steps(state, 2)
        seen.append(found)
    assert len(seen[0]) == (4 if sharpness == "sam" else 2)
    for a, b in zip(*seen, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_an_overflow_leaves_weights_direction_and_topology_alone(method):
    config = dataclasses.replace(TINY, method=method, precision="fp16", lr=0.01)
    state = build(config)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    steps(state, 2)  # the next step changes the topology
    before, masks = weights(state), {n: m.clone() for n, m in state.sparsifier.masks.items()}
    state_before = {k: v.clone() for s in list(state.optimizer.state.values())[:1] for k, v in s.items()}
    x, y = next(iter(state.batches))
    at = []
    handle = state.model.classifier.register_forward_pre_hook(lambda m, _: at.append(m.weight.detach().clone()))
    train_step(state, x * math.inf, y)
    assert all(torch.equal(a, b) for a, b in zip(weights(state), before, strict=True))
    assert all(torch.equal(m, state.sparsifier.masks[n]) for n, m in masks.items())
    momentum = next(iter(state.optimizer.state.values()))["momentum_buffer"]
    assert torch.equal(momentum, state_before["momentum_buffer"])
    assert state.scaler.get_scale() == 4.0
    assert state.sparsifier.updates == 0
    assert not state.sharpness.is_displaced
    train_step(state, x, y)  # the buffers of BatchNorm are infinite now, batch statistics are not
    handle.remove()
    assert torch.equal(at[0], at[1])  # the window continues at the same displaced point
    assert state.sparsifier.updates == 1
    assert any(not torch.equal(m, state.sparsifier.masks[n]) for n, m in masks.items())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("sharpness", ["none", "s2sam"])
def test_half_precision_follows_fp32(name, sharpness, tmp_path):
    config = dataclasses.replace(TINY, method="static", sharpness=sharpness, epochs=6)
    seen = {}
    for kind in ("fp32", name):
        state = build(dataclasses.replace(config, precision=kind))
        dtypes = set()
        state.model.classifier.register_forward_hook(lambda m, i, out, d=dtypes: d.add(out.dtype))
        losses = [float(loss) for _, loss in steps(state, 16)]
        seen[kind] = (sum(losses[-4:]) / 4, dtypes)
        assert all(p.dtype == torch.float32 for p in state.model.parameters())
    assert seen["fp32"][1] == {torch.float32}
    assert seen[name][1] == {precision.DTYPES[name]}
    assert seen[name][0] == pytest.approx(seen["fp32"][0], rel=0.1)


def test_bf16_with_sam_and_fp16_with_s2sam_finish(tmp_path):
    sam = dataclasses.replace(TINY, sharpness="sam", precision="bf16", out=str(tmp_path / "sam"))
    fp16 = dataclasses.replace(TINY, precision="fp16", out=str(tmp_path / "s2sam"))
    assert run(sam)["sparsity"] == run(fp16)["sparsity"] == pytest.approx(0.9, abs=1e-2)


def test_a_device_that_cannot_is_told(monkeypatch):
    def cannot(device, dtype):
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'\nmore")

    monkeypatch.setattr(precision, "_probe", cannot)
    check_precision(torch.device("cpu"), "fp32")
    with pytest.raises(ValueError, match=r"this CPU cannot train in fp16 \(.*'Half'\); use --precision bf16 or fp32"):
        build(dataclasses.replace(TINY, precision="fp16"))


def test_channels_last_is_the_same_network():
    options = {"width": 0.25, "shortcut": "A"}
    config = dataclasses.replace(PLAIN, model="resnet20", model_options=options, lr=0.01, method="rigl")
    a, b = build(config), build(dataclasses.replace(config, channels_last=True))
    conv = next(m for m in b.model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    for (_, loss), (_, other) in zip(steps(a, 4), steps(b, 4), strict=True):
        assert float(loss) == pytest.approx(float(other), rel=1e-3)
    assert all(torch.equal(m, b.sparsifier.masks[n]) for n, m in a.sparsifier.masks.items())
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_that_would_crash_is_refused():
    config = dataclasses.replace(PLAIN, model="resnet20", model_options={"width": 0.25}, channels_last=True)
    with pytest.raises(ValueError, match=r"channels_last would crash on this CPU: stages\.1\.0\.shortcut\.conv is a"):
        build(config)
    model = create_model("resnet20", num_classes=10, generator=torch.Generator().manual_seed(0))
    to_channels_last(model, torch.device("cpu"))  # 16 channels


def test_ema_is_the_recursion_and_as_sparse_as_the_network():
    state = build(change(dataclasses.replace(TINY, method="set"), optim={"ema": 0.75}))
    name = "body.fc1.weight"
    weight = dict(state.model.named_parameters())[name]
    expected, updates = None, 0
    for x, y in itertools.chain(state.batches, state.batches):
        train_step(state, x, y)
        state.advance()
        w = weight.detach()
        expected = w.clone() if expected is None else 0.75 * expected + 0.25 * w
        if state.sparsifier.updates > updates:
            updates = state.sparsifier.updates
            state.sparsifier.apply_to(state.ema.module)
            expected *= state.sparsifier.masks[name]
        averaged = dict(state.ema.module.named_parameters())[name]
        assert torch.allclose(averaged, expected, atol=1e-6)
        assert not averaged[~state.sparsifier.masks[name]].any()
    assert updates == 2
    assert not torch.equal(averaged, weight)


def test_ema_of_a_run_is_recorded(tmp_path):
    final = run(change(dataclasses.replace(TINY, out=str(tmp_path / "run")), optim={"ema": 0.5}))
    header = (tmp_path / "run" / "summary.csv").read_text().splitlines()[0].split(",")
    assert header[-2:] == ["ema_val_top1", "ema_test_top1"]
    assert 0 <= final["ema_test_top1"] <= 1


def test_recalibrated_statistics_are_those_of_the_training_images_in_random_order():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(70, 3, generator=draw).sort(dim=0).values * 3 + 5
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))
    twin = recalibrated(model, x, 32, lambda batch, _: batch, torch.Generator().manual_seed(1))
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([x[order[:32]].mean(0), x[order[32:64]].mean(0)]).mean(0)
    assert torch.allclose(twin[0].running_mean, expected, atol=1e-5)
    assert torch.equal(model[0].running_mean, torch.zeros(3))
    assert not twin[0].running_mean.allclose(model[0].running_mean)
    assert recalibrated(torch.nn.Linear(3, 2), x, 32, lambda batch, _: batch, draw) is None
    calls = []
    recalibrated(model, x, 2, lambda batch, _: calls.append(len(batch)) or batch, draw)
    assert calls == [2] * 35
    assert BN_BATCHES == 100


def test_final_record_has_both_accuracies(tmp_path):
    final = run(dataclasses.replace(TINY, out=str(tmp_path / "run")))
    assert final["recalibrated_test_loss"] != final["test_loss"]
    assert 0 <= final["recalibrated_test_top1"] <= 1


def test_ema_of_the_first_step_is_the_weights():
    model = torch.nn.Linear(2, 2)
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(model)
    assert torch.equal(ema.module.weight, model.weight)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TrainConfig(sharpness="sam", precision="fp16"), "sam needs two gradients a step, which fp16 cannot"),
        (lambda: TrainConfig(precision="fp8"), "unknown precision 'fp8'; did you mean 'fp32'"),
        (lambda: TrainConfig(batch_size=8, optim=OptimConfig(accumulate=5)), "it can be 4 at most with batch_size 8"),
        (lambda: TrainConfig(checkpoint_every=-1), "checkpoint_every must be a whole number"),
        (lambda: OptimConfig(accumulate=0), "optim.accumulate must be a whole number of at least 1"),
        (lambda: OptimConfig(clip_norm=-1.0), "optim.clip_norm"),
        (lambda: OptimConfig(ema=1.0), "optim.ema must be a number at least 0 and below 1"),
        (lambda: DataConfig(label_smoothing=1.0), "data_options.label_smoothing"),
        (lambda: DataConfig(label_noise=1.0), "data_options.label_noise"),
    ],
)
def test_impossible_settings(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_recalibration_sees_the_stream_that_was_trained_on(tmp_path):
    """With images as they are stored, this run loses about five points."""
    wide = {"epochs": 4, "data_options": DataConfig(), "model_options": {"width": 0.5}}
    final = run(dataclasses.replace(TINY, **wide, out=str(tmp_path / "run")))
    assert abs(final["recalibrated_test_top1"] - final["test_top1"]) < 0.02


def test_epochs_between_evaluations_are_not_measured(tmp_path):
    folder = tmp_path / "run"
    final = run(dataclasses.replace(TINY, epochs=5, evaluate_every=2, out=str(folder)))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert [r["test_top1"] is not None for r in epochs] == [False, True, False, True, True]
    assert [r["val_loss"] is not None for r in epochs] == [False, True, False, True, True]
    assert final["test_top1"] == epochs[-1]["test_top1"]
    assert final["best_epoch"] in (2, 4, 5)
    every = run(dataclasses.replace(TINY, epochs=5, out=str(tmp_path / "every")))
    assert every["test_loss"] == final["test_loss"]  # measuring changes nothing
