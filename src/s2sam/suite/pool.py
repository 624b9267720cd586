"""Many runs, several at a time on one machine: a pool of processes, one thread each, that loses nothing when stopped.

Ctrl-C and SIGTERM let every run under way finish its step and save; the same command then goes on from there. A run
that fails is reported and does not stop the others, whatever its error; where it left the GPU unusable for its process,
the others go on in fresh ones. Packing several small runs on one device pays because norms, masks
and random states belong to a network, and a process to a run: nothing is shared.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from s2sam.train.processes import in_processes, terminable

if TYPE_CHECKING:
    from rich.console import Console

    from s2sam.report.read import Run
    from s2sam.train.config import TrainConfig

#: name of the run, its final record if it succeeded, what went wrong else
Outcome = tuple[str, dict[str, Any] | None, str]
KILLED = "RuntimeError: its process was ended from outside; was there enough memory?"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def finished(config: TrainConfig) -> Run | None:
    """The whole run of these settings in its folder, if there is one; folder, device and checkpoints do not count."""
    from s2sam.report.read import read_run
    from s2sam.train.resume import differences

    try:
        found = read_run(config.folder)
    except ValueError:
        return None
    return None if any(differences(config.as_dict(), found.config)) else found


def reusable(config: TrainConfig) -> bool:
    """True if the folder holds a whole run of the same settings, made by the same versions."""
    from importlib.metadata import version

    from s2sam import __version__

    found = finished(config)
    versions = {} if found is None else found.env.get("versions", {})
    return versions.get("s2sam") == __version__ and versions.get("torch") == version("torch")


def train_all(
    configs: Mapping[str, TrainConfig],
    jobs: int,
    console: Console,
    *,
    fresh: bool = False,
    runner: Callable[[Mapping[str, TrainConfig], int], Iterable[Outcome]] | None = None,
    shown: str = "test_top1",
) -> list[Outcome]:
    """Train these runs, `jobs` at a time, and say what has finished; a failure does not stop the others.

    Args:
        configs: the runs by name.
        jobs: how many at a time.
        console: where progress goes.
        fresh: begin again where a run is finished or begun; else go on with what is begun.
        runner: another way to run them, which gives the outcomes as they come; None = processes of this machine.
        shown: which accuracy of the final record is printed.
    """
    outcomes = []
    with _progress(console, len(configs), shown) as report:
        for outcome in runner(configs, jobs) if runner else run_here(configs, min(jobs, len(configs)), fresh=fresh):
            outcomes.append(outcome)
            report(outcome)
    return outcomes


def train_one(name: str, config: TrainConfig, fresh: bool = False) -> Outcome:
    """Train one run with one thread; what goes wrong is returned as text, with the name of its type in front.

    Then its memory is freed, that of compiled networks too, for the next run in this process. An order to end
    (Preempted, KeyboardInterrupt) is no failure and passes.
    """
    outcome = _attempt(name, config, fresh)
    if not gpu_is_lost():  # else this process takes no further run
        _free(compiled=config.compile != "none")
    return outcome


def _attempt(name: str, config: TrainConfig, fresh: bool) -> Outcome:
    try:
        from s2sam.train.loop import run as train

        with one_thread():
            return name, train(config, overwrite=fresh), ""
    except Exception as error:  # noqa: BLE001 whatever it is, it belongs to this run and goes onto the table
        return name, None, f"{type(error).__name__}: {error}".removesuffix(": ")


def _free(*, compiled: bool) -> None:
    """Let go of networks that nobody uses any more: they are in cycles, and in the graphs that torch.compile keeps."""
    if compiled:
        import torch

        torch._dynamo.reset()
    gc.collect()


def gpu_is_lost() -> bool:
    """True if no call on the GPU succeeds in this process any more, as after a failed device assertion."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@contextmanager
def one_thread() -> Iterator[None]:
    """torch with one thread: quickest for small networks, and the same numbers on every machine with such a CPU."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_here(configs: Mapping[str, TrainConfig], jobs: int, *, fresh: bool = False) -> Iterator[Outcome]:
    """The outcomes as they come: in this process for one job (as long as its GPU answers), else in fresh ones.

    If one of these is ended from outside, all are. The runs that may have been under way then go on one after another,
    each alone, so that only the one that does it again is reported; after them the others side by side as before.
    """
    tasks = {name: (name, config, fresh) for name, config in configs.items()}
    if jobs <= 1:
        for name, config in configs.items():
            with _interrupts_save():
                outcome = train_one(name, config, fresh)
            del tasks[name]
            yield outcome
            if tasks and outcome[1] is None and gpu_is_lost():
                break
    with terminable():
        while tasks:
            yield from _finished_of(tasks, max(1, jobs))
            for name in list(tasks)[: max(1, jobs)]:
                alone = {name: tasks.pop(name)}
                yield from _finished_of(alone, 1)
                if alone:
                    yield name, None, KILLED


def _finished_of(tasks: dict[str, tuple[Any, ...]], jobs: int) -> Iterator[Outcome]:
    """The outcomes of these runs, which leave `tasks`; those that lost their process stay there."""
    with closing(in_processes(_train_in_worker, tasks, jobs)) as done:
        for name, future in done:
            if not isinstance(future.exception(), BrokenProcessPool):
                outcome = future.result()
                del tasks[name]
                yield outcome


def _train_in_worker(name: str, config: TrainConfig, fresh: bool) -> Outcome:
    """As :func:`train_one`; a process that was asked to end, or lost its GPU, takes no further run from the queue."""
    from s2sam.train.signals import Preempted

    if gpu_is_lost():
        os._exit(1)  # the outcome of the run that lost it has been handed over
    try:
        return train_one(name, config, fresh)
    except Preempted as ended:
        os._exit(int(str(ended.code)))


@contextmanager
def _interrupts_save() -> Iterator[None]:
    """The first Ctrl-C asks the run to save and then is a KeyboardInterrupt; the second is one at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed or not callable(signal.getsignal(signal.SIGTERM)):
            raise KeyboardInterrupt
        pressed = True
        signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    except SystemExit:
        if pressed:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(console: Console, total: int, shown: str) -> Iterator[Callable[[Outcome], None]]:
    """A bar on a terminal, a line for each finished run elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    def words(outcome: Outcome) -> str:
        name, final, _ = outcome
        value = None if final is None else final[shown]
        return f"{name}: {'failed' if final is None else 'finished' if value is None else f'{100 * value:.1f} %'}"

    if not console.is_terminal:
        count = 0

        def line(outcome: Outcome) -> None:
            nonlocal count
            count += 1
            console.print(f"[{count}/{total}] {words(outcome)}", markup=False, soft_wrap=True)

        yield line
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda outcome: progress.update(task, advance=1, description=words(outcome))
