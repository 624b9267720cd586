"""`metrics.jsonl` with every record and `summary.csv` with one row an epoch: always written, readable by anything."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from s2sam.outside import reading
from s2sam.track.base import Record


class FileLogger:
    """Appends each record at once, as one line; a record that was written survives whatever comes after.

    Numbers that are not finite become null, so that every line is JSON by the standard.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines: TextIO | None = None
        self._rows: TextIO | None = None
        self._table: csv.DictWriter[str] | None = None

    def start(self, config: Record, info: Record) -> None:
        """Open both files: empty, or, if `info["logs"]` gives the length of each at a checkpoint, cut back to it."""
        lengths = info.get("logs") or {}
        self._lines = _open(self.folder / "metrics.jsonl", lengths.get("metrics.jsonl", 0))
        self._rows = _open(self.folder / "summary.csv", lengths.get("summary.csv", 0))
        path = self.folder / "summary.csv"
        with (
            reading(path, "damaged", "put that file back, or train anew with --resume never"),
            open(path, encoding="utf-8", newline="") as file,
        ):
            header = next(csv.reader(file), None)
        self._table = None if header is None else csv.DictWriter(self._rows, header)

    def position(self) -> dict[str, int]:
        """The length of each file in bytes, after all of it is safe on the disk."""
        lengths = {}
        for file in (self._lines, self._rows):
            assert file is not None, "start() comes first"
            with named(file):
                file.flush()
                os.fsync(file.fileno())
                lengths[Path(file.name).name] = os.fstat(file.fileno()).st_size
        return lengths

    def scalars(self, record: Record) -> None:
        """Write one line; an epoch is a row of the table as well."""
        assert self._lines is not None, "start() comes first"
        assert self._rows is not None
        clean = plain(record)
        with named(self._lines):
            self._lines.write(json.dumps(clean, allow_nan=False) + "\n")
            self._lines.flush()
        if record["kind"] == "epoch":
            row = {key: value for key, value in clean.items() if key != "kind"}
            with named(self._rows):
                if self._table is None:
                    self._table = csv.DictWriter(self._rows, list(row))
                    self._table.writeheader()
                if list(self._table.fieldnames) != list(row):
                    raise ValueError(
                        f"{self._rows.name} has other columns than this run's epochs, so it is damaged or of another "
                        "run; put the whole run folder back, or train anew with --resume never"
                    )
                self._table.writerow(row)
                self._rows.flush()

    def artifact(self, path: Path) -> None:
        """Files of the run lie in its folder already."""

    def close(self) -> None:
        """Close both files."""
        for file in (self._lines, self._rows):
            if file is not None:
                with named(file):
                    file.close()


@contextmanager
def named(file: TextIO) -> Iterator[None]:
    """An OSError of the block, which has no name if it comes from a write (a full disk), gets that of the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or file.name
        raise


def _open(path: Path, length: int) -> TextIO:
    """The file, cut back to `length` bytes and ready for more."""
    file = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115
    file.truncate(length)
    return file


def plain(value: Any) -> Any:
    """`value` with nan and infinities, also inside mappings, as None.

    >>> plain({"loss": float("nan"), "density": {"fc": 0.5}})
    {'loss': None, 'density': {'fc': 0.5}}
    """
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
