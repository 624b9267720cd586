"""How long steps take: from the host's clock, or from events on a CUDA device, where the host runs ahead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WARM_UP = 5  #: first steps that are left out: allocations, lazy initialisation, the first displacement
KEPT = 10_000  #: as many last steps go into checkpoints and medians


class StepTimer:
    """Collects the seconds of every step; `median()` is what a run reports."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self.earlier: list[float] = []  #: of the process that a resumed run goes on from
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

    def state_dict(self) -> torch.Tensor:
        """The last seconds; those of the warm-up are left out if there are others."""
        self.collect()
        warm = self.earlier + self.seconds[WARM_UP:]
        return torch.tensor((warm or self.seconds)[-KEPT:], dtype=torch.float64)

    def load_state_dict(self, seconds: torch.Tensor) -> None:
        """Go on from saved seconds; the first steps of this process are left out again."""
        self.earlier = seconds.tolist()

    def median(self) -> float:
        """Median seconds of a step after warm-up (of all steps if there are fewer; of the last 10,000)."""
        return statistics.median(self.state_dict().tolist())


class Stopwatch:
    """Adds up the seconds between `start` and `pause`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Run from now on."""
        self._since = time.perf_counter()

    def pause(self) -> float:
        """Stop; returns the seconds so far."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None
        return self.seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop for the block, if it runs."""
        running = self._since is not None
        self.pause()
        yield
        if running:
            self.start()
