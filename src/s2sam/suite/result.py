"""What a table says: an entry for each cell and column, differences to the reference column, and notes. Pure functions.

The unit of observation is a run; the value of a run is its test accuracy after the last epoch, at final sparsity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from s2sam.report.read import Run
from s2sam.report.stats import LEVEL, Difference, Interval, deviation, mean, paired_difference
from s2sam.suite.plan import Cell, Plan, Planned, percent_text
from s2sam.suite.pooled import Pooled, pooled_difference

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
    interval: Interval | None = None  #: of the difference, together with all others of the table
    state: str = ""  #: why there is no value; "" if there is one
    setting: str = ""  #: what mode tuned chose
    paired: Difference | None = None

    @property
    def n(self) -> int:
        """Number of seeds, or of rounds."""
        return len(self.values)

    @property
    def shows(self) -> int:
        """+1 or -1 if the interval lies on one side of 0, else 0."""
        return 0 if self.paired is None else self.paired.shows


@dataclass(frozen=True, eq=False)
class SuiteTable:
    """A whole table, ready to be written."""

    plan: Plan
    measure: str  #: accuracy or throughput: what the entries hold
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
) -> SuiteTable:
    """The table of test accuracies after the last epoch.

    A column of a cell in which a run failed has no value, and neither it nor what is compared with it enters the pooled
    difference: to leave out single seeds would favour settings that diverge.

    Args:
        plan: what was to be run.
        runs: the finished runs of the table.
        failed: what went wrong in the others.
        settings: what mode tuned chose, as text.
        remarks: further notes.
    """
    values: dict[tuple[Cell, str], dict[int, float]] = {}
    bad: dict[tuple[Cell, str], int] = {}
    images = max((int(run.final["test_images"]) for run in runs.values()), default=1)
    for planned, run in runs.items():
        values.setdefault((planned.cell, planned.column), {})[run.seed] = float(run.final["test_top1"])
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
    pooled = pool(differences, 1 / images)
    notes = [*plan_notes(plan), *_statistics(plan, len(compared), images)]
    notes += [*failure_notes(failed), *provenance(runs), *tripwires(plan, entries), *remarks]
    return SuiteTable(
        plan, "accuracy", tuple(entries), pooled, len(compared), tuple(notes), dict(runs), dict(failed)
    )  # fmt: skip


def pool(differences: Differences, grain: float) -> dict[str, Pooled]:
    """The pooled difference of each column, and where there are several sparsities of each of them as well.

    The intervals over all cells hold together, and those of single sparsities hold together.
    """
    pooled = {}
    for column, groups in differences.items():
        every = [cell for cells in groups.values() for cell in cells]
        pooled[column] = pooled_difference(every, comparisons=len(differences), grain=grain)
    count = sum(len(groups) for groups in differences.values())
    for column, groups in differences.items():
        for sparsity, cells in groups.items() if len(groups) > 1 else ():
            name = f"{column} at {percent_text(sparsity)}"
            pooled[name] = pooled_difference(cells, comparisons=count, grain=grain)
    return pooled


def possible(interval: Interval | None) -> Interval | None:
    """The part of an interval in which a difference of accuracies can lie, -1 to 1; it covers as often as the whole.

    >>> possible(Interval(-7.5, 0.5, 0.95))
    Interval(low=-1.0, high=0.5, level=0.95)
    """
    return None if interval is None else replace(interval, low=max(interval.low, -1.0), high=min(interval.high, 1.0))


def plan_notes(plan: Plan) -> list[str]:
    """What a reader must know about how the table was made."""
    notes = [f"Missing: {sentence}." for sentence in plan.missing]
    if plan.scaled:
        paper = plan.suite.paper or "the full budget"
        listed = "; ".join(plan.scaled)
        notes.append(f"Scaled by --budget {plan.budget.name}, so these are not the numbers of {paper}: {listed}.")
    if stands_in(plan):
        notes.append(
            "scikit-learn's digits (1,797 images of 8 x 8 pixels) stand in for the data of the table: this shows that "
            "everything runs, and is no evidence about any method."
        )
    if plan.mode == "matched":
        notes.append(
            "Mode matched: in a row all columns share seeds, initial weights, order of the data, learning rate, weight "
            "decay and epochs; they differ in sharpness, rho and sam.* only. Nothing was tuned for any column."
        )
    return notes


def stands_in(plan: Plan) -> bool:
    """True if digits take the place of the data of the table."""
    digits = any(cell.settings.get("data") == "digits" for cell in plan.runnable)
    return digits and plan.budget.stand_in.get("data") == "digits"


def failure_notes(failed: Mapping[Planned, str]) -> list[str]:
    """Each failed run by name."""
    return [f"Failed: {planned.name}: {reason}" for planned, reason in failed.items()]


def provenance(runs: Mapping[Planned, Run]) -> list[str]:
    """One sentence for each way in which the runs do not come from one code and one set of images."""
    notes = []
    codes: dict[str, int] = {}
    for run in runs.values():
        text = code_of(run)
        codes[text] = codes.get(text, 0) + 1
    if len(codes) > 1:
        listed = "; ".join(f"{text} ({count} runs)" for text, count in codes.items())
        notes.append(f"The runs were made by {len(codes)} versions of the code: {listed}.")
    elif codes:
        notes.append(f"All runs were made by {next(iter(codes))}.")
    digests: dict[str, dict[str, int]] = {}
    for planned, run in runs.items():
        found = digests.setdefault(planned.cell.block, {})
        digest = digest_of(run)[:12]
        found[digest] = found.get(digest, 0) + 1
    for block, found in digests.items():
        if len(found) > 1:
            listed = ", ".join(f"{digest} ({count} runs)" for digest, count in found.items())
            notes.append(f"The runs of {block} were trained on {len(found)} different sets of images: {listed}.")
    return notes


def code_of(run: Run) -> str:
    """Versions and commit of a run, as in "s2sam 0.1.0, torch 2.13.0, commit 1a2b3c4d"."""
    versions = run.env.get("versions", {})
    commit = str(run.env.get("git_commit") or "unknown")
    short = commit.removesuffix("-dirty")[:12] + ("-dirty" if commit.endswith("-dirty") else "")
    return f"s2sam {versions.get('s2sam', '?')}, torch {versions.get('torch', '?')}, commit {short}"


def digest_of(run: Run) -> str:
    """The digest of the images that a run was trained on."""
    return str(run.final.get("data_digest", run.env.get("data_digest", "unknown")))


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
                f"Tripwire: {entry.cell.label}, {entry.column} reaches {100 * entry.center:.2f} %, below the {bar:g} % "
                "of a well-tuned pipeline; mend that first, the comparisons of this row are void."
            )
    return notes


def _statistics(plan: Plan, comparisons: int, images: int) -> list[str]:
    if not comparisons:
        return []
    notes = [
        f"Values: mean test accuracy in % of the last epoch over the seeds {', '.join(map(str, plan.seeds))} (n = "
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
        "Pooled: the mean of the cells' differences, each cell counting once; its variance is pooled within cells "
        "(df = sum of n - 1). The intervals over all cells hold together; those of single sparsities hold together."
    )
    return notes
