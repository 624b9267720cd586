"""What a person sees of a run: a progress bar with one line an epoch on a terminal, plain lines elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2sam.track.base import Record

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class ConsoleLogger:
    """Writes to a rich Console. The bar moves with the step records; without a terminal there is none."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._epochs = 0

    def start(self, config: Record, info: Record) -> None:
        """One line about the run, and the bar."""
        self._epochs = int(config["epochs"])
        self._say(headline(config, info))
        resumed = info.get("resumed")
        if resumed is not None:
            for note in resumed["notes"]:
                self._say(note)
            self._say(f"going on after step {resumed['step']:,} of {info['n_steps']:,}, from {resumed['path']}")
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self.console, transient=True)
            self._task = self._progress.add_task(
                "steps", total=info["n_steps"], completed=0 if resumed is None else resumed["step"]
            )
            self._progress.start()

    def scalars(self, record: Record) -> None:
        """Move the bar; write a line for an epoch and for the end."""
        if self._progress is not None and self._task is not None and record["kind"] in ("step", "epoch", "level"):
            self._progress.update(self._task, completed=record["step"])
        if record["kind"] in ("epoch", "level"):
            self._say(epoch_line(record, self._epochs))
        elif record["kind"] == "final":
            self._stop()
            self._say(final_line(record))

    def artifact(self, path: Path) -> None:
        """Files are named once, in the headline's folder."""

    def close(self) -> None:
        """Take the bar away."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def headline(config: Record, info: Record) -> str:
    """The run in one line."""
    sparse = "dense" if config["method"] == "dense" else f"{config['method']} {100 * config['sparsity']:g} %"
    sharpness = "" if config["sharpness"] == "none" else f" + {config['sharpness']} (rho {config['rho']:g})"
    return (
        f"{config['data']}, {config['model']} ({info['parameters']:,} parameters), {sparse}, "
        f"{config['optim']['name']}{sharpness}, "
        f"{config['epochs']} epochs of {info['train_images']:,} images, seed {config['seed']} -> {info['folder']}"
    )


def epoch_line(record: Record, epochs: int) -> str:
    """An epoch in one line of fixed columns."""
    count = f"{record['epoch']:>{len(str(epochs))}}/{epochs}"
    level = f"level {record['level']}  " if "level" in record else ""
    return (
        f"{level}epoch {count}  train {_loss(record['train_loss'])} {_share(record['train_top1'])}"
        f"  val {_share(record['val_top1'])}  test {_share(record['test_top1'])}  sparsity {_share(record['sparsity'])}"
        f"  lr {record['lr']:.2e}  {record['seconds']:.2f} s"
    )


def final_line(record: Record) -> str:
    """The result: the last epoch's test accuracy, and on how many images."""
    return (
        f"test accuracy {_share(record['test_top1']).strip()} of {record['test_images']:,} images, last epoch; "
        f"sparsity {_share(record['sparsity']).strip()}; {1000 * record['step_seconds']:.2f} ms a step"
    )


def _share(value: Any) -> str:
    return f"{100 * value:6.2f} %" if value is not None and value == value else "     - "


def _loss(value: Any) -> str:
    return f"{value:.4f}" if value is not None and value == value else "-"
