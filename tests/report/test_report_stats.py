"""Golden values worked out by hand, and the properties an honest comparison must have."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2sam.report.stats import (
    binomial_error,
    deviation,
    mean,
    median_interval,
    paired_difference,
    t_interval,
)

# t quantiles from the printed tables (two-sided 95 %): one, two and four degrees of freedom
T_95 = {1: 12.7062, 2: 4.30265, 4: 2.77645}
finite = st.floats(-1, 1, allow_nan=False)


def test_mean_and_deviation_by_hand():
    assert mean([2.0, 4.0, 9.0]) == 5.0
    assert deviation([2.0, 4.0, 9.0]) == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert deviation([3.0]) is None
    with pytest.raises(ValueError, match="no values"):
        mean([])


@pytest.mark.parametrize(("values", "df"), [([1.0, 3.0], 1), ([1.0, 2.0, 3.0], 2), ([0.0, 1.0, 2.0, 3.0, 4.0], 4)])
def test_t_interval_by_hand(values, df):
    interval = t_interval(values)
    half = T_95[df] * deviation(values) / math.sqrt(len(values))
    assert interval.half_width == pytest.approx(half, rel=1e-5)
    assert (interval.low + interval.high) / 2 == pytest.approx(mean(values))


def test_paired_difference_golden():
    # differences .02, .01, .03: mean .02, sd .01, half width 4.30265 * .01 / sqrt(3) = .0248414
    difference = paired_difference({0: 0.92, 1: 0.93, 2: 0.97}, {2: 0.94, 0: 0.90, 1: 0.92})
    assert difference.per_seed == pytest.approx({0: 0.02, 1: 0.01, 2: 0.03})
    assert difference.mean == pytest.approx(0.02)
    assert difference.deviation == pytest.approx(0.01)
    assert difference.interval.low == pytest.approx(0.02 - 0.0248414, abs=1e-6)
    assert difference.n == 3
    assert difference.shows == 0  # the interval reaches below 0


def test_four_comparisons_need_a_wider_interval():
    # two degrees of freedom, a = .05 / 4 two-sided: t_{.99375, 2} = 8.8602, as t_2 is (2p - 1) / sqrt(2p (1 - p))
    p = 1 - 0.05 / 8
    quantile = (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    wide = paired_difference({0: 0.92, 1: 0.93, 2: 0.97}, {0: 0.9, 1: 0.92, 2: 0.94}, comparisons=4)
    assert quantile == pytest.approx(8.8602, abs=1e-4)
    assert wide.simultaneous.half_width == pytest.approx(quantile * 0.01 / math.sqrt(3))
    assert wide.interval.half_width == pytest.approx(0.0248414, abs=1e-6)


def test_a_difference_can_be_shown_alone_and_not_among_many():
    treated, reference = {0: 0.920, 1: 0.930, 2: 0.947}, {0: 0.90, 1: 0.91, 2: 0.92}  # .020 .020 .027
    assert paired_difference(treated, reference).shows == 1
    assert paired_difference(treated, reference, comparisons=10).shows == 0
    assert paired_difference(reference, treated).shows == -1


def test_unmatched_seeds_are_refused():
    with pytest.raises(ValueError, match="seeds 0, 1 against seeds 0, 2 cannot be paired"):
        paired_difference({0: 1.0, 1: 1.0}, {0: 1.0, 2: 1.0})
    with pytest.raises(ValueError, match=r"\(none\)"):
        paired_difference({}, {})


def test_one_seed_gives_no_interval():
    difference = paired_difference({7: 0.5}, {7: 0.25})
    assert (difference.mean, difference.interval, difference.simultaneous, difference.shows) == (0.25, None, None, 0)


def test_equal_differences_do_not_claim_certainty():
    difference = paired_difference({0: 0.91, 1: 0.92, 2: 0.93}, {0: 0.90, 1: 0.91, 2: 0.92})
    assert difference.mean == pytest.approx(0.01)
    assert difference.interval is None
    assert difference.shows == 0


@pytest.mark.parametrize(("n", "low", "high"), [(6, 1, 6), (9, 2, 8), (20, 6, 15)])
def test_median_interval_matches_the_published_ranks(n, low, high):
    assert (median_interval(range(1, n + 1)).low, median_interval(range(1, n + 1)).high) == (low, high)


def test_median_interval_of_too_few_values():
    assert median_interval([1, 2, 3, 4, 5]) is None


def test_binomial_error_by_hand():
    assert binomial_error(0.9, 900) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="accuracy in"):
        binomial_error(1.5, 10)
    with pytest.raises(ValueError, match="one image"):
        binomial_error(0.5, 0)


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=8), st.integers(1, 20))
def test_swapping_the_arms_mirrors_the_interval(pairs, comparisons):
    a, b = ({i: pair[k] for i, pair in enumerate(pairs)} for k in (0, 1))
    ab, ba = (paired_difference(x, y, comparisons=comparisons) for x, y in ((a, b), (b, a)))
    assert ab.mean == pytest.approx(-ba.mean)
    assert ab.shows == -ba.shows
    if ab.interval is not None:
        assert ab.interval.low == pytest.approx(-ba.interval.high)
        assert ab.simultaneous.half_width >= ab.interval.half_width * (1 - 1e-12)
        assert ab.interval.contains(ab.mean)


@given(st.lists(finite, min_size=2, max_size=8), finite)
def test_shifting_both_arms_changes_nothing(values, shift):
    a = dict(enumerate(values))
    b = {i: v + shift for i, v in a.items()}
    difference = paired_difference(b, a)
    assert difference.mean == pytest.approx(shift, abs=1e-9)
    assert difference.interval is None or difference.interval.contains(shift)


@pytest.mark.parametrize("options", [{"level": 1.0}, {"level": 0.0}, {"comparisons": 0}])
def test_nonsense_levels_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        t_interval([1.0, 2.0], **options)
