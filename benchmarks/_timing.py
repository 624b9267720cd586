"""Time pieces of work fairly on a machine that drifts: interleaved rounds, ABBA pairs, medians with bootstraps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Work = Callable[[], object]
FLUSH_BYTES = 128 << 20


class Clock:
    """Times one call at a time on a device: CUDA events between two synchronisations, or the monotonic clock.

    With `cold`, a buffer larger than the last-level cache is rewritten first, because after a real backward pass the
    optimizer does not find its tensors in the cache either.
    """

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES) -> None:
        self.device = device
        self._flush = torch.zeros(flush_bytes // 4, device=device)

    def __call__(self, work: Work, *, before: Work | None = None, cold: bool = False) -> float:
        """Seconds that `work()` takes; `before()` runs untimed."""
        if before is not None:
            before()
        if cold:
            self._flush.add_(1)
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3


def interleaved(works: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every work once a round, in alternating order, so that drift and neighbours hit all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds):
        for name in list(works)[:: 1 if index % 2 == 0 else -1]:
            seconds[name].append(works[name]())
    return seconds


def abba(a: Callable[[], float], b: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Rounds a b b a, every second one b a a b; of each the mean time of a and that of b, both free of linear drift."""
    times_a, times_b = [], []
    for index in range(rounds):
        first, second = (a, b) if index % 2 == 0 else (b, a)
        t = [first(), second(), second(), first()]
        outer, inner = (t[0] + t[3]) / 2, (t[1] + t[2]) / 2
        times_a.append(outer if index % 2 == 0 else inner)
        times_b.append(inner if index % 2 == 0 else outer)
    return times_a, times_b


def bootstrap(statistic: Callable[..., Any], *samples: Sequence[float], resamples: int = 2000) -> dict[str, Any]:
    """`statistic(*samples)` with its 95 % percentile interval over resampled rounds, seeded so that it can be repeated.

    The statistic must work along the last axis; each sample is resampled on its own.
    """
    rng = np.random.default_rng(0)
    arrays = [np.asarray(s, dtype=np.float64) for s in samples]
    values = statistic(*(a[rng.integers(len(a), size=(resamples, len(a)))] for a in arrays))
    low, high = np.percentile(values, [2.5, 97.5])
    return {"value": float(statistic(*arrays)), "interval": [float(low), float(high)], "n": len(arrays[0])}


def median(sample: Any) -> Any:
    """Median along the last axis."""
    return np.median(sample, axis=-1)
