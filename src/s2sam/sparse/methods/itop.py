"""RigL-ITOP and SET-ITOP: fewer, larger exchanges until the end, so that more weights get a turn (arXiv:2102.02887)."""

from __future__ import annotations

from dataclasses import dataclass

from s2sam.hooks import check_number
from s2sam.sparse.drop_grow import DropGrow, GrowByGradient, check_annealed
from s2sam.sparse.methods.rigl import RigL, RigLOptions
from s2sam.sparse.methods.set import SET, SETOptions
from s2sam.sparse.schedules import CosineDrop


@dataclass(frozen=True)
class SETITOPOptions(SETOptions):
    """As SET's, with a cosine from `drop_fraction` to `drop_end` at `t_end`, the end of the training."""

    drop_fraction: float = 0.5
    delta_t: int = 1500
    t_end: float | None = 1.0
    drop_end: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        check_annealed(self.t_end)
        check_number("drop_end", self.drop_end, 0.0, 1.0)


@dataclass(frozen=True)
class RigLITOPOptions(RigLOptions):
    """As RigL's, with a cosine from `drop_fraction` to `drop_end` at `t_end`, the end of the training."""

    drop_fraction: float = 0.5
    delta_t: int = 4000
    t_end: float | None = 1.0
    drop_end: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("drop_end", self.drop_end, 0.0, 1.0)


class InTime(DropGrow):
    """The share of both: f_t = f_end + (f - f_end) / 2 (1 + cos(pi t / T))."""

    options: SETITOPOptions | RigLITOPOptions

    def drop_fraction(self, t: int) -> float:
        """The cosine, which does not reach 0."""
        return CosineDrop(self.options.drop_fraction, self.last_step, self.options.drop_end)(t)


class SETITOP(InTime, SET):
    """SET every 1500 steps until the end of the training, with half of the weights exchanged at first.

    What it is about is `explored()`, R_s = (weights active at some time) / (all weights): 1 - s at the start, and the
    nearer to 1 at the end, the nearer to dense training (Liu et al. 2021). What was just dropped is not drawn at once.

    Differs from Shiweiliuiiiiiii/In-Time-Over-Parameterization:sparselearning/core.py in its exact counts (there each
    position is drawn with a probability, and what was just dropped may come back).

    Defaults are for CIFAR (batch 128, 250 epochs). ImageNet: delta_t=4000. Cost: as SET.

    Raises:
        ValueError: no total_steps.
    """

    method = "set-itop"
    Options = SETITOPOptions
    options: SETITOPOptions


class RigLITOP(InTime, GrowByGradient, RigL):
    """RigL every 4000 steps until the end of the training, after the step instead of in place of it.

    The gradients are those of the step, seen before those of pruned weights become 0. R_s as in :class:`SETITOP`.
    Differs from Shiweiliuiiiiiii/In-Time-Over-Parameterization:sparselearning/core.py in exact counts where scores tie.

    Defaults are for CIFAR and for ImageNet (batch 64, 100 epochs). Cost: as RigL.

    Raises:
        ValueError: no total_steps.
    """

    method = "rigl-itop"
    placement = "after"
    Options = RigLITOPOptions
    options: RigLITOPOptions
