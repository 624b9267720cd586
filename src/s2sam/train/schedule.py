"""The learning rate of a step, as a factor on the configured one."""

from __future__ import annotations

import math

import torch

from s2sam.train.config import ScheduleConfig


def factor(step: int, total: int, warmup: int = 0, name: str = "cosine", final: float = 0.0) -> float:
    """lr_t / lr for step t = 0 .. total - 1.

    Warm-up: (t + 1) / (warmup + 1). Then final + (1 - final) (1 + cos(pi u)) / 2, u = (t - warmup) / (total - warmup).

    >>> [round(factor(t, 4), 3) for t in range(4)], factor(0, 4, warmup=1)
    ([1.0, 0.854, 0.5, 0.146], 0.5)
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if name == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, total: int, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A torch scheduler that follows :func:`factor`, to be stepped after every optimizer step."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor(step, total, warmup, config.name, config.final)
    )
