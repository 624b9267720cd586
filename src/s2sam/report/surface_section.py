"""Loss surfaces in the report: what `s2sam surface` has measured of its runs, as grids, lines and Ra.

The page holds no script: the grids are drawn from several sides, and the reader chooses one by a radio button.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from s2sam.analysis.roughness import clipped
from s2sam.analysis.surface_file import Surface, load_surface
from s2sam.report.arm_bars import Dot, arm_bars
from s2sam.report.arms import Arm
from s2sam.report.draw import End, end_labels
from s2sam.report.held import digest_of
from s2sam.report.panels import Figure, Section, treatments
from s2sam.report.surface_plots import ceiling, cut_points
from s2sam.report.svg import mark, new_axes, series_colour, shorten, style, to_svg

SIDES = {"from above": None, "3-D": -52.0, "turned 90°": 38.0, "turned 180°": 128.0, "turned 270°": 218.0}
_GREY = "#7f8a99"  # legible on light and dark pages alike
_LOOK: dict[Any, Any] = {
    "text.color": _GREY, "axes.labelcolor": _GREY, "axes.edgecolor": _GREY, "xtick.color": _GREY, "ytick.color": _GREY,
    "axes.titlelocation": "center", "grid.color": _GREY,
}  # fmt: skip
Found = dict[Arm, Surface]


def find_surfaces(folder: str | Path, arms: Sequence[Arm]) -> Found:
    """The surface of one run of each arm, the lowest seed that has one; arms without any are left out.

    Surfaces are known by the digest of the weights they were measured at, so runs and folders may have been moved.

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
        for run in arm.runs.values():
            digest = digest_of(run.folder)
            if digest in by_weights and arm not in found:
                found[arm] = by_weights[digest]
    if not found:
        raise ValueError(f"no surface in {folder} is of these runs; run `s2sam surface` on them")
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
    first = found[shown[0]]
    figures = [_views(shown, found)] if first.settings.dims == 2 else []
    with style():
        figures += [_profiles(base, shown, found, arms) for base in dict.fromkeys(arm.base for arm in shown)]
        for key, title in _RA.items():
            values = {arm: [Dot(value) for value in found[arm].summary()[key]] for arm in shown}
            figures.append(arm_bars(title, "nats", values, treatments(arms), f"surface-{key}"))
    cut = sum(cut_points([found[arm] for arm in shown]).values())
    size = " x ".join([str(first.settings.points)] * first.settings.dims)
    return Section(
        "Loss surfaces",
        f"Mean cross entropy around the weights, {size} points, {first.settings.pairs} "
        f"{'pair' if first.settings.dims == 2 else 'draw'}{'s' if first.settings.pairs > 1 else ''} of directions, "
        f"{first.facts.get('images', '?')} {first.facts.get('split', '')} images, BatchNorm {first.settings.bn}; one "
        "run of each arm, all on one scale. Directions are random on the active weights, each filter scaled to its own "
        "norm; the grids show the first pair, the lines and Ra all of them. Ra_raw is the height of the bowl, "
        "Ra_detrended what is left without it; neither shows by itself that a minimum generalises."
        + (f" {cut} points lie above the end of the scale and are cut off." if cut else ""),
        tuple(figures),
    )


_RA = {"ra_raw": "Ra_raw, height of the bowl", "ra_detrended": "Ra_detrended, without the bowl"}


def _comparable(surface: Surface) -> dict[str, Any]:
    left_out = ("weights_sha256", "masked_weights")
    return {key: value for key, value in surface.depends_on.items() if key not in left_out}


def _views(arms: Sequence[Arm], found: Mapping[Arm, Surface]) -> Figure:
    """All grids from one side at a time."""
    buttons, pictures = [], []
    for number, (name, azimuth) in enumerate(SIDES.items()):
        checked = " checked" if number == 0 else ""
        buttons.append(
            f'<label><input type="radio" name="surface-view" id="surface-view-{number}"{checked}>{escape(name)}</label>'
        )
        words = "; ".join(f"{arm.name}: loss {found[arm].centre[0]:.3g} at the weights" for arm in arms)
        data = base64.b64encode(_picture(arms, found, azimuth)).decode()
        pictures.append(
            f'<img class="view view-{number}" alt="Loss surfaces {escape(name)}. {escape(words, quote=True)}" '
            f'src="data:image/png;base64,{data}">'
        )
    html = f'<div class="views"><div class="buttons">{"".join(buttons)}</div>{"".join(pictures)}</div>'
    return Figure(html, f"Loss surfaces of {len(arms)} runs", wide=True)


def _picture(arms: Sequence[Arm], found: Mapping[Arm, Surface], azimuth: float | None) -> bytes:
    """The first grid of each arm as PNG: contours, or 3-D from one side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from PIL import Image

    top = ceiling([found[arm] for arm in arms])
    grids = [clipped(found[arm].loss[0], top)[0] for arm in arms]
    low = min(float(z.min()) for z in grids)
    high = top if top > low else low + 1.0
    columns = min(len(arms), 4)
    rows = -(-len(arms) // columns)
    with matplotlib.rc_context(_LOOK):
        figure = Canvas(figsize=(2.6 * columns + 0.7, 2.5 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        all_axes, image = [], None
        for place, (arm, z) in enumerate(zip(arms, grids, strict=True)):
            t = found[arm].settings.coordinates
            axes: Any = figure.add_subplot(rows, columns, place + 1, projection=None if azimuth is None else "3d")
            if azimuth is None:
                image = axes.contourf(t, t, z.T, levels=np.linspace(low, high, 25), cmap="viridis")
                axes.contour(t, t, z.T, levels=np.linspace(low, high, 13), colors="white", linewidths=0.3)
                axes.plot(0, 0, "+", color="white", ms=6)
                axes.set_aspect("equal")
                axes.grid(visible=False)
            else:
                a, b = np.meshgrid(t, t, indexing="ij")
                image = axes.plot_surface(a, b, z, cmap="viridis", vmin=low, vmax=high, rstride=1, cstride=1, lw=0)
                axes.set_zlim(low, high)
                axes.view_init(32, azimuth)
                for side in (axes.xaxis, axes.yaxis, axes.zaxis):
                    side.set_pane_color((1.0, 1.0, 1.0, 0.0))
            axes.tick_params(labelsize=6, length=0)
            axes.set_title(shorten(arm.name, 34), fontsize=8.5)
            all_axes.append(axes)
        assert image is not None
        figure.colorbar(image, ax=all_axes, label="loss (nats)", shrink=0.8, aspect=26, format="%.3g")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, transparent=True, metadata={"Software": None})
        small = io.BytesIO()
        with Image.open(buffer) as picture:  # 256 colours: a third of the bytes
            picture.quantize(256, Image.Quantize.FASTOCTREE).save(small, format="png", optimize=True)
    return small.getvalue()


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
