"""When a run is given up: its losses, or gradients that are never finite, say that it will not come back.

A run stops with one sentence and without DONE

- at the next step record or the end of the epoch, if a loss is not finite and nothing skips such a step;
- after an epoch, if the validation or test loss is not finite;
- after an epoch in which more than half of the losses are absurd: not finite, or above 1000 ln(classes). Guessing has
  the loss ln(classes), so that a mean above 1000 times that means that wrong logits lead by thousands. What goes up for
  a few steps only (a warm-up that is too short, one broken batch) is not in half of an epoch;
- if no step has moved the weights for a whole epoch (at most 100 steps), because gradients were not finite and S2SAM or
  SAM skipped the step: these weights have then met about all images, and will meet them again. With the loss scale of
  fp16 it takes 100 steps in a row whatever the epoch: each skipped one halves the scale, from 2^16 at first, and long
  before 2^-84 every finite gradient is 0 in fp16. The few skips by which the scale finds its value never come near.

With echo only second visits count for the last of these: first visits are not displaced, and could go on alone.

A bad but finite result is a result: a network that has settled at guessing finishes its run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from s2sam.hooks import Phase, StepContext, step_hooks

if TYPE_CHECKING:
    from s2sam.train.state import TrainState

PATIENCE = 100  #: skipped steps in a row, at most
ABSURD = 1000.0  #: times the loss of a uniform guess


class SkippedSteps:
    """Counts the steps that left the weights as they were, whoever skipped them: S2SAM, SAM or a GradScaler.

    A hook on the optimizer notes that a step was taken; a GradScaler that meets an overflow does not call the optimizer
    at all. `total` and `row` (in a row, up to now) are numbers, or 0-dim tensors if the optimizer is told on the device
    what to skip (fused): nobody waits for the device until they are read. Cost: two tiny kernels a step there.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.total: int | Tensor = 0
        self.row: int | Tensor = 0
        self._skipped: int | Tensor = 1
        step_hooks(optimizer).register(Phase.DIRECTION, self._after_step)

    def _after_step(self, context: StepContext) -> None:
        self._skipped = int(context.skip) if context.skip or context.found_inf is None else context.found_inf.clone()

    def count(self, *, in_row: bool = True) -> None:
        """To be called after every step, taken or not; `in_row`: whether it counts for `row`."""
        if in_row:
            self.row = (self.row + 1) * self._skipped
        self.total = self.total + self._skipped
        self._skipped = 1


def absurd_loss(classes: int) -> float:
    """The loss above which a network does worse than 1000 guesses.

    >>> round(absurd_loss(10), 1)
    2302.6
    """
    return ABSURD * math.log(max(classes, 2))


def check_skips(state: TrainState) -> None:
    """After a step: raise RuntimeError if none has moved the weights for too long.

    What a fused optimizer skips is known on the device only, and looked at once in so many steps.
    """
    assert state.skipped is not None
    limit = PATIENCE if state.scaler.is_enabled() else min(PATIENCE, len(state.batches))
    if isinstance(state.skipped.row, Tensor) and (state.step + 1) % limit:
        return
    if state.skipped.row >= limit:
        which = "displaced steps" if state.config.sharpness == "echo" else "steps"
        raise diverged(state, f"no gradient was finite in the last {limit} {which}, none of which moved the weights,")


def check_losses(state: TrainState, bad: int, absurd: int) -> None:
    """After the last step of an epoch, of whose losses `bad` are not finite and `absurd` are absurd: raise as above."""
    steps = len(state.batches)
    if bad and state.skipped is None:
        raise diverged(state, "the loss is nan")
    if 2 * absurd > steps:
        raise diverged(state, f"{absurd} of {steps} losses are not finite or above {ABSURD:.0f} times that of a guess")


def check_evaluation(state: TrainState, split: str, loss: float | None) -> None:
    """Raise RuntimeError if the loss at the clean weights is not finite; None is a split without images."""
    if loss is not None and not math.isfinite(loss):
        raise diverged(state, f"the {split} loss is {loss}")


def diverged(state: TrainState, what: str) -> RuntimeError:
    """The sentence that ends a run; it names what can be too large, the radius too if there is one."""
    config = state.config
    radius = config.sharpness != "none" and config.rho > 0
    or_rho = f", lower --rho (now {config.rho:g}, sharpness {config.sharpness})," if radius else ""
    return RuntimeError(
        f"training diverged: {what} at step {state.step} (epoch {state.epoch + 1}); lower --lr (now "
        f"{config.lr:g}){or_rho} or give it a warm-up with --schedule.warmup-epochs"
    )
