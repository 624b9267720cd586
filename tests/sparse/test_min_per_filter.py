"""min_per_filter: plain-Python references of the guarded choice and of an exchange, and every method with it."""

import itertools
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from s2sam import sparsify
from s2sam.registry import list_methods
from s2sam.sparse.geometry import is_blocks
from s2sam.sparse.topk import choose, class_of, global_topk, topk_mask

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import (
    attach,
    copy_masks,
    golden,
    golden_pair,
    loss_fn,
    make_batches,
    make_net,
    one_step,
    set_masks,
    sgd,
    step_by,
    take_step,
)  # fmt: skip

# -- the slow, obvious twin -------------------------------------------------------------------------------------------

NAN_IS = torch.finfo(torch.float32).min


def places(score_rows, k):
    """Class, score and place of each candidate of one layer, a list of filters, each a list of scores."""
    found = []
    for row, values in enumerate(score_rows):
        known = [NAN_IS if math.isnan(s) else s for s in values]
        order = sorted((-s, i) for i, s in enumerate(known) if s != -math.inf)
        for rank, (negative, i) in enumerate(order):
            found.append((min(rank, k), negative, row * len(values) + i))
    return sorted(found)


def slow_choice(score_rows, n, k):
    """The first n places by class, score and index, as a flat list of bool."""
    chosen = {i for _, _, i in places(score_rows, k)[:n]}
    return [i in chosen for i in range(sum(map(len, score_rows)))]


def slow_global(layers, n, at_least, k):
    """The same over several layers, each of which is sure of its own first `at_least`."""
    ordered = []
    for number, score_rows in enumerate(layers):
        for place, (rank, negative, i) in enumerate(places(score_rows, k)):
            ordered.append((-1 if place < at_least else rank, negative, number, i))
    chosen = {(number, i) for *_, number, i in sorted(ordered)[:n]}
    return [[(number, i) in chosen for i in range(sum(map(len, rows)))] for number, rows in enumerate(layers)]


values = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 2.0, -math.inf, math.nan]), st.floats(-10, 10, width=32, allow_nan=False)
)
layers = st.tuples(st.integers(1, 5), st.integers(1, 5)).flatmap(
    lambda shape: st.lists(st.lists(values, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])
)


@given(layers, st.integers(0, 3), st.data())
def test_the_choice_equals_the_twin(score_rows, k, data):
    candidates = sum(s != -math.inf for row in score_rows for s in row)
    n = data.draw(st.integers(0, candidates))
    scores = torch.tensor(score_rows)
    for check in (True, False):
        assert topk_mask(scores, n, check=check, min_per_filter=k).flatten().tolist() == slow_choice(score_rows, n, k)
    with pytest.raises(
        ValueError, match=f"cannot choose {candidates + 1} of {candidates} candidates|of {scores.numel()} s"
    ):
        topk_mask(scores, candidates + 1, min_per_filter=k)


@given(st.lists(layers, min_size=1, max_size=3), st.integers(0, 3), st.integers(0, 2), st.data())
def test_a_choice_over_all_layers_equals_the_twin(given_layers, k, at_least, data):
    given_layers = [[[0.0 if s == -math.inf else s for s in row] for row in rows] for rows in given_layers]
    scores = {str(i): torch.tensor(rows) for i, rows in enumerate(given_layers)}
    least = sum(min(at_least, s.numel()) for s in scores.values())
    n = data.draw(st.integers(least, sum(s.numel() for s in scores.values())))
    masks = global_topk(scores, n, at_least=at_least, min_per_filter=k)
    assert [m.flatten().tolist() for m in masks.values()] == slow_global(given_layers, n, at_least, k)


@given(layers, st.data())
def test_without_a_guard_it_is_the_plain_choice(score_rows, data):
    n = data.draw(st.integers(0, sum(s != -math.inf for row in score_rows for s in row)))
    scores = torch.tensor(score_rows)
    assert torch.equal(topk_mask(scores, n, min_per_filter=0), topk_mask(scores.flatten(), n).view(scores.shape))


def test_a_budget_below_the_filters_gives_one_each_to_those_with_the_largest_scores():
    scores = torch.tensor([[9.0, 8.0], [1.0, 7.0], [5.0, 5.0], [2.0, 3.0]])
    assert topk_mask(scores, 3, min_per_filter=2).int().tolist() == [[1, 0], [0, 1], [1, 0], [0, 0]]
    assert topk_mask(scores, 5, min_per_filter=2).int().tolist() == [[1, 1], [0, 1], [1, 0], [0, 1]]


def test_choices_of_rising_size_are_nested():
    """What Top-KAST's two sets and gradual pruning need."""
    scores = torch.randint(0, 9, (6, 2, 3), generator=torch.Generator().manual_seed(0)).float()
    masks = [topk_mask(scores, n, min_per_filter=2) for n in range(37)]
    assert all(bool((a <= b).all()) for a, b in pairwise(masks))


def test_a_vector_has_no_filters():
    scores = torch.tensor([3.0, 1.0, 2.0])
    assert class_of(scores, 1).tolist() == [1, 1, 1]
    assert choose({"a": scores, "b": torch.zeros(2, 2)}, 3, min_per_filter=1)["a"].tolist() == [True, False, False]


def test_no_host_read_while_there_is_room_for_all_filters():
    mask = topk_mask(torch.empty(4, 5, device="meta"), 8, check=False, min_per_filter=2)
    assert mask.shape == (4, 5)


# -- an exchange of one layer -----------------------------------------------------------------------------------------


def slow_exchange(weights, active, grads, share, k, regrow):
    """The mask after a change, as a flat list of bool, and how many weights were exchanged."""
    width, kept_before = len(weights[0]), sum(map(sum, active))
    sizes = [
        [abs(w) if m else -math.inf for w, m in zip(*rows, strict=True)] for rows in zip(weights, active, strict=True)
    ]
    live = [row for row, flags in enumerate(active) if any(flags)]
    n = min(math.floor(share * kept_before + 1e-9), kept_before - sum(min(k, sum(flags)) for flags in active))
    if not regrow:
        n = min(n, (len(live) if k else len(active)) * width - kept_before)
    kept = slow_choice(sizes, kept_before - n, k)
    free = [
        (-abs(grads[row][i]), row * width + i)
        for row in (live if k else range(len(active)))
        for i in range(width)
        if not (kept[row * width + i] if regrow else active[row][i])
    ]
    grown = {place for _, place in sorted(free)[:n]}
    return [flag or i in grown for i, flag in enumerate(kept)], n


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    k=st.integers(0, 3),
    regrow=st.booleans(),
    share=st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]),
    data=st.data(),
)
def test_an_exchange_equals_the_twin(shape, k, regrow, share, data):
    numbers = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.5, 2.0, 3.0, -4.0])
    rows = st.lists(st.lists(numbers, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0])
    weights, grads = data.draw(rows), data.draw(rows)
    flags = data.draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).filter(any))
    active = [flags[i : i + shape[1]] for i in range(0, len(flags), shape[1])]
    zero = sum(w == 0 for w, flag in zip(itertools.chain(*weights), flags, strict=True) if flag)
    assume(2 * zero <= sum(flags))  # a step says so if most active weights are 0
    layer = nn.Linear(shape[1], shape[0], bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    options = {"drop_fraction": share, "delta_t": 1, "regrow_dropped": regrow, "min_per_filter": k}
    rigl = sparsify(layer, optimizer, method="rigl", sparsity=0.0, total_steps=10**9, **options)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights))
    set_masks(rigl, {"weight": torch.tensor(active)})
    before = layer.weight.detach().clone()
    expected, n = slow_exchange(weights, active, grads, rigl.drop_fraction(1), k, regrow)
    layer.weight.grad = torch.tensor(grads)
    due = rigl.due(rigl.parts[0], 1)
    optimizer.step()
    if due:
        assert rigl.masks["weight"].flatten().tolist() == expected
        both = rigl.masks["weight"] & torch.tensor(active)
        assert torch.equal(layer.weight, before * both), "the change replaces the step, and what grows starts at 0"
    else:
        places = (sum(map(any, active)) if k else shape[0]) * shape[1]
        assert n == 0 or sum(flags) == places, "a step is given up only if there is something to exchange"
        assert rigl.masks["weight"].flatten().tolist() == flags
    assert rigl.parts[0].kept["weight"] == sum(flags)
    assert not (rigl.masks["weight"].any(1) & ~torch.tensor(active).any(1)).any() or not k


def test_where_the_guard_leaves_less_to_drop_fewer_are_exchanged():
    """Five weights, of which two filters keep one each: three can go, though a share of 0.9 says four."""
    layer, optimizer, rigl = golden(
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [5.0, 4.0, 3.0, 2.0, 1.0, 0, 0, 0, 0, 0, 0, 0],
        "rigl",
        total_steps=10**9,
        delta_t=1,
        drop_fraction=0.9,
        regrow_dropped=False,
        min_per_filter=1,
    )
    take_step(layer, optimizer, torch.tensor([[0.0] * 4, [0.0, 1.0, 2.0, 3.0], [9.0] * 4]))
    assert rigl.last_update.dropped == rigl.last_update.grown == {"weight": 3}
    # the second filter keeps its only weight, the weakest of all; the third stays empty, whatever its gradient
    assert rigl.masks["weight"].int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_no_step_is_given_up_for_nothing():
    """One weight a filter: nothing can be dropped, so RigL's change, which takes the place of a step, is not due."""
    layer, optimizer, rigl = golden(
        [1, 0, 0, 0] * 3,
        [1.0, 0, 0, 0, 2.0, 0, 0, 0, 3.0, 0, 0, 0],
        "rigl",
        total_steps=100,
        delta_t=1,
        min_per_filter=1,
    )
    take_step(layer, optimizer, torch.ones(3, 4))
    assert rigl.updates == 0
    assert layer.weight[:, 0].tolist() == pytest.approx([0.5, 1.5, 2.5])


def test_a_dense_layer_is_no_reason_to_give_up_a_step():
    """Layer a has one weight in each filter, layer b all of them: neither has anything to exchange."""
    net, optimizer, rigl = golden_pair(
        {"a": [1, 0, 0, 0] * 3, "b": [1] * 12},
        {"a": [1.0] * 12, "b": [1.0] * 12},
        "rigl",
        total_steps=100,
        delta_t=1,
        drop_fraction=0.5,
        min_per_filter=1,
    )
    step_by(net, optimizer, [1.0] * 12, [1.0] * 12)
    assert rigl.updates == 0
    assert net["b"].weight.unique().tolist() == [0.5]


def test_a_method_that_has_nothing_to_drop_says_why():
    net = make_net()
    with pytest.warns(
        UserWarning, match="at sparsity 0.9 the filters keep all weights with min_per_filter=2; give a lower"
    ):
        sparsify(net, sgd(net), method="rigl", sparsity=0.9, delta_t=3, total_steps=60, min_per_filter=2)
    net = make_net()
    with pytest.warns(UserWarning, match="give a smaller delta_t, for instance 2"):
        sparsify(net, sgd(net), method="set", sparsity=0.7, delta_t=100, total_steps=60)


def test_sign_split_spares_the_strongest_of_a_filter():
    weights = [0.1, 0, 0, 0, -0.2, 0, 0, 0, 5.0, 4.0, -3.0, -2.0]
    layer, optimizer, found = golden(
        [1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1],
        weights,
        "set",
        delta_t=1,
        drop_fraction=0.7,
        sign_split=True,
        min_per_filter=1,
    )
    take_step(layer, optimizer)
    # of the three positive ones and of the three negative ones floor(2/3 n) = 1 or 2 go, but not 0.1 and not -0.2
    assert found.masks["weight"][:, 0].tolist() == [True, True, True]
    assert int(found.masks["weight"].sum()) == 6
    assert found.last_update.dropped["weight"] == found.last_update.grown["weight"] > 0


# -- every method, over real steps ------------------------------------------------------------------------------------

GUARDED = [info for info in list_methods() if "min_per_filter" in info.defaults]
guarded = pytest.mark.parametrize("info", GUARDED, ids=lambda info: info.name)
FIXED = ("static", "magnitude", "snip", "grasp", "synflow")
DENSE_AT_TIMES = ("ac-dc", "gmp", "granet", "lt", "mest")  #: with more weights than at the end


def of_filters(mask):
    """How many weights each filter has."""
    return mask.flatten(1).sum(1)


def filters_with_weights(masks):
    return {name: of_filters(mask) > 0 for name, mask in masks.items()}


def test_who_takes_it_and_with_what_default():
    assert {info.name for info in list_methods() if info.defaults.get("min_per_filter") == 0} == set(FIXED)
    assert {info.name for info in list_methods()} - {info.name for info in GUARDED} == {
        "nm", "sr-ste", "srigl", "str", "chex", "chase",
    }  # fmt: skip


@guarded
@pytest.mark.parametrize("value", [-1, True, 1.5, "1", None])
def test_only_whole_numbers_from_0_on(info, value):
    with pytest.raises(ValueError, match=r"min_per_filter must be a whole number of at least 0, got"):
        attach(info, make_net(), sgd(make_net()), min_per_filter=value)


@guarded
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(
    ("distribution", "sparsity"), [("auto", 0.75), ("global", 0.75), ("erk", 0.9), ("uniform", 0.95)]
)
def test_filters_keep_weights_in_every_step(info, k, distribution, sparsity):
    """25 filters share 56, 22 or 11 weights: enough for two each, too few for one each."""
    if "m" in info.defaults:
        distribution, sparsity = "uniform", 0.5
    net = make_net()
    optimizer = sgd(net)
    found = attach(info, net, optimizer, sparsity=sparsity, distribution=distribution, min_per_filter=k)
    together = found.distribution == "global"
    first = filters_with_weights(found.masks)
    for t, batch in enumerate(make_batches(16), 1):
        one_step(net, optimizer, batch)
        kept = found.parts[0].kept
        assert kept == {name: int(m.sum()) for name, m in found.masks.items()}
        assert sum(kept.values()) == round((1 - found.target_sparsity(t)) * 222), "counts stay exact"
        rows = {name: of_filters(mask) for name, mask in found.masks.items()}
        if together and sum(kept.values()) >= 25 * k:
            assert all(bool((r >= k).all()) for r in rows.values())
        elif not together:
            for name, row in rows.items():
                if info.name not in ("dsr", "snfs") and found.options.__dict__.get("block") is None:
                    assert int((row > 0).sum()) == min(len(row), kept[name]), "as many filters as the budget allows"
                    assert kept[name] < k * len(row) or bool((row >= k).all())
        if info.name not in (*DENSE_AT_TIMES, "top-kast"):
            now = filters_with_weights(found.masks)
            assert all(torch.equal(first[name], now[name]) for name in first), "none runs empty, in none grows a weight"
    room = 222 * (1 - sparsity) > 2 * 25 * (k if info.name == "block-rigl" else 1)  # 28 blocks of two, or 56 weights
    assert found.updates > 0 or info.kind == "static" or not room, "there is something to see"
    found.verify()


@guarded
def test_it_is_the_guard_that_keeps_them(info):
    """Without it the same run empties a filter: every method's own, or that of its first masks."""
    if info.name in ("nm-rigl", "deepr", "static", "magnitude", "snip", "grasp", "synflow", "set", "set-itop"):
        pytest.skip("weights in every group, a choice before training, or too short a run to tell")
    lost = 0
    for k in (0, 1):
        net = make_net()
        optimizer = sgd(net)
        found = attach(info, net, optimizer, sparsity=0.7 if info.defaults.get("block") else 0.8, min_per_filter=k)
        for batch in make_batches(16):
            one_step(net, optimizer, batch)
        empty = sum(int((~alive).sum()) for alive in filters_with_weights(found.masks).values())
        lost = empty if k == 0 else lost
    assert lost > 0
    assert empty == 0


@pytest.mark.parametrize("method", ["set", "gmp", "block-rigl"])
def test_a_filter_keeps_a_whole_block(method):
    """Blocks of two filters by one input: 12 and 10 filters make 6 and 5 rows of blocks; 3 filters stay dense."""
    net = make_net()
    optimizer = sgd(net)
    options = {"t_start": 0.0, "t_end": 0.2} if method == "gmp" else {}
    found = sparsify(
        net,
        optimizer,
        method=method,
        sparsity=0.8,
        distribution="uniform",
        block=(2, 1),
        delta_t=3,
        total_steps=60,
        **options,
    )
    for batch in make_batches(14):
        one_step(net, optimizer, batch)
        for mask in found.masks.values():
            assert is_blocks(mask, (2, 1))
            assert bool((of_filters(mask) > 0).all()), "7 and 12 blocks for 6 and 5 rows of blocks"
    assert found.updates > 0
    assert sum(found.parts[0].kept.values()) == 2 * round(0.2 * 192 / 2)


@pytest.mark.parametrize("distribution", ["erk", "global"])
def test_several_optimizers(distribution):
    net = make_net()
    optimizers = [sgd(net[0]), sgd(nn.ModuleList([net[2], net[4]]))]
    found = sparsify(
        net,
        optimizers,
        method="rigl",
        sparsity=0.6,
        distribution=distribution,
        delta_t=3,
        total_steps=60,
        drop_fraction=0.9,
    )
    first = filters_with_weights(found.masks)
    assert sum(int(alive.sum()) for alive in first.values()) == 25
    for x, y in make_batches(10):
        loss_fn(net(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        now = filters_with_weights(found.masks)
        assert all(torch.equal(first[name], now[name]) for name in first)
    assert found.updates == 6, "three of each optimizer"


@pytest.mark.parametrize("method", ["rigl", "mest", "granet", "deepr"])
def test_a_state_from_before_the_guard_loads_and_goes_on(method):
    """Its empty filters stay empty, the others are guarded from now on."""
    info = next(row for row in list_methods() if row.name == method)
    net = make_net()
    optimizer = sgd(net)
    found = attach(info, net, optimizer, sparsity=0.5, min_per_filter=0)
    assert found.parts[0].kept["0.weight"] % 6, "one filter is not full"
    full, rest = divmod(found.parts[0].kept["0.weight"], 6)  # in the first filters, the last of which is not full
    set_masks(found, {**copy_masks(found), "0.weight": (torch.arange(72) < 6 * full + rest).view(12, 6)})
    saved = found.state_dict()
    del saved["min_per_filter"]
    with torch.no_grad():
        net[0].weight[full] *= 1e-6  # the weakest weights of all
    found.remove()
    resumed = attach(info, net, optimizer, sparsity=0.5, init=False)
    with pytest.warns(
        UserWarning, match="saved with min_per_filter=0, the sparsifier has 1: .* give min_per_filter=0 to"
    ):
        resumed.load_state_dict(saved)
    resumed.apply()
    for batch in make_batches(9):
        one_step(net, optimizer, batch)
    assert resumed.updates > saved["updates"]
    assert (of_filters(resumed.masks["0.weight"]) > 0).tolist() == [i <= full for i in range(12)]
