"""Trainers as processes of their own on one device: what packing several runs brings, against one run alone."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from _timing import bootstrap, interleaved, median
from s2sam.track.base import Loggers
from s2sam.track.files import FileLogger
from s2sam.train.config import TrainConfig
from s2sam.train.fast import quickest_convolutions
from s2sam.train.folder import RunFolder
from s2sam.train.loop import Trainer
from s2sam.train.state import build

EPOCHS, IMAGES = 160, 50_000  #: of the full run whose time is estimated
GOAL = 115.0  #: its seconds, for ResNet-32 of double width on a GPU
ALONE = 0.25  #: load average of a processor below which nothing runs beside the measurement


def trainer_epoch(config: TrainConfig, folder: Path) -> Callable[[], float]:
    """A function that trains one epoch with the trainer and returns its seconds, as the run's records have them."""
    state = build(config)
    run = RunFolder(folder)
    run.create(config, {})
    logger = FileLogger(folder)
    logger.start({}, {})
    trainer = Trainer(state, Loggers([logger]), run)
    return lambda: float(trainer.epoch()["seconds"])


class Team:
    """Processes that each train one epoch whenever the team is called, all at the same time.

    Args:
        config: what each of them trains; built and warmed up before the constructor returns.
        count: of processes.
        threads: of torch in each of them.
        folder: for their records.
    """

    def __init__(self, config: TrainConfig, count: int, threads: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.members: list[tuple[Any, Connection]] = []
        for index in range(count):
            here, there = context.Pipe()
            member = context.Process(target=_work, args=(there, config, threads, folder / str(index)), daemon=True)
            member.start()
            there.close()
            self.members.append((member, here))
        self._wait()

    def __call__(self) -> float:
        """One epoch each; seconds from the start of all to the end of the last, evaluation not counted."""
        start = perf_counter()
        for _, connection in self.members:
            connection.send("epoch")
        return max(self._wait()) - start

    def close(self) -> None:
        """End the processes."""
        for member, connection in self.members:
            connection.close()
            member.join(10)
            if member.is_alive():
                member.terminate()

    def _wait(self) -> list[float]:
        """When each of them was done, on the clock that all processes share."""
        try:
            return [float(connection.recv()) for _, connection in self.members]
        except EOFError:
            raise RuntimeError("a packed trainer has ended; its own message stands above (out of memory?)") from None


@contextmanager
def teams(config: TrainConfig, count: int, threads: int, folder: Path) -> Iterator[dict[str, Team]]:
    """One process with all threads, and `count` processes that share them."""
    found: dict[str, Team] = {}
    try:
        found["single"] = Team(config, 1, threads, folder / "single")
        found["packed"] = Team(config, count, max(1, threads // count), folder / "packed")
        yield found
    finally:
        for team in found.values():
            team.close()


def measure_packed(
    config: TrainConfig, count: int, threads: int, rounds: int, images: int, folder: Path
) -> dict[str, Any]:
    """Images a second of one trainer and of `count` together, in turn, and what packing gains.

    The load of the machine is told as well: numbers of a machine that others use are of that machine on that day.

    Args:
        config: what each trains.
        count: trainers at a time.
        threads: of torch in all; one trainer alone gets them all.
        rounds: of one epoch each.
        images: of an epoch.
        folder: for the records.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with teams(config, count, threads, folder) as both:
        seconds = interleaved(both, rounds)
    speeds = {name: [len(both[name].members) * images / t for t in times] for name, times in seconds.items()}
    gains = [packed / single for packed, single in zip(speeds["packed"], speeds["single"], strict=True)]
    together = bootstrap(median, speeds["packed"])
    return {
        "load_average_before": load,
        "machine_was_alone": None if load is None else load < ALONE * (os.cpu_count() or 1),
        "processes": count,
        "threads_of_each": max(1, threads // count),
        "threads_of_single": threads,
        "rounds": rounds,
        "images_per_second": {"single": bootstrap(median, speeds["single"]), "packed": together},
        "gain": bootstrap(median, gains),
        "full_run": full_run(together["value"], count),
    }


def full_run(images_per_second: float, count: int) -> dict[str, float]:
    """Seconds of a run of 160 epochs over 50,000 images, by its training steps alone.

    >>> full_run(80_000.0, 4)
    {'seconds_per_run': 100.0, 'seconds_of_all': 400.0}
    """
    each = EPOCHS * IMAGES / images_per_second
    return {"seconds_per_run": each, "seconds_of_all": count * each}


def judge_packed(name: str, width: float, found: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Packing must not lose; on a GPU ResNet-32 of double width has a goal for the whole run.

    On a machine that others use the gain is not judged: threads that wait for one another lose most there.
    """
    gain = found["gain"]
    holds = None if found["machine_was_alone"] is False else gain["value"] >= 1.0
    bars: list[dict[str, Any]] = [{"bar": f"packed / single, {name}", **gain, "limit": 1.0, "holds": holds}]
    if device.type == "cuda" and name == "resnet32" and width == 2:
        seconds = found["full_run"]["seconds_per_run"]
        words = "at most, seconds of a packed 160-epoch run, resnet32 x 2"
        bars.append({"bar": words, "value": seconds, "interval": None, "limit": GOAL, "holds": seconds <= GOAL})
    return bars


def _work(connection: Connection, config: TrainConfig, threads: int, folder: Path) -> None:
    """A member of the team: an epoch for every message, until the other end closes."""
    torch.set_num_threads(threads)
    device = torch.device(config.device)
    with quickest_convolutions(device):
        epoch = trainer_epoch(config, folder)
        epoch()  # warm-up: allocations, kernels, graphs
        connection.send(perf_counter())
        while _next(connection):
            started = perf_counter()
            connection.send(started + epoch())


def _next(connection: Connection) -> bool:
    try:
        connection.recv()
    except (EOFError, ConnectionResetError):
        return False
    return True
