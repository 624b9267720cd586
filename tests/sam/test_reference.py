"""Invariant 3: the fast version equals the slow twin to 1e-12 over 120 steps, whatever happens on the way."""

import ast
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, WITHOUT_MOMENTUM, distance, make_data, make_net, snapshot
from torch.func import functional_call

import s2sam.sam.reference
from s2sam import S2SAM, sparsify
from s2sam.sam.reference import ReferenceS2SAM


def grouped(factory, rhos):
    """A factory that puts each weight in a group of its own, with its own rho."""
    return lambda weights: factory([{"params": [w], "rho": r} for w, r in zip(weights, rhos, strict=True)])


def reference_gradients(net, ref, batches):
    """Mean gradient over micro-batches at the reference's displaced point."""
    names = [n for n, _ in net.named_parameters()]
    xs = [x.requires_grad_() for x in ref.displaced()]
    loss = sum(F.cross_entropy(functional_call(net, dict(zip(names, xs, strict=True)), (x,)), y) for x, y in batches)
    return torch.autograd.grad(loss / len(batches), xs)


@pytest.mark.parametrize("scale", ["norm", "relative", "asam"])
@pytest.mark.parametrize("direction", ["gradient", "momentum"])
@pytest.mark.parametrize("name", ["sgd", "sgd-fused", "adamw"])
def test_equals_the_reference_over_120_eventful_steps(name, direction, scale):
    rhos = [0.05, 0.0, 0.1]
    factor = lambda step: 1.0 + 0.5 * (step % 7 == 0)  # noqa: E731
    options = {"direction": direction, "scale": scale, "sign": -1}
    net, twin = make_net(), make_net()
    optimizer = grouped(FACTORIES[name], rhos)(list(net.parameters()))
    sparsifier = sparsify(net, optimizer, method="static", sparsity=0.5, generator=torch.Generator().manual_seed(3))
    sam = S2SAM(optimizer, model=net, rho=factor, **options)
    masks = [sparsifier.masks.get(n) for n, _ in net.named_parameters()]
    assert sum(m is not None for m in masks) == 3
    ref = ReferenceS2SAM(snapshot(net), grouped(FACTORIES[name], rhos), masks=masks, factor=factor, **options)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 120) for o in (optimizer, ref.optimizer)]
    rng = random.Random(0)
    data = iter(make_data(400))
    for step in range(120):
        batches = [next(data) for _ in range(rng.choice([1, 1, 2, 3]))]
        if step in (5, 6, 60):
            batches[0][0][0, 0] = float("nan")
        gradients = reference_gradients(twin, ref, batches)
        for x, y in batches:
            (F.cross_entropy(net(x), y) / len(batches)).backward()
            if rng.random() < 0.3:  # an evaluation inside the window
                net.eval()
                out = net(x)
                net.train()
                names = [n for n, _ in net.named_parameters()]
                clean = functional_call(twin, dict(zip(names, ref.weights, strict=True)), (x,))
                assert torch.allclose(out, clean, atol=1e-12, equal_nan=True)
            if rng.random() < 0.2:
                sam.restore()
        optimizer.step()
        optimizer.zero_grad(set_to_none=rng.random() < 0.5)
        ref.step(gradients)
        for schedule in schedules:
            schedule.step()
        assert distance(net.parameters(), ref.weights) < 1e-12, step
    assert sam.stats["skipped"] == 3
    assert distance(net.parameters(), snapshot(make_net())) > 0.1


@pytest.mark.parametrize("name", FACTORIES)
def test_equals_the_reference_on_every_optimizer(name):
    for direction in ("gradient",) if name in WITHOUT_MOMENTUM else ("gradient", "momentum"):
        net, twin = make_net(), make_net()
        optimizer = FACTORIES[name](net.parameters())
        S2SAM(optimizer, model=net, rho=0.05, direction=direction)
        ref = ReferenceS2SAM(
            snapshot(net), lambda w: FACTORIES[name]([{"params": w, "rho": 0.05}]), direction=direction
        )
        for x, y in make_data(100):
            gradients = reference_gradients(twin, ref, [(x, y)])
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            ref.step(gradients)
        assert distance(net.parameters(), ref.weights) < 1e-12


def test_the_reference_shares_nothing_with_the_fast_version():
    tree = ast.parse(Path(s2sam.sam.reference.__file__).read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not any(m and m.startswith("s2sam") for m in modules)
