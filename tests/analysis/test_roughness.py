"""Ra, raw and without the bowl: published anchors and the properties that define them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2sam.analysis.roughness import clipped, mean_and_spread, ra_detrended, ra_raw, roughness


def square(n):
    t = np.linspace(-1, 1, n)
    return np.meshgrid(t, t, indexing="ij")


def test_raw_measures_the_height_of_the_bowl_and_detrended_the_ripple():
    x, y = square(51)
    bowl, ripple = 3 * (x**2 + y**2), 0.1 * np.sin(20 * x) * np.sin(20 * y)
    assert (round(ra_raw(bowl), 4), round(ra_raw(bowl + ripple), 4)) == (1.0888, 1.0892)
    assert ra_detrended(bowl) < 1e-12
    assert ra_detrended(bowl + ripple) == pytest.approx(0.040, abs=5e-4)


@pytest.mark.parametrize(
    ("points", "profile", "areal"), [(21, 0.2806, 0.383), (51, 0.2669, 0.363), (201, 0.2591, 0.353)]
)
def test_raw_depends_on_the_grid(points, profile, areal):
    x, y = square(points)
    assert ra_raw(7 * x[:, 0] ** 2) == pytest.approx(7 * profile, abs=7 * 5e-5)
    assert ra_raw(x**2 + y**2) == pytest.approx(areal, abs=5e-4)


def test_the_limit_of_a_parabola():
    assert ra_raw(np.linspace(-1, 1, 20_001) ** 2) == pytest.approx(4 / (9 * math.sqrt(3)), abs=1e-4)


coefficients = st.lists(st.floats(-5, 5), min_size=6, max_size=6)


@settings(max_examples=30, deadline=None)
@given(c=coefficients, n=st.integers(4, 9), m=st.integers(4, 9), seed=st.integers(0, 99))
def test_no_quadratic_changes_what_is_left_of_a_grid(c, n, m, seed):
    z = np.random.default_rng(seed).normal(size=(n, m))
    x, y = np.meshgrid(np.linspace(-3, 1, n), np.linspace(0, 9, m), indexing="ij")  # any even spacing
    bowl = c[0] + c[1] * x + c[2] * y + c[3] * x**2 + c[4] * x * y + c[5] * y**2
    assert ra_detrended(z + bowl) == pytest.approx(ra_detrended(z), rel=1e-6, abs=1e-9)
    assert ra_detrended(z) > 1e-3
    line = z[0] + c[0] + c[1] * y[0] + c[2] * y[0] ** 2
    assert ra_detrended(line) == pytest.approx(ra_detrended(z[0]), rel=1e-6, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(shift=st.floats(-10, 10), scale=st.floats(-10, 10), seed=st.integers(0, 99))
def test_ra_ignores_a_shift_and_grows_with_the_scale(shift, scale, seed):
    z = np.random.default_rng(seed).normal(size=(5, 6))
    for measure in (ra_raw, ra_detrended):
        assert measure(shift + scale * z) == pytest.approx(abs(scale) * measure(z), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("grid", [[], 1.0, np.zeros((2, 2, 2)), np.zeros((0, 5)), [1.0, math.nan], [1.0, math.inf]])
def test_what_is_no_grid_is_refused(grid):
    for measure in (ra_raw, ra_detrended):
        with pytest.raises(ValueError, match=r"at least one point|not finite"):
            measure(grid)


def test_a_quadratic_through_three_points_says_nothing():
    with pytest.raises(ValueError, match="at least 4 points along each side, got 7 x 3"):
        ra_detrended(np.random.default_rng(0).normal(size=(7, 3)))
    assert ra_detrended([0.0, 1.0, 0.0, 0.0]) > 0.1


def test_clipping_counts_what_it_replaces_and_leaves_its_input_alone():
    grid = np.array([[1.0, math.nan], [math.inf, 4.0], [-math.inf, 2.0]])
    found, count = clipped(grid)
    assert found.tolist() == [[1.0, 4.0], [4.0, 4.0], [4.0, 2.0]]
    assert count == 3
    assert np.isnan(grid[0, 1])
    assert clipped(grid, ceiling=1.5)[0].max() == 1.5
    with pytest.raises(ValueError, match="take a smaller span"):
        clipped([math.nan, math.inf])


def test_roughness_of_several_grids():
    grids = np.random.default_rng(0).normal(size=(3, 6, 6))
    grids[1, 0, 0] = math.nan
    found = roughness(grids)
    assert found["ra_raw"] == [ra_raw(grids[0]), ra_raw(clipped(grids[1])[0]), ra_raw(grids[2])]
    assert found["ra_detrended_mean"] == pytest.approx(np.mean(found["ra_detrended"]))
    assert found["ra_detrended_spread"] == pytest.approx(np.std(found["ra_detrended"], ddof=1))
    assert found["clipped"] == 1
    assert mean_and_spread([2.0]) == (2.0, None)
