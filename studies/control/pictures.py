"""runs.csv -> gains.png (what each arm gains, cell by cell) and radii.png (how wide the useful radii are)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from analyse import Fresh, Gate, gates, interval, minus, values, whole_cells
from plan import Plan, Row
from s2sam.report.bound_plots import save_png
from s2sam.report.stats import Interval

SHOWN = {"sam": ("SAM (2 gradients a step)", "#8a93a3", "s"), "echo": ("echo (1)", "#0072b2", "o"),
         "+g": ("the paper's +g (1)", "#d55e00", "^")}  # fmt: skip
NETWORKS = {"bn": "with BatchNorm", "plain": "without BatchNorm"}
Gain = tuple[float, Interval | None]


def draw(plan: Plan) -> list[Path]:
    """Both pictures, of the cells that have all their runs."""
    rows = plan.rows()
    found, _ = whole_cells(plan, rows)
    gate = gates(plan, rows, found)
    return [draw_gains(plan, found, gate), draw_radii(plan, found)]


def gains(plan: Plan, found: Fresh, gate: Mapping[str, Gate], arm: str) -> dict[str, Gain]:
    """Cell -> the arm minus the better baseline, mean and the interval that holds together over all cells."""
    out = {}
    for cell, arms in found.items():
        gap = minus(values(arms[arm]), values(arms[gate[cell].baseline]))
        out[cell] = fmean(gap.values()), interval(gap, len(plan.cells))
    return out


def draw_gains(plan: Plan, found: Fresh, gate: Mapping[str, Gate]) -> Path:
    """A panel for each network and share of wrong labels; a filled mark where two-step SAM itself gains (the gate)."""
    settings = plan.settings["cells"]
    masks = [mask for mask in settings["masks"] if any(cell.endswith(f"-{mask}") for cell in found)]
    shares = [noise for noise in settings["noise"] if any(cell.startswith(f"{100 * noise:.0f}-") for cell in found)]
    figure, panels = _panels(len(settings["networks"]), len(shares), 3.4, 2.6)
    series = {arm: gains(plan, found, gate, arm) for arm in SHOWN}
    for row, network in zip(panels, settings["networks"], strict=True):
        for axes, noise in zip(row, shares, strict=True):
            axes.axhline(0, color="#1b2430", lw=1)
            for i, (arm, (label, color, mark)) in enumerate(SHOWN.items()):
                for x, mask in enumerate(masks):
                    cell = f"{100 * noise:.0f}-{network}-{mask}"
                    if cell not in found:
                        continue
                    mean, bounds = series[arm][cell]
                    at = x + 0.2 * (i - 1)
                    if bounds is not None:
                        axes.plot([at, at], [bounds.low, bounds.high], color=color, lw=2.5, solid_capstyle="butt")
                    fill = color if gate[cell].passes else "white"
                    axes.plot(at, mean, mark, ms=6, color=color, mfc=fill, label=label)
            axes.set_xticks(range(len(masks)), [name.replace("static", "").replace("rigl", "RigL ") for name in masks])
            axes.set_title(f"{100 * noise:.0f} % wrong labels, {NETWORKS[network]}", fontsize=9)
            axes.set_xlim(-0.5, len(masks) - 0.5)
    for row in panels:
        row[0].set_ylabel("points above the better of\ntuned SGD and Nesterov", fontsize=9)
    _legend(figure, list(SHOWN.values()))
    figure.supxlabel(
        "dense, or sparsity in %. Filled: two-step SAM itself is shown to gain there (the gate)",
        fontsize=9,
    )
    path = plan.table.with_name("gains.png")
    save_png(figure, path)
    return path


def best_by_radius(plan: Plan, rows: list[Row], cell: str, arm: str) -> dict[float, float]:
    """Radius -> the best validation accuracy in % of all trials with it, over learning rates and weight decays."""
    scores = plan.screened(plan.tried(cell, arm, rows))
    best: dict[float, float] = {}
    for (_, _, rho), score in scores.items():
        best[rho] = max(best.get(rho, 0.0), 100 * score)
    return dict(sorted(best.items()))


def draw_radii(plan: Plan, found: Fresh) -> Path:
    """The best trial at each radius of echo and SAM: both have the scale "filter", so that radii can be compared."""
    settings, rows = plan.settings["cells"], plan.rows()
    masks = [name for name, (method, _) in settings["masks"].items() if method != "rigl"]
    noise = max(settings["noise"])
    figure, panels = _panels(len(settings["networks"]), len(masks), 2.4, 2.2)
    arms = {arm: SHOWN[arm] for arm in ("sam", "echo")}
    for row, network in zip(panels, settings["networks"], strict=True):
        for axes, mask in zip(row, masks, strict=True):
            cell = f"{100 * noise:.0f}-{network}-{mask}"
            sparsity = "dense" if mask == "dense" else f"{mask.removeprefix('static')} %"
            axes.set_title(f"{sparsity}, {NETWORKS[network]}", fontsize=8)
            axes.set_xscale("log", base=2)
            axes.set_xticks([0.01, 0.04, 0.16, 0.64], ["0.01", "0.04", "0.16", "0.64"])
            axes.set_ylim(0, 100)
            if cell not in found:
                continue
            for arm, (label, color, mark) in arms.items():
                best = best_by_radius(plan, rows, cell, arm)
                axes.plot(list(best), list(best.values()), mark + "-", ms=4, color=color, label=label)
            without = max(100 * v for v in plan.screened(plan.tried(cell, "sgd", rows)).values())
            axes.axhline(without, color="#1b2430", lw=1, ls="--")
    for row in panels:
        row[0].set_ylabel("validation accuracy, %", fontsize=9)
    _legend(figure, [*arms.values(), ("best SGD", "#1b2430", "_")])
    figure.supxlabel(f"radius (share of each filter's length), {100 * noise:.0f} % wrong labels", fontsize=9)
    path = plan.table.with_name("radii.png")
    save_png(figure, path)
    return path


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[list[Any]]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey="row")
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, panels.tolist()


def _legend(figure: Any, entries: list[tuple[str, str, str]]) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=color, marker=mark, ls="", label=label) for label, color, mark in entries]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False, fontsize=9)
