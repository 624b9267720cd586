"""Loss surfaces of finished runs: weights, masks and images from the run folder, points here or in processes."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2sam.analysis.opened import Opened, choose, open_finished
from s2sam.analysis.surface import Landscape, Point, SurfaceSettings
from s2sam.analysis.surface_file import Surface
from s2sam.data.augment import Augment
from s2sam.data.images import ImageData
from s2sam.train.processes import in_processes
from s2sam.train.seeding import derive

Measured = tuple[Point, float, float]  #: where, loss, top-1
SAVE_EVERY = 5.0  #: seconds
CALIBRATION = 10_000  #: images at most that re-estimate the statistics of BatchNorm


def open_run(
    folder: Path,
    data: ImageData,
    settings: SurfaceSettings,
    *,
    label: str,
    split: str = "train",
    images: int | None = 1000,
    weights: str = "final",
    device: str = "auto",
) -> tuple[Landscape, Surface]:
    """A finished run, ready to be measured, and its surface, on which nothing is measured yet.

    Args:
        folder: of the run.
        data: the images it was trained on, of :func:`~s2sam.analysis.opened.load_common`.
        settings: the grid.
        label: what to call the run.
        split: "train", "val" or "test".
        images: how many, chosen at random by the seed of the settings, the same ones for every run on these images;
            None, or more than there are = all.
        weights: "final", or "ema" for the averaged ones.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: no finished run, no images in this split, masks that are torn, or as :class:`Landscape`.
    """
    opened = open_finished(folder, data, weights=weights, device=device)
    x, y = opened.images(split, images, settings.seed)
    masks, calibration = opened.masks, None
    if settings.bn == "recalibrated":
        calibration = calibration_images(opened, settings.seed, len(x))
    landscape = Landscape(opened.model, x, y, opened.prepare, settings, masks, calibration)
    facts = opened.facts_of(split, len(x)) | {
        "masked_weights": sum(int((~mask).sum()) for mask in masks.values()),
        "classes": len(opened.env["classes"]), "calibration_images": 0 if calibration is None else len(calibration),
    }  # fmt: skip
    return landscape, Surface.empty(label, settings, facts)


def calibration_images(opened: Opened, seed: int, count: int) -> Tensor:
    """Training images as the network saw them, augmentation included, drawn once: the same at every point."""
    options, data = opened.config.data_options, opened.data
    augment = Augment(opened.prepare.mean.cpu(), opened.prepare.std.cpu(), options.augment, cutout=options.cutout)
    generator = torch.Generator().manual_seed(derive(seed, "surface calibration"))
    x, _ = choose(data.train_x, data.train_y, min(count, CALIBRATION), seed)
    return augment(x, generator).to(opened.device)


def measure(
    landscape: Landscape,
    surface: Surface,
    path: Path,
    *,
    jobs: int = 1,
    on_point: Callable[[int], None] = lambda done: None,
) -> Surface:
    """Measure what `path` does not hold yet of `surface`; the file is saved as it grows, and on an error or Ctrl-C.

    Args:
        landscape: of the run.
        surface: of the run, filled in place.
        path: the npz file.
        jobs: processes; each takes its share of torch's threads.
        on_point: called with how many points of the surface are measured.

    Raises:
        ValueError: `path` is damaged or was made with other settings.
        RuntimeError: a process was ended from outside.
    """
    surface.resume(path)
    todo = surface.todo()
    on_point(surface.loss.size - len(todo))
    if not todo:
        return surface
    surface.save(path)  # a place that cannot be written is known now, not after hours
    saved = time.monotonic()
    try:
        with closing(elsewhere(landscape, todo, jobs) if jobs > 1 else here(landscape, todo)) as found:
            for count, point in enumerate(found, surface.loss.size - len(todo) + 1):
                surface.put(*point)
                on_point(count)
                if time.monotonic() - saved > SAVE_EVERY:
                    surface.save(path)
                    saved = time.monotonic()
    finally:
        surface.save(path)
    return surface


def here(landscape: Landscape, points: Iterable[Point]) -> Generator[Measured, None, None]:
    """The points one after another."""
    with landscape.open():
        for point in points:
            yield (point, *landscape.at(point))


def elsewhere(landscape: Landscape, points: Sequence[Point], jobs: int) -> Generator[Measured, None, None]:
    """The points as they come from `jobs` processes, which end with the caller."""
    threads = max(1, torch.get_num_threads() // jobs)
    tasks = {point: (point,) for point in points}
    with closing(in_processes(_at, tasks, jobs, begin=_begin, given=(pickle.dumps(landscape), threads))) as done:
        try:
            for _, future in done:
                yield future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that measured points was ended from outside; free some memory or take fewer --jobs, then "
                "run the same command again to go on"
            ) from error


_open: list[Any] = []  #: in a worker: its landscape, opened once, and what keeps it open


def _begin(landscape: bytes, threads: int) -> None:
    """In a worker: open its copy of the landscape."""
    torch.set_num_threads(threads)
    mine = pickle.loads(landscape).open()
    _open[:] = [mine.__enter__(), mine]


def _at(point: Point) -> Measured:
    landscape: Landscape = _open[0]
    return (point, *landscape.at(point))
