"""Lines with a band for the seeds, and their names at the right end: what the panels of curves share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from s2sam.report.curves import Curve
from s2sam.report.svg import mark, series_colour, shorten, spread_apart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

End = tuple[float, str, str, int | None]  #: of a line: last value, name, colour, series
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)))  #: networks within a panel


def spread(axes: Axes, curve: Curve, series: int, text: str, unique: str, ls: Any = "-", lw: float = 1.7) -> End:
    """Mean line and seed band; returns what its end label needs."""
    x, y = curve
    colour = series_colour(series)
    (line,) = axes.plot(x, y.mean(0), color=colour, ls=ls, lw=lw)
    mark(line, series, unique=f"{unique}-{text}")
    if len(y) > 1:
        mark(
            axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.16, lw=0),
            series,
            unique=f"{unique}-{text}-band",
        )
    return float(y.mean(0)[-1]), text, colour, series


def end_labels(axes: Axes, ends: Sequence[End], unique: str) -> None:
    """Names at the right end of their lines, moved apart where they would overlap."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    pixels = [float(axes.transData.transform((0, value))[1]) for value, _, _, _ in ends]
    low, high = (float(axes.transAxes.transform((0, f))[1]) for f in (0.0, 1.0))
    gap = figure.dpi * 11 / 72
    for target, (_, text, colour, series) in zip(spread_apart(pixels, gap, floor=low), ends, strict=True):
        y = (target - low) / (high - low)
        label = axes.annotate(
            shorten(text, 28),
            (1.02, y),
            xycoords="axes fraction",
            color=colour,
            va="center",
            fontsize=8.5,
            annotation_clip=False,
        )
        if series is not None:
            mark(label, series, unique=f"{unique}-{text}-label")


def log_scale(axes: Axes, limits: tuple[float, float]) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 (1 alone on a long one)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    subs = (1.0, 2.0, 5.0) if limits[1] / limits[0] < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
