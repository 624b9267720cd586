"""One number for a column of a table: the mean of its cells' paired differences, and its interval. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from s2sam.report.stats import LEVEL, Interval, mean, t_interval


@dataclass(frozen=True)
class Pooled:
    """The mean difference over the cells of a table."""

    mean: float
    deviation: float | None  #: of a paired difference within a cell; None without a cell of two seeds
    freedom: int
    cells: int
    interval: Interval | None  #: if the differences of one seed in several cells are independent
    comparisons: int
    over_seeds: Interval | None = None  #: whatever links them; None with fewer than two seeds that all cells share
    correlation: float | None = None  #: of the cells over the seeds, estimated
    planned: int = 0  #: cells there would be if no run had failed

    @property
    def shows(self) -> int:
        """+1 or -1 if both intervals lie on that side of 0, else 0."""
        return side(self.interval) if side(self.interval) == side(self.over_seeds) else 0


def side(interval: Interval | None) -> int:
    """+1 or -1 if the interval lies on one side of 0, else 0."""
    if interval is None or interval.contains(0.0):
        return 0
    return 1 if interval.low > 0 else -1


def pooled_difference(
    cells: Sequence[Sequence[float]], *, level: float = LEVEL, comparisons: int = 1, grain: float = 0.0
) -> Pooled:
    """The mean over C cells of their mean paired differences d_c, each cell counting once.

        D = (1/C) sum_c d_c,   s^2 = sum_c sum_i (d_ci - d_c)^2 / nu,   nu = sum_c (n_c - 1)
        D +- t_{1 - a/2, nu} * s * sqrt(sum_c 1 / n_c) / C,             a = (1 - level) / comparisons

    The variance is pooled within cells, so it is taken to be the same in all of them; differences in different cells
    are taken to be independent, also for the same seed. But a seed means the same order of the data in all cells: with
    a correlation of 0.3 between 30 cells, 3 seeds and 2 columns this interval holds 45 times of 100. So there is a
    second one, Student's t over the n means of seeds, with n - 1 degrees of freedom, which needs no such assumption,
    and the correlation estimated from the two mean squares, (M_seed - M_rest) / (M_seed + (C - 1) M_rest). The cells
    are fixed: the intervals speak of training again in these cells, not of other methods or sparsities.

    Args:
        cells: the paired differences of each cell, at least one in each; if there are equally many everywhere, in the
            same order of seeds.
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
    seeds = [mean(seed) for seed in zip(*cells, strict=True)] if len({*map(len, cells)}) == 1 else []
    linked = t_interval(seeds, level=level, comparisons=comparisons, grain=grain / count) if seeds else None
    squares = (math.fsum((value - m) ** 2 for value in cell) for cell, m in zip(cells, means, strict=True))
    spread = math.sqrt(math.fsum(squares) / freedom)
    if spread <= max(0.1 * grain, 1e-12 * max(1.0, abs(middle))):
        return Pooled(middle, spread, freedom, count, None, comparisons, linked)
    from scipy import stats

    quantile = float(stats.t.ppf(1 - (1 - level) / (2 * comparisons), freedom))
    half = quantile * spread * math.sqrt(math.fsum(1 / len(cell) for cell in cells)) / count
    interval = Interval(middle - half, middle + half, level)
    correlation = _correlation(seeds, spread**2 * freedom, count) if len(seeds) > 1 and count > 1 else None
    return Pooled(middle, spread, freedom, count, interval, comparisons, linked, correlation)


def _correlation(seeds: Sequence[float], squares: float, count: int) -> float:
    """Of `count` cells over seeds with these means; `squares`: the sum of squares within cells, not 0."""
    middle, freedom = mean(seeds), len(seeds) - 1
    of_seeds = count * math.fsum((value - middle) ** 2 for value in seeds)
    rest = max(0.0, squares - of_seeds) / ((count - 1) * freedom)
    return (of_seeds / freedom - rest) / (of_seeds / freedom + (count - 1) * rest)
