"""SIGTERM and SIGUSR1 ask a run to save: the first then ends it, after the second it goes on.

A job of submitit ends otherwise. SIGTERM may be the notice of a preemption or an order to cancel, which nobody can tell
apart: the run saves and goes on until it is killed. The signal that submitit itself waits for (SIGUSR2 unless
SUBMITIT_PREEMPT_SIGNAL says otherwise) saves, and then submitit's own handler submits the job again and ends it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, MethodType
from typing import Any

NAMES = ("SIGTERM", "SIGUSR1")
Handler = Callable[[int, FrameType | None], Any]


class Preempted(SystemExit):
    """The run has saved and ends because a signal asked for it; the exit code is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class Signals:
    """Notes the signals that arrive; the loop asks between two steps, where a checkpoint is exact.

    >>> signals = Signals()
    >>> signals.pending
    0
    """

    def __init__(self) -> None:
        self.pending = 0  #: number of the signal to obey; 0 = none
        self._last: int = signal.SIGTERM  #: the one that ends the run
        self._end: Handler = _preempt

    @contextmanager
    def listening(self) -> Iterator[Signals]:
        """Take the signals over for the block; outside the main thread Python allows none of this: then do nothing."""
        self._last, self._end = of_submitit() or (signal.SIGTERM, _preempt)
        numbers = {self._last, *(getattr(signal, name) for name in NAMES if hasattr(signal, name))}
        if threading.current_thread() is not threading.main_thread():
            numbers = set()
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending != self._last:  # a wish to go on does not undo the order to end
            self.pending = number

    def obey(self) -> None:
        """After saving: forget the signal, or end the run.

        Raises:
            Preempted: the signal was SIGTERM, and this is no job of submitit.
            SystemExit: submitit has submitted the job again.
            RuntimeError: submitit does not submit it again, because it ran out of time too often.
        """
        number, self.pending = self.pending, 0
        if number == self._last:
            self._end(number, None)


def of_submitit() -> tuple[int, Handler] | None:
    """The signal by which submitit ends this process and has it come back, and its handler; None = no job of submitit.

    >>> of_submitit()
    """
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if isinstance(handler, MethodType) and handler.__name__ == "checkpoint_and_try_requeue":
            return number, handler
    return None


def _preempt(number: int, frame: FrameType | None) -> None:
    raise Preempted(number)
