"""Figures of sharpness: bars of several runs, spectral densities, and the premise of S2-SAM along the runs.

Everything is drawn from the records that `s2sam sharpness` writes. A bar without reliable value (not converged, not
finite) is hatched and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from s2sam.analysis.lanczos import Array, density
from s2sam.report.draw import log_scale
from s2sam.report.surface_plots import LIGHT, new_figure, save_figure
from s2sam.report.svg import PALETTE, shorten, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
Colour = Callable[[int], str]  #: of a run; `svg.series_colour` for the page, in its `svg.style()`
#: measure -> title of its panel; the raw ones first, then those in units of the weights, and the adaptive one
BARS = {
    "lambda_max": "$\\lambda_{max}$", "trace": "trace", "worst": "worst case", "m_sharpness": "m-sharpness",
    "lambda_w2": "$\\lambda_{max} ||w||^2$", "trace_w2_n": "trace $||w||^2 / n$",
    "worst_adaptive": "adaptive worst case", "average_adaptive": "adaptive average",
}  # fmt: skip
POINTS = 400  #: of a density
FLOOR = 1e-8  #: the share of all eigenvalues, smoothed into a bell, that is the least that is drawn of a density


def light(place: int) -> str:
    """The colour of a run on white paper."""
    return PALETTE[place % len(PALETTE)][0]


def draw_bars(records: Sequence[Record], stem: Path) -> list[Path]:
    """Write `stem`.png and .svg: see :func:`bars`."""
    with style(), matplotlib.rc_context(LIGHT):
        return save_figure(bars(records), stem)


def draw_densities(records: Sequence[Record], stem: Path) -> list[Path]:
    """Write `stem`.png and .svg: see :func:`densities`."""
    with style(), matplotlib.rc_context(LIGHT):
        return save_figure(densities(records), stem)


def draw_premise(records: Sequence[Record], stem: Path) -> list[Path]:
    """Write `stem`.png and .svg: see :func:`premise`."""
    with style(), matplotlib.rc_context(LIGHT):
        return save_figure(premise(records), stem)


def bars(records: Sequence[Record], colour: Colour = light) -> Figure:
    """A panel for each measure, a bar for each run, with its spread where it has one."""
    rows = 2
    columns = math.ceil(len(BARS) / rows)
    figure = new_figure(2.3 * columns, 2.2 * rows + 0.25 * len(records))
    handles: list[Any] = []
    for place, (key, title) in enumerate(BARS.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        handles = [bar(axes, i, record[key], colour(i)) for i, record in enumerate(records)]
        axes.set_title(title)
        axes.set_xticks([])
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))
        axes.grid(axis="x", visible=False)
    labels = [f"{shorten(r['run'], 40)} (train loss {r['train_loss']:.3g})" for r in records]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(2, len(records)), frameon=False, fontsize=8)
    return figure


def bar(axes: Axes, place: int, measured: Record | None, colour: str) -> Any:
    """One bar; without a reliable value hatched, and with the reason above it. Returns its artist."""
    value = None if measured is None else measured["value"]
    converged = measured is None or measured.get("converged", True)
    fine = value is not None and converged
    (drawn,) = axes.bar(
        [place], [value or 0.0], width=0.7, color=colour if fine else "none", edgecolor=colour,
        hatch=None if fine else "///",
    )  # fmt: skip
    error = None if measured is None else measured.get("sd", measured.get("error"))
    if fine and error:
        ink = matplotlib.rcParams["text.color"]
        axes.errorbar(float(place), float(value or 0.0), yerr=float(error), color=ink, lw=1, capsize=3)
    if not fine:
        text = "not finite" if measured is not None and value is None else "not measured"
        axes.annotate(
            "at least" if value is not None else text, (place, value or 0.0), ha="center", va="bottom", fontsize=7
        )
    handle = matplotlib.patches.Patch(color=colour)
    return handle if not fine else drawn


def smoothed(spectra: Sequence[Record]) -> tuple[Array, list[Array], float]:
    """A common grid, the density of each spectrum on it, and the width of a bell: a hundredth of the range of all.

    >>> grid, (phi,), width = smoothed([{"nodes": [[0.0, 10.0]], "weights": [[0.9, 0.1]]}])
    >>> round(width, 3), round(float(np.trapezoid(phi, grid)), 3), round(float(phi.max()), 1)
    (0.1, 1.0, 3.6)
    """
    given = [tuple(np.array(one[key], dtype=np.float64) for key in ("nodes", "weights")) for one in spectra]
    low, high = (float(limit([limit(nodes) for nodes, _ in given])) for limit in (np.min, np.max))
    width = (high - low) / 100 or 1.0
    grid = np.linspace(low - 4 * width, high + 4 * width, POINTS)
    return grid, [density(nodes, weights, grid, width) for nodes, weights in given], width


def density_limits(curves: Sequence[Array], width: float) -> tuple[float, float]:
    """Of a logarithmic axis: below it nothing is drawn, as so little mass is not resolved."""
    return FLOOR / width, 3 * max(float(phi.max()) for phi in curves)


def densities(records: Sequence[Record], colour: Colour = light) -> Figure:
    """The spectral density of each run on one scale, smoothed by a hundredth of the range, logarithmic.

    Raises:
        ValueError: none was measured.
    """
    given = [(i, r) for i, r in enumerate(records) if r["density"] is not None]
    if not given:
        raise ValueError("no run has a spectral density; measure it with --probes above 0")
    figure, starts = new_figure(6.0, 3.4), len(given[0][1]["density"]["nodes"])
    axes = figure.add_subplot()
    grid, curves, width = smoothed([r["density"] for _, r in given])
    for (i, record), drawn in zip(given, curves, strict=True):
        axes.plot(grid, drawn, color=colour(i), label=shorten(record["run"], 40))
    limits = density_limits(curves, width)
    log_scale(axes, limits)
    axes.set_ylim(*limits)
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_ylabel("density")
    axes.set_title(f"Spectral density, {starts} random starts")
    axes.legend(frameon=False, fontsize=8)
    return figure


def premise(records: Sequence[Record], colour: Colour = light) -> Figure:
    """Six panels over the steps: alignment, odd and even part of the rise, curvature, radius and c lambda_max."""
    panels: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
        ("cosine of $g_t$ and $g_{t-1}$", (("cosine", "-", ""),)),
        ("odd part: slope along e", (("previous_odd", "-", "$g_{t-1}$"), ("own_odd", "--", "own gradient"),
                                     ("random_odd", ":", "random"))),
        ("even part: curvature along e", (("previous_even", "-", "$g_{t-1}$"), ("own_even", "--", "own gradient"),
                                          ("random_even", ":", "random"))),
        ("$\\lambda_{max}$ and batch sharpness", (("lambda_max", "-", "$\\lambda_{max}$"),
                                                  ("batch_sharpness", "--", "batch sharpness"))),
        ("$\\rho\\, /\\, ||w||$", (("rho_over_w", "-", ""),)),
        ("$c\\,\\lambda_{max}$", (("c_lambda_max", "-", ""),)),
    )  # fmt: skip
    figure = new_figure(9.6, 5.2 + 0.25 * len(records))
    for place, (title, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(2, 3, place)
        for i, record in enumerate(records):
            for key, ls, _ in lines:
                curve(axes, record["points"], key, colour(i), ls)
        axes.set_title(title)
        axes.axhline(0.0, color=matplotlib.rcParams["axes.edgecolor"], lw=0.6)
        if place > 3:
            axes.set_xlabel("step")
        if len(lines) > 1:
            ink = matplotlib.rcParams["axes.labelcolor"]
            handles = [matplotlib.lines.Line2D([], [], color=ink, ls=ls, label=name) for _, ls, name in lines]
            axes.legend(handles=handles, frameon=False, fontsize=7)
    handles = [
        matplotlib.lines.Line2D([], [], color=colour(i), label=f"{shorten(r['run'], 40)} (rho {r['rho']:g})")
        for i, r in enumerate(records)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(2, len(records)), frameon=False, fontsize=8)
    return figure


def curve(axes: Axes, points: Sequence[Record], key: str, colour: str, ls: str) -> None:
    """A number over the steps with a band of one standard deviation over the looks; what did not converge is hollow."""
    known = [p for p in points if value_of(p.get(key)) is not None]
    steps = [p["step"] for p in known]
    values = np.array([value_of(p[key]) for p in known], dtype=np.float64)
    axes.plot(steps, values, color=colour, ls=ls, lw=1.4)
    for p, step, value in zip(known, steps, values, strict=True):
        fine = p[key].get("converged", True)
        axes.plot([step], [value], "o", ms=4, color=colour, markerfacecolor=colour if fine else "none")
    spreads = [p[key].get("sd") for p in known]
    if len(known) > 1 and all(s is not None for s in spreads):
        sd = np.array(spreads, dtype=np.float64)
        axes.fill_between(steps, values - sd, values + sd, color=colour, alpha=0.12, lw=0)


def value_of(measured: Record | None) -> float | None:
    """The number in a record of a measure: its value, or its mean.

    >>> value_of({"mean": 1.0, "sd": 0.1}), value_of({"value": 2.0}), value_of(None)
    (1.0, 2.0, None)
    """
    return None if measured is None else measured.get("value", measured.get("mean"))
