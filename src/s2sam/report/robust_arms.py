"""Robustness over seeds: runs of one arm together, and arms against the first one. Pure functions of results.

A result is what `s2sam.analysis.robustness_file` keeps of a run. The unit of observation is a run; see
`s2sam.report.stats` for what the intervals speak of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from s2sam.analysis.robustness import Matched, at_matched_clean
from s2sam.analysis.robustness_file import check_comparable, check_distinct
from s2sam.report.stats import Difference, binomial_error, deviation, mean, paired_difference

Result = dict[str, Any]


def measure_of(result: Result, name: str) -> float | None:
    """A measure of a result, or None where it is not defined; a dot leads inside.

    >>> measure_of({"clean": {"ece": 0.25}, "mce_alexnet": None}, "clean.ece")
    0.25
    """
    found: Any = result
    for part in name.split("."):
        found = found[part]
    return None if found is None else float(found)


@dataclass(frozen=True)
class RobustArm:
    """Runs that differ in their seed only."""

    name: str
    results: tuple[Result, ...]

    def values(self, measure: str) -> list[float]:
        """The measure of each run; empty where it is not defined."""
        return [value for r in self.results if (value := measure_of(r, measure)) is not None]

    def text(self, measure: str, scale: float = 1.0, digits: int = 2) -> str:
        """Mean over the runs, and below it +- standard deviation if there are several; "-" for an undefined measure."""
        values = [scale * value for value in self.values(measure)]
        if not values:
            return "-"
        spread = deviation(values)
        return f"{mean(values):.{digits}f}" + ("" if spread is None else f"\n+-{spread:.{digits}f}")


@dataclass(frozen=True)
class Comparison:
    """An arm against the first one, in accuracy on corrupted images."""

    name: str
    reference: str
    paired: Difference | None  #: over the seeds both have; None unless both have the same
    matched: Matched  #: among runs of equal clean accuracy
    tolerance: float  #: of that equality: one standard error of the test set


def group(results: Sequence[Result]) -> list[RobustArm]:
    """The arms in order of appearance; an arm of one run has its name, one of several what their names share.

    Raises:
        ValueError: results that may not stand in one table, or two of one arm with the same seed.
    """
    check_comparable(results)
    check_distinct(results)
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["arm"], []).append(result)
    names = [_shared_name([r["run"] for r in arm]) for arm in found.values()]
    names = [name if names.count(name) == 1 else arm[0]["run"] for name, arm in zip(names, found.values(), strict=True)]
    return [RobustArm(name, tuple(arm)) for name, arm in zip(names, found.values(), strict=True)]


def compare(arms: Sequence[RobustArm], comparisons: int | None = None) -> list[Comparison]:
    """Every arm against the first one; the intervals hold together, or with as many as `comparisons` says."""
    made = []
    together = len(arms) - 1 if comparisons is None else comparisons
    for arm in arms[1:]:
        first = arms[0]
        clean = [1 - error for a in (first, arm) for error in a.values("clean_error")]
        images = int(first.results[0]["images"])
        tolerance = binomial_error(mean(clean), images)
        before, after = (
            [(1 - r["clean_error"], r["mean_corruption_accuracy"]) for r in a.results] for a in (first, arm)
        )
        seeds = [{r["run_seed"]: r["mean_corruption_accuracy"] for r in a.results} for a in (first, arm)]
        paired = None
        if seeds[0].keys() == seeds[1].keys():
            paired = paired_difference(seeds[1], seeds[0], comparisons=together, grain=1 / images)
        made.append(Comparison(arm.name, first.name, paired, at_matched_clean(before, after, tolerance), tolerance))
    return made


def sentence(found: Comparison) -> str:
    """A comparison in words, which claims what its interval supports and nothing else."""
    if found.paired is None:
        text = f"{found.name} and {found.reference} have other seeds, so they are not compared seed by seed"
    else:
        text = f"{found.name} minus {found.reference}: {100 * found.paired.mean:+.2f} points of corrupted accuracy"
        text += f" (n = {found.paired.n}"
        interval = found.paired.simultaneous
        if interval is None:
            text += ", no interval)"
        else:
            shown = "shows a difference" if found.paired.shows else "shows none"
            covering = f" for all {found.paired.comparisons} together" if found.paired.comparisons > 1 else ""
            text += f", 95 % interval{covering} {100 * interval.low:+.2f} to {100 * interval.high:+.2f}: this {shown})"
    matched = found.matched
    if matched.corrupted is None or matched.clean is None:
        return f"{text}; no two runs have the same clean accuracy within {100 * found.tolerance:.2f} points"
    return (
        f"{text}; {100 * matched.corrupted:+.2f} among {len(matched.pairs)} pair(s) of runs with the same clean "
        f"accuracy within {100 * found.tolerance:.2f} points"
    )


def _shared_name(names: Sequence[str]) -> str:
    """What names of one arm have in common, without a trailing seed.

    >>> _shared_name(["rigl-seed0", "rigl-seed1"]), _shared_name(["a", "b"]), _shared_name(["one"])
    ('rigl', 'a', 'one')
    """
    if len(names) == 1:
        return names[0]
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    common = "".join(column[0] for column in alike).rstrip("0123456789").rstrip("-_ .")
    for word in ("seed", "run"):
        common = common.removesuffix(word).rstrip("-_ .")
    return common or names[0]
