"""Heat maps of corruption robustness: 15 corruptions x 5 severities of a run, and the difference of two runs.

Pure functions from results, as `s2sam robust` writes them, to figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from s2sam.analysis.robustness_file import check_comparable, grid_of
from s2sam.data.corruptions import group_of
from s2sam.report.surface_plots import LIGHT, new_figure, save_figure
from s2sam.report.svg import shorten, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Cells = NDArray[np.float64]

Result = Mapping[str, Any]
COLUMNS = 4  #: runs side by side at most
_INK, _MUTED = "#1c2430", "#5b6675"


def accuracies(result: Result) -> Cells:
    """Accuracy in %, (corruptions, severities)."""
    grid = grid_of(result["cells"], "top1")
    return 100 * np.array([[grid[c][s] for s in result["severities"]] for c in result["corruptions"]])


def draw_heatmaps(results: Sequence[Result]) -> Figure:
    """The accuracy of each run at each corruption and severity, on one scale from 0 to 100 %.

    Raises:
        ValueError: results that may not stand side by side, such as on generated and on official images.
    """
    check_comparable([dict(result) for result in results])
    panels = [(f"{shorten(r['run'], 30)}: {_mean(accuracies(r))} %", accuracies(r)) for r in results]
    return _draw(panels, results[0], "accuracy (%)", cmap="viridis", limits=(0.0, 100.0), form="{:.0f}")


def draw_differences(results: Sequence[Result], reference: Result) -> Figure:
    """The accuracy of each run minus that of `reference`, in points, on one scale that is symmetric about 0.

    Raises:
        ValueError: results that may not stand side by side, or none.
    """
    if not results:
        raise ValueError("there is no run to subtract the reference from; give at least one")
    check_comparable([dict(reference), *(dict(result) for result in results)])
    gains = [accuracies(result) - accuracies(reference) for result in results]
    limit = max(1.0, max(float(np.abs(gain).max()) for gain in gains))
    name = shorten(reference["run"], 24)
    panels = [
        (f"{shorten(r['run'], 24)} - {name}: {_mean(gain, sign=True)}", gain)
        for r, gain in zip(results, gains, strict=True)
    ]
    return _draw(panels, reference, "difference (points)", cmap="RdBu", limits=(-limit, limit), form="{:+.1f}")


def write(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and .svg, each whole or not at all."""
    return save_figure(figure, stem)


def _draw(
    panels: Sequence[tuple[str, Cells]], facts: Result, label: str, *, cmap: str, limits: tuple[float, float], form: str
) -> Figure:
    names = [name.replace("_", " ") for name in facts["corruptions"]]
    wide = min(len(panels), COLUMNS)
    high = -(-len(panels) // COLUMNS)
    with style(), matplotlib.rc_context(LIGHT):
        width = 2.3 + (0.9 + 0.36 * len(facts["severities"])) * wide
        figure = new_figure(width, (0.95 + 0.25 * len(names)) * high)
        image = None
        every: list[Axes] = []
        for place, (title, cells) in enumerate(panels):
            axes = figure.add_subplot(high, wide, place + 1)
            image = axes.imshow(cells, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="auto")
            axes.set_title(title)
            axes.set_xticks(range(len(facts["severities"])), [str(s) for s in facts["severities"]])
            axes.set_yticks(range(len(names)), names if place % COLUMNS == 0 else [""] * len(names))
            axes.set_xlabel("severity")
            axes.tick_params(length=0)
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            groups = [group_of(name) for name in facts["corruptions"]]
            for row in range(1, len(groups)):
                if groups[row] != groups[row - 1]:
                    axes.axhline(row - 0.5, color="white", lw=2)
            for (row, column), value in np.ndenumerate(cells):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                axes.text(
                    column, row, form.format(value), ha="center", va="center", fontsize=6.5,
                    color="white" if dark else _INK,
                )  # fmt: skip
            every.append(axes)
        assert image is not None
        source = "official files" if facts["source"] == "official" else f"generated, constants {facts['constants']}"
        figure.colorbar(image, ax=every, label=label, aspect=30, pad=0.02)
        figure.suptitle(f"{facts['images']:,} test images, {source}", fontsize=8, color=_MUTED)
    return figure


def _mean(cells: Cells, *, sign: bool = False) -> str:
    return f"{float(cells.mean()):+.2f}" if sign else f"{float(cells.mean()):.2f}"
