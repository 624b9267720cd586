"""The premise of S2-SAM along a run: a probe of a few steps from each checkpoint that the run kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from s2sam.analysis.hessian import BN_MODES, ActiveLoss
from s2sam.analysis.lanczos import extremes
from s2sam.analysis.opened import choose
from s2sam.analysis.premise import probe, summary
from s2sam.analysis.sharpness import PRECISIONS
from s2sam.sparse.names import unknown
from s2sam.train.checkpoint import load_checkpoint
from s2sam.train.config import TrainConfig, number, whole
from s2sam.train.finished import read_folder, weights_digest
from s2sam.train.seeding import derive
from s2sam.train.state import TrainState, build

FORMAT = 1
FILE = "premise.json"  #: in the run folder


@dataclass(frozen=True, kw_only=True)
class PremiseSettings:
    """How a probe looks.

    Args:
        looks: steps that are looked at from each checkpoint.
        rho: length of the displacements; None = the run's own if it trained with sam or s2sam and scale norm, else
            0.05.
        bn: BatchNorm in all losses: train = the statistics of each batch, as the training forward has them.
        images: fixed training images for lambda_max, not augmented, in batches of the run's size; None = all.
        precision: of what is measured, fp32 or fp64; the steps are the run's.
        max_steps: of Lanczos for lambda_max.
        tolerance: of its residual.
        seed: of the random vectors and of the choice of images.

    Raises:
        ValueError: none of this.
    """

    looks: int = 20
    rho: float | None = None
    bn: str = "train"
    images: int | None = 1000
    precision: str = "fp32"
    max_steps: int = 60
    tolerance: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        whole("looks", self.looks, 2)
        whole("max_steps", self.max_steps, 1)
        whole("seed", self.seed, 0)
        number("tolerance", self.tolerance, 1e-12, below=1.0)
        if self.rho is not None:
            number("rho", self.rho, 0.0)
        if self.rho == 0:
            raise ValueError("rho must be above 0: at the weights themselves nothing rises")
        if self.images is not None:
            whole("images", self.images, 1)
        if self.bn not in BN_MODES:
            raise unknown("BatchNorm mode", self.bn, BN_MODES)
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, list(PRECISIONS))

    def radius(self, config: TrainConfig) -> float:
        """The length of the displacements for this run."""
        if self.rho is not None:
            return self.rho
        own = config.sharpness != "none" and config.sam.scale == "norm" and config.rho > 0
        return config.rho if own else 0.05


def find_checkpoints(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The whole checkpoints of a run, one for each step, in order.

    Raises:
        ValueError: there is none, or one is torn.
    """
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for path in sorted((folder / "checkpoints").glob("*.pt"), reverse=True):
        saved = load_checkpoint(path)
        found.setdefault(saved["step"], (path, saved))
    if not found:
        raise ValueError(f"{folder} has no checkpoints to look from; train it again, with --keep-every for a curve")
    return [found[step] for step in sorted(found)]


def measure_premise(
    folder: Path,
    settings: PremiseSettings,
    *,
    label: str,
    device: str = "auto",
    on_look: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """The premise at each checkpoint of a finished run, as a record of plain values. The run's files are only read.

    Args:
        folder: of the run.
        settings: how a probe looks.
        label: what to call the run.
        device: "auto", "cpu" or "cuda".
        on_look: called with how many looks are done, of `looks` for each checkpoint.

    Raises:
        ValueError: no finished run, no checkpoints, a torn one, or images that have changed.

    Cost: each probe is `looks` training steps and their looks, and up to max_steps Hessian-vector products.
    """
    config, env = read_folder(folder)
    checkpoints = find_checkpoints(folder)
    here = replace(config, compile="none", device=device)
    cuda = list(range(torch.cuda.device_count()))
    points = []
    with torch.random.fork_rng(cuda):  # a checkpoint brings the random state of the run
        state = build(here, init=False)
        for done, (path, saved) in enumerate(checkpoints):
            same = saved | {"config": saved["config"] | {"compile": "none"}}
            state.load_state_dict(same, f"the checkpoint {path}")
            found = point(state, settings, on_step=partial(_count, on_look, done * settings.looks))
            points.append(found | {"checkpoint": path.name})
            if len(found["each"]) < settings.looks:  # some steps had no gradient to look along
                on_look((done + 1) * settings.looks)
    return {
        "run": label, "format": FORMAT, "points": points, "settings": asdict(settings),
        "rho": settings.radius(config), "run_sharpness": config.sharpness, "run_rho": config.rho,
        "data_digest": env["data_digest"], "steps": state.n_steps, "device": state.device.type,
        "weights_sha256": weights_digest(folder),
        "direction": "e = rho d / ||d|| on the active weights, before the step, on its own batch",
    }  # fmt: skip


def point(state: TrainState, settings: PremiseSettings, *, on_step: Callable[[int], None]) -> dict[str, Any]:
    """One checkpoint: lambda_max on fixed images, then the probe. `state` is moved on."""
    rho = settings.radius(state.config)
    step, epoch, lr = state.step, state.epoch, state.optimizer.param_groups[0]["lr"]
    top = curvature(state, settings)
    over = state.epoch >= state.config.epochs
    if over and state.sparsifier is not None:
        state.sparsifier.freeze()
    generator = torch.Generator().manual_seed(derive(settings.seed, f"premise {step}"))
    looks = probe(
        state, steps=settings.looks, rho=rho, generator=generator, bn=settings.bn,
        dtype=PRECISIONS[settings.precision], advance=not over, on_step=on_step,
    )  # fmt: skip
    found = summary(looks, rho)
    c = (found.get("c") or {}).get("mean")
    return {
        "step": step, "epoch": epoch, "lr": lr, "over": over, "rho": rho, "lambda_max": top,
        "c_lambda_max": top | {key: None if c is None else top[key] * c for key in ("value", "residual")}, **found,
        "each": [{"step": look.step, **{k: v if v == v else None for k, v in look.numbers.items()}} for look in looks],
    }  # fmt: skip


def curvature(state: TrainState, settings: PremiseSettings) -> dict[str, Any]:
    """lambda_max of the loss that is trained on, with its BatchNorm and label smoothing, but on fixed images."""
    x, y = choose(state.data.train_x, state.data.train_y, settings.images, settings.seed)
    loss = ActiveLoss(
        state.model, x, y, state.augment, {} if state.sparsifier is None else state.sparsifier.masks,
        bn=settings.bn, dtype=PRECISIONS[settings.precision], batch_size=state.config.batch_size,
        label_smoothing=state.config.data_options.label_smoothing,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(derive(settings.seed, "premise lambda_max"))
    found = extremes(
        loss.product, loss.size, generator, tolerance=settings.tolerance, max_steps=settings.max_steps,
        like=loss.weights,
    )  # fmt: skip
    return asdict(found.top[0])


def _count(on_look: Callable[[int], None], before: int, looks: int) -> None:
    on_look(before + looks)
