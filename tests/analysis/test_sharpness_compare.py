"""Runs are ranked in words at matched train loss only, by values that converged and differ by more than their error."""

from __future__ import annotations

from s2sam.analysis.sharpness_compare import match, rank, words


def row(run, train_loss, size, *, converged=True, error=0.0):
    return {
        "run": run, "train_loss": train_loss, "lambda_w2": {"value": size, "converged": converged, "error": error},
        "trace_w2_n": {"value": 2 * size, "error": error}, "worst_adaptive": {"value": 3 * size},
    }  # fmt: skip


def test_unmatched_runs_are_not_ranked():
    lines = words([row("a", 0.5, 1.0), row("b", 0.4, 9.0)], 0.1)
    assert len(lines) == 1
    assert lines[0].startswith("train losses do not match: b's is 20 % below a's, and 10 % is the tolerance")
    assert "flattest" not in lines[0] and "9" not in lines[0]
    assert match([row("a", 0.5, 1.0), row("b", 0.4, 9.0)], 0.2).matched
    assert words([row("a", 0.5, 1.0)], 0.1) == []
    assert match([row("a", 0.0, 1.0), row("b", 0.0, 9.0)], 0.0).matched


def test_matched_runs_are_ranked_by_each_measure():
    lines = words([row("a", 0.5, 2.0), row("b", 0.49, 1.0), row("c", 0.5, 4.0)], 0.1)
    assert "train losses match: they lie within 2.0 %" in lines[0]
    assert lines[1] == "lambda_max ||w||^2: b 1 < a 2 < c 4"
    assert lines[-1] == "the scale-invariant measures agree that b is the flattest"


def test_differences_within_the_error_and_bounds_decide_nothing():
    near = [row("a", 0.5, 2.0, error=0.4), row("b", 0.5, 1.5, error=0.4)]
    assert words(near, 0.1)[1] == "lambda_max ||w||^2: b 1.5 ~ a 2"
    assert words(near, 0.1)[-1] == "the scale-invariant measures do not agree on a flattest run"
    bound = [row("a", 0.5, 2.0), row("b", 0.5, 1.0, converged=False)]
    assert words(bound, 0.1)[1] == "lambda_max ||w||^2: not ranked, as there is no reliable value of b"
    assert words(bound, 0.1)[-1].endswith("do not agree on a flattest run")
    missing = [row("a", 0.5, 2.0), {**row("b", 0.5, 1.0), "trace_w2_n": None}]
    assert rank(missing, "trace_w2_n").unreliable == ("b",)
    crossed = [row("a", 0.5, 2.0), {**row("b", 0.5, 1.0), "worst_adaptive": {"value": 7.0}}]
    assert words(crossed, 0.1)[-1].endswith("do not agree on a flattest run")
