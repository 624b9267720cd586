"""One number for a column of a table: the mean of its cells' paired differences, and its interval. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from s2sam.report.stats import LEVEL, Interval, mean


@dataclass(frozen=True)
class Pooled:
    """The mean difference over the cells of a table."""

    mean: float
    deviation: float | None  #: of a paired difference within a cell; None without a cell of two seeds
    freedom: int
    cells: int
    interval: Interval | None
    comparisons: int

    @property
    def shows(self) -> int:
        """+1 or -1 if the interval lies on one side of 0, else 0."""
        if self.interval is None or self.interval.contains(0.0):
            return 0
        return 1 if self.interval.low > 0 else -1


def pooled_difference(
    cells: Sequence[Sequence[float]], *, level: float = LEVEL, comparisons: int = 1, grain: float = 0.0
) -> Pooled:
    """The mean over C cells of their mean paired differences d_c, each cell counting once.

        D = (1/C) sum_c d_c,   s^2 = sum_c sum_i (d_ci - d_c)^2 / nu,   nu = sum_c (n_c - 1)
        D +- t_{1 - a/2, nu} * s * sqrt(sum_c 1 / n_c) / C,             a = (1 - level) / comparisons

    The variance is pooled within cells, so it is taken to be the same in all of them; differences in different cells
    are taken to be independent, also for the same seed. The cells are fixed: the interval speaks of training again in
    these cells, not of other methods or sparsities.

    Args:
        cells: the paired differences of each cell, at least one in each.
        level: of the interval.
        comparisons: pooled differences of the table, which hold together (Bonferroni).
        grain: resolution of the values; no interval is given where all are equal up to a tenth of it.

    Raises:
        ValueError: there is no cell, or an empty one.

    >>> pooled = pooled_difference([[1.0, 3.0], [4.0, 6.0]])
    >>> pooled.mean, pooled.freedom, round(pooled.interval.low, 3), round(pooled.interval.high, 3)
    (3.5, 2, 0.458, 6.542)
    """
    means = [mean(cell) for cell in cells]
    middle, count = mean(means), len(cells)
    freedom = sum(len(cell) - 1 for cell in cells)
    if freedom == 0:
        return Pooled(middle, None, 0, count, None, comparisons)
    squares = (math.fsum((value - m) ** 2 for value in cell) for cell, m in zip(cells, means, strict=True))
    spread = math.sqrt(math.fsum(squares) / freedom)
    if spread <= max(0.1 * grain, 1e-12 * max(1.0, abs(middle))):
        return Pooled(middle, spread, freedom, count, None, comparisons)
    from scipy import stats

    quantile = float(stats.t.ppf(1 - (1 - level) / (2 * comparisons), freedom))
    half = quantile * spread * math.sqrt(math.fsum(1 / len(cell) for cell in cells)) / count
    return Pooled(middle, spread, freedom, count, Interval(middle - half, middle + half, level), comparisons)
