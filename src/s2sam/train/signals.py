"""SIGTERM and SIGUSR1 ask a run to save: the first then ends it, after the second it goes on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = ("SIGTERM", "SIGUSR1")


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

    @contextmanager
    def listening(self) -> Iterator[Signals]:
        """Take the signals over for the block; outside the main thread Python allows none of this: then do nothing."""
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending != signal.SIGTERM:  # a wish to go on does not undo the order to end
            self.pending = number

    def obey(self) -> None:
        """After saving: forget the signal, or end the run.

        Raises:
            Preempted: the signal was SIGTERM.
        """
        number, self.pending = self.pending, 0
        if number == signal.SIGTERM:
            raise Preempted(number)
