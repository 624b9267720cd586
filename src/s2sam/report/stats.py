"""What a comparison over seeds may claim: means, paired differences and their intervals. Pure functions.

The unit of observation is a run. Two arms are compared on the seeds they share, one difference per seed, because a seed
fixes the initial weights and the order of the data for both. The interval is Student's t over those differences: it
speaks of the randomness of training on *this* train and test set, not of other test images; for those see
:func:`binomial_error`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval."""

    low: float
    high: float
    level: float

    @property
    def half_width(self) -> float:
        """Half of the length: what cannot be told from 0 around the estimate."""
        return (self.high - self.low) / 2

    def contains(self, value: float) -> bool:
        """True if `value` lies inside, ends included."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Difference:
    """Treated minus reference, paired over seeds."""

    per_seed: dict[int, float]
    mean: float
    deviation: float | None  #: standard deviation of the paired differences (n - 1); None for one seed
    interval: Interval | None  #: this comparison alone; None where no interval can be given
    simultaneous: Interval | None  #: Bonferroni over the comparisons of the table; None with `interval`
    comparisons: int

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.per_seed)

    @property
    def shows(self) -> int:
        """+1 or -1 if the simultaneous interval lies on one side of 0, else 0 (also where there is no interval)."""
        if self.simultaneous is None or self.simultaneous.contains(0.0):
            return 0
        return 1 if self.simultaneous.low > 0 else -1


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean. Raises ValueError for no values.

    >>> mean([1.0, 2.0, 6.0])
    3.0
    """
    if not values:
        raise ValueError("the mean of no values is not defined")
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation with n - 1, or None for fewer than two values.

    >>> deviation([1.0, 2.0, 3.0])
    1.0
    """
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (len(values) - 1))


def t_interval(
    values: Sequence[float], *, level: float = LEVEL, comparisons: int = 1, grain: float = 0.0
) -> Interval | None:
    """Student's t interval of the mean, m +- t_{1 - a/2, n-1} s / sqrt(n) with a = (1 - level) / comparisons.

    With `comparisons` = c the c intervals of a table hold together with probability >= level (Bonferroni). None for
    fewer than two values, and where all values are equal (up to a tenth of `grain`, their resolution): a deviation of 0
    comes from the grid of a finite test set, whose accuracies move in steps of one image, and would claim certainty.

    >>> interval = t_interval([1.0, 2.0, 3.0])
    >>> round(interval.low, 4), round(interval.high, 4)
    (-0.4841, 4.4841)
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    if comparisons < 1:
        raise ValueError(f"comparisons must be at least 1, got {comparisons!r}")
    spread = deviation(values)
    middle = mean(values)
    if spread is None or spread <= max(0.1 * grain, 1e-12 * max(1.0, abs(middle))):
        return None
    from scipy import stats

    quantile = float(stats.t.ppf(1 - (1 - level) / (2 * comparisons), len(values) - 1))
    half = quantile * spread / math.sqrt(len(values))
    return Interval(middle - half, middle + half, level)


def paired_difference(
    treated: Mapping[int, float],
    reference: Mapping[int, float],
    *,
    level: float = LEVEL,
    comparisons: int = 1,
    grain: float = 0.0,
) -> Difference:
    """Treated minus reference, seed by seed; both map seed -> value. Options as in :func:`t_interval`.

    Raises:
        ValueError: the two do not have the same seeds, or have none. Unpaired values are not compared.

    >>> paired_difference({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.25}).mean
    0.375
    """
    if set(treated) != set(reference) or not treated:
        raise ValueError(
            f"seeds {_listed(treated)} against seeds {_listed(reference)} cannot be paired; run both arms with the "
            f"same seeds"
        )
    per_seed = {seed: treated[seed] - reference[seed] for seed in sorted(treated)}
    values = list(per_seed.values())
    return Difference(
        per_seed=per_seed,
        mean=mean(values),
        deviation=deviation(values),
        interval=t_interval(values, level=level, grain=grain),
        simultaneous=t_interval(values, level=level, comparisons=comparisons, grain=grain),
        comparisons=comparisons,
    )


def median_interval(values: Sequence[float], *, level: float = LEVEL) -> Interval | None:
    """Distribution-free interval of the median from order statistics, or None if there are too few values for `level`.

    The k-th smallest and k-th largest of n values enclose the median with probability 1 - 2 P(B <= k - 1), where B is
    Bin(n, 1/2); k is the largest for which that is at least `level`.

    >>> median_interval([1, 2, 3, 4, 5, 6])
    Interval(low=1.0, high=6.0, level=0.95)
    """
    from scipy import stats

    ordered, n = sorted(float(v) for v in values), len(values)
    k = 0
    while k < n // 2 and 1 - 2 * float(stats.binom.cdf(k, n, 0.5)) >= level:
        k += 1
    return None if k == 0 else Interval(ordered[k - 1], ordered[n - k], level)


def binomial_error(accuracy: float, images: int) -> float:
    """Standard error of an accuracy measured on `images` test images, sqrt(a (1 - a) / N): the grain of the test set.

    >>> binomial_error(0.5, 100)
    0.05
    """
    if not 0 <= accuracy <= 1 or images < 1:
        raise ValueError(f"need an accuracy in [0, 1] and at least one image, got {accuracy!r} and {images!r}")
    return math.sqrt(accuracy * (1 - accuracy) / images)


def _listed(seeds: Mapping[int, float]) -> str:
    return ", ".join(str(s) for s in sorted(seeds)) or "(none)"
