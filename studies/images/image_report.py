"""runs.csv -> report.md, summary.json of the image study: the gate, the contrasts and the tables of protocol.md.

Statistics and tables are those of studies/control/analyse.py, which has to be on the path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean

from analyse import (
    COMPARED,
    Contrast,
    Fresh,
    Gate,
    accuracy_table,
    check_trials,
    choice_table,
    difference_table,
    environments,
    equal_runs,
    gates,
    mean_over,
    means,
    summary,
    table,
    values,
    whole_cells,
)
from image_plan import ImagePlan
from plan import Row

PRIMARIES = 6  #: three with wrong labels, three with right ones
OVERFIT = 10.0  #: points by which a network that over-fits is better on its training than on the test images


def report(plan: ImagePlan) -> str:
    """The whole report, which is also written to report.md beside the table.

    Raises:
        ValueError: no cell has all its fresh runs, or two arms of a cell have different numbers of trials.
    """
    rows = plan.rows()
    equal, (found, _) = equal_runs(plan, rows), whole_cells(plan, rows)
    found = {cell: arms for cell, arms in found.items() if cell in equal}
    missing = lacking(plan, rows, found)
    check_trials(plan, rows, found)
    if not found:
        raise ValueError(f"no cell has all its fresh runs yet: {'; '.join(missing)}; run `run.py tune`, then `fresh`")
    gate = gates(plan, rows, found)
    primary = contrasts(plan, found, gate)
    common = "lr {lr:g} and weight decay {weight_decay:g}".format(**plan.settings["equal"])
    parts = [
        "# Image study: results",
        "Made from the table of runs alone by `python studies/images/run.py report`; protocol.md, written before any "
        "seed ran under it, says what is compared and why. CIFAR-10 pooled to 16x16 pixels: accuracies are not those "
        "of CIFAR-10. Differences are in points of test accuracy, paired by seed; "
        f"n = {len(plan.fresh)} fresh seeds. {len(rows):,} runs.",
        "**Missing**: " + "; ".join(missing) + "." if missing else "All cells of the plan are here.",
        environments(plan, rows),
        "## The gate",
        "A claim about an arm with one gradient is made in words only if two-step SAM beats the better tuned baseline "
        f"of the cell (interval above 0, Bonferroni over {len(plan.cells)} cells) and SGD at {common} fits wrong "
        "labels (accuracy on the labels that it was trained on, minus the share of right ones, at least 10 points). "
        "With right labels it cannot pass; for those cells see what SGD memorises.",
        table(["cell", "better baseline", "SAM minus it", "SGD on its labels minus right ones: tuned",
               "at the common setting", "gate"],
              [[*(line := one.line(cell))[:5], line[-1]] for cell, one in gate.items()]),
        "## Primary contrasts",
        f"Simultaneous 95 % intervals (Bonferroni over {PRIMARIES}). Contrasts 1 to 3: mean over the cells with wrong "
        "labels that pass the gate; the line below each has all cells with wrong labels, whether they pass or not. "
        "Contrasts 4 to 6: mean over the cells with right labels and without augmentation, all of them.",
        table(["contrast", "cells", "estimate", "interval", "says"], [one.line() for one in primary]),
        "## Every cell",
        "Mean test accuracy in %. The better baseline of a cell (by validation accuracy in the tuning) is in italics.",
        accuracy_table(plan, found, gate),
        f"Minus the better baseline, with intervals that hold together over {len(plan.cells)} cells for each arm:",
        difference_table(plan, found, gate),
        "## What SGD memorises",
        f"Accuracy in % of SGD on its training images, with the labels that it was trained on and not augmented, and "
        f"on test images: at its choice, and at {common}. It over-fits if the former is at least {OVERFIT:.0f} points "
        "above the latter.",
        table(["cell", "right labels", "at its choice: train", "test", "over-fits", "common setting: train", "test",
               "over-fits"],
              [memorised(plan, cell, found[cell]["sgd"], equal[cell]["sgd"]) for cell in found]),
        "## Trials",
        "In every cell all arms have had the same number of trials (checked by the code that wrote "
        "this). lr, weight decay, radius of each choice; * if a neighbour of it on the lattice was not tried.",
        choice_table(plan, rows, found),
        "## Cost",
        "Processor time of all runs, those of cells that are not whole included.",
        table(["cell", "runs of the tuning", "fresh runs", "processor hours", "seconds a run"], costs(plan, rows)),
    ]  # fmt: skip
    text = "\n\n".join(parts) + "\n"
    plan.table.with_name("report.md").write_text(text, encoding="utf-8")
    facts = json.dumps(summary(plan, found, gate, missing, primary, equal), indent=1)
    plan.table.with_name("summary.json").write_text(facts + "\n", encoding="utf-8")
    return text


def lacking(plan: ImagePlan, rows: Sequence[Row], found: Mapping[str, object]) -> list[str]:
    """What is missing, a phrase for each cell that is not whole; cells that have not begun share one."""
    begun = {row["cell"] for row in rows}
    out = []
    for cell in (one for one in plan.cells if one in begun and one not in found):
        untuned = plan.untuned(cell, rows)
        runs = sum(row["stage"] != "tune" and row["cell"] == cell for row in rows)
        fresh = f"{runs} of {len(plan.fresh) * (len(plan.arms) + len(plan.equal_arms))} fresh runs"
        out.append(f"{cell} is being tuned ({'; '.join(untuned)})" if untuned else f"{cell} has {fresh}")
    later = [cell for cell in plan.cells if cell not in begun]
    return out + ([f"not begun: {', '.join(later)}"] if later else [])


def contrasts(plan: ImagePlan, found: Fresh, gate: Mapping[str, Gate]) -> list[Contrast]:
    """Contrasts 1 to 3 with wrong labels, by the gate and over all; 4 to 6 with right ones, without augmentation."""
    clean = [cell for cell in found if not gate[cell].noisy and plan.cells[cell].augment == "none"]
    three = [
        mean_over(plan, found, gate, (f"{3 + int(number)}", arm, other), "clean", clean, PRIMARIES)
        for number, arm, other in COMPARED
    ]
    return means(plan, found, gate, PRIMARIES) + three


def memorised(plan: ImagePlan, cell: str, tuned: Mapping[int, Row], common: Mapping[int, Row]) -> list[str]:
    """A row of the table of what SGD memorises."""
    line = [cell, f"{100 * (1 - plan.cells[cell].noise):.0f}"]
    for runs in (tuned, common):
        train, test = (fmean(values(runs, key).values()) for key in ("train", "test"))
        line += [f"{train:.1f}", f"{test:.1f}", "yes" if train - test >= OVERFIT else "no"]
    return line


def costs(plan: ImagePlan, rows: Sequence[Row]) -> list[list[str]]:
    """The rows of the table of costs, and their sum."""
    lines = []
    for name, mine in ((cell, [row for row in rows if row["cell"] == cell]) for cell in plan.cells):
        if mine:
            lines.append(cost(name, mine))
    return [*lines, cost("all", rows)]


def cost(name: str, rows: Sequence[Row]) -> list[str]:
    """One row of it."""
    seconds, tuning = sum(row["seconds"] for row in rows), sum(row["stage"] == "tune" for row in rows)
    return [name, f"{tuning}", f"{len(rows) - tuning}", f"{seconds / 3600:.2f}", f"{seconds / len(rows):.1f}"]
