"""contrasts.png, sparsities.png: arms against Nesterov on fresh seeds; `study.py report` draws them."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import analyse
from s2sam.report.bound_plots import panels_of, save_png
from s2sam.report.stats import t_interval
from sparser import ALL_FOUR, DESIGN, GUARDED_CELL, METHODS, SECOND, cells_at, gaps
from study import CELLS, HERE, PAPER, baseline

EDGE, MIDDLE, GREY = "#0072b2", "#1b2430", "#8a93a3"
COLOURS = (EDGE, "#d55e00", GREY)


def draw(folder: Path = HERE) -> Path | None:
    """Write contrasts.png; None while no arm has all its runs."""
    arms, reference = analyse.whole(), baseline()
    if not arms:
        return None
    figure, (axes,) = panels_of(1, width=9.0, height=1.6 + 0.62 * len(arms))
    axes.axvline(0, color=MIDDLE, lw=1)
    for place, (arm, cells) in enumerate(reversed(arms)):
        whole = analyse.pooled(cells, arm, reference)
        for index, groups in enumerate(cells.values()):
            gap = analyse.mean(groups[arm], "test_top1") - analyse.mean(groups[reference], "test_top1")
            axes.plot(gap, place - 0.26, marker="os^v"[index], ms=4, mfc="none", color=GREY, ls="")
        if whole.interval is not None:
            axes.plot(
                [whole.interval.low, whole.interval.high], [place, place], color=EDGE, lw=3, solid_capstyle="butt"
            )
        axes.plot(whole.mean, place, "D", ms=6, color=EDGE)
    axes.set_yticks(range(len(arms)), [arm for arm, _ in reversed(arms)])
    axes.set_ylim(-0.6, len(arms) - 0.6)
    axes.set_xlabel(f"test accuracy minus that of {reference}, points")
    title = f"Mean over {len(CELLS)} cells with its 95 % interval; below it the cells: {legend()}"
    figure.suptitle(title, fontsize=9)
    path = folder / "contrasts.png"
    save_png(figure, path)
    return path


def legend() -> str:
    """The marks of the cells."""
    return ", ".join(f"{mark} {cell}" for mark, cell in zip("○□△▽", CELLS, strict=True))


def draw_sparsities(folder: Path = HERE) -> Path | None:
    """Write sparsities.png: arms minus Nesterov at 80 to 98 %, static ERK and RigL; None before stage 5 is done.

    RigL at 98 % is the guarded cell, left out before it has run.
    """
    arms = [(arm, colour, mark) for arm, colour, mark in zip((PAPER, SECOND, "sgd"), COLOURS, "Dos", strict=True)]
    if not all(gaps(arm, "nesterov", cells_at(ALL_FOUR)) for arm, _, _ in arms):
        return None
    figure, panels = panels_of(len(METHODS), width=9.0, height=3.4)
    for axes, method in zip(panels, METHODS, strict=True):
        cells = cells_at(ALL_FOUR, methods=[method])
        if method == "rigl" and all(gaps(arm, "nesterov", [GUARDED_CELL]) for arm, _, _ in arms):
            cells.append(GUARDED_CELL)
        axes.axhline(0, color=MIDDLE, lw=1)
        for place, (arm, colour, mark) in enumerate(arms):
            for x, seeds in enumerate(gaps(arm, "nesterov", cells).values()):
                values, at = list(seeds.values()), x + 0.12 * (place - 1)
                interval = t_interval(values)
                if interval is not None:
                    axes.plot([at, at], [interval.low, interval.high], color=colour, lw=2.5, solid_capstyle="butt")
                axes.plot(at, fmean(values), mark, ms=6, color=colour, label=arm if x == 0 else None)
        names = [f"{100 * DESIGN[c][1]:.0f} %{', guarded' if c == GUARDED_CELL else ''}" for c in cells]
        axes.set_xticks(range(len(cells)), names)
        axes.set_xlabel(f"sparsity, {'static ERK' if method == 'static' else 'RigL'}")
    ends = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    panels[0].set_ylabel("accuracy minus Nesterov's, points")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Each cell with its own 95 % interval over 8 seeds", fontsize=9)
    path = folder / "sparsities.png"
    save_png(figure, path)
    return path
