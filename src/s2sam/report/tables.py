"""The table of a report: one row per arm, as data, Markdown, CSV and rich. Says no more than the intervals do."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2sam.report.arms import Arm, reference_of
from s2sam.report.cost import Cost, cost_from_runs
from s2sam.report.stats import LEVEL, Difference, Interval, binomial_error, deviation, mean, paired_difference

if TYPE_CHECKING:
    from rich.table import Table as RichTable

HEADERS = (
    "arm", "test accuracy %", "sd", "vs {plain}", "95 % interval", "all {m} together", "verdict", "n", "test images",
    "cost ratio", "sparsity %",
)  # fmt: skip
NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class Row:
    """One arm: accuracies are fractions, costs are ratios to the plain arm of the same base."""

    arm: Arm
    mean: float
    deviation: float | None
    difference: Difference | None  #: None for a plain arm and where there is no plain arm to compare with
    reference: Arm | None
    cost: Cost | None
    sparsity: tuple[float, float]  #: lowest and highest over the seeds, measured from the weights
    test_images: int

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.arm.runs)

    @property
    def verdict(self) -> str:
        """What the simultaneous interval allows one to say, and nothing else."""
        if self.difference is None or self.reference is None:
            return "reference" if self.arm.plain else "nothing to compare with"
        if self.difference.n < 2:
            return "no interval from one seed"
        if self.difference.simultaneous is None:
            return "no interval (all equal)"
        if self.difference.shows == 0:
            return NO_DIFFERENCE
        return f"{'higher' if self.difference.shows > 0 else 'lower'} than {self.reference.treatment}"


@dataclass(frozen=True)
class Table:
    """All rows, the number of comparisons their simultaneous intervals cover, and the grain of the test set."""

    rows: tuple[Row, ...]
    comparisons: int
    binomial_error: float  #: of the mean accuracy over all arms on this test set

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know to read the numbers."""
        first = self.rows[0]
        notes = [
            "Differences are percentage points, paired over seeds, to the arm of the same base that uses the plain "
            "optimizer; "
            "intervals are 95 % Student t intervals over the paired differences."
        ]
        if self.comparisons > 1:
            notes.append(
                f"With {self.comparisons} comparisons in one table the verdict goes by the wider interval, which "
                f"covers all of them "
                "together with 95 % confidence (Bonferroni)."
            )
        notes.append(
            f"The test set has {first.test_images} images: one image is {percent(1 / first.test_images, 2)} points, "
            f"and the binomial "
            f"standard error of one accuracy is {percent(self.binomial_error, 2)} points. The intervals speak of "
            f"training again on "
            "this data, not of new test images."
        )
        notes.append(first.cost.how if first.cost else "Cost was not measured.")
        return tuple(notes)


def build_table(arms: Sequence[Arm], costs: Mapping[str, Cost] | None = None) -> Table:
    """The table of these arms; `costs` by arm name, measured side by side, else taken from the runs' own step times.

    Raises:
        ValueError: an arm and its reference do not have the same seeds.
    """
    references = {arm.name: reference_of(arm, arms) for arm in arms}
    comparisons = sum(reference is not None for reference in references.values())
    costs = cost_from_runs(arms) if costs is None else costs
    rows = []
    for arm in arms:
        reference, top1 = references[arm.name], arm.final("test_top1")
        images = int(next(iter(arm.final("test_images").values())))
        difference = None
        if reference is not None:
            try:
                difference = paired_difference(
                    top1, reference.final("test_top1"), comparisons=comparisons, grain=1 / images
                )
            except ValueError as error:
                raise ValueError(f"{arm.name} and {reference.name}: {error}") from None
        sparsity = arm.final("sparsity").values()
        rows.append(
            Row(
                arm=arm,
                mean=mean(list(top1.values())),
                deviation=deviation(list(top1.values())),
                difference=difference,
                reference=reference,
                cost=costs.get(arm.name),
                sparsity=(min(sparsity), max(sparsity)),
                test_images=images,
            )
        )
    grain = binomial_error(mean([row.mean for row in rows]), rows[0].test_images)
    return Table(tuple(rows), comparisons, grain)


def percent(fraction: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """A fraction as a number of percent; a dash for None.

    >>> percent(0.5), percent(-0.01234, sign=True), percent(None)
    ('50.00', '-1.23', '-')
    """
    if fraction is None:
        return "-"
    text = f"{100 * fraction:{'+' if sign else ''}.{digits}f}"
    return text.replace("-0." + "0" * digits, "0." + "0" * digits) if float(text) == 0 else text


def interval_text(interval: Interval | None) -> str:
    """An interval of fractions in percentage points; a dash for None."""
    return "-" if interval is None else f"{percent(interval.low, sign=True)} to {percent(interval.high, sign=True)}"


def headers(table: Table) -> list[str]:
    """The column heads of this table."""
    plain = sorted({row.arm.treatment for row in table.rows if row.arm.plain})
    return [h.format(plain=plain[0] if len(plain) == 1 else "plain", m=table.comparisons) for h in HEADERS]


def cells(row: Row) -> list[str]:
    """One row as text, in the order of :data:`HEADERS`."""
    d, low, high = row.difference, *row.sparsity
    sparsity = percent(low, 1) if percent(low, 1) == percent(high, 1) else f"{percent(low, 1)} to {percent(high, 1)}"
    return [
        row.arm.name,
        percent(row.mean),
        percent(row.deviation),
        percent(d.mean, sign=True) if d else "-",
        interval_text(d.interval if d else None),
        interval_text(d.simultaneous if d else None),
        row.verdict,
        str(row.n),
        str(row.test_images),
        row.cost.text if row.cost else "-",
        sparsity,
    ]


def to_markdown(table: Table) -> str:
    """A Markdown table with its notes below."""
    grid = [headers(table), *(cells(row) for row in table.rows)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in grid]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in escaped]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes), ""])


def to_csv(table: Table) -> str:
    """Unrounded numbers, one line per arm; accuracies and differences are fractions, empty where there is none."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
            "arm",
            "base",
            "treatment",
            "n",
            "seeds",
            "test_images",
            "test_top1_mean",
            "test_top1_sd",
            "difference",
            "interval_low",
            "interval_high",
            "simultaneous_low",
            "simultaneous_high",
            "comparisons",
            "level",
            "verdict",
            "cost_ratio",
            "cost_low",
            "cost_high",
            "step_seconds",
            "sparsity_min",
            "sparsity_max",
        ]
    )
    for row in table.rows:
        d, cost = row.difference, row.cost
        writer.writerow(
            [
                *(
                    row.arm.name,
                    row.arm.base,
                    row.arm.treatment,
                    row.n,
                    " ".join(map(str, row.arm.runs)),
                    row.test_images,
                ),
                *(row.mean, row.deviation, d.mean if d else None, *_ends(d.interval if d else None)),
                *(*_ends(d.simultaneous if d else None), table.comparisons, LEVEL, row.verdict),
                *(cost.ratio if cost else None, *_ends(cost.interval if cost else None)),
                *(cost.step_seconds if cost else None, *row.sparsity),
            ]
        )
    return buffer.getvalue()


def to_rich(table: Table) -> RichTable:
    """The table for a terminal of 80 columns, to be printed with its notes; the interval is the one that decides."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    head, rows = headers(table), table.rows
    counts = sorted({row.n for row in rows})
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    title = f"n = {span} seeds an arm, {rows[0].test_images} test images"
    result = RichTable(box=box.SIMPLE_HEAD, title=title, padding=0, show_edge=False)
    result.title_justify, result.title_style = "left", "bold"
    result.add_column("arm", no_wrap=True)
    interval = f"95 %, all {table.comparisons}" if table.comparisons > 1 else head[4]
    for name in ("test % (sd)", head[3], interval):
        result.add_column(name, justify="right", no_wrap=name is not interval)
    result.add_column("verdict", min_width=13)
    for name in ("cost", "sparse"):
        result.add_column(name, justify="right", no_wrap=True)
    for base in dict.fromkeys(row.arm.base for row in rows):
        result.add_section()
        result.add_row(Text(base, style="bold"))
        for row in (row for row in rows if row.arm.base == base):
            text, shows = cells(row), row.difference.shows if row.difference else 0
            accuracy = text[1] + ("" if row.deviation is None else f" ({text[2]})")
            line = [f"  {row.arm.treatment}", accuracy, text[3], text[5]]
            verdict = Text(row.verdict, style={1: "bold green", -1: "bold red"}.get(shows, "dim"))
            result.add_row(*map(Text, line), verdict, Text(text[9].split(" ")[0]), Text(text[10]))
    return result


def _ends(interval: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if interval is None else (interval.low, interval.high)
