"""runs.csv -> report.md, summary.json: the gate, the primary contrasts and the tables that protocol.md names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from plan import BASELINES, MAIN, TIMED, Plan, Point, Row, read_table
from s2sam.report.stats import Interval, t_interval

LEVEL, PRIMARIES = 0.95, 7  #: four slopes and three means
GATE_FIT = 0.10  #: by how much SGD must fit its noisy labels beyond the share of right ones
GRAIN = Plan.grain
#: scopes of means over cells, and what the table calls them in place of the contrast's name
SCOPES = {"gate": "", "noisy": "all cells with wrong labels", "clean": ""}
BySeed = dict[int, float]
Fresh = dict[str, dict[str, dict[int, Row]]]  #: cell -> arm -> seed -> row


def report(plan: Plan) -> str:
    """The whole report, which is also written to report.md beside the table.

    Raises:
        ValueError: there is no fresh run, or two arms of a cell have different numbers of trials.
    """
    rows = plan.rows()
    found, missing = whole_cells(plan, rows)
    check_trials(plan, rows, found)
    if not found:
        raise ValueError(f"no cell has all its fresh runs yet; missing: {'; '.join(missing)}")
    equal = equal_runs(plan, rows)
    gate = gates(plan, rows, found)
    parts = [
        "# Control study: results",
        "Made from the table of runs alone by `python studies/control/run.py report`; protocol.md, written before the "
        "first fresh seed, says what is compared and why. Differences are in points of test accuracy, paired by seed; "
        f"n = {len(plan.fresh)} fresh seeds.",
        *(["**Not whole**: " + "; ".join(missing) + "."] if missing else []),
        environments(plan, rows),
        "## The gate",
        "A claim about an arm with one gradient is made only in a cell where two-step SAM beats the better tuned "
        f"baseline (interval above 0, Bonferroni over {len(plan.cells)} cells) and SGD fits wrong labels (accuracy on "
        "the labels that it was trained on, minus the share of right ones, at least 10 points) at the common learning "
        "rate and weight decay. First written was that *tuned* SGD fits them, which no cell can fulfil whose tuning "
        "prevents it (protocol.md, Changes); the column before the last has it.",
        table(["cell", "better baseline", "SAM minus it", "SGD on its labels minus right ones: tuned",
               "at the common setting", "gate as first written", "gate"],
              [one.line(cell) for cell, one in gate.items()]),
        "## Primary contrasts",
        f"Simultaneous 95 % intervals (Bonferroni over {PRIMARIES}). Contrasts 1 to 3: mean over the cells with wrong "
        "labels that pass the gate; the line below each has all cells with wrong labels, whether they pass or not.",
        table(
            ["contrast", "cells", "estimate", "interval", "says"],
            [one.line() for one in contrasts(plan, found, gate)],
        ),
        "## Every cell",
        "Mean test accuracy in %. The better baseline of a cell (by validation accuracy in the tuning) is in italics.",
        accuracy_table(plan, found, gate),
        f"Minus the better baseline, with intervals that hold together over {len(plan.cells)} cells for each arm:",
        difference_table(plan, found, gate),
        "## At one learning rate and weight decay",
        "All arms at lr {lr:g} and weight decay {weight_decay:g}, each with the best of the radii that the tuning "
        "tried there (by validation, two seeds). ".format(**plan.settings["equal"])
        + "SGD's accuracy in %; the others minus SGD, with intervals that hold together over "
        f"{len(plan.cells)} cells for each arm. Not a primary contrast: it says what a displacement does where nobody "
        "has tuned the weight decay.",
        equal_table(plan, equal),
        "## Equal time with SAM",
        "SAM trained for as long as echo takes, by seconds a gradient in the library's own loop, in turns, one thread.",
        time_table(plan, found),
        "## Trials",
        "In every cell all arms have had the same number of trials (checked by the code that wrote "
        "this). lr, weight decay, radius of each choice; * if a neighbour of it on the lattice was not tried.",
        choice_table(plan, rows, found),
    ]  # fmt: skip
    text = "\n\n".join(parts) + "\n"
    plan.table.with_name("report.md").write_text(text, encoding="utf-8")
    facts = json.dumps(summary(plan, found, gate, missing, equal=equal), indent=1)
    plan.table.with_name("summary.json").write_text(facts + "\n", encoding="utf-8")
    return text


def whole_cells(plan: Plan, rows: Sequence[Row]) -> tuple[Fresh, list[str]]:
    """The cells whose arms have all their fresh runs, and what the others lack."""
    every: Fresh = {}
    for row in rows:
        if row["stage"] == "fresh":
            every.setdefault(row["cell"], {}).setdefault(row["arm"], {})[row["seed"]] = row
    found, missing = {}, []
    for cell in plan.cells:
        lacks = [a for a in plan.fresh_arms(cell) if set(every.get(cell, {}).get(a, {})) != set(plan.fresh)]
        if cell not in every:
            missing.append(f"{cell} has not run")
        elif lacks:
            missing.append(f"{cell} lacks fresh runs of {', '.join(lacks)}")
        else:
            found[cell] = every[cell]
    return found, missing


def equal_runs(plan: Plan, rows: Sequence[Row]) -> Fresh:
    """The cells whose arms (the main ones, or fewer if the plan says so) have their runs at the common setting."""
    every: Fresh = {}
    for row in rows:
        if row["stage"] == "equal":
            every.setdefault(row["cell"], {}).setdefault(row["arm"], {})[row["seed"]] = row
    return {
        cell: every[cell]
        for cell in plan.cells
        if all(set(every.get(cell, {}).get(arm, {})) == set(plan.fresh) for arm in plan.equal_arms)
    }


def gates(plan: Plan, rows: Sequence[Row], found: Fresh) -> dict[str, Gate]:
    """The gate of every cell that has all its runs."""
    equal = equal_runs(plan, rows)
    return {cell: Gate(plan, rows, cell, arms, len(plan.cells), equal.get(cell)) for cell, arms in found.items()}


def check_trials(plan: Plan, rows: Sequence[Row], cells: Mapping[str, object]) -> None:
    """Raise ValueError unless all arms of a cell have the same number of trials."""
    for cell in cells:
        counts = {arm: len(plan.screened(plan.tried(cell, arm, rows))) for arm in plan.arms_in(cell)}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the arms of {cell} have different numbers of trials: {counts}; finish its tuning")


def environments(plan: Plan, rows: Sequence[Row]) -> str:
    """Which commits, versions and machines the runs are from."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["environment"]] = counts.get(row["environment"], 0) + 1
    lines = plan.table.with_name("environments.jsonl").read_text(encoding="utf-8").splitlines()
    found = {one["environment"]: one for one in map(json.loads, lines)}
    listed = []
    for name, count in counts.items():
        e = found[name]
        changed = f" with changes in {', '.join(e['changed'])}" if e["changed"] else ""
        listed.append(
            f"{count:,} runs: commit {e['commit'][:12]}{changed}, torch {e['torch']}, Python {e['python']}, "
            f"{e['processor']}"
        )
    return "; ".join(listed) + "."


def values(arm: Mapping[int, Row], key: str = "test") -> BySeed:
    """Accuracy in % by seed."""
    return {seed: 100 * row[key] for seed, row in arm.items()}


def minus(a: BySeed, b: BySeed) -> BySeed:
    """Paired differences."""
    return {seed: a[seed] - b[seed] for seed in a}


def averaged(several: Sequence[BySeed]) -> BySeed:
    """Mean over cells, seed by seed."""
    return {seed: fmean(one[seed] for one in several) for seed in several[0]}


def interval(by_seed: BySeed, comparisons: int, grain: float = GRAIN) -> Interval | None:
    """Student's t over the seeds, Bonferroni over the comparisons; `grain` is the points of one test image."""
    return t_interval(list(by_seed.values()), level=LEVEL, comparisons=comparisons, grain=grain)


def shown(found: Interval | None) -> str:
    """An interval as text."""
    return "none: all seeds agree" if found is None else f"[{found.low:+.2f}, {found.high:+.2f}]"


class Gate:
    """Whether a cell can show anything, and against which baseline.

    Args:
        plan: the study.
        rows: the table.
        cell: a name.
        arms: its fresh runs, by arm and seed.
        comparisons: how many cells the interval of SAM's gain is to hold together with.
        common: its runs at the common learning rate and weight decay; without them tuned SGD must have memorised.
    """

    def __init__(
        self,
        plan: Plan,
        rows: Sequence[Row],
        cell: str,
        arms: Mapping[str, Mapping[int, Row]],
        comparisons: int,
        common: Mapping[str, Mapping[int, Row]] | None = None,
    ) -> None:
        self.baseline = better_baseline(plan, rows, cell)
        self.gain = minus(values(arms["sam"]), values(arms[self.baseline]))
        self.interval = interval(self.gain, comparisons, plan.grain)
        right = 1 - plan.cells[cell].noise
        self.tuned_fit = fmean(row["train"] for row in arms["sgd"].values()) - right
        self.fit = self.tuned_fit if common is None else fmean(r["train"] for r in common["sgd"].values()) - right
        self.measured = common is not None
        self.noisy = plan.cells[cell].noise > 0
        gains = self.interval is not None and self.interval.low > 0
        self.passes = gains and self.fit >= GATE_FIT
        self.as_written = gains and self.tuned_fit >= GATE_FIT

    def line(self, cell: str) -> list[str]:
        """A row of the table."""
        gain = f"{fmean(self.gain.values()):+.2f} {shown(self.interval)}"
        common = f"{100 * self.fit:+.1f}" if self.measured else "not run"
        verdicts = ["passes" if passes else "fails" for passes in (self.as_written, self.passes)]
        return [cell, self.baseline, gain, f"{100 * self.tuned_fit:+.1f}", common, *verdicts]


def better_baseline(plan: Plan, rows: Sequence[Row], cell: str) -> str:
    """SGD or Nesterov, by the validation accuracy of its choice over the tuning seeds."""

    def score(arm: str) -> float:
        tried = plan.tried(cell, arm, rows)
        choice = plan.choice(tried)
        assert choice is not None
        return fmean(tried[choice][seed] for seed in plan.tuning)

    return max(BASELINES, key=score)


@dataclass(frozen=True)
class Contrast:
    """A primary contrast.

    Args:
        name: as protocol.md numbers it.
        scope: "gate" (cells that pass it), "noisy" (all with wrong labels), "clean" (some with right ones), or the
            network of a slope.
        cells: how many there are.
        by_seed: its values; empty if it cannot be computed.
        bounds: joint interval.
        says: the verdict in words.
    """

    name: str
    scope: str
    cells: int
    by_seed: BySeed
    bounds: Interval | None
    says: str

    def line(self) -> list[str]:
        """A row of the table."""
        title = SCOPES.get(self.scope) or self.name
        count = f"{self.cells}" if self.scope in SCOPES else ""
        if not self.by_seed:
            return [title, count, "", "", self.says]
        return [title, count, f"{fmean(self.by_seed.values()):+.2f}", shown(self.bounds), self.says]

    def facts(self) -> dict[str, object]:
        """The same for summary.json."""
        facts: dict[str, object] = {"contrast": self.name, "scope": self.scope, "cells": self.cells, "says": self.says}
        return facts | numbers(self.by_seed, self.bounds)


def numbers(by_seed: BySeed, bounds: Interval | None) -> dict[str, object]:
    """A difference for summary.json."""
    if not by_seed:
        return {"n": 0}
    ends = {} if bounds is None else {"low": round(bounds.low, 3), "high": round(bounds.high, 3)}
    return {"n": len(by_seed), "mean": round(fmean(by_seed.values()), 3)} | ends


COMPARED = (("1", "echo", ""), ("2", "echo", "sam"), ("3", "+g", ""))  #: number, arm, other arm ("": the baseline)


def means(plan: Plan, found: Fresh, gate: Mapping[str, Gate], comparisons: int) -> list[Contrast]:
    """Contrasts 1 to 3, once over the cells that pass the gate and once over all with wrong labels."""
    noisy = [cell for cell in found if gate[cell].noisy]
    passed = [cell for cell in noisy if gate[cell].passes]
    return [
        mean_over(plan, found, gate, one, scope, cells, comparisons)
        for one in COMPARED
        for scope, cells in (("gate", passed), ("noisy", noisy))
    ]


def mean_over(
    plan: Plan, found: Fresh, gate: Mapping[str, Gate], compared: tuple[str, str, str], scope: str,
    cells: Sequence[str], comparisons: int,
) -> Contrast:  # fmt: skip
    """One of the contrasts that are a mean over cells."""
    number, arm, other = compared
    name = f"{number}: {arm} minus {other or 'the better baseline'}"
    if not cells:
        says = "no cell passes the gate: nothing can be said" if scope == "gate" else "none of its cells has run"
        return Contrast(name, scope, 0, {}, None, says)
    gap = averaged([minus(values(found[c][arm]), values(found[c][other or gate[c].baseline])) for c in cells])
    bounds = interval(gap, comparisons, plan.grain)
    says = non_inferior(bounds, float(plan.settings["margin"])) if other else direction(bounds)
    return Contrast(name, scope, len(cells), gap, bounds, says)


def contrasts(plan: Plan, found: Fresh, gate: Mapping[str, Gate]) -> list[Contrast]:
    """All primary contrasts, the first three once over the cells that pass and once over all with wrong labels."""
    out = means(plan, found, gate, PRIMARIES)
    for network in plan.settings["cells"]["networks"]:
        for arm in ("echo", "sam"):
            slopes = slope(plan, found, gate, network, arm)
            title = f"4: {arm}'s gain per halving of the density, {network}"
            if slopes is None:
                out.append(Contrast(title, network, 0, {}, None, "not all its cells have run"))
                continue
            bounds = interval(slopes, PRIMARIES)
            says = direction(bounds, above="sparser gains more", below="sparser gains less")
            out.append(Contrast(title, network, 0, slopes, bounds, says))
    return out


def summary(
    plan: Plan,
    found: Fresh,
    gate: Mapping[str, Gate],
    missing: Sequence[str],
    primary: Sequence[Contrast] | None = None,
    equal: Fresh | None = None,
) -> dict[str, object]:
    """What summary.json holds, for pages that quote numbers; the primary contrasts are this study's own, or given."""
    cells = {}
    for cell, arms in found.items():
        baseline = values(arms[gate[cell].baseline])
        differences = {arm: minus(values(arms[arm]), baseline) for arm in plan.arms_in(cell)}
        cells[cell] = {
            "baseline": gate[cell].baseline,
            "passes": gate[cell].passes,
            "fit": round(100 * gate[cell].fit, 2),
            "accuracy": {arm: round(fmean(values(arms[arm]).values()), 3) for arm in plan.arms_in(cell)},
            "minus": {
                arm: numbers(gap, interval(gap, len(plan.cells), plan.grain)) for arm, gap in differences.items()
            },
        }
    facts = [one.facts() for one in (contrasts(plan, found, gate) if primary is None else primary)]
    common = {}
    for cell, arms in (equal or {}).items():
        gaps = {arm: minus(values(arms[arm]), values(arms["sgd"])) for arm in plan.equal_arms[1:]}
        common[cell] = {
            "sgd": round(fmean(values(arms["sgd"]).values()), 3),
            "minus sgd": {arm: numbers(gap, interval(gap, len(plan.cells), plan.grain)) for arm, gap in gaps.items()},
        }
    return {"missing": list(missing), "primaries": facts, "cells": cells, "at one setting": common}


def direction(bounds: Interval | None, above: str = "a gain", below: str = "a loss") -> str:
    """What an interval says."""
    if bounds is None or bounds.contains(0.0):
        return "cannot tell"
    return above if bounds.low > 0 else below


def non_inferior(bounds: Interval | None, margin: float) -> str:
    """What an interval says about non-inferiority."""
    if bounds is None:
        return "cannot tell"
    if bounds.low > -margin:
        return f"not worse than SAM by {margin:g} points" + (", and better" if bounds.low > 0 else "")
    return f"worse than SAM by more than {margin:g} points" if bounds.high < -margin else "cannot tell"


def slope(plan: Plan, found: Fresh, gate: Mapping[str, Gate], network: str, arm: str) -> BySeed | None:
    """Least-squares slope of the gain over log2(1 / density), for each seed; mean over the shares of wrong labels.

    Dense and static cells with wrong labels, whether they pass the gate or not; None if one has not run.
    """
    settings = plan.settings["cells"]
    masks = [name for name, (method, _) in settings["masks"].items() if method != "rigl"]
    noise = [share for share in settings["noise"] if share > 0]
    names = [[f"{100 * share:.0f}-{network}-{mask}" for share in noise] for mask in masks]
    if any(cell not in found for level in names for cell in level):
        return None
    x = [-math.log2(1 - settings["masks"][mask][1]) for mask in masks]
    gains = [averaged([minus(values(found[c][arm]), values(found[c][gate[c].baseline])) for c in n]) for n in names]
    middle = fmean(x)
    square = sum((at - middle) ** 2 for at in x)
    return {
        seed: sum((at - middle) * gain[seed] for at, gain in zip(x, gains, strict=True)) / square for seed in gains[0]
    }


def accuracy_table(plan: Plan, found: Fresh, gate: Mapping[str, Gate]) -> str:
    """Mean test accuracy of every arm in every cell."""
    lines = []
    for cell, arms in found.items():
        ran = plan.arms_in(cell)
        means = {arm: f"{fmean(values(arms[arm]).values()):.1f}" if arm in ran else "" for arm in plan.arms}
        better = gate[cell].baseline
        means[better] = f"*{means[better]}*"
        lines.append([cell, *means.values()])
    return table(["cell", *plan.arms], lines)


def difference_table(plan: Plan, found: Fresh, gate: Mapping[str, Gate]) -> str:
    """Every arm minus the better baseline."""
    arms = [arm for arm in plan.arms if arm not in BASELINES]
    lines = []
    for cell, by_arm in found.items():
        line = [cell]
        for arm in arms:
            if arm not in plan.arms_in(cell):
                line.append("")
                continue
            gap = minus(values(by_arm[arm]), values(by_arm[gate[cell].baseline]))
            line.append(f"{fmean(gap.values()):+.2f} {shown(interval(gap, len(plan.cells), plan.grain))}")
        lines.append(line)
    return table(["cell", *arms], lines)


def equal_table(plan: Plan, equal: Fresh) -> str:
    """The main arms at one learning rate and weight decay."""
    lines = []
    for cell, arms in equal.items():
        line = [cell, f"{fmean(values(arms['sgd']).values()):.1f}"]
        for arm in MAIN[1:]:
            gap = minus(values(arms[arm]), values(arms["sgd"]))
            rho = next(iter(arms[arm].values()))["rho"]
            radius = f" (rho {rho:g})" if rho else ""
            line.append(f"{fmean(gap.values()):+.1f} {shown(interval(gap, len(plan.cells)))}{radius}")
        lines.append(line)
    return table(["cell", "sgd", *MAIN[1:]], lines)


def time_table(plan: Plan, found: Fresh) -> str:
    """Echo and SAM at equal time."""
    times = read_table(plan.table.with_name("times.csv"))
    lines = []
    for cell, arms in found.items():
        of = {
            arm: 1e3 * median(r["seconds"] for r in times if r["cell"] == cell and r["arm"] == arm)
            for arm in ("sgd", "sam", "echo")
        }
        epochs = next(iter(arms[TIMED].values()))["epochs"]
        gap = minus(values(arms["echo"]), values(arms[TIMED]))
        difference = f"{fmean(gap.values()):+.2f} {shown(interval(gap, len(plan.cells)))}"
        lines.append([cell, *(f"{t:.2f}" for t in of.values()), f"{epochs:.0f}", difference])
    head = ["cell", "ms a gradient: SGD", "SAM", "echo", "SAM's epochs in echo's time", "echo minus that SAM"]
    return table(head, lines)


def choice_table(plan: Plan, rows: Sequence[Row], found: Fresh) -> str:
    """The settings of every arm."""
    lines = []
    for cell in found:
        line = [cell]
        for arm in plan.arms:
            if arm not in plan.arms_in(cell):
                line.append("")
                continue
            tried = plan.tried(cell, arm, rows)
            choice = plan.choice(tried)
            assert choice is not None
            line.append(setting(choice) + "*" * bool(plan.on_edge(arm, tried, choice)))
        lines.append([*line, f"{len(plan.screened(plan.tried(cell, 'sgd', rows)))}"])
    return table(["cell", *plan.arms, "trials an arm"], lines)


def setting(point: Point) -> str:
    """A trial as text."""
    return " ".join(f"{value:g}" for value in (point if point[2] else point[:2]))


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
