"""The learning rate of a step, as a factor on the configured one."""

from __future__ import annotations

import math

import torch

from s2sam.train.config import ScheduleConfig

COSINE = ScheduleConfig()
RISE, FALL = 25.0, 25.0e4  #: lr over the first and over the last learning rate of onecycle


def factor(step: int, total: int, warmup: int = 0, config: ScheduleConfig = COSINE) -> float:
    """lr_t / lr for step t = 0 .. total - 1.

    Warm-up: (t + 1) / (warmup + 1). Then, with u = (t - warmup) / (total - warmup):

        cosine      final + (1 - final) (1 + cos(pi u)) / 2
        step        gamma^k, k = milestones (shares of the whole run) that t / total has reached
        onecycle    as torch's OneCycleLR with its defaults, momentum not cycled: from 1/25 up to 1 at the share `rise`
                    of the run and down to 1/250000, along half cosines
        constant    1

    >>> [round(factor(t, 4), 3) for t in range(4)], factor(0, 4, warmup=1)
    ([1.0, 0.854, 0.5, 0.146], 0.5)
    >>> [round(factor(t, 4, config=ScheduleConfig(name="step")), 3) for t in range(4)]
    [1.0, 1.0, 0.1, 0.01]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.name == "constant":
        return 1.0
    if config.name == "step":
        return float(config.gamma ** sum(step >= round(m * total) for m in config.milestones))
    if config.name == "onecycle":
        peak, last = config.rise * total - 1, total - 1
        if step <= peak:
            return half_cosine(1 / RISE, 1.0, step / peak if peak > 0 else 1.0)
        return half_cosine(1.0, 1 / FALL, min(1.0, (step - peak) / (last - peak)))
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return half_cosine(1.0, config.final, done)


def half_cosine(start: float, end: float, done: float) -> float:
    """From `start` (done = 0) to `end` (done = 1)."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def make_scheduler(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, total: int, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A torch scheduler that follows :func:`factor`, to be stepped after every optimizer step."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, total, warmup, config))
