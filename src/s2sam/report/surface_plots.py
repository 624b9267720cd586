"""Figures of loss surfaces: several runs on one scale, in 3-D, as contours and as lines with a band over directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from s2sam.analysis.roughness import clipped
from s2sam.analysis.surface_file import Surface
from s2sam.report.svg import PALETTE, shorten, style
from s2sam.train.atomic import atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Loss = NDArray[np.float64]

COLUMNS = 4  #: runs side by side at most
GUESSES = 10.0  #: a plot ends at this many times the loss of guessing
_INK, _MUTED, _GRID = "#1c2430", "#5b6675", "#dde2e8"
#: on white paper, over :func:`s2sam.report.svg.style`
LIGHT: dict[Any, Any] = {
    "text.color": _INK, "axes.labelcolor": _MUTED, "axes.edgecolor": _MUTED, "xtick.color": _MUTED,
    "ytick.color": _MUTED, "grid.color": _GRID, "figure.facecolor": "white", "axes.facecolor": "white",
    "axes.titlesize": 9,
}  # fmt: skip


def ceiling(surfaces: Sequence[Surface]) -> float:
    """Where the loss axis ends: the largest finite loss of all runs, at most 10 times that of guessing, log classes.

    Far out losses grow without a bound that means anything, and one run's would flatten the others to a line.
    """
    largest = max(float(s.loss[np.isfinite(s.loss)].max(initial=-math.inf)) for s in surfaces)
    return min(largest, GUESSES * math.log(max(2, min(int(s.facts["classes"]) for s in surfaces))))


def band(surface: Surface) -> tuple[Loss, Loss, Loss]:
    """(mean, lowest, highest) loss along single directions, as measured: the axis ends the picture, not the losses.

    Those that are not finite count as the largest finite one of all the lines.
    """
    lines = clipped(surface.profiles())[0]
    low, high = lines.min(axis=0), lines.max(axis=0)
    return lines.mean(axis=0).clip(low, high), low, high  # a mean of equal numbers may round to one above them


def loss_limits(top: float) -> tuple[float, float]:
    """Of the axis of lines, from nothing to `top`."""
    return 0.0, 1.02 * top if top > 0 else 1.0


def cut_points(surfaces: Sequence[Surface]) -> dict[str, int]:
    """How many points of each run lie above the end of the axis or are not finite; runs without any are left out."""
    top = ceiling(surfaces)
    counts = {s.label: int((~(s.loss <= top)).sum()) for s in surfaces}
    return {label: count for label, count in counts.items() if count}


def draw_surfaces(surfaces: Sequence[Surface], stem: Path) -> list[Path]:
    """Write `stem`.png and .svg: the first grid of each run in 3-D and as contours, all on one scale.

    One pair of directions is drawn, as a mean over pairs would smooth what there is to see.

    Args:
        surfaces: finished, of two dims, with one grid.
        stem: path without a suffix.
    """
    top = ceiling(surfaces)
    grids = [clipped(s.loss[0], top)[0] for s in surfaces]
    low = min(float(z.min()) for z in grids)
    levels = np.linspace(low, top, 25) if top > low else np.array([low, low + 1.0])
    wide = min(len(surfaces), COLUMNS)
    bands = math.ceil(len(surfaces) / COLUMNS)
    with style(), matplotlib.rc_context(LIGHT):
        figure = new_figure(max(2.9 * wide, 4.2) + 0.6, 5.4 * bands)
        filled, flat = None, []
        for place, (surface, z) in enumerate(zip(surfaces, grids, strict=True)):
            band, column = divmod(place, COLUMNS)
            t = surface.settings.coordinates
            where = 2 * band * wide + column + 1
            solid: Any = figure.add_subplot(2 * bands, wide, where, projection="3d")
            a, b = np.meshgrid(t, t, indexing="ij")
            solid.plot_surface(
                a, b, z, cmap="viridis", vmin=low, vmax=levels[-1], rstride=1, cstride=1, lw=0.15, edgecolor=_INK
            )
            solid.set_zlim(low, levels[-1])
            solid.set_title(shorten(surface.label, 34))
            solid.tick_params(labelsize=6, pad=-2)
            solid.view_init(32, -52)
            axes = figure.add_subplot(2 * bands, wide, where + wide, aspect="equal")
            filled = axes.contourf(t, t, z.T, levels=levels, cmap="viridis")
            axes.contour(t, t, z.T, levels=levels[::2], colors="white", linewidths=0.4)
            axes.plot(0, 0, "+", color="white", ms=6)
            axes.set_xlabel("along $d_1$, filter norms")
            axes.set_ylabel("along $d_2$" if column == 0 else "")
            axes.grid(visible=False)
            flat.append(axes)
        assert filled is not None
        text = f"loss (nats), cut off at {top:.3g}" if cut_points(surfaces) else "loss (nats)"
        figure.colorbar(filled, ax=flat, label=text, shrink=0.9, aspect=30, format="%.3g")
        return save_figure(figure, stem)


def draw_profiles(surfaces: Sequence[Surface], stem: Path) -> list[Path]:
    """Write `stem`.png and .svg: each run's mean loss along single directions, in a band from lowest to highest.

    Of 2-D grids the two lines through the centre count as profiles.
    """
    top = ceiling(surfaces)
    with style(), matplotlib.rc_context(LIGHT):
        figure = new_figure(5.6, 3.4)
        axes = figure.add_subplot()
        for place, surface in enumerate(surfaces):
            mean, low, high = band(surface)
            t, colour = surface.settings.coordinates, PALETTE[place % len(PALETTE)][0]
            axes.fill_between(t, low, high, color=colour, alpha=0.15, lw=0)
            axes.plot(t, mean, color=colour, label=shorten(surface.label, 40))
        axes.set_ylim(*loss_limits(top))
        axes.set_xlabel("distance from the weights, filter norms")
        axes.set_ylabel("loss (nats)")
        axes.set_title(f"Along {len(surfaces[0].profiles())} random directions: mean, lowest to highest")
        axes.legend(frameon=False, fontsize=8)
        return save_figure(figure, stem)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, whose parts make room for each other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and .svg, each whole or not at all; returns the paths."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        with atomic(path) as temporary:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(temporary, format=path.suffix[1:], dpi=160, bbox_inches="tight", metadata=metadata)
        figure.set_layout_engine("none")  # the next format takes the places of the first
    return paths
