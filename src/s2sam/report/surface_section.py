"""Loss surfaces in the report: what `s2sam surface` has measured of its runs, as grids, lines and Ra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s2sam.analysis.roughness import clipped
from s2sam.analysis.surface_file import Surface, load_surface
from s2sam.report.arm_bars import Dot, arm_bars
from s2sam.report.arms import Arm
from s2sam.report.draw import End, end_labels
from s2sam.report.held import digest_of
from s2sam.report.panels import Figure, Section, treatments
from s2sam.report.surface_plots import ceiling
from s2sam.report.surface_views import PAIRS, views
from s2sam.report.svg import mark, new_axes, series_colour, style, to_svg
from s2sam.train.finished import WEIGHTS

Found = dict[Arm, Surface]
_RA = {"ra_raw": "Ra_raw, height of the bowl", "ra_detrended": "Ra_detrended, without the bowl"}


def find_surfaces(folder: str | Path, arms: Sequence[Arm]) -> Found:
    """The surface of one run of each arm, the lowest seed that has one; arms without any are left out.

    Surfaces are known by the digest of the weights they were measured at, the final or the averaged ones, so runs and
    folders may have been moved.

    Raises:
        ValueError: no file of `s2sam surface` in `folder`, one is damaged or not finished, none belongs to these runs,
            or they have not been measured in the same way.
    """
    files = sorted(Path(folder).glob("*/surface.npz"))
    if not files:
        raise ValueError(f"{folder} holds no surfaces; give the --out folder of `s2sam surface`")
    measured = {path: load_surface(path) for path in files}
    for path, surface in measured.items():
        if not surface.done.all():
            raise ValueError(f"{path} is not finished; run the command that made it again")
    by_weights = {surface.facts.get("weights_sha256"): surface for surface in measured.values()}
    found: Found = {}
    for arm in arms:
        held = [digest_of(run.folder, kind) for run in arm.runs.values() for kind in WEIGHTS]
        mine = next((by_weights[digest] for digest in held if digest in by_weights), None)
        if mine is not None:
            found[arm] = mine
    if not found:
        raise ValueError(
            f"no surface in {folder} was measured at weights that these runs hold now; run `s2sam surface` on them"
        )
    kept = [_comparable(surface) for surface in found.values()]
    for one in kept:
        for key, value in kept[0].items():
            if one.get(key) != value:
                raise ValueError(
                    f"the surfaces in {folder} cannot be compared: {key} is {value!r} in one and {one.get(key)!r} in "
                    "another; measure them by one command"
                )
    return found


def surface_section(found: Mapping[Arm, Surface], arms: Sequence[Arm]) -> Section:
    """Grids (if there are any), lines along single directions, and both Ra."""
    shown = [arm for arm in arms if arm in found]
    figures = [views(shown, found)] if found[shown[0]].settings.dims == 2 else []
    with style():
        figures += [_profiles(base, shown, found, arms) for base in dict.fromkeys(arm.base for arm in shown)]
        for key, title in _RA.items():
            values = {arm: [Dot(value) for value in found[arm].summary()[key]] for arm in shown}
            figures.append(arm_bars(title, "nats", values, treatments(arms), f"surface-{key}"))
    return Section("Loss surfaces", " ".join([*_where(found[shown[0]]), *_lost(shown, found)]), tuple(figures))


def _where(first: Surface) -> list[str]:
    """What all the surfaces share, in sentences."""
    given, facts = first.settings, first.facts
    size = " x ".join([str(given.points)] * given.dims)
    directions = f"{given.pairs} {'pair' if given.dims == 2 else 'draw'}{'s' if given.pairs > 1 else ''} of directions"
    images = f"{facts['images']:,}" if "images" in facts else "an unknown number of"
    total = f" of {facts['all_images']:,}" if "all_images" in facts else ""
    digest = f" (digest {facts['data_digest'][:12]})" if "data_digest" in facts else ""
    weights = "the averaged weights, not those of the table" if facts.get("weights") == "ema" else "the final weights"
    lines = [
        f"Mean cross entropy around {weights}, one run of each arm: {size} points from -{given.span:g} to "
        f"{given.span:g} along {directions} (seed {given.seed}), random on the active weights and filter-normalised: "
        f"1 is the norm of each filter; over {images}{total} {facts.get('split', '')} images{digest}, not augmented; "
        f"BatchNorm {given.bn}; all on one linear scale."
    ]
    if given.dims == 2:
        some = f" the first {PAIRS} pairs are drawn," if given.pairs > PAIRS else ""
        lines.append(
            "From above a cell is a point and tells its loss under the pointer, or that of the point in its middle "
            f"where there are too many;{some} lines and Ra are of all pairs."
        )
    lines.append(
        "Ra_raw is the height of the bowl, Ra_detrended what is left without it; neither shows by itself that a "
        "minimum generalises."
    )
    return lines


def _lost(arms: Sequence[Arm], found: Mapping[Arm, Surface]) -> list[str]:
    """What is cut off, and what Ra takes for losses that are not finite."""
    top, lines = ceiling([found[arm] for arm in arms]), []
    wild = {arm.name: int((~np.isfinite(found[arm].loss)).sum()) for arm in arms}
    cut = sum(int((found[arm].loss > top).sum() - np.isposinf(found[arm].loss).sum()) for arm in arms)
    if any(wild.values()):
        counts = ", ".join(f"{name} {count}" for name, count in wild.items() if count)
        lines.append(
            f"Losses that are NaN or infinite ({counts}) are drawn at the end of the scale, and count as the largest "
            "finite loss of their grid for Ra."
        )
    if cut:
        lines.append(f"{cut} points lie above the end of the scale, {top:.3g}, and are cut off.")
    return lines


def _comparable(surface: Surface) -> dict[str, Any]:
    left_out = ("weights_sha256", "masked_weights")
    return {key: value for key, value in surface.depends_on.items() if key not in left_out}


def _profiles(base: str, shown: Sequence[Arm], found: Mapping[Arm, Surface], arms: Sequence[Arm]) -> Figure:
    """Along single directions: mean, and the band from the lowest to the highest."""
    names, top = treatments(arms), ceiling([found[arm] for arm in shown])
    unit = f"surface-{base}".replace(" ", "-").replace("%", "")
    figure, axes = new_axes(base, "distance from the weights, filter norms", "loss (nats)")
    ends: list[End] = []
    for arm in (a for a in shown if a.base == base):
        series = names.index(arm.treatment)
        lines, t, colour = (
            clipped(found[arm].profiles(), top)[0],
            found[arm].settings.coordinates,
            series_colour(series),
        )
        mark(
            axes.fill_between(t, lines.min(0), lines.max(0), color=colour, alpha=0.15, lw=0), series, unique=f"b{unit}"
        )
        (line,) = axes.plot(t, lines.mean(0), color=colour)
        mark(line, series, unique=f"l{unit}")
        ends.append((float(lines.mean(0)[-1]), arm.treatment, colour, series))
    axes.set_ylim(0, 1.02 * top if top > 0 else 1.0)
    end_labels(axes, ends, unit)
    words = f"Loss along random directions, {base}: " + ", ".join(
        f"{text} {v:.3g} at the end" for v, text, _, _ in ends
    )
    return Figure(to_svg(figure, unit, words), words)
