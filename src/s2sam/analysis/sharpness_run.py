"""Sharpness of finished runs: weights, masks and images from the run folder, results as JSON beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from s2sam.analysis.hessian import ActiveLoss
from s2sam.analysis.sharpness import PRECISIONS, SharpnessSettings, measure
from s2sam.analysis.surface_run import choose, load_masks
from s2sam.data.augment import Augment
from s2sam.data.images import ImageData
from s2sam.train.atomic import write_text
from s2sam.train.finished import load_model, read_folder, weights_digest
from s2sam.train.state import choose_device

FORMAT = 1
FILE = "sharpness.json"  #: in the run folder


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
    on_pass: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Everything about the sharpness of a finished run, as a record of plain values with all that it depends on.

    The train loss, at which runs must be matched to be compared, is that of as many training images in the same
    BatchNorm mode, whatever the split.

    Args:
        folder: of the run.
        data: the images it was trained on, of :func:`~s2sam.analysis.surface_run.load_common`.
        settings: what is measured.
        label: what to call the run.
        split: "train", "val" or "test".
        images: how many, chosen at random by the seed of the settings, the same for every run on these images; None,
            or more than there are = all.
        weights: "final", or "ema" for the averaged ones.
        device: "auto", "cpu" or "cuda".
        on_pass: as in :func:`~s2sam.analysis.sharpness.measure`.

    Raises:
        ValueError: no finished run, no images in this split, masks that are torn or do not fit.
        RuntimeError: its loss or curvature is not finite.
    """
    if images is not None and images < 1:
        raise ValueError(f"sharpness needs at least one image, got {images}; 1000 for instance, or all")
    config, env = read_folder(folder)
    there = choose_device(device)
    model = load_model(folder, config, env, data, weights).to(there)
    masks = load_masks(folder)
    prepare = Augment(torch.tensor(env["mean"]).to(there), torch.tensor(env["std"]).to(there), "none")

    def on(name: str) -> ActiveLoss:
        x, y = choose(*data.split(name), images, settings.seed)
        if len(x) == 0:
            raise ValueError(f"{folder} was trained without {name} images; choose another --split")
        return ActiveLoss(
            model, x.to(there), y.to(there), prepare, masks, bn=settings.bn, dtype=PRECISIONS[settings.precision],
            batch_size=settings.batch_size,
        )  # fmt: skip

    loss = on(split)
    found = measure(loss, settings, on_pass=on_pass)
    trained = {"loss": found["loss"], "images": len(loss.x)}
    if split != "train":
        other = on("train")
        trained = {"loss": other.loss(), "images": len(other.x)}
    return {
        "run": label, "format": FORMAT, "train_loss": trained["loss"], "train_images": trained["images"], **found,
        "settings": asdict(settings), "split": split, "images": len(loss.x), "all_images": len(data.split(split)[1]),
        "data_digest": data.digest, "augmentation": "none", "measure": "mean cross entropy in nats", "weights": weights,
        "weights_sha256": weights_digest(folder, weights),
        "parameters": sum(p.numel() for p in model.parameters()), "active_weights": loss.size,
        "run_sharpness": config.sharpness, "run_rho": config.rho, "device": there.type,
    }  # fmt: skip


def save_record(path: Path, record: dict[str, Any] | Sequence[dict[str, Any]]) -> Path:
    """Write JSON whole or not at all; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return path
