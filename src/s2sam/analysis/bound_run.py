"""The constants of a finished run: its start and its checkpoints are trained on for some steps, on a copy in memory."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s2sam.analysis.bound_network import Constants, Rates, constants, network_terms, plain
from s2sam.analysis.bound_objective import Objective, cross_entropy, flat
from s2sam.analysis.bound_probe import Probe, Stop, measure
from s2sam.analysis.bound_threads import enough_threads
from s2sam.analysis.opened import load_common
from s2sam.sam.norms import total_norm
from s2sam.sam.single_step import S2SAM
from s2sam.sam.two_step import SAM
from s2sam.train.checkpoint import load_checkpoint
from s2sam.train.config import TrainConfig
from s2sam.train.finished import read_folder, weights_digest
from s2sam.train.schedule import factor
from s2sam.train.seeding import derive
from s2sam.train.state import TrainState, build
from s2sam.train.step import train_step

LEAST_RATE = 0.01  #: of the largest learning rate: below it the weights would not move


@dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """How much is looked at.

    Args:
        images: of the training split, not augmented, chosen at random by the seed; None = all. What does not fill a
            batch of the run's size is left out.
        steps: of training at each place.
        examples: images whose own gradients are taken, at both ends of those steps.
        power: difference quotients towards the largest curvature, at both ends as well.
        seed: of the choice of images.

    Raises:
        ValueError: none of this.
    """

    images: int | None = 1000
    steps: int = 10
    examples: int = 16
    power: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images is not None and self.images < 2:
            raise ValueError(f"a batch's variance needs images, at least two batches of them, got {self.images}")
        if self.steps < 1:
            raise ValueError(f"a probe needs at least one step, got {self.steps}; 10 for instance")
        for name in ("examples", "power", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


def check_common(folders: Sequence[Path]) -> None:
    """Raise ValueError if one is no finished run, or they were trained on different images, or the images changed."""
    if len(folders) == 1:
        read_folder(folders[0])
    else:
        load_common(folders)


def measure_run(
    folder: Path,
    settings: ProbeSettings,
    *,
    label: str,
    epochs: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    device: str = "auto",
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Constants, terms and what was measured beside them, as plain values; nothing is written.

    Args:
        folder: of a finished run.
        settings: how much to look at.
        label: what to call the run.
        epochs: its epoch records.
        steps: its step records, which hold the lengths of S2SAM's displacements.
        device: "auto", "cpu" or "cuda".
        tell: called with how many of how many places have been looked at.

    Raises:
        ValueError: no finished run, no checkpoint in it, too few images, or its images have changed.
    """
    config, env = read_folder(folder)
    saved = checkpoints(folder)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        state = build(replace(config, device=device, compile="none", out=str(folder)))
        if state.data.digest != env["data_digest"]:
            raise ValueError(f"the images in {config.data} are not those {folder} was trained on; bring them back")
        losses = cross_entropy(config.data_options.label_smoothing)
        batches = fixed_batches(state, settings)
        objective = Objective(state.model, batches, losses)
        probes: list[Probe] = []
        masks: list[str] = []
        where: list[dict[str, Any]] = []
        total, done = (1 + len(saved)) * (settings.steps + 1), itertools.count(1)
        with enough_threads(objective.twin, batches[0][0]):
            for name, checkpoint in [("start", None), *saved.items()]:
                if checkpoint is not None:
                    mine = {**checkpoint, "config": {**checkpoint["config"], "compile": "none"}}
                    state.load_state_dict(mine, f"the checkpoint {folder}/checkpoints/{name}.pt")
                begun, taken = state.step, list[float]()
                masks.append(mask_digest(state))
                probe = measure(
                    objective, stops(state, settings.steps, taken), decay=config.optim.weight_decay,
                    examples=settings.examples, power=settings.power, tell=lambda: tell(next(done), total),
                )  # fmt: skip
                probes.append(probe)
                where.append({"at": name, "step": begun, "lr": taken, "mask": masks[-1], **asdict(probe)})
        if next(done) <= total:  # fewer steps were left of the run than asked for
            tell(total, total)
    return {
        "format": 1, "run": label, **facts(state, env), "settings": asdict(settings),
        "images": objective.images, "all_images": len(state.data.train_x), "batches": len(objective.batches),
        "weights_sha256": weights_digest(folder),
        **evaluate(state, probes, epochs, steps, masks), "probes": where,
    }  # fmt: skip


def checkpoints(folder: Path) -> dict[str, dict[str, Any]]:
    """Those that a run keeps, by name in the order of their steps, one for each step.

    Raises:
        ValueError: there is none, or one is torn.
    """
    paths = sorted((folder / "checkpoints").glob("*.pt"), key=lambda path: (path.stem == "last", path.stem))
    by_step: dict[int, tuple[str, dict[str, Any]]] = {}
    for path in paths:
        saved = load_checkpoint(path)
        by_step[saved["step"]] = path.stem, saved
    if not by_step:
        raise ValueError(f"{folder} keeps no checkpoint to go on from (checkpoints/last.pt); train the run again")
    return {name: saved for _, (name, saved) in sorted(by_step.items())}


def fixed_batches(state: TrainState, settings: ProbeSettings) -> list[tuple[Tensor, Tensor]]:
    """Training images in random order, as the network takes them, in batches of the run's size.

    The order matters: batches of images as they are stored may be of one class each.

    Raises:
        ValueError: they do not fill two.
    """
    x, y, size = state.data.train_x, state.data.train_y, state.config.batch_size
    generator = torch.Generator().manual_seed(derive(settings.seed, "bound images"))
    rows = torch.randperm(len(x), generator=generator)[: settings.images].to(x.device)
    count = len(rows) // size
    if count < 2:
        hint = f"give --images {2 * size} or more" if len(x) >= 2 * size else "the run has too few training images"
        raise ValueError(
            f"{len(rows)} images do not fill two batches of {size}, and the variance of a batch needs two: {hint}"
        )
    parts = rows[: count * size].split(size)
    return [(state.augment(x[part]), y[part]) for part in parts]


def stops(state: TrainState, steps: int, taken: list[float]) -> Iterator[Stop]:
    """Train, and stop before each step and after the last; the learning rates used are put into `taken`.

    They are the schedule's, but at least 1 % of the largest. Steps do not go past the end of the run; at its end the
    masks stay what they are.
    """
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    if state.step >= state.n_steps:
        if state.sparsifier is not None:
            state.sparsifier.freeze()
    else:
        steps = min(steps, state.n_steps - state.step)
    batches = itertools.chain.from_iterable(itertools.repeat(state.batches))
    for step in range(steps + 1):
        yield Stop(flat(parameters), active_weights(state), partial(displacement, state))
        if step < steps:
            state.model.train()
            for group in state.optimizer.param_groups:
                group["lr"] = max(group["lr"], LEAST_RATE * state.config.lr)
            taken.append(state.optimizer.param_groups[0]["lr"])
            train_step(state, *state.mix(*next(batches)))
            state.advance()


def active_weights(state: TrainState) -> Tensor:
    """True where a weight is, flat."""
    masks = {} if state.sparsifier is None else state.sparsifier.masks
    named = [(name, p) for name, p in state.model.named_parameters() if p.requires_grad]
    return flat([masks.get(name, torch.ones_like(p, dtype=torch.bool)) for name, p in named])


def mask_digest(state: TrainState) -> str:
    """What names the masks now: equal masks have equal names."""
    return hashlib.sha256(active_weights(state).cpu().numpy().tobytes()).hexdigest()[:16]


def displacement(state: TrainState, gradient: Tensor) -> Tensor | None:
    """e of the next step: S2SAM's own; SAM's as it would be for the batch of all images; None if there is none."""
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    w = flat(parameters)
    if isinstance(state.sharpness, S2SAM):
        with state.sharpness.displaced():
            return flat(parameters) - w
    if isinstance(state.sharpness, SAM):
        scale, ws = state.sharpness.scale, [p.detach() for p in parameters]
        parts = zip(gradient.split([p.numel() for p in parameters]), parameters, strict=True)
        ds = [part.view_as(p) for part, p in parts]
        size = total_norm(ws) if scale.relative else None
        c = scale.coefficient(state.config.rho, scale.direction_norm(ds, ws), size)
        return flat(list(scale.shaped(ds, ws))) * c
    return None


def learning_rates(state: TrainState) -> Rates:
    """Of all steps of the run."""
    config, per_training = state.config, state.config.epochs * len(state.batches)
    warmup = round(config.schedule.warmup_epochs * len(state.batches))
    steps = range(per_training)
    once = [config.lr * factor(step, per_training, warmup, config.schedule) for step in steps]
    return Rates.of(once * (state.n_steps // per_training))


def weighted(records: Sequence[Mapping[str, Any]], key: str, power: int = 1) -> float | None:
    """sum lr value^power / sum lr over the records that have the value.

    >>> weighted([{"lr": 3.0, "x": 1.0}, {"lr": 1.0, "x": 5.0}, {"lr": 1.0}], "x")
    2.0
    """
    held = [(float(r["lr"]), float(r[key]) ** power) for r in records if r.get(key) is not None and r.get("lr")]
    total = sum(lr for lr, _ in held)
    return sum(lr * value for lr, value in held) / total if total > 0 else None


def evaluate(
    state: TrainState,
    probes: Sequence[Probe],
    epochs: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    masks: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Constants, terms, and the measured losses that the bounds are about; `masks` as :func:`constants` takes them."""
    found, rates = constants(probes, masks), learning_rates(state)
    seen = [length for probe in probes for length in probe.displacements if math.isfinite(length)]
    if isinstance(state.sharpness, S2SAM):
        del seen[:1]  # at the start of the run there is no direction yet
    training = state.config.epochs * len(state.batches)
    later = [r for r in steps if r.get("step", 0) % training]  # the first step of a training has no direction yet
    visits = 1
    if state.config.sharpness == "echo":
        # Records every 10th step, say, would be of first visits only: take second ones, which are half of all steps.
        visits, seen, later = 2, [e for e in seen if e > 0], [r for r in later if r.get("displacement")]
    logged = weighted(later, "displacement", 2) if isinstance(state.sharpness, S2SAM) else None
    squared = (logged if logged is not None else sum(e * e for e in seen) / len(seen) if seen else 0.0) / visits
    decay, examples = state.config.optim.weight_decay, len(state.data.train_x)
    terms = network_terms(found, rates, squared_radius=squared, decay=decay, examples=examples)
    return {
        "rates": asdict(rates),
        "squared_radius": squared,
        "radius_from": "steps" if logged is not None else "probes" if squared else "none",
        "constants": asdict(found) | {"gap": found.gap},
        "terms": {name: plain(one) for name, one in terms.items()},
        "step_condition": rates.largest * (found.smooth + decay),
        "decay_share": decay / (2 * found.smooth),
        "measured": measured(found, probes, epochs),
    }


def measured(found: Constants, probes: Sequence[Probe], epochs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """What the left sides were in this run, as far as it logged them."""
    return {
        "epochs": len(epochs),
        "tested_epochs": sum(record.get("test_loss") is not None for record in epochs),
        "test_loss": weighted(epochs, "test_loss"),
        "train_loss": weighted(epochs, "train_loss"),
        "last_loss": probes[-1].losses[0],
        "last_gradient": probes[-1].gradients[0],
        "first_gradient": probes[0].gradients[0],
    }


def facts(state: TrainState, env: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers depend on, and which assumptions the run breaks by its settings."""
    config: TrainConfig = state.config
    parameters, active = state.parameter_counts()
    return {
        "model": config.model, "method": config.method, "sparsity": state.sparsity(), "sharpness": config.sharpness,
        "rho": config.rho if config.sharpness != "none" else 0.0, "optimizer": config.optim.name,
        "momentum": config.optim.momentum if config.optim.name == "sgd" else None,
        "weight_decay": config.optim.weight_decay, "lr": config.lr, "batch_size": config.batch_size,
        "augmented": config.data_options.augment != "none" or config.data_options.mixup > 0,
        "clip_norm": config.optim.clip_norm, "classes": len(env["classes"]), "parameters": parameters,
        "active_parameters": active, "data_digest": state.data.digest, "split": "train",
    }  # fmt: skip
