"""Counts that fall from change to change: exact totals, no layer gains a weight, the target's own counts at the end."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2sam.sparse.budget import counts, descend, thin

SHAPES = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.integers(2, 12), st.integers(2, 12)), min_size=1, max_size=6
)


@settings(max_examples=200, deadline=None)
@given(
    SHAPES,
    st.lists(st.floats(0, 0.7), min_size=1, max_size=8),
    st.sampled_from(["uniform", "er", "erk", "uniform-first-dense"]),
)
def test_totals_are_exact_and_no_layer_gains_a_weight(shapes, sparsities, distribution):
    sparsities = sorted(sparsities)
    path = descend(shapes, sparsities, distribution)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dense = next(iter(sizes.values())) if distribution == "uniform-first-dense" else 0
    assert path[-1] == counts(shapes, sparsities[-1], distribution)
    for s, kept in zip(sparsities, path, strict=True):
        assert all(1 <= kept[name] <= sizes[name] for name in sizes)
        wanted = dense + round((1 - s) * (sum(sizes.values()) - dense))
        assert sum(kept.values()) == max(wanted, sum(path[-1].values()))
    for before, after in pairwise(path):
        assert all(after[name] <= before[name] for name in sizes)


def test_every_layer_is_at_the_same_share_of_its_own_target():
    shapes = {"a": (100, 10), "b": (100, 90), "c": (10, 10)}
    half, target = descend(shapes, [0.4, 0.8], {"a": 0.5, "c": 0.0})
    assert target == {"a": 500, "b": 2020 - 600, "c": 100}
    assert half == {"a": 750, "b": 9000 - (9000 - 1420) // 2, "c": 100}


def test_dense_all_the_way():
    assert descend({"a": (2, 3)}, [0.0, 0.0]) == [{"a": 6}, {"a": 6}]


@pytest.mark.parametrize("sparsities", [[], [0.5, 0.4]])
def test_a_path_rises(sparsities):
    with pytest.raises(ValueError, match="must rise to the target"):
        descend({"a": (2, 3)}, sparsities)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 500), min_size=1), st.floats(0, 1))
def test_thinned_layers_give_up_the_same_share(kept, share):
    left = thin(kept, share)
    assert all(1 <= left[name] <= n for name, n in kept.items())
    assert sum(left.values()) == max(len(kept), round(share * sum(kept.values())))
    if min(kept.values()) * share >= 1:
        assert all(abs(left[name] - share * n) <= 1 for name, n in kept.items())
