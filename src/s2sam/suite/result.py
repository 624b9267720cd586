"""What a table says: an entry for each cell and column, differences to the reference column, and notes. Pure functions.

The unit of observation is a run; the value of a run is its test accuracy after the last epoch, at final sparsity.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from s2sam.report.read import Run
from s2sam.report.stats import LEVEL, Difference, Interval, deviation, mean, paired_difference
from s2sam.suite.matched import VARIANT
from s2sam.suite.plan import Cell, Plan, Planned, percent_text
from s2sam.suite.pooled import Pooled, pooled_difference
from s2sam.suite.provenance import image_notes, provenance, sparsity_notes
from s2sam.suite.settings import merged

TRIPWIRE = "Tripwire"  #: how the note on a badly tuned reference begins
#: what is shown in percent
_VALUE = {
    "accuracy": "test accuracy in % of the last epoch",
    "robustness": "accuracy in % on corrupted test images after the last epoch",
}
Differences = dict[str, dict[float, list[list[float]]]]  #: column -> sparsity -> paired differences of each cell


@dataclass(frozen=True, eq=False)
class Entry:
    """One cell and column. Accuracies are fractions; in a throughput table `center` is images a second."""

    cell: Cell
    column: str
    values: dict[int, float] = field(default_factory=dict)  #: by seed, or by round of a throughput measurement
    center: float | None = None  #: the mean, or the median of the rounds
    spread: float | None = None  #: standard deviation over the seeds
    difference: float | None = None  #: to the reference column; in a throughput table the ratio of the step times
    equal: float = 0.0  #: the difference of equals: 0, or 1 for a ratio
    interval: Interval | None = None  #: of the difference, together with all others of the table
    state: str = ""  #: why there is no value; "" if there is one
    setting: str = ""  #: what mode tuned chose
    paired: Difference | None = None
    distinct: float | None = None  #: images a second, each counted once, where a throughput table visits some twice

    @property
    def n(self) -> int:
        """Number of seeds, or of rounds."""
        return len(self.values)

    @property
    def shows(self) -> int:
        """+1 or -1 if the interval lies above or below the difference of equals, else 0."""
        if self.interval is None or self.interval.contains(self.equal):
            return 0
        return 1 if self.interval.low > self.equal else -1

    @property
    def better(self) -> int:
        """+1 if the column is shown to be better than the reference, -1 for worse, else 0: a long step is worse."""
        return -self.shows if self.equal == 1 else self.shows


@dataclass(frozen=True, eq=False)
class SuiteTable:
    """A whole table, ready to be written."""

    plan: Plan
    measure: str  #: accuracy, throughput or robustness: what the entries hold
    entries: tuple[Entry, ...]
    pooled: dict[str, Pooled]  #: of each column but the reference, over all cells and then by sparsity
    comparisons: int
    notes: tuple[str, ...]
    runs: dict[Planned, Run] = field(default_factory=dict)
    failed: dict[Planned, str] = field(default_factory=dict)
    screening: dict[Planned, Run] = field(default_factory=dict)  #: of mode tuned
    screening_failed: dict[Planned, str] = field(default_factory=dict)

    def entry(self, cell: Cell, column: str) -> Entry:
        """The entry of a cell and column."""
        return next(e for e in self.entries if e.cell is cell and e.column == column)


def build_accuracy(
    plan: Plan,
    runs: Mapping[Planned, Run],
    failed: Mapping[Planned, str],
    settings: Mapping[tuple[Cell, str], str] | None = None,
    remarks: Iterable[str] = (),
    robust: Mapping[Planned, Mapping[str, Any]] | None = None,
) -> SuiteTable:
    """The table of test accuracies after the last epoch, or of the mean accuracies on corrupted test images.

    A column of a cell in which a run failed has no value, and neither it nor what is compared with it enters the pooled
    difference: to leave out single seeds would favour settings that diverge.

    Args:
        plan: what was to be run.
        runs: the finished runs of the table.
        failed: what went wrong in the others.
        settings: what mode tuned chose, as text.
        remarks: further notes.
        robust: what :func:`s2sam.suite.robust.measure_robustness` found, if the table is about that.
    """
    values: dict[tuple[Cell, str], dict[int, float]] = {}
    bad: dict[tuple[Cell, str], int] = {}
    images = max((int(run.final["test_images"]) for run in runs.values()), default=1)
    for planned, run in runs.items():
        values.setdefault((planned.cell, planned.column), {})[run.seed] = float(
            run.final["test_top1"] if robust is None else robust[planned]["mean_corruption_accuracy"]
        )
    for planned in failed:
        bad[planned.cell, planned.column] = bad.get((planned.cell, planned.column), 0) + 1
    reference = plan.suite.reference
    keys = [(cell, column) for cell in plan.cells for column in plan.suite.columns]
    compared = [
        key for key in keys
        if key[1] != reference and not key[0].missing and key not in bad and (key[0], reference) not in bad
    ]  # fmt: skip
    entries, differences = [], Differences()
    for key in keys:
        cell, column = key
        setting = (settings or {}).get(key, "")
        if cell.missing or key in bad:
            state = f"missing: {cell.missing}" if cell.missing else f"{bad[key]} of {len(plan.seeds)} runs failed"
            entries.append(Entry(cell, column, {}, state=state, setting=setting))
            continue
        own, paired = dict(sorted(values[key].items())), None
        if key in compared:
            paired = paired_difference(own, values[cell, reference], comparisons=len(compared), grain=1 / images)
            differences.setdefault(column, {}).setdefault(cell.sparsity, []).append([*paired.per_seed.values()])
        entry = Entry(cell, column, own, mean([*own.values()]), deviation([*own.values()]), setting=setting)
        if paired is not None:
            entry = replace(entry, difference=paired.mean, interval=possible(paired.simultaneous), paired=paired)
        entries.append(entry)
    pooled = pool(differences, 1 / images, Counter(cell.sparsity for cell in plan.runnable))
    notes = [*plan_notes(plan), *_statistics(plan, len(compared), images)]
    notes += robust_notes((robust or {}).values())
    notes += [*image_notes(runs), *failure_notes(failed), *provenance(runs), *sparsity_notes(runs)]
    notes += [*tripwires(plan, entries), *remarks]
    return SuiteTable(
        plan, "accuracy" if robust is None else "robustness", tuple(entries), pooled, len(compared), tuple(notes),
        dict(runs), dict(failed),
    )  # fmt: skip


def pool(differences: Differences, grain: float, planned: Mapping[float, int]) -> dict[str, Pooled]:
    """The pooled difference of each column, and where there are several sparsities of each of them as well.

    The intervals over all cells hold together, and those of single sparsities hold together. `planned` says how many
    cells of each sparsity there should be.
    """
    pooled = {}
    for column, groups in differences.items():
        every = [cell for cells in groups.values() for cell in cells]
        found = pooled_difference(every, comparisons=len(differences), grain=grain)
        pooled[column] = replace(found, planned=sum(planned.values()))
    count = sum(len(groups) for groups in differences.values())
    for column, groups in differences.items():
        for sparsity, cells in groups.items() if len(groups) > 1 else ():
            name = f"{column} at {percent_text(sparsity)}"
            found = pooled_difference(cells, comparisons=count, grain=grain)
            pooled[name] = replace(found, planned=planned[sparsity])
    return pooled


def possible(interval: Interval | None) -> Interval | None:
    """The part of an interval in which a difference of accuracies can lie, -1 to 1; it covers as often as the whole.

    >>> possible(Interval(-7.5, 0.5, 0.95))
    Interval(low=-1.0, high=0.5, level=0.95)
    """
    return None if interval is None else replace(interval, low=max(interval.low, -1.0), high=min(interval.high, 1.0))


def plan_notes(plan: Plan) -> list[str]:
    """What a reader must know about how the table was made."""
    notes = [*column_notes(plan), *(f"Missing: {sentence}." for sentence in plan.missing)]
    if plan.scaled:
        paper = plan.suite.paper or "the full budget"
        changes = "; ".join(plan.scaled)
        by = f"--budget {plan.budget.name} or by --set"
        notes.append(f"Scaled by {by}, so these are not the numbers of {paper}: {changes}.")
        if any(change.startswith("epochs ") for change in plan.scaled):
            notes.append("Fewer epochs reward fast optimisation: what wins here need not win at the full budget.")
    if stands_in(plan):
        notes.append(
            "scikit-learn's digits (1,797 images of 8 x 8 pixels) stand in for the data of the table: this shows that "
            "everything runs, and is no evidence about any method."
        )
    if plan.mode == "matched":
        plain = " and ".join(plan.suite.baselines)
        but = f", and {plain} (another plain optimizer, as a baseline) in {VARIANT}" if plain else ""
        twice = f" (each batch twice in a row: {listed(echo)})" if (echo := with_echo(plan)) else ""
        notes.append(
            "Mode matched: in a row all columns share seeds, initial weights, order of the data"
            f"{twice}, learning rate, weight decay and epochs; they differ in sharpness, rho and sam.* only{but}. "
            "Nothing was tuned for any column."
        )
    return notes + echo_notes(plan)


def column_notes(plan: Plan) -> list[str]:
    """Which columns are those of the paper, where the table has others too."""
    suite = plan.suite
    if not suite.not_in_paper:
        return []
    published = [column for column in suite.columns if column not in suite.not_in_paper]
    return [
        f"Columns: {listed(published)} as in {suite.paper} of the paper. Not in the paper, so that there is no "
        f"published number to compare with: {listed(suite.not_in_paper)} (left out by --columns "
        f"{shlex.join(published)})."
    ]


def with_echo(plan: Plan) -> list[str]:
    """The columns in which every batch comes twice in a row."""
    cells = [cell.settings for cell in plan.runnable]
    return [
        column
        for column, settings in plan.suite.columns.items()
        if any(merged(cell, settings).get("sharpness") == "echo" for cell in cells)
    ]


def echo_notes(plan: Plan) -> list[str]:
    """What columns with echo see of the data, and that they take as many steps as the others."""
    found = with_echo(plan)
    if not found:
        return []
    what = (
        f"{listed(found)}: every batch comes twice in a row, and the second visit is displaced by the gradient of the "
        "first. A visit is a step with one gradient"
    )
    if plan.suite.measure == "throughput":
        return [f"{what}; its images are counted in both, so that half of the images a second are distinct."]
    return [
        f"{what}, and an epoch has as many steps as in the other columns. The batches are those of the other columns, "
        "in the same order and augmented alike, but as many steps see only the first half of them."
    ]


def listed(names: Sequence[str]) -> str:
    """As in "A, B and C".

    >>> listed(["SGD", "SAM", "Echo"]), listed(["SGD"])
    ('SGD, SAM and Echo', 'SGD')
    """
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def stands_in(plan: Plan) -> bool:
    """True if digits take the place of the data of the table."""
    digits = any(cell.settings.get("data") == "digits" for cell in plan.runnable)
    return digits and plan.budget.stand_in.get("data") == "digits"


def robust_notes(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the corrupted images are, and how accurate the same runs are on clean ones."""
    found = list(results)
    if not found:
        return []
    row, clean = found[0], [1 - result["clean_error"] for result in found]
    kind = "Official" if row["source"] == "official" else f"GENERATED (constants {row['constants']}, not official)"
    return [
        f"{kind} corrupted images: the mean over {len(row['corruptions'])} corruptions x {len(row['severities'])} "
        f"severities of {row['images']} test images, accuracy and not mCE (digest {row['corrupted_digest'][:12]}). "
        f"Clean accuracies of these runs: {100 * min(clean):.2f} to {100 * max(clean):.2f} %; a network that is better "
        "on clean images is better on corrupted ones too; `s2sam robust` on the run folders says what is lost."
    ]


def failure_notes(failed: Mapping[Planned, str]) -> list[str]:
    """Each failed run by name."""
    return [f"Failed: {planned.name}: {one_line(reason)}" for planned, reason in failed.items()]


def one_line(text: str) -> str:
    r"""The words of a text on one line.

    >>> one_line("RuntimeError: CUDA error\n  compile with TORCH_USE_CUDA_DSA")
    'RuntimeError: CUDA error compile with TORCH_USE_CUDA_DSA'
    """
    return " ".join(text.split())


def tripwires(plan: Plan, entries: Iterable[Entry]) -> list[str]:
    """At full budget: a sentence for each reference whose accuracy is below what a correct pipeline reaches."""
    notes = []
    for entry in entries:
        least = plan.suite.tripwires.get(entry.cell.block, {}).get(entry.cell.row)
        if plan.budget.name != "full" or least is None or entry.column != plan.suite.reference or entry.center is None:
            continue
        bar = least[plan.suite.sparsities.index(entry.cell.sparsity)]
        if 100 * entry.center < bar:
            notes.append(
                f"{TRIPWIRE}: {entry.cell.label}, {entry.column} reaches {100 * entry.center:.2f} %, below the {bar:g} "
                "% of a well-tuned pipeline trained on all images; mend that first, the comparisons of this row and "
                "the pooled ones are void."
            )
    return notes


def _statistics(plan: Plan, comparisons: int, images: int) -> list[str]:
    if not comparisons:
        return []
    notes = [
        f"Values: mean {_VALUE[plan.suite.measure]} over the seeds {', '.join(map(str, plan.seeds))} (n = "
        f"{len(plan.seeds)}), +- standard deviation; in brackets the difference to {plan.suite.reference} in points, "
        "paired over seeds. No epoch was picked."
    ]
    if len(plan.seeds) < 2:
        notes.append("Fewer than 2 seeds: no interval is printed, and no difference here means anything by itself.")
        return notes
    notes.append(
        f"Intervals: Student's t over the paired differences; the {comparisons} of the table hold together with "
        f"{100 * LEVEL:g} % confidence (Bonferroni), cut to what is possible (100 points); with few seeds a single "
        "cell shows nothing. Where all differences are equal there is none. They speak of training again on these "
        f"data, not of other images; one of the {images} test images is {100 / images:.2f} points."
    )
    notes.append(
        "Pooled: the mean of the cells' differences, each cell counting once. Of its two intervals the first pools the "
        "variance within cells (df = sum of n - 1) and takes cells to be independent, the second is Student's t over "
        "the means of the seeds (df = n - 1) and needs no such assumption; a difference is shown if both say so. Those "
        "over all cells hold together, and those of single sparsities hold together (Bonferroni)."
    )
    return notes
