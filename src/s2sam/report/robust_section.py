"""Robustness to corruption in the report: what `s2sam robust` has measured of its runs.

Generated and official images have a section each: the two never share a figure or a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from s2sam.analysis.robustness_file import SHARED, path_of, read
from s2sam.data.corruptions import group_of
from s2sam.report.arm_bars import Dot, arm_bars
from s2sam.report.arms import Arm, reference_of
from s2sam.report.held import Held, Result, find
from s2sam.report.panels import Figure, Section, treatments
from s2sam.report.robust_arms import RobustArm, compare, measure_of, sentence
from s2sam.report.robust_plots import accuracies
from s2sam.report.svg import PAPER, new_axes, shorten, to_svg

if TYPE_CHECKING:
    from s2sam.report.robust_plots import Cells

SOURCES = ("generated", "official")
_DARK, _LIGHT = "#1c2430", "#ffffff"  #: of numbers on coloured cells, the same on a dark page
_BARS = (  # measure, title, unit, factor, form
    ("mean_corruption_accuracy", "Accuracy on corrupted images", "% of the images", 100.0, "{:.2f} %"),
    ("relative_mean_corruption_error", "Accuracy lost to corruption", "percentage points", 100.0, "{:.2f} points"),
    ("clean.ece", "Calibration error on clean images", "ECE, %", 100.0, "{:.2f} %"),
    ("mean_corruption_ece", "Calibration error on corrupted images", "ECE, %", 100.0, "{:.2f} %"),
)


def find_robustness(arms: Sequence[Arm], source: str) -> Held:
    """What the run folders hold of `source`, "generated" or "official".

    Raises:
        ValueError: as :func:`s2sam.report.held.find`.
    """
    return find(arms, path_of(Path(), source).name, "s2sam robust", shared=("weights", *SHARED), read=read)


def robust_sections(held: Held, arms: Sequence[Arm]) -> list[Section]:
    """The bars, and the maps."""
    names = treatments(arms)
    bars = [
        arm_bars(
            title,
            unit,
            {arm: [_dot(r, measure, factor) for r in seeds.values()] for arm, seeds in held.by_arm.items()},
            names,
            f"robust-{held.first['source']}-{measure.replace('.', '-')}",
            form,
        )
        for measure, title, unit, factor, form in _BARS
    ]
    where = "official files" if held.first["source"] == "official" else "images corrupted here"
    first = Section(
        f"Robustness to corruption, {where}",
        f"{_where(held.first)}. A bar is the mean over the seeds, a dot one run. ECE: the gap between confidence and "
        f"accuracy in {held.first['ece_bins']} equal bins. A network that is better on clean images is often better "
        "on corrupted ones too; what is lost, and runs of equal clean accuracy, are the fairer comparison.",
        tuple(bars),
        says=(*_words(held, arms), *held.notes),
    )
    return [first, _maps(held, arms, where)]


def _maps(held: Held, arms: Sequence[Arm], where: str) -> Section:
    """A heat map of each arm, and of its difference to the plain arm of the same network."""
    facts = held.first
    gains = {arm: gain for arm in held.by_arm if (gain := difference(held, arms, arm)) is not None}
    limit = max([1.0, *(float(np.abs(gain).max()) for gain in gains.values())])
    figures = []
    for place, (arm, seeds) in enumerate(held.by_arm.items()):
        cells, key = mean_cells(seeds.values()), f"robust-{facts['source']}-{place}"
        label = f"Accuracy, {arm.name}: mean {cells.mean():.2f} %"
        figures.append(_map(cells, facts, arm.name, label, key))
        reference = reference_of(arm, arms)
        if arm in gains and reference is not None:
            title = f"{arm.treatment} minus {reference.treatment}, {arm.base}"
            label = f"Difference in accuracy, {title}: mean {gains[arm].mean():+.2f} points"
            figures.append(_map(gains[arm], facts, title, label, f"{key}-gain", limit))
    scale = (
        " Differences in points, over the seeds that both arms have: blue where the arm is better than the plain "
        f"optimizer, red where it is worse, to {limit:.1f} on either side."
        if gains
        else ""
    )
    return Section(
        f"By corruption and severity, {where}",
        f"Accuracy in %, mean over the seeds, one scale from 0 to 100.{scale}",
        tuple(figures),
    )


def mean_cells(results: Iterable[Result]) -> Cells:
    """Mean accuracy in %, (corruptions, severities)."""
    mean: Cells = np.mean([accuracies(result) for result in results], axis=0)
    return mean


def difference(held: Held, arms: Sequence[Arm], arm: Arm) -> Cells | None:
    """Accuracy of an arm minus that of the plain arm of its network, in points, over the seeds that both have."""
    reference = reference_of(arm, arms)
    if reference is None or reference not in held.by_arm:
        return None
    a, b = held.by_arm[arm], held.by_arm[reference]
    both = sorted(a.keys() & b.keys())
    if not both:
        return None
    return mean_cells([a[seed] for seed in both]) - mean_cells([b[seed] for seed in both])


def _words(held: Held, arms: Sequence[Arm]) -> list[str]:
    """A sentence for each arm that has a plain one beside it; all intervals hold together."""

    def robust(arm: Arm) -> RobustArm:
        return RobustArm(arm.name, tuple(held.by_arm[arm].values()))

    pairs = [(arm, reference_of(arm, arms)) for arm in held.by_arm]
    known = [(arm, plain) for arm, plain in pairs if plain is not None and plain in held.by_arm]
    if not known:
        return ["No arm here was measured beside the plain optimizer on the same network, so nothing is compared."]
    found = [compare([robust(plain), robust(arm)], comparisons=len(known))[0] for arm, plain in known]
    return [f"{sentence(each)}." for each in found]


def _dot(result: Result, measure: str, factor: float) -> Dot:
    value = measure_of(result, measure)
    return Dot(None if value is None else factor * value)


def _where(facts: Result) -> str:
    averaged = ", averaged weights" if facts.get("weights") == "ema" else ""
    images = f"{facts['images']:,} of {facts['all_images']:,} test images{averaged}"
    if facts["source"] == "official":
        return f"{images}, official files in the layout of {facts['layout']}"
    return (
        f"{images}, corrupted by s2sam's generator (constants of {facts['constants']}, seed "
        f"{facts['corruption_seed']}), not the official files: compare only with values of the same source"
    )


def _map(cells: Cells, facts: Result, title: str, label: str, key: str, limit: float | None = None) -> Figure:
    """One heat map: accuracy from 0 to 100 %, or with `limit` a difference that is symmetric about 0."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    names = [name.replace("_", " ") for name in facts["corruptions"]]
    rows, columns = cells.shape
    figure, axes = new_axes(shorten(title, 32), "severity", height=0.8 + 0.22 * rows)
    colours = colormaps["viridis" if limit is None else "RdBu"]
    scale = Normalize(0.0, 100.0) if limit is None else Normalize(-limit, limit)
    axes.pcolormesh(cells, cmap=colours, norm=scale, edgecolors=PAPER, linewidth=0.8)
    for (row, column), value in np.ndenumerate(cells):
        red, green, blue, _ = colours(scale(value))
        ink = _LIGHT if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else _DARK
        text = f"{value:.0f}" if limit is None else f"{value:+.1f}"
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center_baseline", fontsize=7.5, color=ink)
    groups = [group_of(name) for name in facts["corruptions"]]
    for row in range(1, rows):
        if groups[row] != groups[row - 1]:
            axes.axhline(row, color=PAPER, lw=4)
    axes.set_xticks(np.arange(columns) + 0.5, [str(s) for s in facts["severities"]])
    axes.set_yticks(np.arange(rows) + 0.5, names)
    axes.set_ylim(rows, 0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return Figure(to_svg(figure, key, label), label)
