"""Horizontal bars, one an arm, with a dot for each of its values: what measurements of arms look like on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from s2sam.report.arms import Arm
from s2sam.report.panels import Figure
from s2sam.report.svg import INK, MUTED, mark, new_axes, series_colour, shorten, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Dot:
    """One value of an arm, such as a run's."""

    value: float | None  #: None = it could not be measured
    error: float | None = None  #: half of the thin line through the dot
    reliable: bool = True  #: False = a lower bound, or no value


def number(value: float, *, sign: bool = False) -> str:
    """Three digits, and no power of ten below a million.

    >>> number(0.25), number(7970.4), number(-12.0, sign=True), number(2.5e7)
    ('0.25', '7,970', '-12', '2.5e+07')
    """
    plus = "+" if sign else ""
    return f"{value:{plus},.0f}" if 1000 <= abs(value) < 1e6 else f"{value:{plus}.3g}"


def bar_text(dots: Sequence[Dot], form: str | None = None) -> str:
    """The mean in words, and what is wrong with it.

    >>> bar_text([Dot(1.0), Dot(2.0, reliable=False)], "{:.1f} %"), bar_text([Dot(1500.0)]), bar_text([Dot(None)])
    ('at least 1.5 %', '1,500', 'no value')
    """
    values = [dot.value for dot in dots if dot.value is not None]
    if len(values) < len(dots) or not values:
        return "no value" if not values else f"no value of {len(dots) - len(values)} of {len(dots)}"
    mean = fmean(values)
    bound = "" if all(dot.reliable for dot in dots) else "at least "
    return bound + (number(mean) if form is None else form.format(mean))


def arm_bars(
    title: str,
    unit: str,
    values: Mapping[Arm, Sequence[Dot]],
    names: Sequence[str],
    key: str,
    form: str | None = None,
    *,
    line: float | None = None,
    pitch: float = 0.42,
) -> Figure:
    """A bar at the mean of each arm, hatched where a value is missing or only a bound; such dots are hollow.

    Args:
        title: of the panel.
        unit: of the axis.
        values: of each arm, in order.
        names: the treatments of the whole report, in the order of their colours.
        key: unique on the page.
        form: of the means in words; None = :func:`number`.
        line: where a dashed vertical line stands, such as the mean of a reference.
        pitch: inches from one bar to the next.
    """
    figure, axes = new_axes(title, unit, height=0.9 + pitch * len(values))
    words = []
    for place, (arm, dots) in enumerate(values.items()):
        series = names.index(arm.treatment)
        colour, known = series_colour(series), [dot for dot in dots if dot.value is not None]
        fine = len(known) == len(dots) and all(dot.reliable for dot in dots)
        mean = fmean([dot.value for dot in known if dot.value is not None]) if known else 0.0
        (bar,) = axes.barh(
            -place, mean, height=0.3, color=colour if fine else "none", alpha=0.45 if fine else None,
            edgecolor="none" if fine else colour, hatch=None if fine else "////",
        )  # fmt: skip
        artists = [bar]
        for index, dot in enumerate(known):
            face, y = colour if dot.reliable else "none", -place - 0.2 * ((index + 0.5) / len(known) - 0.5)
            artists += axes.plot([dot.value or 0.0], [y], "o", ms=3.2, color=colour, markerfacecolor=face)
            if dot.error:
                reach = [(dot.value or 0.0) - dot.error, (dot.value or 0.0) + dot.error]
                artists += axes.plot(reach, [y, y], color=colour, lw=0.9)
        text = bar_text(dots, form)
        words.append(f"{arm.name} {text}")
        label = f"{shorten(arm.name, 40)}: {text}"
        artists.append(axes.text(0, -place + 0.2, label, va="bottom", color=INK, fontsize=8.5))
        for index, artist in enumerate(artists):
            mark(artist, series, unique=f"{key}{place}-{index}")
    if line is not None:
        axes.axvline(line, color=MUTED, lw=1.1, ls=(0, (4, 2)))
    horizontal(axes, len(values))
    said = f"{title}: " + ", ".join(words)
    return Figure(to_svg(figure, key, said), said)


def horizontal(axes: Axes, rows: int) -> None:
    """Horizontal bars with their names above them: no vertical axis."""
    axes.set_ylim(-rows + 0.6, 0.75)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.label.set_color(MUTED)
