"""Work in fresh processes that end in order: Ctrl-C and SIGTERM are the business of the process that began them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def in_processes(
    function: Callable[..., T],
    tasks: Mapping[K, tuple[Any, ...]],
    jobs: int,
    *,
    begin: Callable[..., None] | None = None,
    given: tuple[Any, ...] = (),
) -> Generator[tuple[K, Future[T]], None, None]:
    """The futures of `function(*arguments)` as they are done, with the keys of their tasks.

    The processes are spawned, so they share nothing with this one, and they never see a Ctrl-C, not even while they
    import. If an exception comes out of the loop over this generator, or the generator is closed, they are sent SIGTERM
    and waited for. Of several GPUs each process sees one, in turn, as its only one. Each compiles with its share of the
    processors, unless TORCHINDUCTOR_COMPILE_THREADS says otherwise.

    Args:
        function: of a module, as its arguments and results are pickled.
        tasks: the arguments of each task.
        jobs: how many processes at most.
        begin: called once in every process before its first task, with the arguments `given`.
        given: see there.

    Example:
        >>> sorted((key, future.result()) for key, future in in_processes(divmod, {"a": (7, 2), "b": (9, 4)}, 1))
        [('a', (3, 1)), ('b', (2, 1))]
    """
    if not tasks:
        return
    strangers = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    workers = min(jobs, len(tasks))
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin,
        initargs=(begin, given, visible_gpus(), context.Value("i", 0), max(1, (os.cpu_count() or 1) // workers)),
    )  # fmt: skip
    with pool:
        try:
            with _interrupts_later():
                keys = {pool.submit(function, *arguments): key for key, arguments in tasks.items()}
            for future in as_completed(keys):
                yield keys[future], future
        except BaseException:
            for child in set(multiprocessing.active_children()) - strangers:
                child.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(i) for i in range(count)])[:count]


def _begin(
    begin: Callable[..., None] | None, given: tuple[Any, ...], gpus: list[str], begun: Synchronized[int], compilers: int
) -> None:
    """In a process: leave Ctrl-C to the parent also where it could not be blocked; take the next GPU of several."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(compilers))
    with begun.get_lock():
        place = begun.value
        begun.value += 1
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
    if begin is not None:
        begin(*given)


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """A Ctrl-C within the block comes when it ends; processes that begin there, which inherit this, never see one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM is an exception, so that the processes begun there are ended in order as well."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
