"""Figures of sharpness: what did not converge is no plain bar, one scale for all runs, the same file every time."""

from __future__ import annotations

import re

import pytest

from s2sam.report.sharpness_plots import BARS, bars, densities, draw_bars, draw_densities, draw_premise, premise
from s2sam.report.svg import series_colour, style, to_svg


def record(run, size, *, converged=True):
    measured = {"value": size, "error": 0.1, "converged": converged}
    return {
        "run": run, "train_loss": 0.1, **{key: {"value": size, "sd": 0.2 * size} for key in BARS},
        "lambda_max": measured, "lambda_w2": measured,
        "density": {"nodes": [[-0.5, 0.0, size]], "weights": [[0.1, 0.7, 0.2]]},
    }  # fmt: skip


def along(run, rho, *, converged=True):
    names = [f"{d}_{what}" for d in ("previous", "own", "random") for what in ("odd", "even")]
    points = [
        {"step": step, "lambda_max": {"value": 1.0 + step, "converged": converged},
         "c_lambda_max": {"value": 0.1, "converged": converged},
         **{name: {"mean": 0.1 * step, "sd": 0.01} for name in (*names, "cosine", "batch_sharpness", "rho_over_w")}}
        for step in (1, 2, 3)
    ]  # fmt: skip
    return {"run": run, "rho": rho, "points": points}


def bar_of(figure, title, place):
    (axes,) = [a for a in figure.axes if a.get_title(loc="left") == BARS[title]]
    return axes.patches[place], [t.get_text() for t in axes.texts]


def test_each_measure_has_a_panel_and_each_run_a_bar():
    with style():
        figure = bars([record("a", 1.0), record("b", 3.0)])
    assert len(figure.axes) == len(BARS)
    assert all(len(axes.patches) == 2 for axes in figure.axes)
    bar, texts = bar_of(figure, "trace", 1)
    assert bar.get_height() == 3.0 and bar.get_hatch() is None and texts == []
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a (train loss 0.1)", "b (train loss 0.1)"]


def test_what_did_not_converge_is_hatched_and_says_so():
    broken = record("b", 3.0, converged=False) | {"trace": None, "worst": {"value": None}}
    with style():
        figure = bars([record("a", 1.0), broken])
    for key, words in [("lambda_max", "at least"), ("trace", "not measured"), ("worst", "not finite")]:
        bar, texts = bar_of(figure, key, 1)
        assert bar.get_hatch() == "///" and texts == [words]
        assert bar_of(figure, key, 0)[0].get_hatch() is None


def test_densities_share_one_scale():
    with style():
        figure = densities([record("a", 1.0), record("b", 3.0)])
    a, b = figure.axes[0].lines
    assert (a.get_xdata() == b.get_xdata()).all() and a.get_xdata()[-1] > 3.0 > a.get_xdata()[0]
    with pytest.raises(ValueError, match="no run has a spectral density"):
        densities([record("a", 1.0) | {"density": None}])


def test_the_premise_is_drawn_over_the_steps():
    lost = along("b", 0.1, converged=False)
    lost["points"][1]["cosine"] = {"mean": None, "sd": None}
    with style():
        figure = premise([along("a", 0.05), lost])
    assert len(figure.axes) == 6
    cosines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 2]
    assert [list(line.get_xdata()) for line in cosines[:1]] == [[1, 2, 3]]
    hollow = [
        line for line in figure.axes[3].lines if line.get_marker() == "o" and line.get_markerfacecolor() == "none"
    ]
    assert len(hollow) == 3  # of the second run, whose largest eigenvalue did not converge
    assert "a (rho 0.05)" in [t.get_text() for t in figure.legends[0].get_texts()]


def test_files_are_the_same_every_time_and_the_page_can_colour_them(tmp_path):
    for draw, given in [(draw_bars, record("a", 1.0)), (draw_premise, along("a", 0.1))]:
        paths = draw([given], tmp_path / draw.__name__)
        assert [path.suffix for path in paths] == [".png", ".svg"]
        assert re.search(r"\d{4}-\d\d-\d\dT", paths[1].read_text()) is None
    one, two = (draw_densities([record("a", 1.0)], tmp_path / name)[1].read_text() for name in ("one", "two"))
    assert one == two
    with style():
        page = to_svg(bars([record("a", 1.0)], series_colour), "bars", "sharpness")
    assert "var(--s0)" in page and "#333c4a" not in page
