"""Files that are there whole or not at all: written under another name, flushed to the disk, then renamed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what was written there replaces `path` if the block ends without an error.

    Raises:
        OSError: the disk is full or not writable; `path`, which it names, is then what it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is None or str(temporary) in (str(error.filename), str(error.filename2)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        temporary.unlink(missing_ok=True)


def meant_for(name: str) -> str | None:
    """The file that a temporary one of :func:`atomic` was to become; None if the name is not that of one.

    >>> meant_for(".config.yaml.4711.tmp"), meant_for(".notes.tmp"), meant_for("config.yaml")
    ('config.yaml', None, None)
    """
    found = re.fullmatch(r"\.(.+)\.\d+\.tmp", name)
    return found[1] if found else None


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself last through a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
