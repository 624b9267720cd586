"""What a person sees: plain lines without a terminal, a bar with one."""

from __future__ import annotations

import io

from rich.console import Console

from s2sam.track.console import ConsoleLogger
from s2sam.train import TrainConfig

CONFIG = TrainConfig(epochs=10).as_dict()
INFO = {"n_steps": 20, "parameters": 85514, "train_images": 1294, "test_images": 359, "folder": "runs/x"}
EPOCH = {
    "kind": "epoch", "epoch": 2, "step": 4, "train_loss": 0.51234, "train_top1": 0.9, "val_top1": None,
    "test_top1": 0.875, "lr": 0.05, "sparsity": 0.9, "seconds": 1.23,
}  # fmt: skip
FINAL = {"kind": "final", "test_top1": 0.875, "test_images": 359, "sparsity": 0.9, "step_seconds": 0.002}


def drive(console):
    logger = ConsoleLogger(console)
    logger.start(CONFIG, INFO)
    logger.scalars({"kind": "step", "step": 2, "loss": 1.0})
    logger.scalars({"kind": "topology", "step": 2})
    logger.scalars(EPOCH)
    logger.scalars(FINAL)
    logger.close()
    logger.close()
    return console.file.getvalue()


def test_plain_lines_without_a_terminal():
    lines = drive(Console(file=io.StringIO(), width=40)).splitlines()
    assert lines == [
        "digits, mlp (85,514 parameters), rigl 90 %, sgd + s2sam (rho 0.05), 10 epochs of 1,294 images, seed 0 "
        "-> runs/x",
        "epoch  2/10  train 0.5123  90.00 %  val      -   test  87.50 %  sparsity  90.00 %  lr 5.00e-02  1.23 s",
        "test accuracy 87.50 % of 359 images, last epoch; sparsity 90.00 %; 2.00 ms a step",
    ]


def test_a_bar_on_a_terminal_that_goes_away():
    text = drive(Console(file=io.StringIO(), width=200, force_terminal=True))
    assert "4/20" in text
    assert "87.50 %" in text
    assert text.rstrip().endswith("a step")


def test_brackets_in_names_are_no_markup():
    console = Console(file=io.StringIO(), width=300)
    ConsoleLogger(console).start({**CONFIG, "data": "a[red]b", "method": "dense", "sharpness": "none"}, INFO)
    assert console.file.getvalue().startswith("a[red]b, mlp (85,514 parameters), dense, sgd, 10 epochs")
