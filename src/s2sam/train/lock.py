"""One process a run folder: a lock that the system gives back when its holder ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"  #: its content says nothing; the lock on it does


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make `folder` if it is not there, and keep other processes out of it while the block runs.

    If nothing was written into it meanwhile, the folder goes again, with the parents made for it. Where the system has
    no `flock` (Windows, some network disks) nobody is kept out.

    Raises:
        ValueError: another process holds the folder.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = _acquire(folder)
    try:
        yield
    finally:
        if [p.name for p in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            _remove_empty([folder, *made[1:]])
        os.close(handle)


def _acquire(folder: Path) -> int:
    """A locked handle of the lock file; a file that its last holder has just removed does not count."""
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _flock(handle):
            os.close(handle)
            raise ValueError(
                f"{folder} is in use by another process; wait for it to end, or choose another folder with --out"
            )
        try:
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except FileNotFoundError:
            folder.mkdir(parents=True, exist_ok=True)
        os.close(handle)


def _flock(handle: int) -> bool:
    """False if somebody else has the lock."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk without locks
        return True
    return True


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # somebody put something there
            return
