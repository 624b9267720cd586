"""Matplotlib figures as inline SVG: colours from CSS variables, text as text, identifiers that never clash.

Figures are drawn with stand-in colours, which become `var(--...)` in the SVG, so that one drawing serves a light and a
dark page. Nothing in the result refers to anything outside it.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import TYPE_CHECKING, Any

import matplotlib

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: stand-in colour -> CSS variable of the page
INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#0102{i:02x}" for i in range(8))  #: one per treatment; see :data:`PALETTE`
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {c: f"s{i}" for i, c in enumerate(SERIES)}
#: light and dark value of each series: the Okabe-Ito hues, which stay apart for the colour-blind, tuned for contrast
PALETTE = (
    ("#333c4a", "#dfe5ec"),
    ("#0072b2", "#56b4e9"),
    ("#c2410c", "#f0914a"),
    ("#00805c", "#2fc79a"),
    ("#a3487f", "#e08fc0"),
    ("#8a6d00", "#e3c63f"),
    ("#4b3fae", "#a99df5"),
    ("#7a4a21", "#c99a6b"),
)
_COORDINATE = re.compile(r"\d+\.\d{3,}")  #: rounded inside of tags, never in the text of a figure
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "s2sam",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def style() -> AbstractContextManager[None]:
    """The look of all figures, as a context."""
    return matplotlib.rc_context(_STYLE)


def new_axes(title: str, x: str = "", y: str = "", *, height: float = 2.7) -> tuple[Figure, Axes]:
    """One panel of the common width, which fills a phone and half a desk."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.15, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(shorten(title, 40), color=INK, pad=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(length=0)
    return figure, axes


def shorten(text: str, room: int) -> str:
    """`text` in at most `room` characters: the page names everything in full beside its colour.

    >>> shorten("S2-SAM (rho 0.05)", 12), shorten("SGD", 12)
    ('S2-SAM (r...', 'SGD')
    """
    return text if len(text) <= room else text[: room - 3].rstrip() + "..."


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element; `name` is unique on the page, `label` is read aloud instead of the drawing."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _COORDINATE.sub(lambda m: f"{float(m.group()):.2f}", tag.group()), text)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'\sid="([^"]+)"', rf' id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(rf'<g id="{name}-(s\d)__[^"]*">', r'<g class="\1">', text)
    text = re.sub("|".join(_VARIABLES), lambda m: f"var(--{_VARIABLES[m.group()]})", text)
    text = re.sub(r"""(font(?:-family)?:[^;"]*)'DejaVu Sans'[^;"]*""", r"\1var(--font)", text)
    text = re.sub(
        r'<svg[^>]*?(viewBox="[^"]+")[^>]*>',
        rf'<svg \1 role="img" aria-label="{escape(label, quote=True)}">',
        text,
        count=1,
    )
    return text.strip()


def mark(artist: Artist, series: int, *, unique: object) -> None:
    """Let the page know to which series a drawn thing belongs (its group gets the class s0, s1, ...)."""
    artist.set_gid(f"s{series % len(SERIES)}__{unique}")


def series_colour(series: int) -> str:
    """The stand-in colour of a series."""
    return SERIES[series % len(SERIES)]


def spread_apart(values: Sequence[float], gap: float, floor: float = -math.inf) -> list[float]:
    """The values moved as little as needed (in order, least squares) to be at least `gap` apart and above `floor`.

    >>> spread_apart([1.0, 1.0, 5.0], 2.0)
    [0.0, 2.0, 5.0]
    >>> spread_apart([1.0, 1.0, 5.0], 2.0, floor=0.5)
    [0.5, 2.5, 5.0]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    blocks: list[tuple[float, int]] = []  # sum and count of value - rank * gap, pooled until the means ascend
    for rank, index in enumerate(order):
        blocks.append((values[index] - rank * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            (total, count), (before, number) = blocks.pop(), blocks.pop()
            blocks.append((before + total, number + count))
    levels = [max(total / count, floor) for total, count in blocks for _ in range(count)]
    result = [0.0] * len(values)
    for rank, index in enumerate(order):
        result[index] = levels[rank] + rank * gap
    return result
