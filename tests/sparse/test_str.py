"""STR: equal to autograd through the soft threshold, step by step; the controller; the numbers of the card."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2sam import S2SAM, sparsify
from s2sam.sparse.soft import logit, s_before_decay, s_for_sparsity, shift, soft_threshold

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import (
    copy_masks,
    generator,
    loss_fn,
    make_batches,
    make_net,
    one_step,
    shaped_states,
    step_by,
    train_scaled,
)

# 12 weights; sigmoid(s) = .25 at s = -log 3
WEIGHTS = [0.5, -0.1, 0.3, -0.7, 0.2, -0.4, 0.8, -0.6, 0.9, 1.0, -1.1, 0.1]
QUARTER = -1.0986122886681098
FREE = {"follow": False, "delta_t": 1, "s_init": QUARTER, "total_steps": 100}


def layer_of(lr=0.5, momentum=0.9, weight_decay=0.0, **kw):
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(WEIGHTS).view(3, 4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    options = {"sparsity": 0.5, "total_steps": 20, "delta_t": 1, "generator": generator()} | kw
    return layer, optimizer, sparsify(layer, optimizer, method="str", **options)


class Reference(nn.Module):
    """What the paper trains: theta and s as parameters, autograd through S."""

    def __init__(self, net, s_init):
        super().__init__()
        self.theta = nn.ParameterList([nn.Parameter(w.detach().clone()) for w in net.parameters()])
        self.s = nn.ParameterList([nn.Parameter(torch.tensor(s_init, dtype=w.dtype)) for w in net.parameters()])

    def weights(self):
        pairs = zip(self.theta, self.s, strict=True)
        return [torch.sign(t) * torch.relu(torch.abs(t) - torch.sigmoid(s)) for t, s in pairs]

    def forward(self, x):
        a, b, c = self.weights()
        return torch.tanh(torch.tanh(x @ a.t()) @ b.t()) @ c.t()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.5},
        {"lr": 0.5, "weight_decay": 2e-3},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 2e-3},
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 2e-3, "nesterov": True},
        {"lr": 0.3, "momentum": 0.8, "weight_decay": 2e-3, "dampening": 0.6},
    ],
    ids=lambda options: "-".join(options),
)
def test_it_is_autograd_through_the_soft_threshold(options):
    net = make_net().double()
    reference = Reference(net, -1.0)
    optimizer, other = torch.optim.SGD(net.parameters(), **options), torch.optim.SGD(reference.parameters(), **options)
    method = sparsify(net, optimizer, method="str", sparsity=0.5, total_steps=1000, t_end=1.0, follow=False, delta_t=1,
                      s_init=-1.0)  # fmt: skip
    dropped = grown = 0
    for x, _ in make_batches(60):
        y = x[:, :3].argmax(1)
        one_step(net, optimizer, (x.double(), y))
        other.zero_grad()
        loss_fn(reference(x.double()), y).backward()
        other.step()
        for (name, w), wanted, theta, s in zip(
            net.named_parameters(), reference.weights(), reference.theta, reference.s, strict=True
        ):
            assert torch.allclose(w, wanted, rtol=1e-10, atol=1e-13)
            assert torch.equal(method.masks[name], wanted != 0)
            assert torch.allclose(method.theta[name], theta, rtol=1e-10, atol=1e-13)
            assert torch.allclose(method.s[name], s, rtol=1e-10)
        dropped += sum(method.last_update.dropped.values())
        grown += sum(method.last_update.grown.values())
    assert dropped > 5 and grown > 5, "weights went and came back"
    assert len({round(t, 4) for t in method.thresholds().values()}) == 3, "each layer has learned its own"


def test_a_step_by_hand():
    layer, optimizer, method = layer_of(lr=0.1, momentum=0.0, **FREE)
    start = [0.25, 0, 0.05, -0.45, 0, -0.15, 0.55, -0.35, 0.65, 0.75, -0.85, 0]
    assert layer.weight.detach().flatten().tolist() == pytest.approx(start, abs=1e-7)
    assert method.thresholds() == {"weight": pytest.approx(0.25)}
    step_by(layer, optimizer, [2.0, 9.0, 1.0, 1.0])
    # dL/ds = -g' (2 + 1 - 1) = -.375, as g' = .25 .75; the second is pruned, its gradient is nobody's
    assert float(method.s["weight"]) == pytest.approx(QUARTER + 0.0375, abs=1e-7)
    threshold = float(torch.sigmoid(method.s["weight"]))
    theta = [0.3, -0.1, 0.2, -0.8, *WEIGHTS[4:]]
    assert method.theta["weight"].flatten().tolist() == pytest.approx(theta, abs=1e-7)
    wanted = [max(abs(t) - threshold, 0) * (1 if t > 0 else -1) for t in theta]
    assert layer.weight.detach().flatten().tolist() == pytest.approx(wanted, abs=1e-7)
    assert method.last_update.dropped == {"weight": 1}
    assert method.target_sparsity(1) == method.sparsity() == pytest.approx(4 / 12)


def test_numerics_of_the_card():
    assert float(torch.sigmoid(torch.tensor(-105.0))) == 0.0 < float(torch.sigmoid(torch.tensor(-87.0)))
    layer, optimizer, method = layer_of(lr=0.1, weight_decay=1e-3, **(FREE | {"s_init": -3200.0, "total_steps": 400}))
    for _ in range(250):
        step_by(layer, optimizer, [1e-3] * 12)
    # only decay moves s, as the formula says
    assert float(method.s["weight"]) == pytest.approx(-3200 / s_before_decay(1.0, 250 * 0.1, 1e-3, 0.9), rel=0.02)
    assert s_before_decay(-3200.0, 0.0, 1e-4) == -3200.0
    assert method.sparsity() == 0.0


@settings(max_examples=50, deadline=None)
@given(sparsity=st.floats(0.0, 1.0), n=st.integers(1, 60), seed=st.integers(0, 99))
def test_s_for_a_wanted_sparsity(sparsity, n, seed):
    weight = torch.rand(n, generator=generator(seed), dtype=torch.float64) * 0.9 + 0.01
    pruned = soft_threshold(weight, torch.tensor(s_for_sparsity(weight, sparsity), dtype=torch.float64)) == 0
    assert int(pruned.sum()) == round(sparsity * n) if round(sparsity * n) < n else int(pruned.sum()) >= n - 1


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 99), k=st.integers(1, 40), s=st.floats(-200, 3))
def test_the_shift_puts_the_threshold_between_kept_and_pruned(seed, k, s):
    theta = torch.randn(40, generator=generator(seed), dtype=torch.float64) * 0.5
    above = logit(theta.abs()) - s
    mask = torch.zeros(40, dtype=torch.bool).index_fill_(0, above.topk(k).indices, True)
    moved = s + shift([above], [mask])
    shrunk = logit(theta.abs()) - moved
    assert bool((shrunk[mask] > -1e-9).all()) and bool((shrunk[~mask] <= 1e-9).all())
    if k == 40:
        assert float(moved) <= s


def test_the_controller_meets_the_plan_at_every_change():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-2)
    method = sparsify(net, optimizer, method="str", sparsity=0.8, total_steps=40, delta_t=4, generator=generator())
    assert method.sparsity() == 0.0
    grown = 0
    for t, batch in enumerate(make_batches(40), 1):
        before, weights = copy_masks(method), [p.detach().clone() for p in net.parameters()]
        one_step(net, optimizer, batch)
        if method.updates and t % 4 == 0 and t <= 30:
            assert sum(int(m.sum()) for m in method.masks.values()) == round((1 - method.target_sparsity(t)) * 222)
            grown += sum(method.last_update.grown.values())
        else:
            assert t == 30 or all(torch.equal(before[name], m) for name, m in method.masks.items())
        assert all(not torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
        for name, mask in method.masks.items():
            weight = net.get_parameter(name)
            assert weight[~mask].abs().sum() == 0
            assert all(s[~mask].abs().sum() == 0 for s in shaped_states(optimizer, weight))
            if t < 30:
                shrunk = soft_threshold(method.theta[name], method.s[name]) * mask
                assert torch.equal(weight.detach(), shrunk)
    assert grown > 0, "more than gradual pruning"
    assert (method.updates, method.theta, method.velocity) == (8, {}, {})
    assert sum(int(m.sum()) for m in method.masks.values()) == 44
    assert len({round(t, 6) for t in method.thresholds().values()}) == 3


@pytest.mark.parametrize("s_init", [-100.0, 0.5])
def test_what_emerges_meets_the_target_at_the_end(s_init):
    """From no sparsity at all, and from too much."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    method = sparsify(net, optimizer, method="str", sparsity=0.6, total_steps=20, delta_t=2, t_end=0.5, follow=False,
                      s_init=s_init)  # fmt: skip
    for batch in make_batches(9):
        one_step(net, optimizer, batch)
    assert (method.sparsity() < 0.1) if s_init == -100 else (method.sparsity() > 0.7)
    assert method.target_sparsity(9) == pytest.approx(method.sparsity())
    assert not method.behind(method.parts[0])
    one_step(net, optimizer, make_batches(1)[0])
    assert sum(int(m.sum()) for m in method.masks.values()) == 89 == round(0.4 * 222)
    assert method.target_sparsity(10) == 0.6


@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("missed", [{16}, {15, 16, 17}, set(range(14, 21))])
def test_the_target_is_met_even_if_steps_are_missed(follow, missed):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    method = sparsify(net, optimizer, method="str", sparsity=0.8, total_steps=20, delta_t=4, t_end=0.8, follow=follow,
                      s_init=-0.2)  # fmt: skip
    for t, batch in enumerate(make_batches(20), 1):
        if t in missed:
            method.missed_step()
        else:
            one_step(net, optimizer, batch)
    assert method.behind(method.parts[0]) == method.catch_up() == (20 in missed)
    assert sum(int(m.sum()) for m in method.masks.values()) == 44
    method.verify()
    assert method.theta == {} and not method.catch_up()


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_theta_and_s(fused):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=fused)
    method = sparsify(net, optimizer, method="str", sparsity=0.8, total_steps=20, delta_t=1)
    sam = S2SAM(optimizer, model=net, rho=0.05)
    first, second = make_batches(2)
    one_step(net, optimizer, first)
    state = copy.deepcopy(method.extra_state())
    optimizer.zero_grad()
    (loss_fn(net(second[0]), second[1]) * torch.nan).backward()
    optimizer.step()
    for key, held in method.extra_state().items():
        assert held.keys() == state[key].keys() and len(held) == 3
        assert all(torch.equal(value, state[key][name]) for name, value in held.items())
    sam.restore()


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_makes_no_difference(fused):
    found = []
    for scaled in (False, True):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
        method = sparsify(net, optimizer, method="str", sparsity=0.7, total_steps=99, follow=False, s_init=-2.0)
        train_scaled(net, optimizer, enabled=scaled)
        found.append(torch.stack([*method.s.values()]))
    assert (found[0] + 2.0).abs().min() > 1e-4
    assert torch.allclose(*found, atol=1e-6)


def test_frozen_masks_keep_and_weights_go_on():
    layer, optimizer, method = layer_of(**FREE)
    method.freeze()
    before = layer.weight.detach().clone()
    step_by(layer, optimizer, [2.0] * 12)
    moved = (layer.weight.detach() - before).flatten()
    assert moved[[0, 2, 3]].tolist() == pytest.approx([-1.0] * 3) and moved[[1, 4, 11]].abs().sum() == 0
    assert float(method.s["weight"]) == pytest.approx(QUARTER)


def test_low_precision_weights_have_wide_thetas():
    net = make_net().bfloat16()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    method = sparsify(net, optimizer, method="str", sparsity=0.5, total_steps=9, delta_t=1, t_end=1.0)
    theta = {name: t.clone() for name, t in method.theta.items()}
    for x, y in make_batches(4):
        optimizer.zero_grad()
        loss_fn(net(x.bfloat16()).float(), y).backward()
        optimizer.step()
    assert all(t.dtype == torch.float32 and not torch.equal(t, theta[name]) for name, t in method.theta.items())
    method.verify()


def test_a_layer_that_would_vanish_keeps_a_weight():
    net = make_net()
    with torch.no_grad():
        net[2].weight.mul_(1e-2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = sparsify(net, optimizer, method="str", sparsity=0.5, total_steps=99, follow=False, s_init=-1.0)
    assert method.parts[0].kept["2.weight"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "give total_steps"),
        ({"s_init": float("nan")}, "s_init must be a finite number"),
        ({"s_decay": -1}, "s_decay must be"),
        ({"follow": 1}, "follow must be true or false"),
        ({"initial_sparsity": 0.9}, "above the sparsity to reach"),
        ({"threshold": 1}, "unknown option of method 'str'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**options)


def test_no_threshold_above_one():
    with pytest.raises(ValueError, match="no s has the threshold 2.5"):
        s_for_sparsity(torch.tensor([2.0, 3.0]), 0.5)
    with pytest.raises(ValueError, match="momentum must be"):
        s_before_decay(-1.0, 1.0, 1e-4, 1.0)


def thresholds_of_two_optimizers(mask_gradients):
    generator_ = generator(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    for p in net.parameters():
        p.data.normal_(std=0.4, generator=generator_)
    optimizers = [torch.optim.SGD(net[i].parameters(), lr=0.5) for i in (0, 2)]
    sparsifier = sparsify(
        net, optimizers, method="str", sparsity=0.5, total_steps=100, delta_t=100, distribution="uniform", s_init=-1.0,
        initial_sparsity=0.3, generator=generator(2),
    )  # fmt: skip
    x = torch.randn(16, 6, generator=generator(1))
    for _ in range(3):
        net(x).pow(2).sum().backward()
        if mask_gradients:
            sparsifier.mask_gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {name: float(s) for name, s in sparsifier.s.items()}


def test_masking_before_clipping_keeps_what_each_optimizer_saw():
    plain, masked = thresholds_of_two_optimizers(False), thresholds_of_two_optimizers(True)
    assert len(set(plain.values())) == 2
    assert plain == masked
