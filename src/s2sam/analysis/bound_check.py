"""One measured number and where it has to lie."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from s2sam.analysis.bound import Terms

ERRORS = 4.0  #: standard errors that a Monte-Carlo mean may be on the wrong side of its limit


@dataclass(frozen=True)
class Check:
    """A claim holds if `low` - 4 errors <= measured <= `high` + 4 errors, a control if not.

    A control is an experiment in which an assumption is broken on purpose: it must end beyond the limit and its error.
    """

    experiment: str
    setting: str
    measured: float
    high: float = math.inf
    low: float = -math.inf
    error: float = 0.0  #: standard error of `measured`; 0 = exact
    control: bool = False
    terms: Terms | None = None  #: what `high` is the sum of
    unit: str = ""  #: "loss", "slope", "curvature"

    @property
    def holds(self) -> bool:
        """True if the measured number is where it has to be."""
        slack = ERRORS * self.error
        within = self.low - slack <= self.measured <= self.high + slack
        return math.isfinite(self.measured) and within != self.control

    @property
    def limit(self) -> str:
        """The claim in symbols.

        >>> Check("slope", "", 2.01, low=1.9, high=2.1).limit, Check("a", "", 1.0, high=2.0, control=True).limit
        ('1.9 to 2.1', 'above 2')
        """
        if self.control:
            return f"above {self.high:.4g}"
        if math.isinf(self.low):
            return f"<= {self.high:.4g}"
        return f"{self.low:.4g} to {self.high:.4g}"


def mean_and_error(per_replica: Tensor) -> tuple[float, float]:
    """Mean over independent replicas and its standard error (0 if there is one replica).

    >>> mean_and_error(torch.tensor([1.0, 3.0]))
    (2.0, 1.0)
    """
    n = len(per_replica)
    error = float(per_replica.std() / math.sqrt(n)) if n > 1 else 0.0
    return float(per_replica.mean()), error


def slope(x: list[float], y: list[float]) -> float:
    """Slope of the least-squares line through (log x, log y).

    >>> round(slope([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]), 6)
    2.0
    """
    a, b = torch.tensor(x, dtype=torch.float64).log(), torch.tensor(y, dtype=torch.float64).log()
    a = a - a.mean()
    return float((a * b).sum() / (a * a).sum())
