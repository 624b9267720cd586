"""The protocol that every tracker follows, and how several are driven as one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Record = Mapping[str, Any]


class Logger(Protocol):
    """Four calls: start once, then scalars and artifact any number of times, at last close, also after an error."""

    def start(self, config: Record, info: Record) -> None:
        """The run begins; `config` is its resolved configuration, `info` what is known besides (see `train.loop`)."""

    def scalars(self, record: Record) -> None:
        """One record: numbers, mappings, and its "kind": "step", "epoch", "topology" or "final".

        "level" is the kind of an epoch's record before the last level of an iterative method (LT).
        """

    def artifact(self, path: Path) -> None:
        """A file of the run is there."""

    def close(self) -> None:
        """The run ended, finished or not."""


@runtime_checkable
class Rewindable(Protocol):
    """A logger whose files hold exactly what was logged before a checkpoint, however the run went on after it."""

    def position(self) -> dict[str, int]:
        """The length of each file in bytes; `start` gets them back as `info["logs"]`."""


class Loggers:
    """Several loggers driven as one; an error in one closes all."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)

    @contextmanager
    def tracking(self, config: Record, info: Record) -> Iterator[Loggers]:
        """Start all; close all at the end, in reverse, also when the block or another logger raises."""
        with contextlib.ExitStack() as stack:
            for logger in self.loggers:
                stack.callback(logger.close)
                logger.start(config, info)
            yield self

    def scalars(self, record: Record) -> None:
        """One record to all."""
        for logger in self.loggers:
            logger.scalars(record)

    def artifact(self, path: Path) -> None:
        """One file to all."""
        for logger in self.loggers:
            logger.artifact(path)

    def position(self) -> dict[str, int]:
        """How long the files of those loggers are that can be cut back to this moment when a run resumes."""
        lengths: dict[str, int] = {}
        for logger in self.loggers:
            if isinstance(logger, Rewindable):
                lengths |= logger.position()
        return lengths
