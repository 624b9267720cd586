"""Sharpness of finished runs: weights, masks and images from the run folder, results as JSON beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from s2sam.analysis.hessian import ActiveLoss
from s2sam.analysis.hessian_graphs import GIB
from s2sam.analysis.in_ranks import in_ranks
from s2sam.analysis.opened import open_finished
from s2sam.analysis.plain_json import to_json
from s2sam.analysis.sharpness import PRECISIONS, SharpnessSettings, measure
from s2sam.data.augment import Augment
from s2sam.data.images import ImageData
from s2sam.train.atomic import write_text
from s2sam.train.state import choose_device

FORMAT = 1
FILE = "sharpness.json"  #: in the run folder


@dataclass(frozen=True)
class Task:
    """What is measured of a run, all in memory."""

    model: nn.Module
    masks: dict[str, Tensor]
    moments: tuple[Tensor, Tensor]  #: mean and deviation of the images
    images: tuple[Tensor, Tensor]
    train: tuple[Tensor, Tensor]  #: for the train loss
    settings: SharpnessSettings

    def carry_out(
        self,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        keep: int | None = None,
        on_pass: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Any]:
        """The measures, the train loss, and how many weights are active; on every rank of the group if there is one."""
        mean, std = (t.to(device) for t in self.moments)
        model, prepare = self.model.to(device), Augment(mean, std, "none")

        def on(images: tuple[Tensor, Tensor]) -> ActiveLoss:
            x, y = (t.to(device) for t in images)
            return ActiveLoss(
                model, x, y, prepare, self.masks, bn=self.settings.bn,
                dtype=PRECISIONS[self.settings.precision], batch_size=self.settings.batch_size, process_group=group,
                keep=keep,
            )  # fmt: skip

        loss = on(self.images)
        found = measure(loss, self.settings, on_pass=on_pass)
        trained = found["loss"] if self.train is self.images else on(self.train).loss()
        return {"train_loss": trained, **found, "active_weights": loss.size, "ranks": loss.ranks.size}


def measure_run(
    folder: Path,
    data: ImageData,
    settings: SharpnessSettings,
    *,
    label: str,
    split: str = "train",
    images: int | None = 1000,
    weights: str = "final",
    device: str = "auto",
    jobs: int = 1,
    process_group: dist.ProcessGroup | None = None,
    on_pass: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Everything about the sharpness of a finished run, as a record of plain values with all that it depends on.

    The train loss, at which runs must be matched to be compared, is that of as many training images in the same
    BatchNorm mode, whatever the split.

    Args:
        folder: of the run.
        data: the images it was trained on, of :func:`~s2sam.analysis.opened.load_common`.
        settings: what is measured.
        label: what to call the run.
        split: "train", "val" or "test".
        images: how many, chosen at random by the seed of the settings, the same for every run on these images; None,
            or more than there are = all.
        weights: "final", or "ema" for the averaged ones.
        device: "auto", "cpu" or "cuda".
        jobs: new processes that share the batches of images, not more than there are batches; with CUDA each takes the
            next device. Sums over batches are taken in float64, so that the numbers do not depend on this beyond
            rounding.
        process_group: instead of `jobs`: of torch.distributed, all ranks of which make this call and get the record,
            each on its current device.
        on_pass: as in :func:`~s2sam.analysis.sharpness.measure`.

    Raises:
        ValueError: no finished run, no images in this split, masks that are torn or do not fit, `jobs` below 1 or
            beside `process_group`.
        RuntimeError: its loss or curvature is not finite, or a process was ended from outside.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if jobs > 1 and process_group is not None:
        raise ValueError("give jobs or process_group, not both: the ranks of a group share the images already")
    there = choose_device(device)
    run = open_finished(folder, data, weights=weights, device="cpu" if jobs > 1 else device)
    chosen = run.images(split, images, settings.seed)
    train = chosen if split == "train" else run.images("train", images, settings.seed)
    task = Task(run.model, run.masks, (run.prepare.mean, run.prepare.std), chosen, train, settings)
    jobs = min(jobs, math.ceil(len(chosen[1]) / settings.batch_size))
    if jobs > 1:
        found = in_ranks(carry_out, (task, there.type, jobs), jobs, on_tell=on_pass)
    else:
        found = task.carry_out(there, process_group, on_pass=on_pass)
    return {
        "run": label, "format": FORMAT, **found, "train_images": len(train[1]), "settings": asdict(settings),
        **run.facts_of(split, len(chosen[1])), "augmentation": "none", "measure": "mean cross entropy in nats",
        "parameters": sum(p.numel() for p in run.model.parameters()), "run_sharpness": run.config.sharpness,
        "run_rho": run.config.rho, "device": there.type,
    }  # fmt: skip


def carry_out(
    task: Task, device: str, jobs: int, group: dist.ProcessGroup, on_pass: Callable[[int], None]
) -> dict[str, Any]:
    """:meth:`Task.carry_out` on one of `jobs` ranks of a machine, whose devices they take in turn."""
    there = torch.device(device)
    if device == "cuda":
        there = torch.device("cuda", dist.get_rank(group) % torch.cuda.device_count())
    return task.carry_out(there, group, GIB // jobs, on_pass)


def save_record(path: Path, record: dict[str, Any] | Sequence[dict[str, Any]]) -> Path:
    """Write JSON whole or not at all, with null for what is not finite; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json(record, indent=1) + "\n")
    return path
