"""The table of a report: one row per arm, as data and as text cells. Says no more than the intervals do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from s2sam.report.arms import Arm, reference_of
from s2sam.report.beside import Beside, Spread, present, spread
from s2sam.report.cost import Cost, cost_from_runs
from s2sam.report.stats import Difference, Interval, binomial_error, deviation, mean, paired_difference

NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True)
class Row:
    """One arm; accuracies are fractions."""

    arm: Arm
    mean: float
    deviation: float | None
    difference: Difference | None  #: None for a plain arm and where there is no plain arm to compare with
    reference: Arm | None
    cost: Cost | None
    sparsity: tuple[float, float]  #: lowest and highest over the seeds, measured from the weights
    test_images: int
    beside: Mapping[str, Spread] = field(default_factory=dict)  #: by key, see :mod:`s2sam.report.beside`

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
    def beside(self) -> tuple[Beside, ...]:
        """The further accuracies that some run has."""
        return present(row.arm for row in self.rows)

    @property
    def plain(self) -> str:
        """What the plain optimizer is called: "SGD"."""
        names = sorted({row.arm.treatment for row in self.rows if row.arm.plain})
        return names[0] if len(names) == 1 else "plain"

    @property
    def has_dense(self) -> bool:
        """True if costs can be compared with the plain dense arm too, and do not only repeat themselves."""
        pruned = any(not row.arm.dense for row in self.rows)
        return pruned and any(row.cost is not None and row.cost.dense is not None for row in self.rows)

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
        if self.beside:
            notes += [
                *(one.note for one in self.beside),
                "Differences and verdicts go by the plain test accuracy alone.",
            ]
        notes.append(first.cost.how if first.cost else "Step times were not measured.")
        if self.has_dense:
            notes.append(
                "Masked weights are multiplied like all others here, so a sparse network saves no time: its step time "
                f"against dense {self.plain} shows the price of the masks."
            )
        return tuple(notes)


def build_table(arms: Sequence[Arm], costs: Mapping[str, Cost] | None = None) -> Table:
    """The table of these arms; `costs` by arm name, measured side by side, else taken from the runs' own step times.

    Raises:
        ValueError: an arm and its reference do not have the same seeds.
    """
    references = {arm.name: reference_of(arm, arms) for arm in arms}
    comparisons = sum(reference is not None for reference in references.values())
    costs, extra = cost_from_runs(arms) if costs is None else costs, present(arms)
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
                beside={one.key: found for one in extra if (found := spread(arm, one.key))},
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


def headers(table: Table) -> dict[str, str]:
    """The heads of this table's columns by name, in their order."""
    heads = {"arm": "arm", "accuracy": "test accuracy %", "deviation": "sd"}
    heads |= {one.key: one.header for one in table.beside}
    heads |= {
        "difference": f"vs {table.plain}", "interval": "95 % interval",
        "simultaneous": f"all {table.comparisons} together", "verdict": "verdict", "n": "n", "images": "test images",
        "cost": f"step time vs {table.plain}, same network",
    }  # fmt: skip
    if table.has_dense:
        heads["dense_cost"] = f"step time vs {table.plain}, dense network"
    return heads | {"sparsity": "sparsity %"}


def cells(table: Table, row: Row) -> dict[str, str]:
    """One row as text, under the names of :func:`headers`."""
    d, low, high = row.difference, *row.sparsity
    sparsity = percent(low, 1) if percent(low, 1) == percent(high, 1) else f"{percent(low, 1)} to {percent(high, 1)}"
    text = {
        "arm": row.arm.name, "accuracy": percent(row.mean), "deviation": percent(row.deviation),
        "difference": percent(d.mean, sign=True) if d else "-",
        "interval": interval_text(d.interval if d else None),
        "simultaneous": interval_text(d.simultaneous if d else None),
        "verdict": row.verdict, "n": str(row.n), "images": str(row.test_images),
        "cost": row.cost.text if row.cost else "-", "dense_cost": row.cost.dense_text if row.cost else "-",
        "sparsity": sparsity,
    } | {one.key: spread_text(row.beside.get(one.key), row.n) for one in table.beside}  # fmt: skip
    return {name: text[name] for name in headers(table)}


def spread_text(found: Spread | None, seeds: int) -> str:
    """Mean and standard deviation in percent, and how many of the seeds have the number, if not all.

    >>> spread_text(Spread(0.9, 0.01, 2), 3), spread_text(Spread(0.9, None, 1), 1), spread_text(None, 3)
    ('90.00 (1.00), n = 2', '90.00', '-')
    """
    if found is None:
        return "-"
    text = percent(found.mean) + ("" if found.deviation is None else f" ({percent(found.deviation)})")
    return text if found.n == seeds else f"{text}, n = {found.n}"
