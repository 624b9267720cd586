"""Top-KAST by hand: the network is the largest weights, some others are trained beside it, the rest rests."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam import S2SAM, sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import generator, loss_fn, make_batches, make_net, one_step, shaped_states, step_by, train_scaled

# 12 weights: A the 6 largest (0 to 5), B three more (6 to 8), and three that rest (9 to 11)
WEIGHTS = [1.2, -1.1, 1.0, -0.9, 0.8, -0.7, 0.6, -0.5, 0.4, 0.3, -0.2, 0.1]


def layer_of(lr=0.5, weight_decay=0.0, **options):
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(WEIGHTS).view(3, 4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    options = {"sparsity": 0.5, "backward_sparsity": 0.25, "min_per_filter": 0} | options
    return layer, optimizer, sparsify(layer, optimizer, method="top-kast", generator=generator(), **options)


def numbers(mask):
    return mask.flatten().nonzero().flatten().tolist()


def theta(kast):
    return kast.theta(kast.parts[0], "weight").flatten().tolist()


def test_golden_step():
    layer, optimizer, kast = layer_of()
    assert numbers(kast.masks["weight"]) == [0, 1, 2, 3, 4, 5]
    assert numbers(kast.backward["weight"]) == list(range(9))
    assert layer.weight.detach().flatten().tolist() == pytest.approx([*WEIGHTS[:6], *[0.0] * 6])
    step_by(layer, optimizer, [0, 0, 0, 0, 0.4, 0, -0.6, 0, 0.2, 9, 9, 9])
    # theta 4: .8 - .2, 6: .6 + .3, 8: .4 - .1, and 9 to 11 rest, whatever their gradient
    assert theta(kast) == pytest.approx([1.2, -1.1, 1.0, -0.9, 0.6, -0.7, 0.9, -0.5, 0.3, 0.3, -0.2, 0.1])
    # the largest six: 6 has come in the place of 4; it brings its value and no momentum
    assert numbers(kast.masks["weight"]) == [0, 1, 2, 3, 5, 6]
    weight, momentum = layer.weight.detach().flatten(), shaped_states(optimizer, layer.weight)[0].flatten()
    assert weight.tolist() == pytest.approx([1.2, -1.1, 1.0, -0.9, 0, -0.7, 0.9, 0, 0, 0, 0, 0])
    assert momentum[[4, *range(6, 12)]].abs().sum() == 0
    assert numbers(kast.backward["weight"])[:8] == list(range(8))
    assert kast.last_update.dropped == kast.last_update.grown == {"weight": 1}
    assert layer.weight.grad.flatten()[[4, *range(6, 12)]].abs().sum() == 0


def test_decay_is_stronger_outside_the_network():
    layer, optimizer, kast = layer_of(weight_decay=0.1, delta_t=10)
    step_by(layer, optimizer)
    inside, outside = [w * (1 - 0.5 * 0.1) for w in WEIGHTS[:6]], [w * (1 - 0.5 * 0.1 / 0.5) for w in WEIGHTS[6:9]]
    assert theta(kast) == pytest.approx([*inside, *outside, *WEIGHTS[9:]])


def test_outside_the_network_it_is_sgd_with_momentum():
    layer, optimizer, kast = layer_of(delta_t=10)
    grads = [[0.0] * 6 + [0.1, -0.2, 0.3, 1, 1, 1], [0.0] * 6 + [0.2, 0.1, 0.0, 1, 1, 1]]
    twin = nn.Parameter(torch.tensor(WEIGHTS[6:9]))
    other = torch.optim.SGD([twin], lr=0.5, momentum=0.9)
    for grad in grads:
        step_by(layer, optimizer, grad)
        twin.grad = torch.tensor(grad[6:9])
        other.step()
    assert theta(kast) == pytest.approx([*WEIGHTS[:6], *twin.tolist(), *WEIGHTS[9:]])
    assert kast.velocity["weight"].flatten()[[*range(6), 9, 10, 11]].abs().sum() == 0


def test_sets_are_nested_and_the_rest_never_moves():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-2)
    kast = sparsify(net, optimizer, method="top-kast", sparsity=0.8, generator=generator(), delta_t=2)
    part, entered = kast.parts[0], 0
    kept = dict(part.kept)
    for batch in make_batches(12):
        before = {name: kast.theta(part, name) for name in kast.masks}
        backward = {name: mask.clone() for name, mask in kast.backward.items()}
        one_step(net, optimizer, batch)
        for name, mask in kast.masks.items():
            size = mask.numel()
            assert int(mask.sum()) == kept[name]
            assert int(kast.backward[name].sum()) == min(size, 2 * kept[name])
            assert not bool((mask & ~kast.backward[name]).any())
            now = kast.theta(part, name)
            assert torch.equal(now[~backward[name]], before[name][~backward[name]])
            assert int((now != before[name])[backward[name]].sum()) > 0.5 * int(backward[name].sum())
        entered += sum(kast.last_update.grown.values()) if kast.last_update else 0
    assert entered > 3
    assert kast.explored() > 0.2


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_and_a_frozen_topology_leave_it_alone(fused):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=fused)
    kast = sparsify(net, optimizer, method="top-kast", sparsity=0.7, generator=generator())
    sam = S2SAM(optimizer, model=net, rho=0.05)
    first, second, third = make_batches(3)
    one_step(net, optimizer, first)
    reserve = kast.reserve["0.weight"].clone()
    optimizer.zero_grad()
    (loss_fn(net(second[0]), second[1]) * torch.nan).backward()
    optimizer.step()
    assert torch.equal(reserve, kast.reserve["0.weight"])
    sam.restore()
    kast.freeze()
    one_step(net, optimizer, third)
    assert torch.equal(reserve, kast.reserve["0.weight"]) and kast.updates == 1


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_makes_no_difference(fused):
    found = []
    for scaled in (False, True):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=fused)
        kast = sparsify(net, optimizer, method="top-kast", sparsity=0.7, generator=generator(), delta_t=10)
        train_scaled(net, optimizer, enabled=scaled)
        found.append(kast.velocity["0.weight"])
    assert found[0].abs().max() > 0
    assert torch.allclose(*found, atol=1e-7)


def test_clipping_keeps_what_is_trained_outside():
    layer, optimizer, kast = layer_of(delta_t=10)
    layer.weight.grad = torch.full((3, 4), 0.2)
    kast.mask_gradients()
    assert layer.weight.grad.flatten()[6:].abs().sum() == 0
    optimizer.step()
    assert theta(kast)[6:] == pytest.approx([0.5, -0.6, 0.3, 0.3, -0.2, 0.1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backward_sparsity": 0.6}, "backward_sparsity 0.6 is above the sparsity 0.5"),
        ({"backward_sparsity": -1}, "backward_sparsity must be"),
        ({"momentum": 2}, "momentum must be"),
        ({"delta_t": 0}, "delta_t must be a whole number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**options)
