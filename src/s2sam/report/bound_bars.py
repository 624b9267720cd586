"""The terms of the bounds of several networks as bars on one logarithmic axis, with what was measured beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2sam.analysis.bound_words import BESIDE
from s2sam.report.bound_plots import BAD, INK, MUTED, STYLE, panels_of, save_png
from s2sam.report.svg import PALETTE
from s2sam.train.atomic import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("start", "noise", "radius", "generalisation", "total")
TITLES = {
    "theorem 1": "Theorem 1, with its lambda = 2L",
    "theorem 1, own decay": "Theorem 1, with the run's lambda",
    "corollary": "Corollary",
}
COLOURS = (1, 3, 4, 5, 6, 7, 0)  #: of the palette, but for that of the line of guessing
DECADES = 6  #: below the largest value that the axis shows


def draw_bars(results: Sequence[Mapping[str, Any]], path: Path) -> list[Path]:
    """Write `path`.png and `path`.svg; returns the paths."""
    import matplotlib

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "s2sam", "svg.fonttype": "none"}):
        figure = bars(results)
        figure.draw_without_rendering()  # lay it out once, not for every file
        figure.set_layout_engine("none")
        paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
        save_png(figure, paths[0])
        with atomic(paths[1]) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
    return paths


def bars(results: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each bound, a group of bars for each term, a bar for each run; from what `bound.json` holds.

    A term of 0 has no bar. The dashed lines are the loss that the bound is about, as measured in each run; the dotted
    one is that of guessing.
    """
    from matplotlib.ticker import FuncFormatter

    names = list(TITLES)
    figure, panels = panels_of(len(names), width=4.1 * len(names), height=4.4)
    guess = max(math.log(r["classes"]) for r in results)
    values = [r["terms"][n][part] for r in results for n in names for part in PARTS]
    values += [r["measured"][key] for r in results for key, _ in BESIDE.values()]
    top = max([guess, *(v for v in values if v is not None and math.isfinite(v))])
    shown = [v for v in values if v and math.isfinite(v)]
    bottom = max(min([guess, *shown]) / 2, top / 10**DECADES)
    width = 0.8 / len(results)
    for axes, name in zip(panels, names, strict=True):
        for series, result in enumerate(results):
            places = [i + (series - (len(results) - 1) / 2) * width for i in range(len(PARTS))]
            heights = [h if h is not None and math.isfinite(h) else 0.0 for h in map(result["terms"][name].get, PARTS)]
            colour = PALETTE[COLOURS[series % len(COLOURS)]][0]
            axes.bar(places, heights, 0.92 * width, color=colour, label=result["run"], lw=0)
            measured = result["measured"][BESIDE[name][0]]
            if measured:
                axes.axhline(measured, color=colour, ls=(0, (5, 2)), lw=1.3)
        axes.axhline(guess, color=BAD, ls=":", lw=1.3)
        box = {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.85}
        axes.text(-0.45, guess, "guessing", color=BAD, fontsize=8, va="center", bbox=box)
        axes.set(yscale="log", ylim=(bottom, top * 4), title=TITLES[name])
        axes.set_xticks(range(len(PARTS)), ["start", "noise", "radius", "general-\nisation", "total"])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(visible=False, axis="x")
        what = "test loss" if BESIDE[name][0] == "test_loss" else "training loss"
        axes.set_xlabel(f"dashed: mean {what} over the run", color=MUTED)
    panels[0].set_ylabel("nats, each term from below", color=INK)
    panels[-1].legend(loc="upper right")
    return figure
