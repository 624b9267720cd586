"""N:M RigL by hand: a layer drops as RigL does, each group grows what it lost."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2sam import sparsify
from s2sam.sparse.geometry import is_n_of_m

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import generator, set_masks, step_by

# two rows of two groups of four; |w| of the active: .8 .1 | .5 .6 // .2 .7 | .3 .9
MASK = [1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1]
WEIGHTS = [0.8, 0.1, 0, 0, 0, 0.5, -0.6, 0, 0.2, 0, 0, 0.7, 0, 0, -0.3, 0.9]


def layer_of(**options):
    layer = nn.Linear(8, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    # f_1 is .49 of 8 weights: 3 are dropped
    options = {"total_steps": 1000, "delta_t": 1, "drop_fraction": 0.49} | options
    rigl = sparsify(layer, optimizer, method="nm-rigl", sparsity=0.5, generator=generator(), **options)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(WEIGHTS).view(2, 8))
    set_masks(rigl, {"weight": torch.tensor(MASK).bool().view(2, 8)})
    return layer, optimizer, rigl


def active(rigl):
    return rigl.masks["weight"].flatten().nonzero().flatten().tolist()


def test_golden_exchange():
    layer, optimizer, rigl = layer_of()
    # dropped: .1 (group 0), .2 (group 2), .3 (group 3); group 1 keeps both, whatever its gradients
    step_by(layer, optimizer, [9, 0, 1, 2, 50, 9, 9, 60, 0, 4, 3, 9, 0.5, 0, -0.6, 9])
    # group 0 grows 3, group 2 grows 9, group 3 grows 14 again, which keeps its value
    assert active(rigl) == [0, 3, 5, 6, 9, 11, 14, 15]
    expected = [0.8, 0, 0, 0, 0, 0.5, -0.6, 0, 0, 0, 0, 0.7, 0, 0, -0.3, 0.9]
    assert layer.weight.detach().flatten().tolist() == pytest.approx(expected), "no gradient step then"
    assert rigl.last_update.dropped == rigl.last_update.grown == {"weight": 2}


def test_what_was_dropped_comes_back_only_where_there_is_no_other():
    layer, optimizer, rigl = layer_of(regrow_dropped=False)
    step_by(layer, optimizer, [9, 99, 1, 2, 0, 9, 9, 0, 99, 4, 3, 9, 0.5, 0, -99, 9])
    assert active(rigl) == [0, 3, 5, 6, 9, 11, 12, 15]
    # at 3:4 a group that lost two has one other place
    layer = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    options = {"total_steps": 1000, "delta_t": 1, "drop_fraction": 0.7, "regrow_dropped": False}
    rigl = sparsify(layer, optimizer, method="nm-rigl", sparsity=0.25, generator=generator(), **options)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.0]]))
    set_masks(rigl, {"weight": torch.tensor([[1, 1, 1, 0]]).bool()})
    step_by(layer, optimizer, [5.0, 1.0, 1.0, 1.0])
    assert active(rigl) == [1, 2, 3]


@given(
    n=st.integers(1, 3),
    fraction=st.floats(0.2, 1.0),
    regrow=st.booleans(),
    seed=st.integers(0, 99),
    kernel=st.sampled_from([0, 1, 3]),
)
@settings(max_examples=25, deadline=None)
def test_every_exchange_keeps_n_of_every_group_and_grows_the_largest_gradients(n, fraction, regrow, seed, kernel):
    net = nn.Sequential(nn.Conv2d(8, 3, kernel, bias=False) if kernel else nn.Linear(8, 6, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    options = {"total_steps": 1000, "delta_t": 1, "drop_fraction": fraction, "regrow_dropped": regrow}
    rigl = sparsify(net, optimizer, method="nm-rigl", sparsity=1 - n / 4, generator=generator(seed), **options)
    weight, g = net[0].weight, generator(seed + 1)
    for _ in range(3):
        old, value = rigl.masks["0.weight"].clone(), weight.detach().clone()
        scores = torch.rand(weight.shape, generator=g) + 0.01
        weight.grad = scores.clone()
        optimizer.step()
        new = rigl.masks["0.weight"]
        assert is_n_of_m(new, n, 4)
        assert torch.equal(weight.detach(), value * (old & new))
        grown, left = new & ~old, ~new & ~old

        def groups(t):
            return t.movedim(1, -1).unflatten(-1, (-1, 4))

        least = groups(scores.masked_fill(~grown, 9.0)).amin(-1)
        most = groups(scores.masked_fill(~left, -1.0)).amax(-1)
        assert bool((least >= most).all()), "in its group what grew has the larger gradients"
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=g) * new * 0.1)


def test_the_number_of_dropped_weights_is_rigls():
    layer, optimizer, rigl = layer_of(drop_fraction=0.3, regrow_dropped=False)
    step_by(layer, optimizer, [1.0] * 16)
    assert rigl.last_update.dropped == {"weight": 2}  # floor(.3 * 8)
    assert rigl.parts[0].kept == {"weight": 8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "give total_steps"),
        ({"t_end": 0.0}, "needs a t_end above 0"),
        ({"drop_fraction": 2}, "drop_fraction must be"),
        ({"n": 9}, "must be at most 4"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**options)
