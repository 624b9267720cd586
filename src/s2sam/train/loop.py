"""A training run from its configuration to its folder: the loop, one step, one epoch, the end."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from s2sam.sam.single_step import S2SAM
from s2sam.sam.two_step import SAM
from s2sam.track.base import Logger, Loggers
from s2sam.track.console import ConsoleLogger
from s2sam.track.files import FileLogger
from s2sam.train.checkpoint import save_checkpoint
from s2sam.train.config import TrainConfig
from s2sam.train.environment import environment
from s2sam.train.evaluate import Meter, evaluate
from s2sam.train.folder import RunFolder
from s2sam.train.state import TrainState, build
from s2sam.train.timing import StepTimer
from s2sam.train.topology import TopologyLog

if TYPE_CHECKING:
    from rich.console import Console

SAME_SPARSITY = 1e-3  #: epochs whose sparsity differs by less compete for "best"


def run(config: TrainConfig, *, console: Console | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Train, write the run folder `config.folder`, and return the final record.

    The folder is created after data, model and masks have been built, and holds DONE only if the run is whole.

    Args:
        config: what to do.
        console: a rich Console for progress; None = silence.
        overwrite: replace a finished run in that folder.

    Raises:
        ValueError: data, options or the folder cannot be used; the sentence says what to do.
        RuntimeError: training diverged, or a pruned weight is not 0 at the end.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     final = run(TrainConfig(epochs=1, out=f"{folder}/run"))
        >>> round(final["sparsity"], 3), final["test_images"]
        (0.9, 359)
    """
    folder = RunFolder(config.folder)
    folder.check(overwrite)
    state = build(config)
    env = environment(state.device) | {"data_digest": state.data.digest, "data_notes": state.data.notes}
    folder.create(config, env, overwrite=overwrite)
    loggers: list[Logger] = [FileLogger(folder.path)]
    if console is not None:
        loggers.append(ConsoleLogger(console))
    info = {
        "folder": str(folder.path), "n_steps": state.n_steps, "train_images": len(state.data.train_x),
        "test_images": len(state.data.test_x), "parameters": state.parameter_counts()[0], "env": env,
    }  # fmt: skip
    with Loggers(loggers).tracking(config.as_dict(), info) as log:
        final = Trainer(state, log, folder).train()
    folder.finish()
    return final


class Trainer:
    """Runs a :class:`TrainState` to its end and logs what happens."""

    def __init__(self, state: TrainState, log: Loggers, folder: RunFolder) -> None:
        self.state, self.log, self.folder = state, log, folder
        self.timer = StepTimer(state.device)
        self.topology = None if state.sparsifier is None else TopologyLog(state.sparsifier)

    def train(self) -> dict[str, Any]:
        """All epochs; returns the final record."""
        state = self.state
        if self.topology is not None:
            self.log.scalars(self.topology.start(state.step))
        record: dict[str, Any] = {}
        while state.epoch < state.config.epochs:
            record = self.epoch()
            self.log.scalars(record)
            self.keep(record)
        return self.finish(record)

    def epoch(self) -> dict[str, Any]:
        """One pass over the training images and the two evaluations; returns the epoch's record.

        Its train_loss and train_top1 are those of the training forwards: augmented images, and with S2SAM displaced
        weights. Validation and test are measured at the clean weights, in eval mode.
        """
        state, meter = self.state, Meter(self.state.device)
        state.model.train()
        start, first, every = time.perf_counter(), state.step, state.config.sam.stats_every
        for x, y in state.batches:
            with self.timer.step():
                logits, loss = train_step(state, x, y)
            meter.add(logits, y, loss)
            if every and state.step % every == 0:
                self.log.scalars(self.step_record(float(loss)))
            state.step += 1
            state.scheduler.step()
            change = None if self.topology is None else self.topology.change(state.step)
            if change is not None:
                self.log.scalars(change)
        self.timer.collect()
        train_loss, train_top1, bad = meter.read()
        seconds = time.perf_counter() - start
        if bad and (state.sharpness is None or bad == state.step - first):
            self.diverged(math.nan)
        state.epoch += 1
        images = min((state.step - first) * state.config.batch_size, len(state.data.train_x))
        val_loss, val_top1 = self.measure("val")
        test_loss, test_top1 = self.measure("test")
        return {
            "kind": "epoch", "epoch": state.epoch, "step": state.step,
            "train_loss": train_loss, "train_top1": train_top1, "val_loss": val_loss, "val_top1": val_top1,
            "test_loss": test_loss, "test_top1": test_top1,
            "lr": self.last_lr(), "sparsity": state.sparsity(), "seconds": seconds,
            "images_per_second": images / seconds,
        }  # fmt: skip

    def step_record(self, loss: float) -> dict[str, Any]:
        """The record of the step that was just taken, with what S2SAM measured in it."""
        state = self.state
        if not math.isfinite(loss) and state.sharpness is None:
            self.diverged(loss)
        lr = state.optimizer.param_groups[0]["lr"]
        record = {"kind": "step", "step": state.step, "epoch": state.epoch + 1, "loss": loss, "lr": lr}
        if isinstance(state.sharpness, S2SAM):
            record |= {k: v for k, v in state.sharpness.stats.items() if k != "step" and math.isfinite(v)}
        return record

    def measure(self, split: str) -> tuple[float | None, float | None]:
        """Loss and accuracy on a split, at the clean weights."""
        x, y = self.state.data.split(split)
        device = self.state.device
        return evaluate(self.state.model, x.to(device), y.to(device), self.state.augment)

    def last_lr(self) -> float:
        """The learning rate of the step that was taken last."""
        factor = self.state.scheduler.lr_lambdas[0](self.state.step - 1)
        return float(self.state.scheduler.base_lrs[0] * factor)

    def keep(self, record: dict[str, Any]) -> None:
        """Write last.pt, and best.pt if this epoch validates best among those at the highest sparsity so far."""
        state = self.state
        names = ("epoch", "val_top1", "test_top1", "sparsity")
        if record["val_top1"] is None or beats(record, state.best):
            state.best = {name: record[name] for name in names}
            save_checkpoint(self.folder.checkpoints / "best.pt", state.state_dict())
        save_checkpoint(self.folder.checkpoints / "last.pt", state.state_dict())

    def finish(self, record: dict[str, Any]) -> dict[str, Any]:
        """Write the final weights and masks, log and return the final record."""
        state = self.state
        assert state.best is not None
        paths: list[Path] = [self.folder.save_tensors("model.safetensors", state.model.state_dict())]
        if state.sparsifier is not None:
            state.sparsifier.verify()
            paths.append(self.folder.save_tensors("masks.safetensors", state.sparsifier.masks))
        parameters, active = state.parameter_counts()
        final = {
            "kind": "final", "test_top1": record["test_top1"], "test_loss": record["test_loss"],
            "val_top1": record["val_top1"], "best_epoch": state.best["epoch"], "best_val_top1": state.best["val_top1"],
            "best_test_top1": state.best["test_top1"], "sparsity": record["sparsity"], "parameters": parameters,
            "active_parameters": active, "step_seconds": self.timer.median(), "train_images": len(state.data.train_x),
            "test_images": len(state.data.test_x), "n_steps": state.step, "data_digest": state.data.digest,
        }  # fmt: skip
        self.log.scalars(final)
        for path in paths:
            self.log.artifact(path)
        return final

    def diverged(self, loss: float) -> None:
        """Raise RuntimeError: going on would only train NaN."""
        state = self.state
        raise RuntimeError(
            f"training diverged: the loss is {loss} at step {state.step} (epoch {state.epoch + 1}); lower --lr (now "
            f"{state.config.lr:g}) or give it a warm-up with --schedule.warmup-epochs"
        )


def train_step(state: TrainState, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """One optimizer step on one batch; returns (logits, loss) of its first forward. Afterwards the weights are clean.

    S2SAM acts through hooks, so the plain loop is all there is; SAM calls the closure twice.
    """
    first: list[tuple[Tensor, Tensor]] = []

    def closure() -> Tensor:
        logits = state.model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        if not first:
            first.append((logits.detach(), loss.detach()))
        return loss

    if isinstance(state.sharpness, SAM):
        state.optimizer.step(closure)  # type: ignore[arg-type]
    else:
        closure()
        state.optimizer.step()
    if isinstance(state.sharpness, S2SAM):
        state.sharpness.restore()
    state.optimizer.zero_grad()
    return first[0]


def beats(record: dict[str, Any], best: dict[str, Any] | None) -> bool:
    """True if an epoch is the new best: sparser than the best so far, or as sparse and better on validation images."""
    if best is None or record["sparsity"] > best["sparsity"] + SAME_SPARSITY:
        return True
    return bool(record["sparsity"] > best["sparsity"] - SAME_SPARSITY and record["val_top1"] > best["val_top1"])
