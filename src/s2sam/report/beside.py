"""Test accuracies that the trainer measures beside the plain one, at the end of a run: no verdict goes by them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from s2sam.report.arms import Arm
from s2sam.report.stats import deviation, mean


@dataclass(frozen=True)
class Beside:
    """A number of the final record that stands beside `test_top1`."""

    key: str  #: in the final record
    header: str
    note: str


BESIDE = (
    Beside(
        "recalibrated_test_top1",
        "BatchNorm re-estimated %",
        "BatchNorm re-estimated: test accuracy of the same weights with BatchNorm statistics taken again over training "
        "images after training, where S2-SAM does not displace the weights.",
    ),
    Beside(
        "ema_test_top1",
        "averaged weights %",
        "Averaged weights: test accuracy of the exponential moving average of the weights.",
    ),
)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over the `n` seeds that have the number; None for one seed."""

    mean: float
    deviation: float | None
    n: int


def spread(arm: Arm, key: str) -> Spread | None:
    """The number `key` of the final records of `arm`, or None if no run has it."""
    found = [run.final.get(key) for run in arm.runs.values()]
    values = [float(value) for value in found if isinstance(value, (int, float))]
    return Spread(mean(values), deviation(values), len(values)) if values else None


def present(arms: Iterable[Arm]) -> tuple[Beside, ...]:
    """Those that some run has."""
    arms = list(arms)
    return tuple(one for one in BESIDE if any(spread(arm, one.key) for arm in arms))
