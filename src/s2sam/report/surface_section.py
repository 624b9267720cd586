"""Loss surfaces in the report: what `s2sam surface` has measured of its runs, as grids, lines and Ra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from s2sam.analysis.surface_file import Surface, load_surface
from s2sam.report.arm_bars import Dot, arm_bars
from s2sam.report.arms import Arm
from s2sam.report.draw import End, end_labels
from s2sam.report.held import digest_of
from s2sam.report.panels import Figure, Section, treatments
from s2sam.report.read import Run
from s2sam.report.surface_plots import band, ceiling, loss_limits
from s2sam.report.surface_views import PAIRS, views
from s2sam.report.svg import mark, new_axes, series_colour, shorten, style, to_svg
from s2sam.train.finished import WEIGHTS

Found = dict[Arm, Surface]
_NAME = 28  #: characters at the end of a line
_RA = {"ra_raw": "Ra_raw, height of the bowl", "ra_detrended": "Ra_detrended, without the bowl"}


def find_surfaces(folder: str | Path, arms: Sequence[Arm]) -> Found:
    """The surface of one run of each arm; arms without any are left out.

    The arms of a network are shown at the lowest seed that all of them have, else each at its own lowest. Surfaces are
    known by the digest of the weights they were measured at, the final or the averaged ones, so runs and folders may
    have been moved.

    Raises:
        ValueError: no file of `s2sam surface` in `folder`, one is damaged, none belongs to these runs, one that does is
            not finished, or they have not been measured in the same way.
    """
    files = sorted(Path(folder).glob("*/surface.npz"))
    if not files:
        raise ValueError(f"{folder} holds no surfaces; give the --out folder of `s2sam surface`")
    measured = {path: load_surface(path) for path in files}
    by_weights = {surface.facts.get("weights_sha256"): path for path, surface in measured.items()}
    held: dict[Arm, dict[int, Surface]] = {}
    for arm in arms:
        for seed, run in arm.runs.items():
            for path in [by_weights[digest] for digest in _digests(run) if digest in by_weights]:
                if not measured[path].done.all():
                    raise ValueError(f"{path} is not finished; run the command that made it again")
                held.setdefault(arm, {}).setdefault(seed, measured[path])
    found = _chosen(held)
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


def surface_section(found: Mapping[Arm, Surface], arms: Sequence[Arm], first: str = "from above") -> Section:
    """Grids (if there are any; `first` seen from this side), lines along single directions, and both Ra."""
    shown = [arm for arm in arms if arm in found]
    figures = [views(shown, found, first)] if found[shown[0]].settings.dims == 2 else []
    with style():
        figures += [_profiles(base, shown, found, arms) for base in dict.fromkeys(arm.base for arm in shown)]
        for key, title in _RA.items():
            values = {arm: [Dot(value) for value in found[arm].summary()[key]] for arm in shown}
            figures.append(arm_bars(title, "nats", values, treatments(arms), f"surface-{key}"))
    caption = [*_where(found[shown[0]]), *_seeds(shown, found), *_lost(shown, found)]
    return Section("Loss surfaces", " ".join(caption), tuple(figures))


def _digests(run: Run) -> list[str]:
    """Of the weights in its folder, the final ones first."""
    return [digest for kind in WEIGHTS if (digest := digest_of(run.folder, kind)) is not None]


def _chosen(held: Mapping[Arm, Mapping[int, Surface]]) -> Found:
    """A surface of each arm: those of a network at the lowest seed of all of them, if there is one."""
    found = {}
    for arm, seeds in held.items():
        common = set(seeds).intersection(*(others for rival, others in held.items() if rival.base == arm.base))
        found[arm] = seeds[min(common or seeds)]
    return found


def _seeds(arms: Sequence[Arm], found: Mapping[Arm, Surface]) -> list[str]:
    """Which seed the runs are of, and where those of a network are of different ones."""
    networks: dict[str, dict[str, int]] = {}
    for arm in arms:
        weights = found[arm].facts.get("weights_sha256")
        seed = next((seed for seed, run in arm.runs.items() if weights in _digests(run)), None)
        if seed is not None:
            networks.setdefault(arm.base, {})[arm.treatment] = seed
    if len(every := {seed for seeds in networks.values() for seed in seeds.values()}) == 1:
        return [f"Each run is of training seed {every.pop()}."]
    lines = []
    for base, seeds in networks.items():
        if len(set(seeds.values())) == 1:
            lines.append(f"{base}: training seed {min(seeds.values())}.")
            continue
        listed = "; ".join(f"{name} seed {seed}" for name, seed in seeds.items())
        lines.append(
            f"{base}: the runs are of different training seeds ({listed}), so what differs between them may be due to "
            "the seed."
        )
    return lines


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
            f"Losses that are NaN or infinite ({counts}) count as the largest finite loss: of their grid in its "
            "picture and for Ra, of all lines of the run in its band and mean."
        )
    if cut:
        lines.append(
            f"{cut} points lie above the end of the scale, {top:.3g}, and are cut off in the pictures; means and Ra "
            "take them as they are."
        )
    return lines


def _comparable(surface: Surface) -> dict[str, Any]:
    left_out = ("weights_sha256", "masked_weights")
    return {key: value for key, value in surface.depends_on.items() if key not in left_out}


def _profiles(base: str, shown: Sequence[Arm], found: Mapping[Arm, Surface], arms: Sequence[Arm]) -> Figure:
    """Along single directions: mean, and the band from the lowest to the highest; the axis cuts off what is above."""
    names, top = treatments(arms), ceiling([found[arm] for arm in shown])
    unit = f"surface-{base}".replace(" ", "-").replace("%", "")
    figure, axes = new_axes(base, "distance from the weights, filter norms", "loss (nats)")
    ends: list[End] = []
    said: list[str] = []
    above = f"above {top:.3g}"
    for arm in (a for a in shown if a.base == base):
        series = names.index(arm.treatment)
        (mean, low, high), t, colour = band(found[arm]), found[arm].settings.coordinates, series_colour(series)
        mark(axes.fill_between(t, low, high, color=colour, alpha=0.15, lw=0), series, unique=f"b{unit}")
        (line,) = axes.plot(t, mean, color=colour)
        mark(line, series, unique=f"l{unit}")
        end, name = float(mean[-1]), arm.treatment
        said.append(f"{name} {f'{end:.3g}' if end <= top else above} at the end")
        text = name if end <= top else f"{shorten(name, _NAME - len(above) - 2)}, {above}"
        ends.append((min(end, top), text, colour, series))
    axes.set_ylim(*loss_limits(top))
    end_labels(axes, ends, unit)
    words = f"Loss along random directions, {base}: {', '.join(said)}"
    return Figure(to_svg(figure, unit, words), words)
