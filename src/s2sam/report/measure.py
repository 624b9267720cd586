"""Step times of several arms side by side: in one process, in turn, round after round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from s2sam.train.config import TrainConfig
from s2sam.train.fast import quickest_convolutions
from s2sam.train.loop import train_step
from s2sam.train.state import TrainState, build
from s2sam.train.timing import StepTimer


def measure_rounds(
    configs: Mapping[str, TrainConfig], *, rounds: int = 15, steps: int = 20, warm_up: int = 5
) -> dict[str, list[float]]:
    """Seconds per training step, arm name -> one number per round.

    In a round every arm takes `steps` steps, starting with another arm each time, so that what disturbs the machine
    disturbs neighbours alike. With `steps` a multiple of the interval of topology updates their cost is in each round.
    Forward, backward and optimizer step are timed; data loading, learning-rate schedule and what S2SAM measures about
    itself (`stats_every`) are not.
    """
    arms = {name: _Arm(config) for name, config in configs.items()}
    order = list(arms)
    found: dict[str, list[float]] = {name: [] for name in order}
    with quickest_convolutions(arms[order[0]].state.device):  # as in training
        for arm in arms.values():
            arm.seconds(warm_up)
        for turn in range(rounds):
            start = turn % len(order)
            for name in order[start:] + order[:start]:
                found[name].append(arms[name].seconds(steps) / steps)
    return found


class _Arm:
    def __init__(self, config: TrainConfig) -> None:
        self.state: TrainState = build(replace(config, sam=replace(config.sam, stats_every=0)))
        self.state.model.train()
        self.batches = _trainings(self.state)

    def seconds(self, steps: int) -> float:
        """Take `steps` steps; the seconds they took together. On a CUDA device nothing waits before the last one."""
        timer = StepTimer(self.state.device)
        for x, y in (next(self.batches) for _ in range(steps)):
            with timer.step():
                train_step(self.state, x, y)
        timer.collect()
        return sum(timer.seconds)


def _trainings(state: TrainState) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one training after another, without end.

    Each begins with a first visit, as the radius of echo does, also if the one before had an odd number of steps.
    """
    while True:
        for _ in range(state.config.epochs):
            yield from state.batches
        state.batches.restart(state.batches.generator.get_state())
