"""ITOP by hand: changes until the end, a share that does not fall to 0, after the step, and R_s."""

import sys
from pathlib import Path

import pytest
import torch

from s2sam import sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import copy_masks, generator, golden, make_batches, make_net, one_step, set_masks, step_by

MASK = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
WEIGHTS = [0.5, -0.1, 0.3, -0.2, 0.6, -0.4, 0, 0, 0, 0, 0, 0]
HALF = {"delta_t": 1, "total_steps": 10**6, "drop_fraction": 0.5001}
both = pytest.mark.parametrize("method", ["set-itop", "rigl-itop"])


def active(sparsifier):
    return sparsifier.masks["weight"].flatten().nonzero().flatten().tolist()


def test_rigl_itop_takes_the_step_and_then_grows_by_its_dense_gradient():
    layer, optimizer, itop = golden(MASK, WEIGHTS, "rigl-itop", **HALF)
    step_by(layer, optimizer, [0.2, 0.01, -0.5, 0.03, 0.2, 0.2, 0.02, 0.3, 0.0, 0.01, -0.4, 0.1])
    # after the step: .4 -.105 .55 -.215 .5 -.5; .55 .5 -.5 stay; the largest |gradient| of the others: 10, 7, 0
    assert active(itop) == [0, 2, 4, 5, 7, 10]
    assert layer.weight.flatten().tolist() == pytest.approx([0.4, 0, 0.55, 0, 0.5, -0.5, 0, 0, 0, 0, 0, 0])
    assert itop.last_update.dropped == itop.last_update.grown == {"weight": 2}
    momentum = optimizer.state[layer.weight]["momentum_buffer"].flatten()
    assert momentum.tolist() == pytest.approx([0.2, 0, -0.5, 0, 0.2, 0.2, 0, 0, 0, 0, 0, 0])
    assert layer.weight.grad.flatten()[6:].abs().sum() == 0


def test_set_itop_is_set_with_another_share():
    layer, optimizer, itop = golden(MASK, WEIGHTS, "set-itop", **HALF)
    step_by(layer, optimizer)
    assert active(itop)[:3] == [0, 4, 5] and len(active(itop)) == 6
    assert all(i > 5 for i in active(itop)[3:])


@both
def test_the_share_falls_to_its_end_and_no_further(method):
    _, _, itop = golden(MASK, WEIGHTS, method, delta_t=1, total_steps=20, drop_fraction=0.9, drop_end=0.2)
    part = itop.parts[0]
    assert [itop.drop_fraction(t) for t in (0, 10, 20)] == pytest.approx([0.9, 0.55, 0.2])
    assert [itop.drop_count(part, "weight", t) for t in (1, 10, 20)] == [5, 3, 1]
    assert all(itop.due(part, t) for t in range(1, 20)) and not itop.due(part, 20) and not itop.due(part, 21)
    assert itop.options.__class__().drop_end == 0.005


@both
def test_explored_is_the_union_of_all_masks_and_never_falls(method):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    options = {"sparsity": 0.9, "total_steps": 40, "delta_t": 4, "generator": generator(), "min_per_filter": 0}
    itop = sparsify(net, optimizer, method=method, **options)
    union, rates = copy_masks(itop), [itop.explored()]
    assert rates[0] == pytest.approx(22 / 222)
    for t, batch in enumerate(make_batches(40), 1):
        one_step(net, optimizer, batch)
        union = {name: union[name] | mask for name, mask in itop.masks.items()}
        rates.append(itop.explored())
        assert rates[-1] == sum(int(m.sum()) for m in union.values()) / 222
        assert rates[-1] >= rates[-2]
        assert t % 4 == 0 or rates[-1] == rates[-2]
    assert rates[-1] > 1.5 * rates[0]


def test_explored_by_hand():
    """6 of 12 at first; 3 go and 3 others come, then the rest of the way back: 9 of 12, then 10."""
    layer, optimizer, itop = golden(MASK, WEIGHTS, "rigl-itop", **HALF)
    assert itop.explored() == 0.5
    tiny = [1e-6 * i for i in (0, 0, 0, 0, 0, 0, 9, 8, 7, 0, 0, 0)]
    step_by(layer, optimizer, tiny)
    assert active(itop) == [0, 4, 5, 6, 7, 8]
    assert itop.explored() == 9 / 12
    step_by(layer, optimizer, [1e-6 * i for i in (0, 9, 8, 0, 0, 0, 0, 0, 0, 7, 0, 0)])
    assert active(itop) == [0, 1, 2, 4, 5, 9]
    assert itop.explored() == 10 / 12
    assert itop.survival() == 5 / 6


def test_clipping_keeps_the_growth_scores():
    layer, optimizer, itop = golden(MASK, WEIGHTS, "rigl-itop", **{**HALF, "drop_fraction": 0.17})
    layer.weight.grad = torch.ones(3, 4)
    layer.weight.grad[2, 3] = 5.0
    itop.mask_gradients()
    assert layer.weight.grad.sum() == 6
    optimizer.step()
    assert bool(itop.masks["weight"][2, 3])


def test_scores_of_a_step_that_changed_nothing_are_not_used_later():
    layer, optimizer, itop = golden(MASK, WEIGHTS, "rigl-itop", **{**HALF, "delta_t": 2, "drop_fraction": 0.17})
    step_by(layer, optimizer)
    step_by(layer, optimizer, [torch.nan] * 6 + [9.0] + [0.0] * 5)
    assert itop.updates == 0
    set_masks(itop, copy_masks(itop))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(WEIGHTS).view(3, 4))
    optimizer.state.clear()
    step_by(layer, optimizer)
    step_by(layer, optimizer, [0.0] * 7 + [1e-3] + [0.0] * 4)
    assert active(itop) == [0, 2, 3, 4, 5, 7]


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "give total_steps"),
        ({"t_end": None}, "needs a t_end above 0"),
        ({"drop_end": 1.5}, "drop_end must be"),
        ({"delta_t": 0}, "delta_t must be a whole number"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(ValueError, match=message):
        golden(MASK, WEIGHTS, method, **{**HALF, **options})
