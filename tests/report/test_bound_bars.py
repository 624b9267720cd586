"""The bars of the bounds, from plain values alone."""

from __future__ import annotations

import math

import pytest

from s2sam.analysis.plain_json import finite
from s2sam.report.bound_bars import PARTS, TITLES, bars, draw_bars

NAMES = tuple(TITLES)


def result(name, *, scale=1.0, test_loss=0.5, **changed):
    terms = {n: {part: scale * (i + 1.0) for i, part in enumerate(PARTS)} for n in NAMES}
    terms["corollary"]["generalisation"] = 0.0
    terms["corollary"] |= changed
    return {"run": name, "classes": 10, "terms": terms, "measured": {"test_loss": test_loss, "train_loss": 0.25}}


def test_a_bar_for_each_run_and_term_and_a_line_for_what_was_measured():
    figure = bars([result("a"), result("b", scale=10.0, test_loss=0.125)])
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == list(TITLES.values())
    heights = [[bar.get_height() for bar in group] for group in panels[2].containers]
    assert heights == [[1.0, 2.0, 3.0, 0.0, 5.0], [10.0, 20.0, 30.0, 0.0, 50.0]]
    levels = [sorted(line.get_ydata()[0] for line in axes.lines) for axes in panels]
    assert levels[0] == pytest.approx([0.125, 0.5, math.log(10)]) and levels[2] == pytest.approx(
        [0.25, 0.25, math.log(10)]
    )
    assert all(axes.get_yscale() == "log" for axes in panels)
    assert len({axes.get_ylim() for axes in panels}) == 1  # one scale
    low, high = panels[0].get_ylim()
    assert low < 0.125 and high > 50
    assert [text.get_text() for text in panels[2].get_legend().get_texts()] == ["a", "b"]
    first, second = (group[0].get_facecolor() for group in panels[0].containers)
    assert first != second


def test_terms_that_are_missing_or_absurd_have_no_bar(tmp_path):
    figure = bars([finite(result("a", start=math.inf, total=1e12, noise=math.nan, test_loss=None))])
    heights = [bar.get_height() for bar in figure.axes[2].containers[0]]
    assert heights == [0.0, 0.0, 3.0, 0.0, 1e12]
    assert len(figure.axes[0].lines) == 1  # nothing measured: guessing alone
    assert figure.axes[0].get_ylim()[0] >= 1e5
    paths = draw_bars([result("<a>")], tmp_path / "bounds")
    assert [p.name for p in paths] == ["bounds.png", "bounds.svg"] and paths[0].read_bytes().startswith(b"\x89PNG")
    assert "&lt;a&gt;" in paths[1].read_text() and "date" not in paths[1].read_text()
