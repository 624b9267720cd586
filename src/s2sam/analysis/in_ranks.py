"""A measurement on several processes of this machine that form a group of torch.distributed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from s2sam.analysis.ranks import LostRankError
from s2sam.train.processes import in_processes

T = TypeVar("T")
Tell = Callable[[int], None]


def in_ranks(function: Callable[..., T], given: tuple[Any, ...], jobs: int, *, on_tell: Tell = lambda done: None) -> T:
    """What rank 0 returns of `function(*given, group, tell)`, which every rank of a new group of `jobs` calls.

    The group is gloo's and talks within this machine only. Each process takes its share of torch's threads. All are
    gone when this returns, and also when it raises.

    Args:
        function: of a module.
        given: are pickled; the same for all ranks.
        jobs: how many ranks.
        on_tell: called here, on another thread, with the numbers that rank 0 gives to `tell`.

    Raises:
        RuntimeError: a process was ended from outside.
        Exception: what the function raised on a rank.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    lost: LostRankError | None = None
    with tempfile.TemporaryDirectory() as folder, _hearing(on_tell) as writer:
        tasks = {rank: (rank, jobs, folder) for rank in range(jobs)}
        started = in_processes(
            _rank, tasks, jobs, begin=_begin, given=(pickle.dumps((function, given)), threads, writer)
        )
        results: dict[int, T] = {}
        try:
            with closing(started) as done:
                for rank, future in done:
                    try:
                        results[rank] = future.result()
                    except LostRankError as error:  # another rank has the reason, and will be done soon
                        lost = error
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that shared the images was ended from outside; free some memory or take fewer --jobs"
            ) from error
    if lost is not None:
        raise lost
    return results[0]


@contextmanager
def _hearing(on_tell: Tell) -> Iterator[Connection]:
    """Numbers sent through this pipe go to `on_tell`; what that raises is raised when the block ends."""
    reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)

    def listen() -> None:
        for number in iter(reader.recv, None):
            on_tell(number)

    with reader, writer, ThreadPoolExecutor(1) as pool:
        heard = pool.submit(listen)
        try:
            yield writer
        finally:
            writer.send(None)
    heard.result()


_given: list[Any] = []  #: in a rank: the function, its arguments, and where to tell


def _begin(given: bytes, threads: int, writer: Connection) -> None:
    """In a rank, before its task."""
    torch.set_num_threads(threads)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")  # nobody else hears it
    _given[:] = [*pickle.loads(given), writer]


def _rank(rank: int, size: int, folder: str) -> Any:
    """In a rank: join the others and call the function."""
    function, given, writer = _given
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        result = function(*given, dist.group.WORLD, writer.send if rank == 0 else lambda number: None)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return result if rank == 0 else None
