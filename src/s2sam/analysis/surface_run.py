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

from s2sam.analysis.surface import Landscape, Point, SurfaceSettings
from s2sam.analysis.surface_file import Surface
from s2sam.data.augment import Augment
from s2sam.data.images import ImageData
from s2sam.train.config import TrainConfig
from s2sam.train.finished import load_images, load_model, read_folder, weights_digest
from s2sam.train.processes import in_processes
from s2sam.train.seeding import derive
from s2sam.train.state import choose_device

Measured = tuple[Point, float, float]  #: where, loss, top-1
SAVE_EVERY = 5.0  #: seconds
CALIBRATION = 10_000  #: images at most that re-estimate the statistics of BatchNorm


def load_common(folders: Sequence[Path]) -> ImageData:
    """The images that all these runs were trained on.

    Raises:
        ValueError: one is no finished run or named twice, they were trained on different images, or those have changed.
    """
    digests: dict[Path, str] = {}
    for folder in folders:
        if folder in digests:
            raise ValueError(f"{folder} is named twice; name every run once")
        digests[folder] = read_folder(folder)[1]["data_digest"]
        if digests[folder] != digests[folders[0]]:
            raise ValueError(f"{folders[0]} and {folder} were trained on different images; compare runs on the same")
    return load_images(*read_folder(folders[0]), None)


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
        data: the images it was trained on, of :func:`load_common`.
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
    if images is not None and images < 1:
        raise ValueError(f"a surface needs at least one image, got {images}; 1000 for instance, or all")
    config, env = read_folder(folder)
    there = choose_device(device)
    model = load_model(folder, config, env, data, weights).to(there)
    masks = load_masks(folder)
    x, y = choose(*data.split(split), images, settings.seed)
    if len(x) == 0:
        raise ValueError(f"{folder} was trained without {split} images; choose another --split")
    mean, std = (torch.tensor(env[name]) for name in ("mean", "std"))
    calibration = None
    if settings.bn == "recalibrated":
        calibration = calibration_images(config, data.train_x, data.train_y, (mean, std), settings.seed, len(x))
        calibration = calibration.to(there)
    landscape = Landscape(
        model, x.to(there), y.to(there), Augment(mean.to(there), std.to(there), "none"), settings, masks, calibration
    )
    facts = {
        "split": split, "images": len(x), "all_images": len(data.split(split)[1]), "data_digest": data.digest,
        "weights": weights, "weights_sha256": weights_digest(folder, weights),
        "masked_weights": sum(int((~mask).sum()) for mask in masks.values()),
        "classes": len(env["classes"]), "calibration_images": 0 if calibration is None else len(calibration),
    }  # fmt: skip
    return landscape, Surface.empty(label, settings, facts)


def load_masks(folder: Path) -> dict[str, Tensor]:
    """The masks of a run, {} if it is dense; ValueError if the file is torn."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / "masks.safetensors"
    try:
        return load_file(path) if path.is_file() else {}
    except SafetensorError as error:
        raise ValueError(f"{path} is torn; train the run again") from error


def choose(x: Tensor, y: Tensor, images: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """`images` of them at random, in their order; all if there are not more."""
    if images is None or images >= len(x):
        return x, y
    generator = torch.Generator().manual_seed(derive(seed, "surface images"))
    rows = torch.randperm(len(x), generator=generator)[:images].sort().values
    return x[rows], y[rows]


def calibration_images(
    config: TrainConfig, x: Tensor, y: Tensor, moments: tuple[Tensor, Tensor], seed: int, count: int
) -> Tensor:
    """Training images as the network saw them, augmentation included, drawn once: the same at every point."""
    options = config.data_options
    augment = Augment(*moments, options.augment, cutout=options.cutout)
    generator = torch.Generator().manual_seed(derive(seed, "surface calibration"))
    return augment(choose(x, y, min(count, CALIBRATION), seed)[0], generator)


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
