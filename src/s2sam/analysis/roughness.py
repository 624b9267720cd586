"""Ra, the arithmetic mean deviation of a loss grid: raw as in the paper, and after its bowl has been taken away.

    Ra_raw       = mean |z - mean z|
    Ra_detrended = mean |z - q|,  q = the quadratic in the grid's coordinates that is nearest to z (least squares)

Ra_raw measures how *high* the bowl is: 3 (x^2 + y^2) on 51 x 51 points of [-1, 1]^2 has 1.0888, and 1.0892 once a
ripple 0.1 sin(20 x) sin(20 y) lies on it. Ra_detrended has 0.0000 and 0.0403, so it sees the ripple. It sees all that
is no quadratic: besides roughness also the plateau or wall that losses have far out. Both depend on the grid and its
span, so compare only values of the same grid. ISO 25178 calls the areal form Sa, ISO 4287 the one of a profile Ra.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Grid = NDArray[np.float64]


def ra_raw(grid: ArrayLike) -> float:
    """mean |z - mean z| over all points of a profile (n,) or a grid (n, m); the unit is that of the losses.

    This is the roughness of the paper, whose code is not published. A profile a x^2 on [-1, 1] has 0.2806 a at 21
    points, 0.2669 a at 51, and 4 a / (9 sqrt 3) = 0.2566 a in the limit.

    Raises:
        ValueError: not one or two dimensions, no points, or losses that are not finite (see :func:`clipped`).

    >>> ra_raw([1.0, 3.0])
    1.0
    """
    z = _checked(grid)
    return float(np.abs(z - z.mean()).mean())


def ra_detrended(grid: ArrayLike) -> float:
    """mean |z - q| over all points, q the nearest quadratic: 1, x, x^2, or 1, x, y, x^2, x y, y^2.

    The points are taken to be evenly spaced; which span they cover makes no difference to the fit.

    Raises:
        ValueError: as :func:`ra_raw`, and fewer than 4 points along a side, through which a quadratic always passes.

    >>> x = np.linspace(-1, 1, 51)
    >>> round(ra_detrended(2 * x**2 - x), 9), round(ra_detrended(2 * x**2 - x + 0.1 * np.sin(20 * x)), 3)
    (0.0, 0.064)
    """
    z = _checked(grid)
    if min(z.shape) < 4:
        raise ValueError(f"Ra without the bowl needs at least 4 points along each side, got {_sides(z)}")
    axes = np.meshgrid(*(np.linspace(-1.0, 1.0, n) for n in z.shape), indexing="ij")
    terms = [np.ones_like(z), *axes, *(a * b for a, b in itertools.combinations_with_replacement(axes, 2))]
    basis = np.stack([term.ravel() for term in terms], axis=1)
    solution = np.linalg.lstsq(basis, z.ravel(), rcond=None)[0]
    return float(np.abs(z.ravel() - basis @ solution).mean())


def clipped(grid: ArrayLike, ceiling: float = np.inf) -> tuple[Grid, int]:
    """(the grid with finite losses only, how many were replaced).

    NaN, infinity and what lies above `ceiling` become the smaller of `ceiling` and the largest finite loss.

    Raises:
        ValueError: no loss is finite.

    >>> clipped([1.0, float("nan"), 5.0, 7.0], ceiling=6.0)
    (array([1., 6., 5., 6.]), 2)
    """
    z: Grid = np.array(grid, dtype=np.float64)
    finite = np.isfinite(z)
    if not finite.any():
        raise ValueError("no loss of the grid is finite; take a smaller span")
    top = min(ceiling, float(z[finite].max()))
    high = ~finite | (z > top)
    z[high] = top
    return z, int(high.sum())


def mean_and_spread(values: ArrayLike) -> tuple[float, float | None]:
    """(mean, sample standard deviation) over direction pairs; no deviation of fewer than two.

    >>> mean_and_spread([1.0, 3.0]), mean_and_spread([2.0])
    ((2.0, 1.4142135623730951), (2.0, None))
    """
    v: Grid = np.asarray(values, dtype=np.float64)
    return float(v.mean()), float(v.std(ddof=1)) if len(v) > 1 else None


def roughness(grids: ArrayLike) -> dict[str, Any]:
    """Ra_raw and Ra_detrended of each grid (the first axis), their mean and spread, and how many losses were replaced.

    Losses that are not finite count as the largest finite one of their grid, which understates how high they are.

    >>> found = roughness(np.zeros((2, 5)))
    >>> found["ra_raw"], found["ra_raw_mean"], found["clipped"]
    ([0.0, 0.0], 0.0, 0)
    """
    parts = [clipped(grid) for grid in np.asarray(grids, dtype=np.float64)]
    found: dict[str, Any] = {"clipped": sum(count for _, count in parts)}
    for name, measure in (("ra_raw", ra_raw), ("ra_detrended", ra_detrended)):
        found[name] = [measure(grid) for grid, _ in parts]
        found[f"{name}_mean"], found[f"{name}_spread"] = mean_and_spread(found[name])
    return found


def _checked(grid: ArrayLike) -> Grid:
    """The grid as float64, or ValueError."""
    z: Grid = np.asarray(grid, dtype=np.float64)
    if z.ndim not in (1, 2) or z.size == 0:
        raise ValueError(f"a grid of losses is (n,) or (n, m) with at least one point, got {_sides(z)}")
    if not np.isfinite(z).all():
        raise ValueError(f"{int((~np.isfinite(z)).sum())} losses of the grid are not finite; clip them first (clipped)")
    return z


def _sides(z: Grid) -> str:
    return " x ".join(map(str, z.shape)) or "a single number"
