"""A training run from its configuration to its folder: the loop, one step, one epoch, the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from s2sam.sam.single_step import S2SAM
from s2sam.track.base import Logger, Loggers
from s2sam.track.console import ConsoleLogger
from s2sam.track.files import FileLogger
from s2sam.train.checkpoint import fitting, kept_name, save_checkpoint
from s2sam.train.config import TrainConfig
from s2sam.train.divergence import absurd_loss, check_evaluation, check_losses, check_skips, diverged
from s2sam.train.environment import environment
from s2sam.train.evaluate import Meter, evaluate_split
from s2sam.train.fast import quickest_convolutions
from s2sam.train.final import beats, finish
from s2sam.train.folder import RunFolder
from s2sam.train.lock import hold
from s2sam.train.resume import find_resume, take_over
from s2sam.train.signals import Signals
from s2sam.train.state import TrainState, build
from s2sam.train.step import train_step as train_step
from s2sam.train.timing import StepTimer, Stopwatch
from s2sam.train.topology import TopologyLog

if TYPE_CHECKING:
    from rich.console import Console


def run(
    config: TrainConfig, *, console: Console | None = None, overwrite: bool = False, resume: str = "auto"
) -> dict[str, Any]:
    """Train, write the run folder `config.folder`, and return the final record.

    The folder is created after data, model and masks have been built, and holds DONE only if the run is whole. SIGTERM
    saves a checkpoint and ends the process (exit code 143), SIGUSR1 saves and goes on; both after the step under way.

    Args:
        config: what to do.
        console: a rich Console for progress; None = silence.
        overwrite: replace a finished run in that folder.
        resume: "auto" goes on with an unfinished run in the folder, bit by bit as if it had never stopped; "never"
            replaces it; a path goes on from that checkpoint or run folder.

    Raises:
        ValueError: data, options, checkpoint or folder cannot be used; the sentence says what to do.
        RuntimeError: training diverged, a checkpoint could not be written, or a pruned weight is not 0 at the end.
        Preempted: SIGTERM came (a SystemExit).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     final = run(TrainConfig(epochs=1, out=f"{folder}/run"))
        >>> round(final["sparsity"], 3), final["test_images"]
        (0.9, 359)
    """
    folder = RunFolder(config.folder)
    folder.check(overwrite)
    signals = Signals()
    with hold(folder.path), signals.listening():
        folder.check(overwrite)  # another process may have finished it before the folder was free
        found = find_resume(folder, config, resume, overwrite=overwrite)
        state = build(config, init=found is None)
        env = environment(state.device) | data_facts(state)
        loggers: list[Logger] = [FileLogger(folder.path)]
        if console is not None:
            loggers.append(ConsoleLogger(console))
        if found is not None:
            state.load_state_dict(found.saved, found.name)
        trainer = Trainer(state, Loggers(loggers), folder, signals)
        if found is not None:
            trainer.load_state_dict(found.saved, found.name)
        if found is None or found.run.resolve() != folder.path.resolve():
            folder.create(config, env, overwrite=overwrite)
        info = {
            "folder": str(folder.path), "n_steps": state.n_steps, "train_images": len(state.data.train_x),
            "test_images": len(state.data.test_x), "parameters": state.parameter_counts()[0], "env": env,
        }  # fmt: skip
        if found is not None:
            take_over(folder, found)
            notes = [*(f"passed over: {damage}" for damage in found.torn), *folder.reopen(state.step, env)]
            resumed = {"step": state.step, "path": str(found.path), "notes": notes}
            info |= {"logs": found.saved["logs"], "resumed": resumed}
        with trainer.log.tracking(config.as_dict(), info), quickest_convolutions(state.device):
            final = trainer.train()
        folder.finish()
    return final


def data_facts(state: TrainState) -> dict[str, Any]:
    """What env.json tells about the images, so that others can be normalised as the network learned it."""
    data = state.data
    return {
        "data_digest": data.digest, "data_notes": data.notes, "classes": list(data.classes),
        "mean": data.mean.tolist(), "std": data.std.tolist(),
    }  # fmt: skip


class Trainer:
    """Runs a :class:`TrainState` to its end and logs what happens."""

    def __init__(self, state: TrainState, log: Loggers, folder: RunFolder, signals: Signals | None = None) -> None:
        self.state, self.log, self.folder = state, log, folder
        self.signals = Signals() if signals is None else signals
        self.timer = StepTimer(state.device)
        self.meter = Meter(state.device, absurd_loss(state.data.num_classes))
        self.topology = None if state.sparsifier is None else TopologyLog(state.sparsifier, state.n_steps)
        self.record: dict[str, Any] = {}  #: of the last finished epoch
        self.watch = Stopwatch()  #: the training time of the epoch

    def train(self) -> dict[str, Any]:
        """All epochs, of all levels if the method has some (LT); returns the final record."""
        state = self.state
        if self.topology is not None and state.step == 0:
            self.log.scalars(self.topology.start(state.step))
        while True:
            while state.epoch < state.config.epochs:
                self.record = self.epoch()
                self.log.scalars(self.record)
                self.keep(self.record)
                self.signals.obey()
            if not state.next_level():
                break
            self.log_topology()
            self.save("last.pt")
        return finish(self.state, self.folder, self.log, self.record, self.timer.median())

    def epoch(self) -> dict[str, Any]:
        """One pass over the training images, or the rest of it, and the evaluations; returns the epoch's record.

        Its train_loss and train_top1 are those of the training forwards: augmented images, and with S2SAM displaced
        weights. Validation and test are measured at the clean weights, in eval mode and fp32.
        """
        state = self.state
        state.model.train()
        self.watch.start()
        for batch in state.batches:
            x, y = state.mix(*batch)
            with self.timer.step():
                logits, loss = train_step(state, x, y)
            self.after_step(logits, y, loss)
            due = state.config.checkpoint_every and state.step % state.config.checkpoint_every == 0
            if due or self.signals.pending:
                self.save("last.pt")
                self.signals.obey()
        self.timer.collect()
        train_loss, train_top1, bad, absurd = self.meter.read()
        seconds = self.watch.pause()
        check_losses(state, bad, absurd)
        images = min(len(state.batches) * state.config.batch_size, len(state.data.train_x))
        finished = state.epoch + 1
        measured = finished % state.config.evaluate_every == 0 or finished == state.config.epochs
        (val_loss, val_top1), (test_loss, test_top1) = (
            evaluate_split(state.model, state.data, split, state.augment) if measured else (None, None)
            for split in ("val", "test")
        )
        check_evaluation(state, "validation", val_loss)
        check_evaluation(state, "test", test_loss)
        state.epoch += 1
        record = {
            "kind": "epoch", "epoch": state.epoch, "step": state.step,
            "train_loss": train_loss, "train_top1": train_top1, "val_loss": val_loss, "val_top1": val_top1,
            "test_loss": test_loss, "test_top1": test_top1,
            "lr": self.last_lr(), "sparsity": state.sparsity(), "seconds": seconds,
            "images_per_second": images / seconds,
        }  # fmt: skip
        if state.level is not None:
            record |= {"kind": "level", "level": state.level}
        if state.ema is not None:  # every epoch has the same keys: they are the columns of summary.csv
            network = state.ema.module
            for split in ("val", "test"):
                top1 = evaluate_split(network, state.data, split, state.augment)[1] if measured else None
                record[f"ema_{split}_top1"] = top1
        self.watch.seconds = 0.0
        self.meter.totals.zero_()
        return record

    def after_step(self, logits: Tensor, y: Tensor, loss: Tensor) -> None:
        """Count and log the step that was just taken, and let everything that follows steps follow it."""
        state, every = self.state, self.state.config.sam.stats_every
        self.meter.add(logits, y, loss)
        if state.skipped is not None:
            state.skipped.count(in_row=not state.first_visit)
            check_skips(state)
        sam = state.sharpness
        if sam.measures(state.step) if isinstance(sam, S2SAM) else every and state.step % every == 0:
            self.log.scalars(self.step_record(float(loss)))
        state.advance()
        self.log_topology()

    def log_topology(self) -> None:
        """If the masks have changed, the averaged weights follow; and a record of it, if it is due."""
        log, ema = self.topology, self.state.ema
        if log is not None and log.changed() and ema is not None:
            log.sparsifier.apply_to(ema.module)
        record = None if log is None else log.record(self.state.step)
        if record is not None:
            self.log.scalars(record)

    def step_record(self, loss: float) -> dict[str, Any]:
        """The record of the step that was just taken, with what S2SAM measured in it."""
        state = self.state
        if not math.isfinite(loss) and state.skipped is None:
            raise diverged(state, f"the loss is {loss}")
        lr = state.optimizer.param_groups[0]["lr"]
        record = {"kind": "step", "step": state.step, "epoch": state.epoch + 1, "loss": loss, "lr": lr}
        if isinstance(state.sharpness, S2SAM):
            record |= {k: v for k, v in state.sharpness.stats.items() if k != "step" and math.isfinite(v)}
        if state.skipped is not None:
            record["skipped"] = int(state.skipped.total)
        return record

    def last_lr(self) -> float:
        """The learning rate of the step that was taken last."""
        factor = self.state.scheduler.lr_lambdas[0](self.state.scheduler.last_epoch - 1)
        return float(self.state.scheduler.base_lrs[0] * factor)

    def keep(self, record: dict[str, Any]) -> None:
        """Write last.pt, and best.pt if this epoch validates best among those at the highest sparsity so far.

        Epochs that were not measured (`evaluate_every`) are no candidates. What `keep_every` wants stays as well.
        """
        measured = record["test_top1"] is not None
        if measured and (record["val_top1"] is None or beats(record, self.state.best)):
            self.state.best = {name: record[name] for name in ("epoch", "val_top1", "test_top1", "sparsity")}
            self.save("best.pt")
        for name in (*kept_name(self.state.epoch, self.state.step, self.state.config.keep_every), "last.pt"):
            self.save(name)

    def save(self, name: str) -> None:
        """Write a checkpoint; its time is not the epoch's."""
        with self.watch.stopped():
            save_checkpoint(self.folder.checkpoints / name, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The run's state, what the epoch has gathered so far, and how long the logs are now."""
        return self.state.state_dict() | {
            "meter": self.meter.totals, "seconds": self.watch.seconds, "step_seconds": self.timer.state_dict(),
            "record": self.record, "logs": self.log.position(),
        }  # fmt: skip

    def load_state_dict(self, saved: Mapping[str, Any], name: str = "this checkpoint") -> None:
        """Take back what :meth:`state_dict` holds besides the run's state, which is loaded already."""
        with fitting(name):
            self.meter.load_state_dict(saved["meter"])
            self.timer.load_state_dict(saved["step_seconds"])
        self.watch.seconds, self.record = saved["seconds"], saved["record"]
