"""Numbers that change with the step: frozen dataclasses, called with the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """The same value at every step.

    >>> Constant(0.3)(1000)
    0.3
    """

    value: float

    def __call__(self, step: int) -> float:
        """The value at `step`."""
        return self.value


@dataclass(frozen=True)
class Cubic:
    """s_t = s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))^3: the sparsity of gradual pruning, fast at first.

    s_i up to t0, exactly s_f from t1 on (Zhu and Gupta 2017, arXiv:1710.01878).

    >>> [round(Cubic(0.0, 0.8, start=0, end=10)(t), 6) for t in (0, 5, 10, 99)]
    [0.0, 0.7, 0.8, 0.8]

    Raises:
        ValueError: `end` is not after `start`.
    """

    initial: float
    final: float
    start: int
    end: int

    def __post_init__(self) -> None:
        if not self.end > self.start:
            raise ValueError(f"a cubic schedule must end after it starts, got start {self.start} and end {self.end}")

    def __call__(self, step: int) -> float:
        """The value at `step`."""
        if step <= self.start or step >= self.end:
            return self.initial if step <= self.start else self.final
        left = 1 - (step - self.start) / (self.end - self.start)
        return self.final + (self.initial - self.final) * left**3


@dataclass(frozen=True)
class CosineDrop:
    """f_t = f_end + (alpha - f_end) / 2 (1 + cos(pi t / T_end)): the share of weights to drop, f_end from T_end on.

    With f_end = 0 it is RigL's (arXiv:1911.11134); ITOP and GraNet end at 0.005.

    >>> [round(CosineDrop(0.3, 100)(t), 6) for t in (0, 50, 100, 101)]
    [0.3, 0.15, 0.0, 0.0]
    >>> [round(CosineDrop(0.5, 100, end=0.1)(t), 6) for t in (0, 50, 100)]
    [0.5, 0.3, 0.1]

    Raises:
        ValueError: `t_end` is not positive.
    """

    alpha: float
    t_end: float
    end: float = 0.0

    def __post_init__(self) -> None:
        if not self.t_end > 0:
            raise ValueError(f"the cosine must end after step 0, got t_end {self.t_end}")

    def __call__(self, step: int) -> float:
        """The value at `step`."""
        if step >= self.t_end:
            return self.end
        return self.end + (self.alpha - self.end) / 2 * (1 + math.cos(math.pi * step / self.t_end))
