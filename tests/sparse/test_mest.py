"""MEST by hand: lower bound after the drop, upper bound after the growth, the phases' edges, fixed at the end."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2sam import sparsify
from s2sam.sparse.methods.mest import bounds

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import (
    MASK,
    WEIGHTS,
    copy_masks,
    generator,
    golden,
    make_batches,
    make_net,
    one_step,
    set_masks,
    shaped_states,
    take_step,
)


def linear(sparsity=1 / 3, mask=MASK, weights=WEIGHTS, **options):
    """Linear(4, 3) with weights and mask by hand; 8 of 12 weights are the target."""
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights).view(3, 4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    common = {"total_steps": 8, "delta_t": 1, "phases": (0.5, 0.75), "generator": generator(), "init": "anew"}
    options = common | {"min_per_filter": 0} | options
    mest = sparsify(layer, optimizer, method="mest", sparsity=sparsity, **options)
    if mask is not None:
        set_masks(mest, {"weight": torch.tensor(mask, dtype=torch.bool).view(3, 4)})
    return layer, optimizer, mest


# -- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "sparsity", "lower", "upper"),
    [  # the lists of boone891214/MEST:scripts/resnet32
        ("em", 0.9, [0.92, 0.91, 0.90], [0.9] * 3),
        ("em", 0.95, [0.96, 0.955, 0.95], [0.95] * 3),
        ("em_s", 0.9, [0.9] * 3, [0.85, 0.875, 0.9]),
        ("em_s", 0.95, [0.95] * 3, [0.9, 0.925, 0.95]),
        ("em_s", 0.98, [0.98] * 3, [0.96, 0.97, 0.98]),  # twice the target's density at most
        ("em", 0.5, [0.6, 0.55, 0.5], [0.5] * 3),
    ],
)
def test_bounds(variant, sparsity, lower, upper):
    low, up = bounds(variant, sparsity, 3)
    assert (low, up) == (pytest.approx(lower), pytest.approx(upper))
    assert low[-1] == up[-1] == sparsity


@given(st.sampled_from(["em", "em_s"]), st.floats(0, 0.999), st.integers(2, 6))
def test_bounds_enclose_the_target_and_close_on_it(variant, sparsity, phases):
    lower, upper = bounds(variant, sparsity, phases)
    assert all(0 <= up <= sparsity <= low < 1 for up, low in zip(upper, lower, strict=True))
    assert upper == sorted(upper) and lower == sorted(lower, reverse=True)
    assert lower[-1] == upper[-1] == sparsity


# -- one exchange ----------------------------------------------------------------------------------------------------


def test_em_drops_a_fifth_and_grows_as_many():
    layer, optimizer, mest = linear()
    take_step(layer, optimizer)  # round(0.8 * 8) = 6 stay: .1 and .2 go, 2 of 4 zeros come
    mask = mest.masks["weight"].flatten().tolist()
    assert mask[:8] == [True, False, True, True, False, True, True, True]
    assert sum(mask[8:]) == 2
    assert mest.last_update.dropped == mest.last_update.grown == {"weight": 2}
    assert layer.weight.flatten().tolist() == pytest.approx([0.5, 0, 0.3, -0.7, 0, -0.4, 0.8, -0.6, 0, 0, 0, 0])


def test_soft_bound_by_hand():
    """Lower 8 of 12; upper 10, 9, 8 in the phases that begin at 0, 4, 6."""
    layer, optimizer, mest = linear(
        sparsity=4 / 12,
        lower=(4 / 12,) * 3,
        upper=(2 / 12, 3 / 12, 4 / 12),
        mask=None,
        weights=[0.1 * i for i in range(1, 13)],
    )
    assert mest.masks["weight"].int().flatten().tolist() == [0, 0] + [1] * 10, "the largest within the upper bound"
    seen = []
    for _ in range(8):
        before = copy_masks(mest)["weight"].flatten()
        take_step(layer, optimizer)
        after = mest.masks["weight"].flatten()
        seen.append((int((before & after).sum()), int((after & ~before).sum())))
    # (kept, grown): at first 2 of 2 zeros come, then 1 of 2, then 1 of 3; at step 6 8 stay for good
    assert seen == [(8, 2), (8, 2), (8, 2), (8, 1), (8, 1), (8, 0), (8, 0), (8, 0)]
    assert mest.updates == 6
    assert mest.masks["weight"].flatten().tolist()[-6:] == [True] * 6, "the largest have survived every drop"


def test_the_score_counts_the_gradient_as_much_as_it_is_told():
    grad = torch.zeros(3, 4)
    grad[0, 1] = -0.3  # |-0.1 + 0.5 * 0.3| = 0.05 after the step; with the gradient 0.05 + 2 * 0.3
    for grad_weight, stays in ((0.0, False), (2.0, True)):
        layer, optimizer, mest = linear(grad_weight=grad_weight)
        take_step(layer, optimizer, grad.clone())
        assert bool(mest.masks["weight"][0, 1]) == stays
        assert int(mest.masks["weight"].sum()) == 8


@pytest.mark.parametrize("regrow", [False, True])
def test_just_dropped_weights_come_back_only_if_asked(regrow):
    back = 0
    for seed in range(20):
        layer, optimizer, mest = linear(regrow_dropped=regrow)
        mest.generator.manual_seed(seed)
        take_step(layer, optimizer)
        mask = mest.masks["weight"].flatten()
        assert int(mask.sum()) == 8 and mask[[0, 2, 3, 5, 6, 7]].all()
        back += int(mask[[1, 4]].sum())
    assert (back > 0) == regrow


def test_growth_is_uniform():
    """Chi-square over 4 equally likely positions, 2 of them drawn 400 times: the 99.9 % quantile is 16.3."""
    hits = torch.zeros(4)
    layer, optimizer, mest = linear()
    start, draws = mest.state_dict(), generator(11)
    for _ in range(400):
        mest.load_state_dict({**start, "generator": draws.get_state()})
        mest.apply()
        take_step(layer, optimizer)
        draws.set_state(mest.generator.get_state())
        hits += mest.masks["weight"].flatten()[8:]
    assert hits.sum() == 800
    assert float(((hits - 200) ** 2 / 200).sum()) < 16.3


def test_a_layer_without_zeros_is_left_alone():
    layer, optimizer, mest = linear(sparsity=0.0, mask=None)
    for _ in range(8):
        take_step(layer, optimizer)
    assert mest.updates == 0 and mest.sparsity() == 0.0
    layer, optimizer, mest = linear(sparsity=1 / 12, mask=[1] * 11 + [0])
    take_step(layer, optimizer)  # round(0.8 * 11) = 9 may stay, but there is one zero to grow
    assert mest.last_update.dropped == {"weight": 1} and mest.masks["weight"][2, 3]


@pytest.mark.parametrize("compat", [False, True])
def test_stale_momentum_stays_only_where_asked_for(compat):
    layer, optimizer, mest = linear(mest_compat=compat, delta_t=2)
    take_step(layer, optimizer, torch.full((3, 4), 1e-3))
    take_step(layer, optimizer)
    momentum = shaped_states(optimizer, layer.weight)[0].flatten()
    dropped = ~mest.masks["weight"].flatten()[:8]
    assert int(dropped.sum()) == 2
    assert bool((momentum[:8][dropped] != 0).all()) == compat
    assert layer.weight.flatten()[:8][dropped].abs().sum() == 0
    take_step(layer, optimizer, torch.ones(3, 4))
    assert layer.weight[~mest.masks["weight"]].abs().sum() == 0, "stale momentum moves no pruned weight"
    assert mest.dense_state == compat


# -- the whole schedule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["em", "em_s"])
@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
def test_bounds_hold_at_every_step(variant, distribution):
    """T = 160, exchanges every 5 steps, phases at 90 and 120: the authors' epochs. 222 weights, 90 %."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    options = {"total_steps": 160, "delta_t": 5, "variant": variant, "distribution": distribution, "min_per_filter": 0}
    mest = sparsify(net, optimizer, method="mest", sparsity=0.9, generator=generator(), **options)
    lower, upper = bounds(variant, 0.9, 3)
    target = round(0.1 * 222)
    for t, batch in enumerate(make_batches(160), 1):
        before = copy_masks(mest)
        one_step(net, optimizer, batch)
        kept = sum(int((before[name] & m).sum()) for name, m in mest.masks.items())
        now = sum(int(m.sum()) for m in mest.masks.values())
        phase = 2 if t >= 120 else 1 if t >= 90 else 0
        assert now == round((1 - upper[phase]) * 222)
        assert mest.target_sparsity(t) == upper[phase]
        if t % 5 or t > 120:
            assert kept == now, "no exchange"
        elif t < 120:
            assert kept == round(target * (1 - lower[phase]) / 0.1)
        if t == 120:
            fixed = copy_masks(mest)
    assert all(torch.equal(fixed[name], m) for name, m in mest.masks.items())
    assert now == target
    assert mest.updates == (24 if variant == "em_s" else 23)
    assert mest.explored() > 0.2


@pytest.mark.parametrize("overflow", [False, True])
def test_the_last_phase_begins_on_time_off_the_grid_or_when_gradients_are_finite_again(overflow):
    bounds = {"lower": (0.5, 0.5), "upper": (0.25, 0.5), "phases": (0.625,)}
    layer, optimizer, mest = linear(
        sparsity=0.5, delta_t=3, mask=None, weights=[0.1 * i for i in range(1, 13)], **bounds
    )
    counts = []
    for t in range(1, 9):
        grad = torch.zeros(3, 4)
        grad[2, 3] = torch.inf if overflow and t == 5 else 0.0
        take_step(layer, optimizer, grad)
        counts.append(int(mest.masks["weight"].sum()))
    assert counts == [9, 9, 9, 9, 9 if overflow else 6, 6, 6, 6]


@settings(max_examples=30, deadline=None)
@given(
    sparsity=st.floats(0, 0.95), total=st.integers(4, 40), delta=st.integers(1, 9),
    variant=st.sampled_from(["em", "em_s"]), distribution=st.sampled_from(["uniform", "erk", "global"]),
    regrow=st.booleans(),
)  # fmt: skip
def test_counts_are_exact_whatever_the_settings(sparsity, total, delta, variant, distribution, regrow):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    options = {"total_steps": total, "delta_t": delta, "variant": variant, "regrow_dropped": regrow}
    mest = sparsify(net, optimizer, method="mest", sparsity=sparsity, distribution=distribution, **options)
    for t, batch in enumerate(make_batches(total), 1):
        one_step(net, optimizer, batch)
        assert sum(int(m.sum()) for m in mest.masks.values()) == round((1 - mest.target_sparsity(t)) * 222)
    assert mest.target_sparsity(total) == sparsity
    mest.verify()


def test_lists_from_a_recipe_and_the_options_of_golden():
    layer, optimizer, mest = golden(
        [1] * 6 + [0] * 6,
        WEIGHTS,
        "mest",
        total_steps=8,
        delta_t=1,
        phases=[0.5, 0.75],
        lower=[0.75, 0.6, 0.5],
        upper=[0.5] * 3,
    )
    assert mest.options.phases == (0.5, 0.75) and mest.edges == [4, 6]
    take_step(layer, optimizer)
    assert mest.last_update.dropped == {"weight": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "give total_steps"),
        ({"variant": "em&s"}, "unknown variant of method 'mest': 'em&s'; did you mean 'em_s'"),
        ({"phases": ()}, "phases must be a list"),
        ({"phases": 0.5}, r"phases must be a list such as \[0.5, 0.75\], got 0.5"),
        ({"phases": None}, "phases must be a list"),
        ({"phases": ["half"]}, "phases must be a finite number"),
        ({"lower": 0.9}, r"lower must be a list such as \[0.92, 0.91, 0.9\], got 0.9"),
        ({"upper": "0.9"}, "upper must be a list"),
        ({"delta_t": "often"}, "delta_t must be a whole number"),
        ({"delta_t": 2.0}, "delta_t must be a whole number"),
        ({"mest_compat": "no"}, "mest_compat must be true or false, got 'no'"),
        ({"regrow_dropped": 1}, "regrow_dropped must be true or false, got 1"),
        ({"phases": (0.75, 0.5)}, "phases must be rising"),
        ({"lower": (0.5, 0.4)}, "3 phases to sparsity"),
        ({"upper": (0.5, 0.4, 1 / 3)}, "3 phases to sparsity"),
        ({"lower": (0.5, 0.4, 0.35)}, "both 0.333"),
        ({"lower": (1.0, 0.4, 1 / 3)}, "3 phases to sparsity"),
        ({"grad_weight": -1}, "grad_weight must be"),
        ({"delta_t": 0}, "delta_t must be a whole number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        linear(**options)
