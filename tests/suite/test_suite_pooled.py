"""The pooled difference against brute force: the formula written out again, and its coverage in simulated tables."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from s2sam.report.stats import t_interval
from s2sam.suite.pooled import pooled_difference

cells_of = st.lists(st.lists(st.integers(-300, 300).map(float), min_size=1, max_size=5), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(cells_of, st.sampled_from([0.9, 0.95]), st.integers(1, 4))
def test_it_is_the_formula(cells, level, comparisons):
    found = pooled_difference(cells, level=level, comparisons=comparisons)
    means = [np.mean(cell) for cell in cells]
    freedom = sum(len(cell) - 1 for cell in cells)
    assert found.mean == pytest.approx(np.mean(means), abs=1e-9)
    assert (found.freedom, found.cells) == (freedom, len(cells))
    residuals = np.concatenate([np.array(cell) - np.mean(cell) for cell in cells])
    if freedom == 0 or np.allclose(residuals, 0):
        assert found.interval is None
        return
    variance = (residuals**2).sum() / freedom
    error = np.sqrt(sum(variance / len(cell) for cell in cells)) / len(cells)
    low, high = stats.t.interval(1 - (1 - level) / comparisons, freedom, np.mean(means), error)
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high))


def test_one_cell_is_students_interval():
    values = [0.3, -0.1, 0.7, 0.2]
    alone, pooled = t_interval(values), pooled_difference([values])
    assert (pooled.interval.low, pooled.interval.high) == pytest.approx((alone.low, alone.high))


def test_a_shift_of_a_cell_moves_the_mean_and_nothing_else():
    cells = [[0.1, 0.4, 0.2], [0.0, 0.3]]
    before, after = pooled_difference(cells), pooled_difference([cells[0], [v + 1 for v in cells[1]]])
    assert after.mean == pytest.approx(before.mean + 0.5)
    assert after.deviation == pytest.approx(before.deviation)
    assert after.interval.half_width == pytest.approx(before.interval.half_width)


def test_it_covers_the_truth_as_often_as_it_says():
    rng, effects, hits = random.Random(0), (0.5, -1.0, 2.0, 0.0), 0
    for _ in range(1000):
        cells = [[rng.gauss(effect, 1.0) for _ in range(n)] for effect, n in zip(effects, (2, 3, 3, 5), strict=True)]
        hits += pooled_difference(cells).interval.contains(statistics.mean(effects))
    assert 930 <= hits <= 970


def linked_tables(correlation, repeats=600):
    """Tables of 6 cells and 3 seeds without effects, in which the cells share a part of each seed's difference."""
    rng = random.Random(1)
    for _ in range(repeats):
        shared = [rng.gauss(0, correlation**0.5) for _ in range(3)]
        yield [[s + rng.gauss(0, (1 - correlation) ** 0.5) for s in shared] for _ in range(6)]


def test_over_the_seeds_it_covers_also_where_seeds_link_the_cells():
    found = [pooled_difference(cells) for cells in linked_tables(0.5)]
    assert sum(p.interval.contains(0.0) for p in found) < 0.8 * len(found)
    assert sum(p.over_seeds.contains(0.0) for p in found) > 0.92 * len(found)
    assert statistics.median(p.correlation for p in found) == pytest.approx(0.4, abs=0.15)
    assert abs(statistics.median(pooled_difference(cells).correlation for cells in linked_tables(0.0))) < 0.1
    assert sum(p.shows != 0 for p in found) < 0.08 * len(found)


def test_cells_of_different_length_have_no_interval_over_the_seeds():
    found = pooled_difference([[0.1, 0.4, 0.2], [0.0, 0.3]])
    assert (found.over_seeds, found.correlation, found.shows) == (None, None, 0)


def test_without_two_seeds_there_is_no_interval():
    found = pooled_difference([[0.1], [0.3]])
    assert (found.mean, found.interval, found.deviation, found.shows) == (pytest.approx(0.2), None, None, 0)
    assert pooled_difference([[0.1, 0.1], [0.3, 0.3]]).interval is None
    assert pooled_difference([[0.1, 0.1001], [0.3, 0.3]], grain=0.01).interval is None
    with pytest.raises(ValueError, match="no values"):
        pooled_difference([])


def test_what_it_shows():
    assert pooled_difference([[1.0, 1.1], [0.9, 1.0]]).shows == 1
    assert pooled_difference([[-1.0, -1.1], [-0.9, -1.0]]).shows == -1
    assert pooled_difference([[1.0, -1.1], [0.9, -1.0]]).shows == 0
