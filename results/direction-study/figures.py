"""raw.csv -> contrasts.png: arms against Nesterov on fresh seeds, pooled and by cell; `study.py report` draws it."""

from __future__ import annotations

from pathlib import Path

import analyse
from s2sam.report.bound_plots import panels_of, save_png
from study import CELLS, HERE, baseline, rows

EDGE, MIDDLE, GREY = "#0072b2", "#1b2430", "#8a93a3"


def contrasts() -> list[tuple[str, analyse.Cells]]:
    """The arms that have all their runs on the fresh seeds, with the cells that hold them."""
    found, reference = rows(), baseline()
    both = []
    for stage in ("confirmation", "confirmation 2"):
        cells = analyse.with_baseline([row for row in found if row["stage"] == stage])
        both += [(arm, cells) for arm in analyse.compared(cells, reference)]
    return both


def draw(folder: Path = HERE) -> Path | None:
    """Write contrasts.png; None while no arm has all its runs."""
    arms, reference = contrasts(), baseline()
    if not arms:
        return None
    figure, (axes,) = panels_of(1, width=9.0, height=1.6 + 0.62 * len(arms))
    axes.axvline(0, color=MIDDLE, lw=1)
    for place, (arm, cells) in enumerate(reversed(arms)):
        whole = analyse.pooled(cells, arm, reference)
        for index, groups in enumerate(cells.values()):
            columns = [analyse.column(groups[name], "test_top1") for name in (arm, reference)]
            gap = sum(columns[0].values()) / len(columns[0]) - sum(columns[1].values()) / len(columns[1])
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
