"""Everything that a run consists of, built from its configuration, and saved as one dictionary."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2sam.attach import sparsify
from s2sam.data import load_data
from s2sam.data.augment import Augment, mixup, soft_targets
from s2sam.data.images import ImageData
from s2sam.data.loader import Batches
from s2sam.models import create_model
from s2sam.sam.rho import clean_growth, late, like_lr, rising
from s2sam.sam.single_step import S2SAM
from s2sam.sam.two_step import SAM
from s2sam.sparse.base import Sparsifier
from s2sam.train.averages import Ema
from s2sam.train.checkpoint import fitting
from s2sam.train.config import OptimConfig, TrainConfig
from s2sam.train.divergence import SkippedSteps
from s2sam.train.fast import check_compile, compile_network
from s2sam.train.precision import check_precision, make_scaler, to_channels_last
from s2sam.train.resume import differences
from s2sam.train.schedule import make_scheduler
from s2sam.train.scoring import scoring_options
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
    scaler: torch.amp.GradScaler
    skipped: SkippedSteps | None  #: None if nothing here skips a step whose gradients are not finite
    ema: Ema | None = None
    epoch: int = 0
    step: int = 0
    best: dict[str, Any] | None = None  #: epoch, val_top1, test_top1, sparsity of the best epoch

    @property
    def n_steps(self) -> int:
        """Steps of the whole run, all levels of LT included."""
        return self.config.epochs * len(self.batches) * (1 if self.sparsifier is None else 1 + self.sparsifier.levels)

    @property
    def level(self) -> int | None:
        """Which training of an iterative method (LT) this is, or None if it is the last or the only one."""
        if self.sparsifier is None or self.sparsifier.level == self.sparsifier.levels:
            return None
        return self.sparsifier.level

    @property
    def first_visit(self) -> bool:
        """Whether the step under way is the first, plain one on its batch (echo)."""
        in_training = self.step % (self.config.epochs * len(self.batches))
        return self.config.sharpness == "echo" and in_training % 2 == 0

    def next_level(self) -> bool:
        """After a training let LT prune and rewind; schedule, data order, averages begin afresh. False at the end."""
        if self.sparsifier is None or not self.sparsifier.next_level():
            return False
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"]
        steps = len(self.batches)
        self.scheduler = make_scheduler(self.optimizer, self.config.schedule, self.config.epochs * steps, steps)
        self.scaler = make_scaler(self.device, self.config.precision)
        self.batches.restart(generator(self.config.seed, "data").get_state())
        if self.ema is not None:
            self.ema = Ema(self.model, self.config.optim.ema)
        if self.skipped is not None:
            self.skipped.row = 0
        self.epoch, self.best = 0, None
        return True

    def mix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A batch after mixup, with probabilities (N, classes) for labels; as it is if there is to be none."""
        alpha, classes = self.config.data_options.mixup, self.data.num_classes
        if alpha == 0:
            return x, y
        x, a, b, lam = mixup(x, y, alpha, self.batches.generator)
        return x, lam * soft_targets(a, classes) + (1 - lam) * soft_targets(b, classes)

    def advance(self) -> None:
        """A step was taken, or skipped: count it, move the schedules, update the average of the weights.

        A step that a GradScaler skips never reaches the sparsifier and S2SAM, which are told here, so that plan and
        schedule keep to the time of the run; after the last step the sparsifier prunes what a skipped one left over.
        """
        self.step += 1
        with warnings.catch_warnings():  # torch cannot know that the scaler skipped the very first step
            if self.scaler.is_enabled():
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.scheduler.step()
        for part in (self.sparsifier, self.sharpness):
            if isinstance(part, (Sparsifier, S2SAM)) and part.step < self.step:
                part.missed_step()
        if self.sparsifier is not None and self.step == self.n_steps:
            self.sparsifier.catch_up()
        if self.ema is not None:
            self.ema.update(self.model)

    def sparsity(self) -> float:
        """Share of the prunable weights that are pruned, counted in masks and weights; 0.0 if dense."""
        return 0.0 if self.sparsifier is None else self.sparsifier.sparsity()

    def parameter_counts(self) -> tuple[int, int]:
        """(all parameters, those that are active)."""
        total = sum(p.numel() for p in self.model.parameters())
        masks = {} if self.sparsifier is None else self.sparsifier.masks
        return total, total - sum(int((~mask).sum()) for mask in masks.values())

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs, as tensors and plain values; weights are the clean ones. Take it between two steps."""
        return {
            "config": self.config.as_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sparsifier": None if self.sparsifier is None else self.sparsifier.state_dict(),
            "ema": None if self.ema is None else self.ema.averaged.state_dict(),
            "skipped": None if self.skipped is None else [int(self.skipped.total), int(self.skipped.row)],
            "batches": self.batches.state_dict(),
            "data_digest": self.data.digest,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, saved: Mapping[str, Any], name: str = "this checkpoint") -> None:
        """Go on where :meth:`state_dict` was taken; bit by bit the same run on the same machine.

        Raises:
            ValueError: it was saved by a run with other settings (folder and device aside), other images, another model
                or other masks, or is damaged; the sentence begins with `name`.
        """
        for different in differences(self.config.as_dict(), saved["config"]):
            raise ValueError(f"{name} is of another run: {different}")
        if saved["data_digest"] != self.data.digest:
            raise ValueError(
                f"{name} was trained on other images than those that are loaded now; give the data it was trained on, "
                "or choose another --out"
            )
        with fitting(name):
            self._load(saved)
        self.epoch, self.step, self.best = saved["epoch"], saved["step"], saved["best"]

    def _load(self, saved: Mapping[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"]) if self.scaler.is_enabled() else None
        self.batches.load_state_dict(saved["batches"])
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(saved["sparsifier"])
            self.sparsifier.verify()
        if self.ema is not None:
            self.ema.averaged.load_state_dict(saved["ema"])
        if self.skipped is not None:
            self.skipped.total, self.skipped.row = map(int, saved["skipped"])
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda_rng"], self.device)


def training_images(config: TrainConfig) -> ImageData:
    """The images that a configuration names, in main memory.

    Raises:
        ValueError: as :func:`s2sam.data.load_data`.
    """
    options = config.data_options
    return load_data(
        config.data, train_size=options.train_size, val_fraction=options.val_fraction, seed=options.split_seed,
        label_noise=options.label_noise, **options.options,
    )  # fmt: skip


def build(config: TrainConfig, *, init: bool = True) -> TrainState:
    """Load the data, build and sparsify the model, attach sharpness. Nothing is written.

    With `init=False` masks are not made; :meth:`TrainState.load_state_dict` brings them.

    Arms of one seed are matched: initial weights, order of images, augmentation and random masks come from generators
    that depend on the seed and their purpose alone, and the split from `data_options.split_seed`.

    Raises:
        ValueError: data, options or the device do not exist or do not fit.
    """
    device = choose_device(config.device)
    check_precision(device, config.precision)
    check_compile(device, config.compile)
    options, data = config.data_options, training_images(config).to(device)
    channels, height, width = data.image_shape
    model = create_model(
        config.model, num_classes=data.num_classes, in_channels=channels, image_size=(height, width),
        generator=generator(config.seed, "init"), **config.model_options,
    ).to(device)  # fmt: skip
    if options.cutout > min(height, width):
        raise ValueError(
            f"data_options.cutout {options.cutout} is larger than the images of {height}x{width} pixels; lower it"
        )
    if config.channels_last:
        model = to_channels_last(model, device)
    augment = Augment(data.mean, data.std, options.augment, cutout=options.cutout)
    images = len(data.train_x)
    batches = Batches(
        data.train_x, data.train_y, config.batch_size, generator(config.seed, "data"), augment,
        drop_last=images > config.batch_size and images % config.batch_size == 1,  # BatchNorm cannot train on one image
        visits=config.visits,
    )  # fmt: skip
    optimizer = make_optimizer(model, config.optim, config.lr)
    sparsifier = None
    if config.method != "dense":
        sparsifier = sparsify(
            model, optimizer, method=config.method, sparsity=config.sparsity, distribution=config.sparse.distribution,
            total_steps=config.epochs * len(batches), generator=generator(config.seed, "sparsify"),
            include=config.sparse.include, exclude=config.sparse.exclude, init=init, **config.method_options,
            **scoring_options(config, data, augment, device),
        )  # fmt: skip
    sharpness = make_sharpness(model, optimizer, config, config.epochs * len(batches), sparsifier)
    compile_network(model, config.compile)
    scaler = make_scaler(device, config.precision)
    skips = sharpness is not None or scaler.is_enabled()
    return TrainState(
        config, device, data, batches, augment, model, optimizer, sparsifier, sharpness,
        make_scheduler(optimizer, config.schedule, config.epochs * len(batches), len(batches)), scaler,
        SkippedSteps(optimizer) if skips else None,
        ema=Ema(model, config.optim.ema) if config.optim.ema > 0 else None,
    )  # fmt: skip


def make_optimizer(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """The base optimizer over all parameters, with one weight decay for all."""
    fused = config.fused or None  # None lets torch choose, and it chooses lists of tensors (foreach) on a GPU
    if config.name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=config.weight_decay, fused=fused)
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=config.momentum, weight_decay=config.weight_decay,
        nesterov=config.nesterov, fused=fused,
    )  # fmt: skip


def make_sharpness(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    total_steps: int,
    sparsifier: Sparsifier | None = None,
) -> S2SAM | SAM | None:
    """What `sharpness` names, attached to the optimizer; a schedule of rho is over `total_steps`."""
    sam = config.sam
    if config.sharpness == "sam":
        return SAM(optimizer, model=model, rho=config.rho, scale=sam.scale)
    if config.sharpness == "echo":
        return S2SAM.echo(
            optimizer, model=model, rho=config.rho, scale=sam.scale, scope=sam.scope, stats_every=sam.stats_every,
            period=total_steps,
        )  # fmt: skip
    if config.sharpness == "s2sam":
        rho = radius(config, optimizer, total_steps)
        if sam.clean_growth and sparsifier is not None:
            rho = clean_growth(sparsifier, rho)
        return S2SAM(
            optimizer, model=model, rho=rho, direction=sam.direction, sign=sam.sign,
            scale=sam.scale, scope=sam.scope, ema_beta=sam.ema_beta, stats_every=sam.stats_every,
            generator=generator(config.seed, "sharpness") if sam.direction == "random" else None,
        )  # fmt: skip
    return None


def radius(config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> float | Callable[[int], float]:
    """rho, or rho times its schedule, which begins anew every `total_steps` (in each training of LT)."""
    if config.sam.rho_schedule == "constant":
        return config.rho
    schedule = {
        "late": lambda: late(total_steps, config.sam.rho_start, rho=config.rho),
        "rising": lambda: rising(total_steps, rho=config.rho),
        "lr": lambda: like_lr(optimizer, rho=config.rho),
    }[config.sam.rho_schedule]()
    return lambda step: schedule(step % total_steps)


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is one.

    Raises:
        ValueError: CUDA is asked for and not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device here; use --device auto or --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
