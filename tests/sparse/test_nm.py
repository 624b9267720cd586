"""N:M magnitude by hand; which layers take part, and what is refused, for all methods of this geometry."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam import S2SAM, sparsify
from s2sam.sparse.geometry import is_n_of_m

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import generator, loss_fn, make_batches, make_net, one_step, set_masks

METHODS = ("nm", "nm-rigl", "sr-ste")


def sgd(net, **kw):
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1, "momentum": 0.9} | kw)


def attach(net, method="nm", sparsity=0.5, **kw):
    kw = {"total_steps": 40, "generator": generator()} | kw
    if method != "nm":
        kw = {"delta_t": 2} | kw
    return sparsify(net, kw.pop("optimizer", None) or sgd(net), method=method, sparsity=sparsity, **kw)


def wide_net():
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    g = generator()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    return net


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.5, [[0.8, -0.7, 0, 0, 0, 0.3, 0, -0.9], [0, 0, 0.2, -0.3, 0.5, 0.5, 0, 0]]),
        (0.75, [[0.8, 0, 0, 0, 0, 0, 0, -0.9], [0, 0, 0, -0.3, 0.5, 0, 0, 0]]),
    ],
)
def test_golden(sparsity, expected):
    layer = nn.Linear(8, 2, bias=False)
    with torch.no_grad():
        rows = [[0.8, -0.7, 0.6, 0.1, 0.2, 0.3, 0.0, -0.9], [0.0, 0.1, 0.2, -0.3, 0.5, 0.5, 0.5, 0.5]]
        layer.weight.copy_(torch.tensor(rows))
    nm = attach(layer, sparsity=sparsity)
    assert torch.equal(layer.weight, torch.tensor(expected))
    assert nm.sparsity() == sparsity and nm.n == round(4 * (1 - sparsity))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("sparsity", "options"), [(0.5, {}), (0.75, {"n": 1}), (0.667, {"m": 3}), (0.5, {"n": 4, "m": 8})]
)
def test_every_group_keeps_n_through_training(method, sparsity, options):
    n, m = {0.75: (1, 4), 0.667: (1, 3)}.get(sparsity, (options.get("n", 2), options.get("m", 4)))
    net = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 3))
    optimizer = sgd(net)
    sparsifier = attach(net, method, sparsity, optimizer=optimizer, **options)
    first = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    assert list(first) == (["0.weight", "4.weight"] if m == 3 else ["0.weight", "2.weight", "4.weight"])
    g = generator(1)
    for _ in range(8):
        one_step(net, optimizer, (torch.randn(16, 24, generator=g), torch.randint(0, 3, (16,), generator=g)))
        for name, mask in sparsifier.masks.items():
            assert is_n_of_m(mask, n, m), name
            assert int((net.get_parameter(name) != 0).sum()) <= int(mask.sum()) == mask.numel() * n // m
    assert sparsifier.sparsity() == pytest.approx(1 - n / m)
    assert sparsifier.target_sparsity(8) == 1 - n / m
    assert any(not torch.equal(first[name], mask) for name, mask in sparsifier.masks.items()) == (method != "nm")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("direction", ["gradient", "momentum", "random"])
def test_the_displaced_network_keeps_the_pattern(method, direction):
    net = wide_net()
    optimizer = sgd(net)
    sparsifier = attach(net, method, optimizer=optimizer)
    S2SAM(optimizer, model=net, rho=0.1, direction=direction)
    g, displaced = generator(1), 0
    for _ in range(7):
        clean = net[0].weight.detach().clone()
        optimizer.zero_grad()
        loss = loss_fn(net(torch.randn(16, 8, generator=g)), torch.randint(0, 4, (16,), generator=g))
        displaced += not torch.equal(clean, net[0].weight)
        for name, mask in sparsifier.masks.items():
            w = net.get_parameter(name).detach()
            assert w[~mask].abs().sum() == 0
            assert int((w != 0).view(len(w), -1, 4).sum(-1).max()) == 2
        loss.backward()
        optimizer.step()
    assert displaced >= 5


@pytest.mark.parametrize("method", METHODS)
def test_either_order_of_attaching_gives_the_same_run(method):
    ends = []
    for sparse_first in (True, False):
        net = make_net()
        optimizer = sgd(net)
        sam = None if sparse_first else S2SAM(optimizer, model=net, rho=0.1)
        sparsifier = attach(net, method, optimizer=optimizer, m=2)
        sam = sam or S2SAM(optimizer, model=net, rho=0.1)
        for batch in make_batches(8):
            one_step(net, optimizer, batch)
        sam.restore()
        sparsifier.verify()
        ends.append([*(p.detach() for p in net.parameters()), *sparsifier.masks.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# -- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_do_not_divide_stay_dense_with_a_reason(method):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 6, 1),
        nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 2),
    )  # fmt: skip
    optimizer = sgd(net)
    sparsifier = attach(net, method, optimizer=optimizer)
    reasons = {row.name: row.reason for row in sparsifier.report() if row.name.endswith("weight")}
    assert reasons == {
        "0.weight": "3 input channels do not divide by m=4",
        "1.weight": "depthwise convolution",
        "2.weight": "",
        "3.weight": "",
        "5.weight": "",
        "6.weight": "5 input channels do not divide by m=4",
    }
    assert list(sparsifier.masks) == ["2.weight", "3.weight", "5.weight"]
    before = net[0].weight.detach().clone()
    net(torch.randn(2, 3, 6, 6, generator=generator())).square().sum().backward()
    optimizer.step()
    assert int((net[0].weight == 0).sum()) == 0 and not torch.equal(before, net[0].weight)
    assert sparsifier.sparsity() == 0.5
    assert "3 input channels do not divide by m=4" in str(sparsifier.report())


def test_a_transposed_convolution_stays_dense_even_if_asked_for():
    net = nn.Sequential(nn.ConvTranspose2d(8, 4, 3), nn.Conv2d(4, 4, 3))
    nm = attach(net, include="ConvTranspose2d")
    reasons = {row.name: row.reason for row in nm.report()}
    assert reasons["0.weight"] == "transposed convolution: its groups of inputs are not along dimension 1"
    assert list(nm.masks) == ["1.weight"]


def test_a_depthwise_convolution_and_a_vector_that_are_asked_for_do_not_divide():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    nm = attach(net, include=["0.weight", "1.weight"])
    reasons = {row.name: row.reason for row in nm.report()}
    assert reasons["0.weight"] == reasons["1.weight"] == "1 input channels do not divide by m=4"


def test_attention_takes_part_where_it_is_asked_for():
    net = nn.Sequential()
    net.attention = nn.MultiheadAttention(8, 2)
    assert list(attach(net).masks) == ["attention.out_proj.weight"]
    net.attention = nn.MultiheadAttention(8, 2)
    nm = attach(net, include="in_proj_weight")
    assert list(nm.masks) == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert all(is_n_of_m(mask, 2, 4) for mask in nm.masks.values())


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.9}, "sparsity 0.9 is not that of 1:4; give sparsity=0.75, or another m"),
        ({"sparsity": 0.6}, "sparsity 0.6 is not that of 2:4; give sparsity=0.5"),
        ({"sparsity": 0.75, "n": 2}, "sparsity 0.75 is not that of 2:4; give sparsity=0.5"),
        ({"sparsity": 1.5}, "sparsity must be"),
        ({"n": 0}, "n must be a whole number of at least 1"),
        ({"n": 5}, "must be at most 4, got 5"),
        ({"m": 1}, "m must be a whole number of at least 2"),
        ({"m": 7}, "no prunable layer has a number of input channels that divides by m=7"),
        ({"distribution": "erk"}, "prunes all layers alike; leave distribution='erk' out"),
    ],
)
def test_refusals(method, options, message):
    with pytest.raises(ValueError, match=message):
        attach(wide_net(), method, **options)


def test_a_state_of_another_pattern_is_refused():
    net = wide_net()
    state = attach(net).state_dict()
    other = wide_net()
    nm = attach(other, sparsity=0.5, m=2, init=False)
    nm.load_state_dict(state)
    nm.apply()
    with pytest.raises(RuntimeError, match="does not keep 1 of every 2 weights; load the state of a run with the same"):
        nm.verify()


def test_hand_made_masks_are_checked_before_the_first_step():
    net = make_net()
    optimizer = sgd(net)
    nm = attach(net, optimizer=optimizer, m=2)
    broken = {name: mask.clone() for name, mask in nm.masks.items()}
    broken["0.weight"][0, :2] = True
    set_masks(nm, broken)
    with pytest.raises(RuntimeError, match=r"'0.weight' does not keep 1 of every 2"):
        one_step(net, optimizer, make_batches(1)[0])
