"""From records to curves: positions and one row of values for each seed. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from s2sam.report.arms import Arm

Curve = tuple[np.ndarray, np.ndarray]  #: positions (T,) and values (seeds, T)


def epoch_curve(arm: Arm, key: str, scale: float) -> Curve:
    """A value of the epoch records that have it, times `scale`, by epoch."""
    measured = [[r for r in run.epochs if r[key] is not None] for run in arm.runs.values()]
    return stack([([r["epoch"] for r in rows], [scale * r[key] for r in rows]) for rows in measured])


def density_curve(arm: Arm) -> Curve:
    """Percent of the prunable weights that are active, measured after each epoch, by step."""
    return stack(
        [
            ([r["step"] for r in run.epochs], [100 * (1 - r["sparsity"]) for r in run.epochs])
            for run in arm.runs.values()
        ]
    )


def record_curve(arm: Arm, records: str, key: str, scale: float) -> Curve:
    """Values of the records that have the key; for topology the last one holds until the end of the run."""
    series = []
    for run in arm.runs.values():
        found = [r for r in getattr(run, records) if isinstance(r.get(key), int | float) and r[key] == r[key]]
        x, y = [r["step"] for r in found], [scale * r[key] for r in found]
        if records == "topology" and run.epochs and run.epochs[-1]["step"] > x[-1]:
            x, y = [*x, run.epochs[-1]["step"]], [*y, y[-1]]
        series.append((x, y))
    return stack(series)


def smooth(curve: Curve, share: float = 0.05) -> Curve:
    """Running mean over a share of the positions, at least one."""
    x, y = curve
    width = max(1, round(share * len(x)))
    if width == 1:
        return curve
    kernel = np.ones(width) / width
    return x[width - 1 :], np.stack([np.convolve(row, kernel, mode="valid") for row in y])


def limits(curves: Sequence[Curve], *, logarithmic: bool) -> tuple[float, float]:
    """Axis limits shared by the panels of a section."""
    if logarithmic:
        values = np.concatenate([y.ravel() for _, y in curves])
        values = values[np.isfinite(values) & (values > 0)]
        return (float(values.min()) / 1.2, float(values.max()) * 1.2) if len(values) else (0.1, 1.0)
    late = np.concatenate([y[:, len(x) // 5 :].ravel() for x, y in curves])
    margin = 0.06 * float(np.ptp(late)) + 0.2
    return float(late.min()) - margin, float(min(100.0, late.max())) + margin


def has(records: Sequence[dict[str, Any]], key: str) -> bool:
    """True if some record holds a number under `key`."""
    return any(isinstance(r.get(key), int | float) and r[key] == r[key] for r in records)


def stack(series: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Curve:
    """Curves of several seeds on the positions of the first, by linear interpolation where they differ."""
    x = np.asarray(series[0][0], dtype=float)
    return x, np.stack([np.interp(x, np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)) for xs, ys in series])
