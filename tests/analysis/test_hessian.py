"""Loss, gradient and Hessian on the active weights against brute force in float64, and that nothing is moved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2sam.analysis.hessian import ActiveLoss
from s2sam.analysis.hessian_trace import trace
from s2sam.analysis.lanczos import extremes
from s2sam.sam.single_step import S2SAM

F64 = torch.float64


def network():
    """A convolution and two linear layers, with both kinds of BatchNorm; about 60 weights."""
    torch.random.default_generator.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Softplus(), nn.Linear(4, 3),
    )  # fmt: skip
    for module in model:
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return model


@pytest.fixture
def images(make_generator):
    generator = make_generator(2)
    x = torch.randn(11, 1, 5, 5, generator=generator)
    return x, torch.randint(0, 3, (11,), generator=generator)


@pytest.fixture
def masks(make_generator):
    generator = make_generator(3)
    named = dict(network().named_parameters())
    return {name: torch.rand(named[name].shape, generator=generator) < 0.4 for name in ("0.weight", "5.weight")}


def pruned(model, masks):
    with torch.no_grad():
        for name, mask in masks.items():
            dict(model.named_parameters())[name].mul_(mask)
    return model


def brute(model, x, y, masks, batches, *, train, smoothing=0.0):
    """(loss, gradient, Hessian) on the active coordinates, batch by batch, with torch.func on another copy."""
    model = model.double().train(train)
    named = {name: p.detach() for name, p in model.named_parameters()}
    where = {name: masks.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in named.items()}
    w = torch.cat([named[name][mask] for name, mask in where.items()])
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def total(v):
        params, at = {}, 0
        for name, mask in where.items():
            part = v[at : at + int(mask.sum())]
            params[name] = torch.zeros_like(named[name]).masked_scatter(mask, part)
            at += len(part)
        found = 0.0
        for rows in batches:
            clones = {name: b.clone() for name, b in buffers.items()}
            logits = torch.func.functional_call(model, {**params, **clones}, (x[rows].double(),))
            target = y[rows].double() if y.is_floating_point() else y[rows]
            found = found + F.cross_entropy(logits, target, label_smoothing=smoothing) * len(rows) / len(x)
        return found

    return (
        total(w),
        torch.autograd.functional.jacobian(total, w),
        torch.autograd.functional.hessian(total, w),
    )


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_everything_equals_brute_force(images, masks, make_generator, bn):
    x, y = images
    model = pruned(network(), masks)
    loss = ActiveLoss(model, x, y, masks=masks, bn=bn, dtype=F64, batch_size=4)
    batches = torch.arange(11).tensor_split(3)
    value, g, h = brute(network_of(model), x, y, masks, batches, train=bn == "train")
    assert (
        loss.size == len(g) == sum(p.numel() for p in model.parameters()) - sum(int((~m).sum()) for m in masks.values())
    )
    assert loss.loss() == pytest.approx(float(value), rel=1e-12)
    found, slope = loss.gradient()
    assert found == pytest.approx(float(value), rel=1e-12) and torch.allclose(slope, g, atol=1e-12)
    columns = loss.product(torch.eye(loss.size, dtype=F64))
    assert torch.allclose(columns, h, atol=1e-10) and float(h.abs().max()) > 0.01
    exact = torch.linalg.eigvalsh(h).flip(0)
    ends = extremes(loss.product, loss.size, make_generator(), count=3, tolerance=1e-9, max_steps=loss.size)
    assert ends.converged and [e.value for e in ends.top] == pytest.approx(exact[:3].tolist(), rel=1e-7)
    assert ends.lowest.value == pytest.approx(float(exact[-1]), rel=1e-6)
    whole = trace(loss.product, loss.size, make_generator(), queries=3 * loss.size)
    assert whole.value == pytest.approx(float(h.trace()), rel=1e-9)
    assert loss.passes["product"] == loss.size + ends.steps + loss.size


def network_of(model):
    other = network()
    other.load_state_dict(model.state_dict())
    return other


def test_statistics_make_a_difference_and_stay_what_they_are(images):
    x, y = images
    model = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    losses = [ActiveLoss(model, x, y, bn=bn).loss() for bn in ("eval", "train")]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()) and model.training


def test_pruned_weights_never_enter(images, masks, make_generator):
    x, y = images
    loss = ActiveLoss(pruned(network(), masks), x, y, masks=masks, dtype=F64)
    inside = []
    loss.model.register_forward_hook(
        lambda module, *_: inside.append({n: p.detach().clone() for n, p in module.named_parameters()})
    )
    e = torch.randn(loss.size, dtype=F64, generator=make_generator())
    loss.loss(e)
    loss.gradient(-e)
    assert len(inside) == 2
    for name, mask in masks.items():
        for seen in inside:
            assert not seen[name][~mask].any() and seen[name][mask].any()
    moved = loss.flat([inside[0][name] for name in inside[0]]) - loss.weights
    assert torch.allclose(moved, e, atol=1e-12)
    spread = loss.spread(e)
    assert torch.equal(loss.flat(spread), e)
    assert sum(int((t != 0).sum()) for t in spread) == loss.size


def test_labels_may_be_probabilities_and_smoothed(images, make_generator):
    x, _ = images
    y = torch.rand(11, 3, generator=make_generator(5))
    y = y / y.sum(1, keepdim=True)
    loss = ActiveLoss(network(), x, y, dtype=F64, label_smoothing=0.2)
    value, g, _ = brute(network(), x, y, {}, [torch.arange(11)], train=False, smoothing=0.2)
    found, slope = loss.gradient()
    assert found == pytest.approx(float(value), rel=1e-7) and torch.allclose(slope, g, atol=1e-7)


def test_groups_add_up(images):
    x, y = images
    loss = ActiveLoss(network(), x[:9], y[:9], dtype=F64)
    parts = loss.split(3)
    assert [len(part.x) for part in parts] == [3, 3, 3]
    assert sum(part.loss() for part in parts) / 3 == pytest.approx(loss.loss(), rel=1e-12)
    mean = torch.stack([part.gradient()[1] for part in parts]).mean(0)
    assert torch.allclose(mean, loss.gradient()[1], atol=1e-12)
    assert [len(part.x) for part in loss.split(4)] == [4, 4]
    assert [len(part.x) for part in loss.split(100)] == [9]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_every_weight_bit_for_bit(images, error):
    x, y = images
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sam = S2SAM(optimizer, model=model, rho=0.5)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    calls = []

    def prepare(part):
        calls.append(len(part))
        if len(calls) in (2, 4, 6):
            raise error
        return part

    loss = ActiveLoss(model, x, y, prepare, batch_size=6, bn="train")
    e = torch.ones(loss.size)
    for measure in (lambda: loss.loss(e), lambda: loss.gradient(e), lambda: loss.product(e[None])):
        with pytest.raises(error):
            measure()
        assert not sam.is_displaced
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert all(torch.equal(a, b) for a, b in zip(loss.parameters, model.parameters(), strict=True))
    assert torch.equal(loss.weights, ActiveLoss(model, x, y).weights)
    assert all(p.grad is None for p in (*model.parameters(), *loss.parameters))


def test_statistics_of_single_images_are_refused(images):
    x, y = images
    normed, bare = network(), nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3))
    with pytest.raises(ValueError, match="3 images in batches of at most 2 leave one of a single image"):
        ActiveLoss(normed, x[:3], y[:3], bn="train", batch_size=2)
    with pytest.raises(ValueError, match="leave one of a single image"):
        ActiveLoss(normed, x[:4], y[:4], bn="train").split(1)
    assert ActiveLoss(normed, x[:3], y[:3], batch_size=2).loss() > 0  # the network's own statistics
    assert ActiveLoss(bare, x[:1], y[:1], bn="train").loss() > 0  # no BatchNorm


def test_wrong_use_is_refused(images, masks):
    x, y = images
    model = network()
    with pytest.raises(ValueError, match="there are none; choose another split"):
        ActiveLoss(model, x[:0], y[:0])
    with pytest.raises(ValueError, match="did you mean 'eval'"):
        ActiveLoss(model, x, y, bn="evla")
    with pytest.raises(ValueError, match="fits no weight of the network"):
        ActiveLoss(model, x, y, masks={"5.weight": masks["0.weight"]})
    with pytest.raises(ValueError, match="batch_size"):
        ActiveLoss(model, x, y, batch_size=0)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no active weights"):
        ActiveLoss(model, x, y)


def test_frozen_weights_are_no_coordinates(images):
    x, y = images
    model = network()
    model[0].weight.requires_grad_(False)
    loss = ActiveLoss(model, x, y)
    assert loss.size == sum(p.numel() for p in model.parameters()) - model[0].weight.numel()
    assert loss.product(loss.weights[None]).isfinite().all()


def test_curvlinops_agrees(images, make_generator):
    curvlinops = pytest.importorskip("curvlinops", reason="pip install curvlinops-for-pytorch to compare with it")
    x, y = images
    model = network().double().eval()
    operator = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [(x.double(), y)], check_deterministic=False
    )
    loss = ActiveLoss(model, x, y, dtype=F64)
    v = torch.randn(loss.size, dtype=F64, generator=make_generator(7))
    assert torch.allclose(torch.as_tensor(operator @ v), loss.product(v[None])[0], atol=1e-10)
