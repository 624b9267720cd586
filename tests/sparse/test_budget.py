"""Budgets: golden densities, exact totals, bounds, monotony, errors that name what is feasible."""

import math
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from s2sam.sparse.budget import counts, densities

SHAPES = {"a": (16, 3, 3, 3), "b": (32, 16, 3, 3), "c": (64, 32, 3, 3), "fc": (10, 64)}
N = sum(math.prod(s) for s in SHAPES.values())
GLOBAL = ("uniform", "er", "erk")

shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]), st.sampled_from([1, 3, 5])),
    ),
    min_size=1,
    max_size=8,
).map(lambda found: {f"layer{i}": shape for i, shape in enumerate(found)})


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [(0.5, (1, 0.825120, 0.389640, 1)), (0.8, (1, 0.281731, 0.133040, 1)), (0.9, (0.566298, 0.114675, 0.054152, 1))],
)
def test_erk_golden_densities(sparsity, expected):
    assert list(densities(SHAPES, sparsity).values()) == pytest.approx(list(expected), abs=1e-6)
    assert sum(counts(SHAPES, sparsity).values()) == round((1 - sparsity) * N)


def test_er_uses_fan_in_and_out_only():
    found = densities(SHAPES, 0.99, "er")
    raw = {"a": 19 / 48, "b": 48 / 512, "c": 96 / 2048, "fc": 74 / 640}
    eps = found["c"] / raw["c"]
    assert {k: d / eps for k, d in found.items() if d < 1} == pytest.approx(
        {k: raw[k] for k, d in found.items() if d < 1}
    )
    assert sum(d * math.prod(SHAPES[k]) for k, d in found.items()) == pytest.approx(0.01 * N)


def test_power_scale_zero_is_uniform_and_larger_ones_push_weights_into_small_layers():
    assert densities(SHAPES, 0.9, "erk", power_scale=0.0) == pytest.approx(densities(SHAPES, 0.9, "uniform"))
    assert densities(SHAPES, 0.95, power_scale=2.0)["c"] < densities(SHAPES, 0.95)["c"]


def test_uniform_conventions():
    kept = counts(SHAPES, 0.9, "uniform-first-dense")
    assert kept["a"] == 432
    assert sum(kept.values()) - 432 == round(0.1 * (N - 432))
    kept = counts(SHAPES, 0.9, "uniform-first-last-dense")
    assert (kept["a"], kept["fc"]) == (432, 640)
    assert kept["b"] == pytest.approx(460.8, abs=1)
    assert sum(counts(SHAPES, 0.9, "uniform").values()) == round(0.1 * N)


def test_a_single_layer_that_is_first_and_last_is_dense():
    assert counts({"a": (4, 5)}, 0.5, "uniform-first-dense") == {"a": 20}


def test_map_fixes_layers_and_meets_the_global_target():
    kept = counts(SHAPES, 0.9, {"fc": 0.5, "^a$": 0.0})
    assert (kept["a"], kept["fc"]) == (432, 320)
    assert sum(kept.values()) == round(0.1 * N)
    free = densities(SHAPES, 0.9, {"fc": 0.5, "^a$": 0.0})
    assert free["b"] / free["c"] == pytest.approx((32 + 16 + 6) / 4608 / ((64 + 32 + 6) / 18432))


def test_a_map_of_all_layers_must_agree_with_the_target():
    everything = dict.fromkeys(SHAPES, 0.75)
    assert counts(SHAPES, 0.75, everything)["fc"] == 160
    with pytest.raises(ValueError, match=r"largest feasible sparsity is 0\.7[45]\d* and the smallest is 0\.75"):
        counts(SHAPES, 0.9, everything)


@given(shapes, st.floats(0, 0.999), st.sampled_from(GLOBAL))
def test_totals_are_exact_and_within_bounds(found, sparsity, distribution):
    total = sum(math.prod(s) for s in found.values())
    target = round((1 - sparsity) * total)
    assume(target >= len(found))
    kept = counts(found, sparsity, distribution)
    assert sum(kept.values()) == target
    assert all(1 <= kept[name] <= math.prod(shape) for name, shape in found.items())
    dense = densities(found, sparsity, distribution)
    assert all(0 <= d <= 1 + 1e-12 for d in dense.values())
    assert sum(d * math.prod(found[k]) for k, d in dense.items()) == pytest.approx((1 - sparsity) * total, abs=1e-6)
    roomy = [k for k, shape in found.items() if dense[k] * math.prod(shape) >= 1]
    assert all(abs(kept[k] - dense[k] * math.prod(found[k])) < len(found) for k in roomy)


@given(shapes, st.floats(0, 0.99), st.floats(0, 0.99), st.sampled_from(GLOBAL))
def test_more_sparsity_never_gives_a_layer_more(found, one, other, distribution):
    low, high = sorted((one, other))
    at_low, at_high = densities(found, low, distribution), densities(found, high, distribution)
    assert all(at_high[name] <= at_low[name] + 1e-9 for name in found)


@settings(max_examples=50)
@given(shapes)
def test_the_largest_feasible_sparsity_that_is_named_is_feasible(found):
    with pytest.raises(ValueError, match="largest feasible sparsity is") as error:
        counts(found, 1.0)
    largest = float(re.search(r"sparsity is ([\d.e-]+)$", str(error.value)).group(1))
    assert min(counts(found, largest).values()) >= 1


@pytest.mark.parametrize(
    ("sparsity", "distribution", "message"),
    [
        (1.2, "erk", "between 0 and 1"),
        (-0.1, "erk", "between 0 and 1"),
        (float("nan"), "erk", "between 0 and 1"),
        (0.9, "erkk", "did you mean 'erk'"),
        (0.9, {"fcc": 0.5}, "unknown layer 'fcc'; did you mean 'fc'"),
        (0.9, {"fc": 1.0}, "at least 0 and less than 1"),
        (0.9, {"fc": 0.5, "f": 0.6}, "two patterns give layer 'fc'"),
        (0.9, {"fc": 0.0, "c": 0.0}, "largest feasible sparsity is 0.2089"),
        (0.1, {"c": 0.9}, "the smallest is 0.68"),
        (0.9999, "uniform", "largest feasible sparsity is 0.999834"),
    ],
)
def test_bad_budgets_get_one_sentence(sparsity, distribution, message):
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.", ".")):
        counts(SHAPES, sparsity, distribution)


def test_no_layers():
    with pytest.raises(ValueError, match="no layer"):
        counts({}, 0.5)
