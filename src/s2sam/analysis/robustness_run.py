"""Finished runs on corrupted test images: every corrupted batch is made or read once and shown to all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2sam.analysis.calibration import Scores
from s2sam.analysis.opened import Opened, choose, load_common, open_finished
from s2sam.analysis.robustness_file import Result, assemble, check_distinct, path_of, read
from s2sam.data.corrupted_files import Source, open_official
from s2sam.data.corruption_constants import constants_for
from s2sam.data.corruptions import CORRUPTIONS, SEVERITIES, Generated, check_corruptions, check_severities
from s2sam.data.images import ImageData
from s2sam.train.config import TrainConfig
from s2sam.train.finished import load_images, read_folder, weights_digest

#: settings in which the seeds of one arm may differ
BOOKKEEPING = ("seed", "out", "device", "checkpoint_every", "keep_every", "evaluate_every")


@dataclass(frozen=True)
class RobustSettings:
    """What is measured, the same for every run.

    Args:
        official: folder of official files; None = generated images.
        corruptions: names, of :data:`s2sam.data.corruptions.CORRUPTIONS`.
        severities: some of 1 to 5.
        images: how many test images, chosen at random by the seed, the same ones everywhere; None = all.
        seed: of the choice of images, and of the draws of generated ones.
        constants: of generated images; None = those made for images nearest in size.
        batch_size: images at a time; changes nothing but the last bits.
        weights: "final", or "ema" for the averaged ones.
        device: "auto", "cpu" or "cuda".

    Raises:
        ValueError: an impossible value.
    """

    official: str | None = None
    corruptions: tuple[str, ...] = CORRUPTIONS
    severities: tuple[int, ...] = SEVERITIES
    images: int | None = None
    seed: int = 0
    constants: str | None = None
    batch_size: int = 500
    weights: str = "final"
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "corruptions", check_corruptions(self.corruptions))
        object.__setattr__(self, "severities", check_severities(self.severities))
        if self.images is not None and self.images < 1:
            raise ValueError(f"robustness needs at least one image, got {self.images}; 1000 for instance, or all")
        if self.batch_size < 1:
            raise ValueError(f"a batch needs at least one image, got {self.batch_size}")
        if self.seed < 0:
            raise ValueError(f"the seed must be at least 0, got {self.seed}")
        if self.official is not None and self.constants is not None:
            raise ValueError("official files have the constants they were made with; leave out --constants")

    @property
    def kind(self) -> str:
        """Where the images come from: "generated" or "official"."""
        return "generated" if self.official is None else "official"

    def source(self, data: ImageData) -> Source:
        """The corrupted images of these clean ones."""
        if self.official is None:
            return Generated(data.test_x, seed=self.seed, constants=self.constants)
        return open_official(self.official, data.test_y, data.image_shape, data.classes)


def measure(
    folders: Sequence[Path],
    labels: Sequence[str],
    settings: RobustSettings,
    *,
    on_cell: Callable[[int], None] = lambda done: None,
) -> list[Result]:
    """Accuracy, NLL and ECE of each run on clean and corrupted test images, and the measures over them.

    Args:
        folders: of finished runs on the same images.
        labels: what to call them.
        settings: what to measure.
        on_cell: called with the number of finished cells, corruptions x severities.

    Raises:
        ValueError: no finished run, runs on different images, official files that are missing, damaged or of other
            images, or outputs that are not finite.

    Cost: one forward pass an image, cell and run; the corrupted images are made once for all runs.
    """
    data = load_common(folders)
    networks = [open_finished(folder, data, weights=settings.weights, device=settings.device) for folder in folders]
    own = [facts_of(network) for network in networks]
    check_distinct([{"run": label, **facts} for label, facts in zip(labels, own, strict=True)])
    rows, y = choose(torch.arange(len(data.test_y)), data.test_y, settings.images, settings.seed)
    source = settings.source(data)
    source.check(settings.corruptions, settings.severities)
    clean = _scores(networks, labels, data.test_x[rows].split(settings.batch_size), y)
    cells: list[dict[str, dict[int, Any]]] = [{name: {} for name in settings.corruptions} for _ in networks]
    sha, done = hashlib.sha256(), 0
    for corruption in settings.corruptions:
        for severity in settings.severities:
            batches = source.batches(corruption, severity, rows, settings.batch_size)
            found = _scores(networks, labels, _digested(batches, sha.update), y)
            for row, score in zip(cells, found, strict=True):
                row[corruption][severity] = score
            done += 1
            on_cell(done)
    shared = shared_facts(settings, data, source) | {"corrupted_digest": sha.hexdigest()}
    return [
        assemble({"run": label, **shared, **facts}, plain, row)
        for label, facts, plain, row in zip(labels, own, clean, cells, strict=True)
    ]


def shared_facts(settings: RobustSettings, data: ImageData, source: Source) -> dict[str, Any]:
    """What all runs of one measurement share, but for the digest of the corrupted pixels."""
    total = len(data.test_y)
    return {
        **source.facts, "corruptions": list(settings.corruptions), "severities": list(settings.severities),
        "split": "test", "images": min(settings.images or total, total), "all_images": total,
        "image_seed": settings.seed, "classes": len(data.classes), "data_digest": data.digest,
        "image_side": side_of(data),
    }  # fmt: skip


def side_of(data: ImageData) -> int:
    """The shorter side of the images in pixels, by which generated ones get their constants."""
    return min(data.image_shape[1:])


def facts_of(network: Opened) -> dict[str, Any]:
    """What identifies a network, and which arm and seed it is."""
    return {**network.facts, "arm": arm_of(network.config), "run_seed": network.config.seed}


def arm_of(config: TrainConfig) -> str:
    """A digest of all settings but the seed: runs of one arm have the same.

    >>> arm_of(TrainConfig(seed=0)) == arm_of(TrainConfig(seed=1)), arm_of(TrainConfig()) == arm_of(TrainConfig(lr=0.9))
    (True, False)
    """
    settings = {key: value for key, value in config.as_dict().items() if key not in BOOKKEEPING}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_of(folder: Path, kind: str) -> Result:
    """What a run folder holds of "generated" or "official" images, measured with the weights that the run has now.

    Raises:
        ValueError: there is none, it is damaged or of other weights, or there is no finished run.
    """
    read_folder(folder)
    path = path_of(folder, kind)
    result = read(path)
    if result["weights_sha256"] != weights_digest(folder, result["weights"]):
        raise ValueError(
            f"{path} was measured at other weights than the run has now; run `s2sam robust {folder}` again"
        )
    return result


def stored(folder: Path, settings: RobustSettings) -> Result | None:
    """The result in the folder of a run, if it is of these settings, this run and, by name, these official files.

    Without constants in the settings it must be of those that images of this size get.

    Raises:
        ValueError: the file is damaged, or there is no finished run.
    """
    path = path_of(folder, settings.kind)
    if not path.is_file():
        return None
    result, (config, env) = read(path), read_folder(folder)
    wanted: dict[str, Any] = {
        "corruptions": list(settings.corruptions), "severities": list(settings.severities), "run_seed": config.seed,
        "image_seed": settings.seed, "images": min(settings.images or result["all_images"], result["all_images"]),
        "data_digest": env["data_digest"], "weights": settings.weights, "arm": arm_of(config),
        "weights_sha256": weights_digest(folder, settings.weights),
    }  # fmt: skip
    if settings.official is not None:
        wanted["files"] = Path(settings.official).resolve().name
    else:
        wanted |= {"corruption_seed": settings.seed}
        side = result.get("image_side") or side_of(load_images(config, env, None))  # older results do not tell
        wanted |= {"constants": settings.constants or constants_for(side)}
    return result if all(result.get(name) == value for name, value in wanted.items()) else None


@torch.no_grad()
def _scores(
    networks: Sequence[Opened], labels: Sequence[str], batches: Sequence[Tensor] | Iterator[Tensor], y: Tensor
) -> list[dict[str, float]]:
    """The scores of every network on these batches, whose labels are `y`, in order."""
    device = networks[0].device
    scores, used = [Scores(device) for _ in networks], 0
    for batch in batches:
        x, labels_of = batch.to(device), y[used : used + len(batch)].to(device)
        used += len(batch)
        for network, score in zip(networks, scores, strict=True):
            score.add(network.model(network.prepare(x)), labels_of)
    assert used == len(y)
    found = []
    for label, score in zip(labels, scores, strict=True):
        try:
            found.append(score.read())
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    return found


def _digested(batches: Iterator[Tensor], update: Callable[[Any], None]) -> Iterator[Tensor]:
    """The batches, whose bytes go to `update` on the way: image after image, whatever the batches are."""
    for batch in batches:
        update(batch.cpu().contiguous().numpy().data)
        yield batch
