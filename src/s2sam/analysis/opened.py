"""Finished runs, opened to be measured: the network, its masks, and the images it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2sam.data.augment import Augment
from s2sam.data.images import ImageData
from s2sam.train.config import TrainConfig
from s2sam.train.finished import load_images, load_model, read_folder, read_tensors, weights_digest
from s2sam.train.seeding import derive
from s2sam.train.state import choose_device


@dataclass(frozen=True)
class Opened:
    """A finished run: its network in eval mode, what that takes, and what identifies both."""

    folder: Path
    config: TrainConfig
    env: dict[str, Any]
    data: ImageData
    model: nn.Module
    prepare: Augment  #: turns stored images into what the model takes; nothing random
    device: torch.device  #: of both
    facts: dict[str, Any]  #: "weights", final or ema, and their digest, "weights_sha256"

    @property
    def masks(self) -> dict[str, Tensor]:
        """On the CPU; ValueError as :func:`load_masks`."""
        return load_masks(self.folder)

    def images(self, split: str, count: int | None, seed: int) -> tuple[Tensor, Tensor]:
        """Images as stored and their labels, on the device: `count` of them, chosen by the seed, or all if None.

        Raises:
            ValueError: fewer than one is asked for, or the run has none in this split.
        """
        if count is not None and count < 1:
            raise ValueError(f"a measurement needs at least one image, got {count}; 1000 for instance, or all")
        x, y = choose(*self.data.split(split), count, seed)
        if len(x) == 0:
            raise ValueError(f"{self.folder} was trained without {split} images; choose another --split")
        return x.to(self.device), y.to(self.device)

    def facts_of(self, split: str, images: int) -> dict[str, Any]:
        """What a measurement on so many images of a split depends on."""
        return {
            "split": split, "images": images, "all_images": len(self.data.split(split)[1]),
            "data_digest": self.data.digest, **self.facts,
        }  # fmt: skip


def open_finished(folder: Path, data: ImageData, *, weights: str = "final", device: str = "auto") -> Opened:
    """A finished run with its images, which :func:`load_common` gives.

    Args:
        folder: of the run.
        data: the images it was trained on.
        weights: "final", or "ema" for the averaged ones.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: no finished run, no such weights or torn ones, images that do not fit, or no such device.
    """
    config, env = read_folder(folder)
    there = choose_device(device)
    model = load_model(folder, config, env, data, weights).to(there).eval()
    mean, std = (torch.tensor(env[name]).to(there) for name in ("mean", "std"))
    facts = {"weights": weights, "weights_sha256": weights_digest(folder, weights)}
    return Opened(folder, config, env, data, model, Augment(mean, std, "none"), there, facts)


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


def load_masks(folder: Path) -> dict[str, Tensor]:
    """The masks of a run, {} if it is dense; ValueError if the file is torn or damaged."""
    name = "masks.safetensors"
    return read_tensors(folder, name) if (folder / name).is_file() else {}


def choose(x: Tensor, y: Tensor, images: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """`images` of them at random, in their order; all if there are not more. The same for every kind of measurement."""
    if images is None or images >= len(x):
        return x, y
    generator = torch.Generator().manual_seed(derive(seed, "surface images"))
    rows = torch.randperm(len(x), generator=generator)[:images].sort().values
    return x[rows], y[rows]
