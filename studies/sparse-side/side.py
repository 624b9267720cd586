"""The study of HAM and SparseOpt: do they gain over tuned SGD and Nesterov in sparse networks? See protocol.md.

    python studies/sparse-side/side.py tune   [--cells "20-bn-*" ...] [--smoke]    # tuning seeds, validation images
    python studies/sparse-side/side.py fresh  [--cells ...] [--smoke]              # fresh seeds, test images
    python studies/sparse-side/side.py report [--smoke]                            # report.md

Tuning, table of runs and choice of the baseline are those of studies/control. It can be stopped and started again: what
stands in runs.csv is not run a second time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean, median

import torch
import yaml

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "control"))

from analyse import (  # noqa: E402
    BySeed,
    Fresh,
    averaged,
    better_baseline,
    check_trials,
    choice_table,
    direction,
    environments,
    interval,
    minus,
    shown,
    table,
    values,
)
from plan import BASELINES, Plan, Row  # noqa: E402
from run import chosen, execute, tune  # noqa: E402
from steps import SideArm  # noqa: E402

PRIMARIES = 4  #: each arm's mean over all cells, and over those with BatchNorm
COLLAPSED = 0.15  #: validation accuracy of a network that guesses, with room for one that nearly does


class SidePlan(Plan):
    """What settings.yaml of this study says."""

    @classmethod
    def read(cls, *, smoke: bool = False) -> SidePlan:
        """The settings; a smoke run has a table of its own, which git ignores."""
        settings = yaml.safe_load((HERE / "settings.yaml").read_text(encoding="utf-8"))
        changes = settings.pop("smoke")
        if smoke:
            settings |= {key: settings[key] | value for key, value in changes.items()}
        return cls(settings, HERE / ("smoke" if smoke else ".") / "runs.csv")

    @cached_property
    def arms(self) -> dict[str, SideArm]:  # type: ignore[override]
        """Name -> arm."""
        return {name: SideArm(**options) for name, options in self.settings["arms"].items()}

    @property
    def treated(self) -> list[str]:
        """The arms that are compared with the better baseline."""
        return [arm for arm in self.arms if arm not in BASELINES]

    def _lattice(self, arm: str) -> tuple[Mapping[str, list[float]], ...]:
        """The third number of a trial is HAM's alpha, and 0 for all others."""
        found = self.settings["lattice"]
        alpha = found["alpha"] if self.arms[arm].ham else {"values": [0.0], "start": [0.0]}
        return found["lr"], found["weight_decay"], alpha


def fresh(plan: Plan, cell: str) -> None:
    """All arms of a cell at their choices, on the fresh seeds.

    Raises:
        ValueError: the tuning of the cell is not complete.
    """
    if missing := plan.refusals(cell, plan.rows()):
        raise ValueError(f"the tuning of {cell} is not complete ({'; '.join(missing)}); run `side.py tune` first")
    for arm in plan.arms:
        execute(plan, "fresh", cell, arm, [(chosen(plan, cell, arm), seed) for seed in plan.fresh])


def whole_cells(plan: Plan, rows: Sequence[Row]) -> tuple[Fresh, list[str]]:
    """The cells whose arms have all their fresh runs, and the names of the others."""
    every: Fresh = {}
    for row in rows:
        if row["stage"] == "fresh":
            every.setdefault(row["cell"], {}).setdefault(row["arm"], {})[row["seed"]] = row
    whole = [c for c in plan.cells if all(set(every.get(c, {}).get(a, {})) == set(plan.fresh) for a in plan.arms)]
    return {cell: every[cell] for cell in whole}, [cell for cell in plan.cells if cell not in whole]


def gains(found: Fresh, arm: str, against: Mapping[str, str], cells: Sequence[str]) -> BySeed:
    """The arm minus the arm that `against` names in each cell: points, by seed, mean over the cells."""
    return averaged([minus(values(found[cell][arm]), values(found[cell][against[cell]])) for cell in cells])


def primaries(plan: SidePlan, found: Fresh, baseline: Mapping[str, str]) -> dict[tuple[str, str], BySeed]:
    """(arm, cells) -> the gain over the better baseline, by seed."""
    groups = {"all": list(found), "BatchNorm": [cell for cell in found if plan.cells[cell].norm]}
    return {
        (arm, name): gains(found, arm, baseline, cells)
        for arm in plan.treated
        for name, cells in groups.items()
        if cells
    }


def verdict(by_cells: Mapping[tuple[str, str], BySeed], arm: str) -> str:
    """Whether the study supports the arm: the joint interval of the mean over all cells lies above 0."""
    bounds = interval(by_cells[arm, "all"], PRIMARIES)
    return "supported" if bounds is not None and bounds.low > 0 else "not supported"


def report(plan: SidePlan) -> str:
    """The whole report, which is also written to report.md beside the table.

    Raises:
        ValueError: no cell has all its fresh runs, or two arms of a cell have different numbers of trials.
    """
    rows = plan.rows()
    found, missing = whole_cells(plan, rows)
    check_trials(plan, rows, found)
    if not found:
        raise ValueError(f"no cell has all its fresh runs yet: {', '.join(missing)}; run `side.py fresh` first")
    baseline = {cell: better_baseline(plan, rows, cell) for cell in found}
    sgd = dict.fromkeys(found, "sgd")
    by_cells = primaries(plan, found, baseline)
    parts = {(network, kind): [] for network in (True, False) for kind in ("static", "rigl")}
    for cell in found:
        parts[plan.cells[cell].norm, plan.cells[cell].method].append(cell)
    parts = {key: cells for key, cells in parts.items() if cells}
    seconds = sum(row["seconds"] for row in rows)
    text = "\n\n".join([
        "# HAM and SparseOpt: results",
        "Made from the table of runs alone by `python studies/sparse-side/side.py report`; protocol.md, written before "
        "any seed ran under it, says what is compared and why. Differences are in points of test accuracy, paired by "
        f"seed; n = {len(plan.fresh)} fresh seeds. {len(rows):,} runs, {seconds:,.0f} processor seconds.",
        *([f"**Not whole**: {', '.join(missing)}."] if missing else []),
        environments(plan, rows),
        "## Primary contrasts",
        f"Minus the better baseline of each cell, mean over the cells; simultaneous 95 % intervals (Bonferroni over "
        f"{PRIMARIES}). An arm is supported if its interval over all cells lies above 0.",
        table(["arm", "cells", "how many", "estimate", "interval", "says"], [
            [arm, name, str(len(found) if name == "all" else sum(plan.cells[c].norm for c in found)),
             *shown_gain(gap, PRIMARIES)]
            for (arm, name), gap in by_cells.items()
        ]),
        *(f"**{arm}: {verdict(by_cells, arm)}.**" for arm in plan.treated),
        "## Parts",
        f"Not decisive: the same by network and kind of masks, and minus SGD, which has the same base step; 95 % "
        f"intervals, Bonferroni over the {2 * len(parts) * len(plan.treated)} of this table.",
        table(["arm", "network", "masks", "minus the better baseline", "minus SGD"], [
            [arm, "BatchNorm" if network else "plain", kind, *(
                " ".join(shown_gain(gains(found, arm, other, cells), 2 * len(parts) * len(plan.treated))[:2])
                for other in (baseline, sgd)
            )]
            for arm in plan.treated for (network, kind), cells in parts.items()
        ]),
        "## Every cell",
        "Mean test accuracy in %; the better baseline (by validation accuracy in the tuning) in italics. Differences "
        f"from it have intervals that hold together over {len(found)} cells for each arm.",
        table(["cell", *plan.arms, *(f"{arm} minus baseline" for arm in plan.treated)], [
            [cell, *(accuracy(by_arm[arm], italic=arm == baseline[cell]) for arm in plan.arms), *(
                " ".join(shown_gain(minus(values(by_arm[arm]), values(by_arm[baseline[cell]])), len(found))[:2])
                for arm in plan.treated
            )]
            for cell, by_arm in found.items()
        ]),
        "## Trials",
        "All arms of a cell have had the same number of trials (checked by the code that wrote this). lr, weight "
        "decay, alpha of each choice; * if a neighbour of it on the lattice was not tried.",
        choice_table(plan, rows, found),
        f"Runs of the tuning that ended at guessing (validation accuracy below {100 * COLLAPSED:.0f} %), and processor "
        "seconds of a run.",
        table(["arm", "runs", "guessing", "seconds, median"], [collapses(rows, arm) for arm in plan.arms]),
    ]) + "\n"  # fmt: skip
    plan.table.with_name("report.md").write_text(text, encoding="utf-8")
    return text


def shown_gain(by_seed: BySeed, comparisons: int) -> list[str]:
    """Estimate, interval, and what it says."""
    bounds = interval(by_seed, comparisons)
    return [f"{fmean(by_seed.values()):+.2f}", shown(bounds), direction(bounds)]


def accuracy(by_seed: Mapping[int, Row], *, italic: bool) -> str:
    """Mean test accuracy."""
    text = f"{fmean(values(by_seed).values()):.1f}"
    return f"*{text}*" if italic else text


def collapses(rows: Sequence[Row], arm: str) -> list[str]:
    """A row of the table of collapsed runs."""
    mine = [row for row in rows if (row["stage"], row["arm"]) == ("tune", arm)]
    share = fmean(row["val"] < COLLAPSED for row in mine)
    return [arm, f"{len(mine):,}", f"{100 * share:.0f} %", f"{median(row['seconds'] for row in mine):.2f}"]


def uncommitted() -> str:
    """The files of this folder that differ from the commit, which the table of runs names."""
    git = ["git", "-C", str(HERE), "status", "--porcelain", "--", "*.py", "*.yaml", "protocol.md"]
    return ", ".join(line[3:] for line in subprocess.check_output(git, text=True).splitlines())


def main() -> None:
    """One command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("tune", "fresh", "report"))
    parser.add_argument("--cells", nargs="+", default=["*"], metavar="NAME", help="names of cells, or patterns of them")
    parser.add_argument("--smoke", action="store_true", help="a few small runs, in the folder smoke; no findings")
    options = parser.parse_args()
    plan = SidePlan.read(smoke=options.smoke)
    torch.set_num_threads(1)
    try:
        if options.command == "report":
            print(report(plan))
            return
        if not options.smoke and (changed := uncommitted()):
            raise ValueError(
                f"the table of runs names a commit, and these files differ from it: {changed}; commit them"
            )
        for cell in plan.chosen_cells(options.cells):
            (tune if options.command == "tune" else fresh)(plan, cell)
            print(cell, f"{sum(row['seconds'] for row in plan.rows()):,.0f} seconds", flush=True)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
