"""A picture for each method that moves its mask: density of every layer over time, first weights left, weights seen.

All of it comes from the records of the topology in `metrics.jsonl`: one before the first step and one for each change.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from s2sam.report.arms import Arm
from s2sam.report.curves import record_curve
from s2sam.report.draw import End, end_labels
from s2sam.report.panels import Figure, Section
from s2sam.report.svg import INK, MUTED, new_axes, shorten, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

BINS = 40  #: cells along the training
SHADES = 24  #: cells of one shade are drawn as one
LABELS = 24  #: rows that carry their name and numbers, at most


def evolution(arms: Sequence[Arm]) -> Section:
    """One picture for each network whose mask has moved: of its plain runs, or else of its first arm."""
    figures: list[Figure] = []
    for base in dict.fromkeys(arm.base for arm in arms):
        arm = next(arm for arm in arms if arm.base == base)
        if moves(arm):
            figures.append(_picture(arm, len(figures)))
    return Section(
        "Masks over the training, method by method",
        "Above: a row for each layer in the order of the network, a column for each part of the training; the stronger "
        "the shade, the denser (it goes by the square root of the density, so that sparse layers can be told apart). "
        "At the right: percent active at the start and at the end. Below: how much of the first mask is left, and R_s, "
        "the share of all prunable weights that have been active at some time. Mean over the seeds, with the plain "
        "optimizer where there is one; masks that never change have no picture.",
        tuple(figures),
    )


def moves(arm: Arm) -> bool:
    """Whether all runs of the arm have recorded their masks, and one of them a change."""
    runs = list(arm.runs.values())
    return all(run.topology for run in runs) and any(r["dropped"] or r["grown"] for run in runs for r in run.topology)


def layer_densities(arm: Arm, bins: int = BINS) -> tuple[list[str], NDArray[np.float64], float]:
    """Layers, their densities in the middle of `bins` equal parts of the training, mean over runs, and its length.

    Between two records the earlier one holds. Shapes: (layers, bins); the length is in steps.
    """
    runs = list(arm.runs.values())
    layers = list(runs[0].topology[0]["density"])
    end = float(max(max(r["step"] for r in [*run.topology, *run.epochs[-1:]]) for run in runs))
    middles = (np.arange(bins) + 0.5) * end / bins
    found = []
    for run in runs:
        records = run.topology
        at = np.searchsorted([r["step"] for r in records], middles, side="right") - 1
        table = np.array([[r["density"].get(name, np.nan) for r in records] for name in layers], dtype=float)
        found.append(table[:, np.maximum(at, 0)])
    return layers, np.mean(found, axis=0), end


def cells(row: NDArray[np.float64]) -> list[tuple[int, int, float]]:
    """(first column, columns, shade from 0 to 1) of the cells of one row, those of one shade together.

    >>> cells(np.array([1.0, 1.0, 0.25, 0.25, 0.0]))
    [(0, 2, 1.0), (2, 2, 0.5), (4, 1, 0.0)]
    """
    shades = np.round(SHADES * np.sqrt(np.nan_to_num(row))) / SHADES
    starts = [0, *(np.flatnonzero(np.diff(shades)) + 1).tolist(), len(row)]
    return [(a, b - a, float(shades[a])) for a, b in pairwise(starts)]


def _picture(arm: Arm, number: int) -> Figure:
    layers, density, end = layer_densities(arm)
    first, last = (
        np.mean([[run.topology[i]["density"].get(n, np.nan) for n in layers] for run in arm.runs.values()], axis=0)
        for i in (0, -1)
    )
    heights = (max(0.9, min(0.17 * len(layers), 4.2)), 1.1)
    figure, axes = new_axes(arm.base, height=sum(heights) + 0.9)
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    axes.set_subplotspec(grid[0])
    spans = [_span(100 * a, 100 * b) for a, b in zip(first, last, strict=True)]
    _map(axes, layers, density, end, spans)
    below = figure.add_subplot(grid[1], sharex=axes)
    ends = _curves(below, arm, number)
    words = (
        f"Masks of {arm.base} over {end:.0f} steps: "
        + ", ".join(f"{text} {value:.1f} % at the end" for value, text, _, _ in ends)
        + "; active per layer: "
        + ", ".join(f"{name.removesuffix('.weight')} {span} %" for name, span in zip(layers, spans, strict=True))
    )
    return Figure(to_svg(figure, f"evolution{number}", words), words)


def _map(axes: Axes, layers: Sequence[str], density: NDArray[np.float64], end: float, spans: Sequence[str]) -> None:
    """Rows of cells, names at the left, `spans` at the right."""
    from matplotlib.colors import to_rgba

    width = end / density.shape[1]
    every = -(-len(layers) // LABELS)
    for place, (name, row) in enumerate(zip(layers, density, strict=True)):
        merged = cells(row)
        axes.broken_barh(
            [(first * width, n * width) for first, n, _ in merged],
            (place - 0.42, 0.84),
            facecolors=[to_rgba(INK, shade) for _, _, shade in merged],
            linewidth=0,
        )
        if place % every == 0:
            for x, side, text in ((-0.02, "right", name.removesuffix(".weight")), (1.02, "left", spans[place])):
                axes.text(x, place, shorten(text, 22), transform=axes.get_yaxis_transform(), ha=side, va="center",
                          fontsize=6.5, color=MUTED)  # fmt: skip
    axes.set_xlim(0, end)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.tick_params(labelbottom=False)
    axes.spines["left"].set_visible(False)


def _curves(axes: Axes, arm: Arm, number: int) -> list[End]:
    """Survival and exploration in percent."""
    ends: list[End] = []
    for key, text, colour, dash in (("survival", "first left", INK, "-"), ("explored", "R_s", MUTED, (0, (4, 1.5)))):
        x, y = record_curve(arm, "topology", key, 100.0)
        axes.plot(x, y.mean(0), color=colour, ls=dash, drawstyle="steps-post")
        ends.append((float(y.mean(0)[-1]), text, colour, None))
    axes.set_ylim(0, 105)
    axes.set_xlabel("training step")
    axes.set_ylabel("weights, %")
    axes.tick_params(length=0)
    end_labels(axes, ends, f"evolution{number}")
    return ends


def _span(first: float, last: float) -> str:
    a, b = f"{first:.3g}", f"{last:.3g}"
    return a if a == b else f"{a} to {b}"
