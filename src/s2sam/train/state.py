"""Everything that a run consists of, built from its configuration, and saved as one dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from s2sam.attach import sparsify
from s2sam.data import load_data
from s2sam.data.augment import Augment
from s2sam.data.images import ImageData
from s2sam.data.loader import Batches
from s2sam.models import create_model
from s2sam.sam.single_step import S2SAM
from s2sam.sam.two_step import SAM
from s2sam.sparse.base import Sparsifier
from s2sam.train.config import OptimConfig, TrainConfig
from s2sam.train.schedule import make_scheduler
from s2sam.train.seeding import generator


@dataclass(eq=False)
class TrainState:
    """A run between two steps. `epoch` and `step` count what is finished."""

    config: TrainConfig
    device: torch.device
    data: ImageData
    batches: Batches
    augment: Augment
    model: nn.Module
    optimizer: torch.optim.Optimizer
    sparsifier: Sparsifier | None
    sharpness: S2SAM | SAM | None
    scheduler: torch.optim.lr_scheduler.LambdaLR
    epoch: int = 0
    step: int = 0
    best: dict[str, Any] | None = None  #: epoch, val_top1, test_top1, sparsity of the best epoch

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * len(self.batches)

    def sparsity(self) -> float:
        """Share of the prunable weights that are pruned, counted in masks and weights; 0.0 if dense."""
        return 0.0 if self.sparsifier is None else self.sparsifier.sparsity()

    def parameter_counts(self) -> tuple[int, int]:
        """(all parameters, those that are active)."""
        total = sum(p.numel() for p in self.model.parameters())
        masks = {} if self.sparsifier is None else self.sparsifier.masks
        return total, total - sum(int((~mask).sum()) for mask in masks.values())

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, as tensors and plain values; weights are the clean ones."""
        return {
            "config": self.config.as_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "sparsifier": None if self.sparsifier is None else self.sparsifier.state_dict(),
            "batches": self.batches.state_dict(),
            "data_digest": self.data.digest,
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; bit by bit the same run on the same machine.

        Raises:
            ValueError: it was saved by a run with other settings (folder and device aside) or other images.
        """
        here, there = comparable(self.config.as_dict()), comparable(saved["config"])
        different = [key for key in here if here[key] != there.get(key)]
        if different:
            key = different[0]
            raise ValueError(f"this checkpoint is of another run: its {key} is {there.get(key)!r}, not {here[key]!r}")
        if saved["data_digest"] != self.data.digest:
            raise ValueError("this checkpoint was trained on other images than those that are loaded now")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.batches.load_state_dict(saved["batches"])
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(saved["sparsifier"])
        torch.set_rng_state(saved["rng"])
        self.epoch, self.step, self.best = saved["epoch"], saved["step"], saved["best"]


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide what is trained."""
    return {key: value for key, value in config.items() if key not in ("out", "device")}


def build(config: TrainConfig) -> TrainState:
    """Load the data, build and sparsify the model, attach sharpness. Nothing is written.

    Arms of one seed are matched: initial weights, order of images, augmentation and random masks come from generators
    that depend on the seed and their purpose alone, and the split from `data_options.split_seed`.

    Raises:
        ValueError: data, options or the device do not exist or do not fit.
    """
    device = choose_device(config.device)
    options = config.data_options
    data = load_data(
        config.data, train_size=options.train_size, val_fraction=options.val_fraction, seed=options.split_seed
    )
    channels, height, width = data.image_shape
    model = create_model(
        config.model, num_classes=data.num_classes, in_channels=channels, image_size=(height, width),
        generator=generator(config.seed, "init"), **config.model_options,
    ).to(device)  # fmt: skip
    augment = Augment(data.mean.to(device), data.std.to(device), options.augment)
    images = len(data.train_x)
    batches = Batches(
        data.train_x.to(device), data.train_y.to(device), config.batch_size, generator(config.seed, "data"), augment,
        drop_last=images > config.batch_size and images % config.batch_size == 1,  # BatchNorm cannot train on one image
    )  # fmt: skip
    optimizer = make_optimizer(model, config.optim, config.lr)
    sparsifier = None
    if config.method != "dense":
        sparsifier = sparsify(
            model, optimizer, method=config.method, sparsity=config.sparsity, distribution=config.sparse.distribution,
            total_steps=config.epochs * len(batches), generator=generator(config.seed, "sparsify"),
            include=config.sparse.include, exclude=config.sparse.exclude, **config.method_options,
        )  # fmt: skip
    return TrainState(
        config, device, data, batches, augment, model, optimizer, sparsifier,
        make_sharpness(model, optimizer, config),
        make_scheduler(optimizer, config.schedule, config.epochs * len(batches), len(batches)),
    )  # fmt: skip


def make_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """The base optimizer over all parameters, with one weight decay for all."""
    if config.name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
    )


def make_sharpness(model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig) -> S2SAM | SAM | None:
    """What `sharpness` names, attached to the optimizer."""
    sam = config.sam
    if config.sharpness == "sam":
        return SAM(optimizer, model=model, rho=config.rho, scale=sam.scale)
    if config.sharpness == "s2sam":
        return S2SAM(
            optimizer, model=model, rho=config.rho, direction=sam.direction, sign=sam.sign, scale=sam.scale,
            stats_every=sam.stats_every,
        )  # fmt: skip
    return None


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; use --device auto or --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
