"""How long steps take: from the host's clock, or from events on a CUDA device, where the host runs ahead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WARM_UP = 5  #: first steps that are left out: allocations, lazy initialisation, the first displacement


class StepTimer:
    """Collects the seconds of every step; `median()` is what a run reports."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time the block; no host sync is added."""
        if not self._cuda:
            start = time.perf_counter()
            yield
            self.seconds.append(time.perf_counter() - start)
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        yield
        last.record()
        self._events.append((first, last))

    def collect(self) -> None:
        """Read finished events; call it once an epoch."""
        if self._events:
            self._events[-1][1].synchronize()
            self.seconds += [first.elapsed_time(last) / 1000 for first, last in self._events]
            self._events.clear()

    def median(self) -> float:
        """Median seconds of a step after warm-up (of all steps if there are fewer)."""
        self.collect()
        return statistics.median(self.seconds[WARM_UP:] or self.seconds)
