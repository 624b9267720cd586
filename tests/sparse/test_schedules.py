"""Schedules at their ends and in between."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2sam.sparse.schedules import Constant, CosineDrop, Cubic


def test_constant():
    assert [Constant(0.3)(t) for t in (0, 10**9)] == [0.3, 0.3]


def test_cubic_hand_values_and_exact_ends():
    s = Cubic(0.05, 0.9, start=100, end=300)
    assert s(0) == s(100) == 0.05
    assert s(200) == pytest.approx(0.9 - 0.85 / 8)
    assert s(300) == s(10**6) == 0.9


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 50), st.integers(1, 200))
def test_cubic_is_monotone_and_ends_exactly(initial, final, start, length):
    s = Cubic(initial, final, start, start + length)
    path = [s(t) for t in range(start + length + 2)]
    direction = 1 if final >= initial else -1
    assert all(direction * (b - a) >= -1e-12 for a, b in pairwise(path))
    assert path[start + length] == final


@given(st.floats(0, 1), st.integers(1, 1000))
def test_cosine_drop(alpha, t_end):
    f = CosineDrop(alpha, t_end)
    assert f(0) == pytest.approx(alpha)
    assert f(t_end) == f(t_end + 1) == 0.0
    if t_end % 2 == 0:
        assert f(t_end // 2) == pytest.approx(alpha / 2)
    assert all(f(t) == pytest.approx(alpha / 2 * (1 + math.cos(math.pi * t / t_end))) for t in range(0, t_end, 7))


def test_schedules_that_end_before_they_start():
    with pytest.raises(ValueError, match="must end after it starts"):
        Cubic(0.0, 0.9, start=5, end=5)
    with pytest.raises(ValueError, match="must end after step 0"):
        CosineDrop(0.3, 0)
