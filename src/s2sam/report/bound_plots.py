"""What `s2sam theory check` writes: JSON, and PNG plots of every measured value against its bound."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from s2sam.analysis.bound import ASSUMPTIONS
from s2sam.analysis.bound_check import Check
from s2sam.analysis.bound_suite import Suite
from s2sam.analysis.plain_json import finite
from s2sam.analysis.stability import METHODS, root_radius
from s2sam.report.svg import PALETTE
from s2sam.train.atomic import atomic, write_text
from s2sam.train.environment import environment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, BAD = PALETTE[0][0], "#8a93a0", PALETTE[2][0]
#: a colour per method, the same in all plots
COLOURS = {
    "SGD": PALETTE[0][0], "SAM": PALETTE[3][0], "S2-SAM echo": PALETTE[5][0], "+": PALETTE[2][0], "-": PALETTE[1][0],
    "": PALETTE[4][0],
}  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def write_suite(suite: Suite, folder: Path, *, command: str) -> list[Path]:
    """Write bound.json, measured.png, rates.png and stability.png into `folder`; returns the paths.

    Raises:
        ValueError: a file stands where the folder should be.
    """
    import matplotlib
    import torch

    make_folder(folder)
    what = {"command": command, **environment(torch.device("cpu"))}
    paths = [folder / "bound.json"]
    write_text(paths[0], json.dumps(as_json(suite) | what, indent=1, allow_nan=False) + "\n")
    with matplotlib.rc_context(STYLE):
        for name, draw in (("measured", draw_measured), ("rates", draw_rates), ("stability", draw_stability)):
            paths.append(folder / f"{name}.png")
            save_png(draw(suite), paths[-1])
    return paths


def save_png(figure: Figure, path: Path) -> None:
    """Whole or not at all, and the same file for the same figure; few colours, so that it is small enough to commit."""
    from PIL import Image

    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=130)
    few = Image.open(pixels).convert("RGB").quantize(128)
    with atomic(path) as temporary:
        few.save(temporary, format="PNG", optimize=True)


def make_folder(folder: Path) -> None:
    """Make it with its parents. Raises ValueError if a file is in the way."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)


def check_folder(folder: Path) -> None:
    """Raises ValueError if a file is in the way; nothing is made."""
    if not next(path for path in (folder, *folder.absolute().parents) if path.exists()).is_dir():
        raise ValueError(f"{folder} is or goes through a file; give --out the name of a folder")


def as_json(suite: Suite) -> dict[str, Any]:
    """Everything in the suite as plain values; an infinite limit is null."""
    return {
        "holds": suite.holds,
        "seed": suite.seed,
        "setting": asdict(suite.setting),
        "assumptions": [asdict(assumption) for assumption in ASSUMPTIONS],
        "checks": finite([asdict(c) | {"holds": c.holds, "limit": c.limit} for c in suite.checks]),
        "rates": finite([asdict(r) | {"slope": r.slope} for r in suite.rates]),
        "boundaries": finite([asdict(b) for b in suite.boundaries]),
    }


def draw_measured(suite: Suite) -> Figure:
    """Each mean loss against its bound, both logarithmic; what is below the diagonal keeps the bound."""
    figure, (axes,) = panels_of(1, width=6.2, height=5.0)
    shown = [c for c in suite.checks if c.unit == "loss" and c.high > 0 and c.measured > 0 and math.isfinite(c.high)]
    groups: dict[str, list[Check]] = {}
    for check in shown:
        groups.setdefault("assumption broken on purpose" if check.control else check.experiment, []).append(check)
    markers = "os^Dvp*hX"
    for place, (name, checks) in enumerate(groups.items()):
        colour = BAD if checks[0].control else PALETTE[(1, 3, 4, 5, 6, 7, 0)[place % 7]][0]
        axes.plot(
            [c.high for c in checks],
            [c.measured for c in checks],
            "x" if checks[0].control else markers[place % len(markers)],
            color=colour,
            ms=6,
            alpha=0.85,
            label=name,
        )
    if shown:
        values = [v for c in shown for v in (c.high, c.measured)]
        ends = [min(values) / 2, max(values) * 2]
        axes.plot(ends, ends, color=INK, lw=1)
        axes.fill_between(ends, ends, [ends[1]] * 2, color=BAD, alpha=0.06, lw=0)
        axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
        axes.legend(loc="lower right")
    axes.set_title("Measured gap against its bound: below the line the bound holds")
    axes.set(xlabel="bound", ylabel="measured mean of F - F*")
    return figure


def draw_rates(suite: Suite) -> Figure:
    """The gap and its bound against T, eta, rho and n."""
    quantities = list(dict.fromkeys(rate.quantity for rate in suite.rates)) or ["T"]
    figure, panels = panels_of(len(quantities), width=3.4 * len(quantities), height=3.4)
    for axes, quantity in zip(panels, quantities, strict=True):
        for rate in (r for r in suite.rates if r.quantity == quantity):
            colour = _colour(rate.method)
            name = rate.method.replace("g_{t-1}", "$g_{t-1}$")
            axes.plot(rate.x, rate.measured, "o-", color=colour, ms=4, label=f"{name}, slope {rate.slope:.2f}")
            axes.plot(rate.x, rate.bounds, "--", color=colour, lw=1)
            axes.set(xscale="log", yscale="log", xlabel=quantity)
            axes.set_xticks(rate.x, [f"{x:g}" for x in rate.x])
            axes.set_xticks([], minor=True)
        axes.legend()
        axes.set_title(f"in {quantity} (dashed: bound)")
    panels[0].set_ylabel("F - F*")
    return figure


def draw_stability(suite: Suite) -> Figure:
    """Critical curvatures, predicted and measured, and the root radius that predicts them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, (left, right) = panels_of(2, width=11.5, height=4.2)
    names = [b.method for b in suite.boundaries]
    for place, boundary in enumerate(suite.boundaries):
        colour = _colour(boundary.method)
        left.plot([boundary.predicted], [-place], "|", color=INK, ms=17, mew=1.6)
        left.plot([boundary.measured], [-place], "o", color=colour, ms=6)
        left.annotate(f"{boundary.measured:.3g}", (boundary.measured, -place), (9, 6), textcoords="offset points")
    left.set_yticks([-i for i in range(len(names))], names)
    left.set(xscale="log", xlabel="critical curvature h", ylim=(-len(names) + 0.4, 0.8))
    left.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.xaxis.set_minor_formatter(NullFormatter())
    s = suite.setting
    left.set_title(f"measured (dot), predicted (bar): eta {s.lr:g}, mu {s.momentum:g}, c {s.c:g}")
    top = 1.3 * max((b.predicted for b in suite.boundaries if math.isfinite(b.predicted)), default=1.0)
    curvatures = np.linspace(top / 400, top, 400)
    for method in METHODS:
        if method.name in names:
            style = {"momentum": "--", "ema": ":", "random": "-."}.get(method.direction, "-")
            radius = root_radius(method, curvatures, s)
            right.plot(curvatures, radius, style, color=_colour(method.name), lw=1.5, label=method.name)
    right.axhline(1.0, color=INK, lw=0.8)
    right.set(xlabel="curvature h", ylabel="root radius", ylim=(0.7, 1.5), xlim=(0, top))
    right.set_title("above 1 a deviation grows")
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _colour(method: str) -> str:
    """By the sign if there is one, else by the name."""
    sign = next((s for s in "+-" if f" {s}" in method or method.startswith(s)), "")
    return COLOURS.get(sign if sign else method, COLOURS[""])


def panels_of(panels: int, *, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    """A figure with that many panels side by side, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, panels, place + 1) for place in range(panels)]
