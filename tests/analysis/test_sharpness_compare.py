"""Runs are ranked in words at matched train loss only, by values that converged and differ by more than their error."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2sam.analysis.sharpness import INVARIANT, SCALED
from s2sam.analysis.sharpness_compare import NAMES, match, quantile, rank, reach, words

AGREE = "the scale-invariant measures agree that b is the flattest"
DISAGREE = "the scale-invariant measures do not agree on a flattest run"


def row(run, train_loss, size, *, converged=True, error=0.0, sd=0.0):
    return {
        "run": run, "train_loss": train_loss, "worst_adaptive": {"value": 3 * size},
        "average_adaptive": {"value": 4 * size, "sd": sd, "each": [4 * size] * 5},
        "lambda_w2": {"value": size, "converged": converged, "error": error},
        "trace_w2_n": {"value": 2 * size, "error": error, "terms": 10},
    }  # fmt: skip


def test_unmatched_runs_are_not_ranked():
    lines = words([row("a", 0.5, 1.0), row("b", 0.4, 9.0)], 0.1)
    assert len(lines) == 1
    assert lines[0].startswith("train losses do not match: b's is 20 % below a's, and 10 % is the tolerance")
    assert "flattest" not in lines[0] and "9" not in lines[0]
    assert match([row("a", 0.5, 1.0), row("b", 0.4, 9.0)], 0.2).matched
    assert words([row("a", 0.5, 1.0)], 0.1) == []
    assert match([row("a", 0.0, 1.0), row("b", 0.0, 9.0)], 0.0).matched


@pytest.mark.parametrize("loss", [None, math.inf, math.nan])
def test_a_run_without_a_finite_train_loss_matches_none_and_is_named(loss):
    rows = [row("a", 0.5, 1.0), row("b", loss, 2.0), row("c", 0.5, 3.0)]
    assert not match(rows, 1.0).matched
    (line,) = words(rows, 1.0)
    assert line.startswith("no finite train loss was measured of b,") and "no run is called flatter" in line


def test_matched_runs_are_ranked_by_each_measure():
    lines = words([row("a", 0.5, 2.0), row("b", 0.49, 1.0), row("c", 0.5, 4.0)], 0.1)
    assert "train losses match: they lie within 2.0 %" in lines[0]
    assert lines[1:] == [
        "adaptive worst case: b 3 < a 6 < c 12", "adaptive average: b 4 < a 8 < c 16",
        "lambda_max ||w||^2, in units of ||w||, which a rescaled layer changes: b 1 < a 2 < c 4",
        "trace ||w||^2 / n, in units of ||w||, which a rescaled layer changes: b 2 < a 4 < c 8", AGREE,
    ]  # fmt: skip


def test_verdicts_go_by_the_scale_invariant_measures_only():
    assert set(NAMES) == {*INVARIANT, *SCALED} and not set(INVARIANT) & set(SCALED)
    rows = [row("a", 0.5, 2.0), row("b", 0.5, 1.0)]
    for other in ({"value": 90.0, "converged": True}, {"value": 90.0, "converged": False}, None):
        assert words([rows[0], {**rows[1], "lambda_w2": other, "trace_w2_n": None}], 0.1)[-1] == AGREE
    for name in INVARIANT:
        assert words([rows[0], {**rows[1], name: {"value": 70.0}}], 0.1)[-1] == DISAGREE
        assert words([rows[0], {**rows[1], name: {"value": None}}], 0.1)[-1] == DISAGREE


def test_differences_within_the_error_and_bounds_decide_nothing():
    near = [row("a", 0.5, 2.0, error=0.4, sd=2.0), row("b", 0.5, 1.5, error=0.4, sd=2.0)]
    lines = words(near, 0.1)
    assert lines[1:3] == ["adaptive worst case: b 4.5 < a 6", "adaptive average: b 6 ~ a 8"]
    assert lines[3].endswith(": b 1.5 ~ a 2") and lines[-1] == DISAGREE
    bound = [row("a", 0.5, 2.0), row("b", 0.5, 1.0, converged=False)]
    assert words(bound, 0.1)[3].endswith(": not ranked, as there is no reliable value of b")
    missing = [row("a", 0.5, 2.0), {**row("b", 0.5, 1.0), "trace_w2_n": None}]
    assert rank(missing, "trace_w2_n").unreliable == ("b",)


def test_a_small_difference_is_none_also_without_an_error():
    def apart(share):
        rows = [{"run": "a", "x": {"value": 1.0 + share}}, {"run": "b", "x": {"value": 1.0}}]
        return rank(rows, "x").apart

    assert apart(7e-14) == apart(0.1) == (False,) and apart(0.2) == (True,)
    assert words([row("a", 0.5, 2.0), row("b", 0.5, 2.0 - 7e-14)], 0.1)[-1] == DISAGREE


def test_few_random_terms_count_by_students_quantile():
    few = [{"run": run, "x": {"value": value, "error": 1.0, "terms": 2}} for run, value in (("a", 10.0), ("b", 14.0))]
    assert rank(few, "x").apart == (False,)  # 2 standard errors are 2.8
    many = [{**one, "x": {**one["x"], "terms": 1000}} for one in few]
    assert rank(many, "x").apart == (True,)
    assert reach({"value": 1.0, "sd": 3.0, "each": [0.0] * 9}) == pytest.approx(2.306, abs=1e-3)
    assert reach({"value": -40.0, "sd": None, "each": [-40.0]}) == 4.0


@given(terms=st.integers(2, 200), error=st.floats(0, 1e3), value=st.floats(-1e3, 1e3))
def test_more_terms_reach_less_far_and_never_below_the_least(terms, error, value):
    one = {"value": value, "error": error, "terms": terms}
    assert reach({**one, "terms": terms + 1}) <= reach(one)
    assert reach(one) >= 0.1 * abs(value) and quantile(terms) > 1.95
