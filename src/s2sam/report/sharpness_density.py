"""The spectral density of the Hessian in the report, from what `s2sam sharpness` has left in the run folders."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from statistics import fmean

import numpy as np

from s2sam.analysis.lanczos import Array
from s2sam.report.arms import Arm
from s2sam.report.draw import End, end_labels, log_scale, spread
from s2sam.report.held import Held, Result
from s2sam.report.panels import Figure, Section, treatments
from s2sam.report.sharpness_plots import density_limits, smoothed
from s2sam.report.svg import new_axes, to_svg


def density_sections(held: Held, arms: Sequence[Arm]) -> list[Section]:
    """A panel for each network, all on one scale; nothing if no run has a density."""
    known = {
        arm: rows for arm, seeds in held.by_arm.items() if (rows := [r for r in seeds.values() if r.get("density")])
    }
    drawn = [r for results in known.values() for r in results]
    if not drawn:
        return []
    grid, curves, width = smoothed([r["density"] for r in drawn])
    limits = density_limits(curves, width)
    each = iter(curves)
    bands = {arm: (grid, np.stack([*islice(each, len(rows))]).clip(limits[0])) for arm, rows in known.items()}
    first, given = drawn[0], drawn[0]["settings"]
    figures = tuple(
        _panel({arm: band for arm, band in bands.items() if arm.base == base}, known, limits, arms, f"density{number}")
        for number, base in enumerate(dict.fromkeys(arm.base for arm in bands))
    )
    missing = [arm.name for arm, seeds in held.by_arm.items() if len(known.get(arm, [])) < len(seeds)]
    starts, steps = (len(part) for part in (first["density"]["nodes"], first["density"]["nodes"][0]))
    return [
        Section(
            "Spectral density of the Hessian",
            f"Which share of the eigenvalues lies where, over {first['images']:,} {first['split']} images, not "
            f"augmented, at the {first['weights']} weights, on the active ones, BatchNorm {given['bn']}. Estimated by "
            f"stochastic Lanczos quadrature from {starts} random start{'s' if starts > 1 else ''}, cut off after "
            f"{steps} step{'s' if steps > 1 else ''}: the outermost eigenvalues may lie further out. Every point found "
            f"is drawn as a bell of standard deviation {width:.3g}, a hundredth of the range of all runs; densities "
            f"below {limits[0]:.2g} are not drawn. Line: mean of the seeds; band: from the lowest to the highest. All "
            "networks on one scale, logarithmic. A spectrum scales with the loss and with the weights, as the raw "
            "measures do.",
            figures,
            says=(f"No spectral density was measured of every run of {', '.join(missing)}.",) if missing else (),
        )
    ]


def _panel(
    bands: dict[Arm, tuple[Array, Array]],
    known: dict[Arm, list[Result]],
    limits: tuple[float, float],
    arms: Sequence[Arm],
    name: str,
) -> Figure:
    base = next(iter(bands)).base
    figure, axes = new_axes(base, "eigenvalue of the Hessian", "density")
    log_scale(axes, limits)
    axes.set_ylim(*limits)
    ends: list[End] = []
    for arm, band in bands.items():
        ends.append(spread(axes, band, treatments(arms).index(arm.treatment), arm.treatment, name, lw=1.2))
    end_labels(axes, ends, name)
    words = f"Spectral density, {base}: " + "; ".join(f"{arm.treatment} {ranged(known[arm])}" for arm in bands)
    return Figure(to_svg(figure, name, words), words)


def ranged(results: Sequence[Result]) -> str:
    """Where the eigenvalues lie that were found, over the runs, and the mean of all (trace / n).

    >>> ranged([{"density": {"nodes": [[-1.0, 0.0, 4.0]], "weights": [[0.25, 0.5, 0.25]]}}])
    'from -1 to 4, mean 0.75'
    """
    nodes, weights = ([np.array(r["density"][key], dtype=np.float64) for r in results] for key in ("nodes", "weights"))
    mean = fmean(float((n * w).sum(1).mean()) for n, w in zip(nodes, weights, strict=True))
    return f"from {min(n.min() for n in nodes):.3g} to {max(n.max() for n in nodes):.3g}, mean {mean:.3g}"
