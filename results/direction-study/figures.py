"""raw.csv -> contrasts.png, sparsities.png: arms against Nesterov on fresh seeds; `study.py report` draws them."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import analyse
from s2sam.report.bound_plots import panels_of, save_png
from s2sam.report.stats import t_interval
from sparser import SECOND, gains
from study import CELLS, HERE, PAPER, baseline

EDGE, MIDDLE, GREY = "#0072b2", "#1b2430", "#8a93a3"


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
    """Write sparsities.png: arms minus Nesterov at 80 to 98 %; None before stage 5 is done."""
    arms = [(arm, found) for arm in (PAPER, SECOND, "sgd") if len(found := gains(arm, "nesterov")) == 4]
    if not arms:
        return None
    figure, (axes,) = panels_of(1, width=7.0, height=3.4)
    axes.axhline(0, color=MIDDLE, lw=1)
    for place, ((arm, found), color, mark) in enumerate(zip(arms, (EDGE, "#d55e00", GREY), "Dos", strict=False)):
        for x, seeds in enumerate(found.values()):
            values, at = list(seeds.values()), x + 0.12 * (place - 1)
            interval = t_interval(values)
            if interval is not None:
                axes.plot([at, at], [interval.low, interval.high], color=color, lw=2.5, solid_capstyle="butt")
            axes.plot(at, fmean(values), mark, ms=6, color=color, label=arm if x == 0 else None)
    sparsities = next(iter(dict(arms).values()))
    axes.set_xticks(range(len(sparsities)), [f"{100 * s:.0f} %" for s in sparsities])
    axes.set_xlabel("sparsity")
    axes.set_ylabel("accuracy minus Nesterov's, points")
    axes.legend(frameon=False, fontsize=9)
    figure.suptitle("Mean over static ERK and RigL, 95 % interval over 8 seeds", fontsize=9)
    path = folder / "sparsities.png"
    save_png(figure, path)
    return path
