"""SynFlow: by hand, conservation, rounds, counts, and no layer that runs empty."""

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam import sparsify
from s2sam.models import create_model
from s2sam.sparse.methods.synflow import step_budget, take_abs

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import copy_masks, equal_masks, generator, make_batches, make_net


def attach(net, *, sparsity=0.0, **kw):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return sparsify(net, optimizer, method="synflow", sparsity=sparsity, **{"input_shape": (6,)} | kw)


def relu_net(*widths, seed=0):
    """A bias-free MLP with ReLU."""
    layers = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out, bias=False), nn.ReLU()]
    net, g = nn.Sequential(*layers[:-1]), generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / p.shape[1] ** 0.5)
    return net


def flow_through(net, width):
    """R = 1' f(1; |theta|) of what is left of the network."""
    twin = copy.deepcopy(net).double()
    take_abs(twin)
    with torch.no_grad():
        return float(twin(torch.ones(1, width).double()).sum())


def test_by_hand():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        net[2].weight.copy_(torch.tensor([[-5.0, 6.0]]))
    sparsifier = attach(net, input_shape=(2,))
    scores = sparsifier.initial_scores(net)
    assert scores["0.weight"].tolist() == [[5, 10], [18, 24]]  # |w1| |w2|
    assert scores["2.weight"].tolist() == [[15, 42]]  # |w2| (sum of |w1| over the inputs)
    sparsifier.remove()
    kept = attach(net, input_shape=(2,), sparsity=0.5, rounds=1).masks
    assert {name: m.tolist() for name, m in kept.items()} == {
        "0.weight": [[False, False], [True, True]],
        "2.weight": [[False, True]],
    }


def test_the_sum_over_a_layer_is_the_same_in_all_layers():
    net = relu_net(6, 40, 7, 25, 3)
    for _ in ("dense", "sparse"):
        scores = attach(copy.deepcopy(net), init="anew").initial_scores(net)
        sums = torch.stack([s.sum() for s in scores.values()])
        assert torch.allclose(sums, sums[:1].expand(4), rtol=1e-12)
        assert float(sums[0]) == pytest.approx(flow_through(net, 6), rel=1e-12)
        assert sums[0] > 0.1
        attach(net, sparsity=0.9).remove()


def test_it_is_conserved_in_a_convolutional_network_at_every_unit():
    """What flows into a hidden channel (rows) flows out of it (columns)."""
    net = nn.Sequential(nn.Conv2d(2, 5, 3, bias=False), nn.ReLU(), nn.Conv2d(5, 4, 3, bias=False))
    scores = attach(net, input_shape=(2, 6, 6)).initial_scores(net)
    assert torch.allclose(scores["0.weight"].sum((1, 2, 3)), scores["2.weight"].sum((0, 2, 3)), rtol=1e-12)


def test_rounds_make_a_difference_and_counts_are_exact():
    masks = {n: copy_masks(attach(relu_net(6, 40, 7, 25, 3), sparsity=0.9, rounds=n)) for n in (1, 10, 100)}
    for found in masks.values():
        assert sum(int(m.sum()) for m in found.values()) == 77
    assert not equal_masks(masks[1], masks[10])
    assert not equal_masks(masks[1], masks[100])
    assert equal_masks(masks[100], copy_masks(attach(relu_net(6, 40, 7, 25, 3), sparsity=0.9)))


@pytest.mark.parametrize("distribution", ["uniform", "erk", {"0": 0.5}])
def test_counts_per_layer_are_exact(distribution):
    net = relu_net(6, 40, 7, 25, 3)
    static = sparsify(other := relu_net(6, 40, 7, 25, 3), torch.optim.SGD(other.parameters(), lr=0.1), method="static",
                      sparsity=0.8, distribution=distribution)  # fmt: skip
    assert attach(net, sparsity=0.8, distribution=distribution).parts[0].kept == static.parts[0].kept


def test_no_layer_runs_empty_however_few_weights_are_left():
    """One path through the network is the most that can go; one round alone has cut the last path long before."""
    widths = (6, 60, 5, 50, 4, 3)
    total = sum(a * b for a, b in itertools.pairwise(widths))
    for left in (5, 6, 8, 12, 20, 40, 100):
        net = relu_net(*widths)
        kept = {name: int(m.sum()) for name, m in attach(net, sparsity=1 - left / total).masks.items()}
        assert sum(kept.values()) == left
        assert flow_through(net, 6) > 0, f"{left} weights are left and no path: {kept}"
    cut = relu_net(*widths)
    attach(cut, sparsity=1 - 8 / total, rounds=1)
    assert flow_through(cut, 6) == 0


def test_steps_of_the_rounds():
    n, sizes = 100, {"a": 700, "b": 300}
    steps = [step_budget(10, sizes, k / n) for k in range(n + 1)]
    assert (steps[0], steps[50], steps[100]) == (1000, 100, 10)
    assert all(a >= b for a, b in itertools.pairwise(steps))
    assert step_budget({"a": 7, "b": 300}, sizes, 0.5) == {"a": 70, "b": 300}
    assert step_budget({"a": 7, "b": 300}, sizes, 1.0) == {"a": 7, "b": 300}


def test_it_needs_no_data():
    one, other = make_batches(1, seed=1), make_batches(1, seed=2)
    expected = copy_masks(attach(make_net(), sparsity=0.8))
    for batches in (one, other, [(one[0][0] * torch.nan, None)]):
        assert equal_masks(expected, attach(make_net(), sparsity=0.8, input_shape=None, batches=batches).masks)
    assert equal_masks(expected, attach(make_net(), sparsity=0.8, batches=[], input_shape=[6]).masks)


def test_signs_of_the_weights_do_not_matter_and_come_back():
    net, flipped = make_net(), make_net()
    signs = [torch.where(torch.rand(p.shape, generator=generator()) < 0.5, -1.0, 1.0) for p in net.parameters()]
    with torch.no_grad():
        for p, sign in zip(flipped.parameters(), signs, strict=True):
            p.mul_(sign)
    before = [p.detach().clone() for p in flipped.parameters()]
    masks = attach(net, sparsity=0.8).masks
    assert equal_masks(masks, attach(flipped, sparsity=0.8).masks)
    for p, old, mask in zip(flipped.parameters(), before, masks.values(), strict=True):
        assert torch.equal(p, old * mask)


def test_a_resnet_and_a_product_beyond_float32_have_scores():
    net = create_model("resnet20", num_classes=10, generator=generator(), width=0.5)
    scores = attach(net, input_shape=(3, 32, 32), rounds=1).initial_scores(net)
    assert all(s.isfinite().all() and s.max() > 0 for s in scores.values())
    deep = relu_net(6, *[10] * 60, 3)
    with torch.no_grad():
        for p in deep.parameters():
            p.mul_(5)
    assert torch.isinf(torch.tensor(flow_through(deep, 6)).float())
    assert sum(int(m.sum()) for m in attach(deep, sparsity=0.9, rounds=20).masks.values()) == round(0.1 * 5990)
    with pytest.raises(ValueError, match="or for a model so deep that float numbers overflow"):
        with torch.no_grad():
            for p in deep.parameters():
                p.mul_(1e6)
        attach(deep, sparsity=0.9)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"input_shape": None}, "needs the shape of one sample: give input_shape=, such as .3, 32, 32., or batches="),
        ({"input_shape": None, "batches": []}, "needs the shape of one sample"),
        ({"input_shape": None, "batches": [({"x": torch.ones(2, 6)}, 0)]}, "needs the shape of one sample"),
        ({"input_shape": 6}, "input_shape must be a list such as .3, 32, 32., got 6"),
        ({"input_shape": (6, 0)}, "each number of input_shape must be a whole number of at least 1, got 0"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_options(kw, message):
    with pytest.raises(ValueError, match=message):
        attach(make_net(), sparsity=0.5, **kw)
