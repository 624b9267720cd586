"""SR-STE against what the paper says, written out: dense weights, a masked forward, a straight-through gradient."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2sam import S2SAM, sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import make_batches, make_net, one_step, step_by, train_scaled
from test_geometry import slow


class Masked(torch.autograd.Function):
    """m theta forward; backward the gradient of m theta, and lambda_w (1 - m) theta, as the authors have it."""

    @staticmethod
    def forward(ctx, theta, mask, lambda_w):
        ctx.save_for_backward(theta, mask)
        ctx.lambda_w = lambda_w
        return theta * mask

    @staticmethod
    def backward(ctx, grad):
        theta, mask = ctx.saved_tensors
        return grad + ctx.lambda_w * (theta * ~mask), None, None


def layer_of(weights, lr=0.5, momentum=0.0, weight_decay=0.0, **options):
    layer = nn.Linear(4, len(weights) // 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights).view(-1, 4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    return layer, optimizer, sparsify(layer, optimizer, method="sr-ste", sparsity=0.5, **options)


def theta(ste):
    return ste.theta(ste.parts[0], "weight").flatten().tolist()


def active(ste):
    return ste.masks["weight"].flatten().nonzero().flatten().tolist()


def test_golden_step():
    layer, optimizer, ste = layer_of([0.9, -0.8, 0.6, 0.1], weight_decay=0.1, lambda_w=0.2)
    assert active(ste) == [0, 1]
    assert torch.equal(layer.weight, torch.tensor([[0.9, -0.8, 0, 0]]))
    step_by(layer, optimizer, [0.1, -0.4, -0.6, 0.2])
    # inside:  .9 - .5 (.1 + .1 * .9) = .805;  -.8 - .5 (-.4 - .1 * .8) = -.56
    # outside: .6 - .5 (-.6 + .3 * .6) = .81;   .1 - .5 (.2 + .3 * .1) = -.015
    assert theta(ste) == pytest.approx([0.805, -0.56, 0.81, -0.015])
    assert active(ste) == [0, 2], "chosen anew, and what enters has its value"
    assert layer.weight.detach().flatten().tolist() == pytest.approx([0.805, 0, 0.81, 0])
    assert layer.weight.grad.flatten()[1:].abs().sum() == 0
    assert ste.last_update.dropped == ste.last_update.grown == {"weight": 1}


def test_momentum_goes_in_and_out_with_the_weight():
    layer, optimizer, ste = layer_of([0.9, -0.8, 0.6, 0.1], momentum=0.5, lambda_w=0.0)
    step_by(layer, optimizer, [0.0, -0.4, -0.6, 0.2])
    buffer = optimizer.state[layer.weight]["momentum_buffer"].flatten()
    assert active(ste) == [0, 2]
    assert buffer.tolist() == pytest.approx([0, 0, -0.6, 0])
    assert ste.velocity["weight"].flatten().tolist() == pytest.approx([0, -0.4, 0, 0.2])
    step_by(layer, optimizer)
    # 1: -.6 + .5 * .2, 2: .9 + .5 * .3, 3: 0 - .5 * .1
    assert theta(ste) == pytest.approx([0.9, -0.5, 1.05, -0.05])


def reference(steps, n, m, lambda_w, **kw):
    """The authors' training: torch's SGD on dense weights."""
    net = make_net().double()
    dense = [p.detach().clone().requires_grad_() for p in net.parameters()]
    optimizer = torch.optim.SGD(dense, lr=0.2, **kw)
    path = []
    for x, y in make_batches(steps):
        masks = [slow(p.detach().abs(), n, m) for p in dense]
        a, b, c = (Masked.apply(p, mask, lambda_w) for p, mask in zip(dense, masks, strict=True))
        optimizer.zero_grad()
        F.cross_entropy(torch.tanh(torch.tanh(x.double() @ a.T) @ b.T) @ c.T, y).backward()
        optimizer.step()
        path.append([p.detach().clone() for p in dense])
    return path


@pytest.mark.parametrize(
    "kw",
    [{}, {"weight_decay": 1e-2}, {"momentum": 0.9, "weight_decay": 1e-2}],
    ids=["sgd", "decay", "momentum"],
)
@pytest.mark.parametrize("lambda_w", [0.0, 0.05])
def test_it_is_the_authors_training(kw, lambda_w):
    net = make_net().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, **kw)
    ste = sparsify(net, optimizer, method="sr-ste", sparsity=0.5, m=2, lambda_w=lambda_w)
    crossings = 0
    for (x, y), expected in zip(make_batches(40), reference(40, 1, 2, lambda_w, **kw), strict=True):
        one_step(net, optimizer, (x.double(), y))
        crossings += sum(ste.last_update.grown.values())
        for name, dense in zip(ste.masks, expected, strict=True):
            assert torch.allclose(ste.theta(ste.parts[0], name), dense, rtol=1e-10, atol=1e-12)
            mask = slow(dense.abs(), 1, 2)
            assert torch.equal(ste.masks[name], mask)
            assert torch.allclose(net.get_parameter(name), dense * mask, rtol=1e-10, atol=1e-12)
    assert crossings > 20 * (1 if lambda_w == 0 else 0.3), crossings


def test_the_choice_is_made_at_w_and_the_gradient_taken_at_w_plus_e():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ste = sparsify(net, optimizer, method="sr-ste", sparsity=0.5, m=2)
    sam = S2SAM(optimizer, model=net, rho=0.5, stats_every=1)
    for x, y in make_batches(6):
        masks = {name: mask.clone() for name, mask in ste.masks.items()}
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        assert all(torch.equal(mask, ste.masks[name]) for name, mask in masks.items()), "none inside the step"
        assert all(net.get_parameter(name)[~mask].abs().sum() == 0 for name, mask in masks.items())
        loss.backward()
        optimizer.step()
        for name, mask in ste.masks.items():
            assert torch.equal(mask, slow(ste.theta(ste.parts[0], name).abs(), 1, 2))
            assert torch.equal(net.get_parameter(name), ste.theta(ste.parts[0], name) * mask)
    assert sam.stats["displacement"] == pytest.approx(0.5, rel=1e-3)
    assert ste.updates == 6 and ste.survival() < 1


def test_lambda_holds_the_mask():
    changed = {}
    for lambda_w in (0.0, 2.0):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
        ste = sparsify(net, optimizer, method="sr-ste", sparsity=0.5, m=2, lambda_w=lambda_w)
        changed[lambda_w] = 0
        for batch in make_batches(30):
            one_step(net, optimizer, batch)
            changed[lambda_w] += sum(ste.last_update.grown.values())
    assert changed[2.0] < changed[0.0] / 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_and_a_frozen_topology_leave_it_alone(fused):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=fused)
    ste = sparsify(net, optimizer, method="sr-ste", sparsity=0.5, m=2)
    sam = S2SAM(optimizer, model=net, rho=0.05)
    first, second, third = make_batches(3)
    one_step(net, optimizer, first)
    before = [ste.theta(ste.parts[0], name) for name in ste.masks]
    optimizer.zero_grad()
    (F.cross_entropy(net(second[0]), second[1]) * torch.nan).backward()
    optimizer.step()
    sam.restore()
    assert all(torch.equal(a, ste.theta(ste.parts[0], name)) for a, name in zip(before, ste.masks, strict=True))
    ste.freeze()
    masks = {name: mask.clone() for name, mask in ste.masks.items()}
    one_step(net, optimizer, third)
    for a, (name, mask) in zip(before, ste.masks.items(), strict=True):
        assert torch.equal(mask, masks[name])
        now = ste.theta(ste.parts[0], name)
        assert torch.equal(a[~mask], now[~mask]) and not torch.equal(a[mask], now[mask])


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_makes_no_difference(fused):
    found = []
    for scaled in (False, True):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=fused)
        ste = sparsify(net, optimizer, method="sr-ste", sparsity=0.5, m=2)
        train_scaled(net, optimizer, enabled=scaled)
        found.append(ste.velocity["0.weight"])
    assert found[0].abs().max() > 0
    assert torch.allclose(*found, atol=1e-7)


def test_maximize_and_a_momentum_of_ones_own():
    layer, optimizer, ste = layer_of([0.9, -0.8, 0.2, 0.1], lambda_w=0.0, momentum=0.0)
    optimizer.param_groups[0]["maximize"] = True
    step_by(layer, optimizer, [0.0, 0.0, 0.1, 0.0])
    assert theta(ste) == pytest.approx([0.9, -0.8, 0.25, 0.1])
    net = make_net()
    adam = torch.optim.AdamW(net.parameters(), lr=0.01)
    ste = sparsify(net, adam, method="sr-ste", sparsity=0.5, m=2, momentum=0.5)
    assert ste.momentum(adam.param_groups[0]) == 0.5
    ste.remove()
    plain = sparsify(net, adam, method="sr-ste", sparsity=0.5, m=2)
    assert plain.momentum(adam.param_groups[0]) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_w": -1}, "lambda_w must be"),
        ({"delta_t": 0}, "delta_t must be"),
        ({"momentum": 2}, "momentum must be"),
        ({"n": 3}, "sparsity 0.5 is not that of 3:4; give sparsity=0.25"),
    ],
)
def test_bad_options(options, message):
    net = make_net()
    net[0], net[2] = nn.Linear(8, 4), nn.Linear(4, 4)
    with pytest.raises(ValueError, match=message):
        sparsify(net, torch.optim.SGD(net.parameters(), lr=0.1), method="sr-ste", sparsity=0.5, **options)
