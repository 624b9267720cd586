r"""Problems whose L, mu, sigma^2 and minimum are known in closed form: where a bound can be checked exactly.

Weights are float64, shape (R, d): R independent replicas, so that one pass gives a Monte-Carlo mean and its error.
A step draws a `sample` of the data for each replica; `sample_gradient(x, sample)` is its gradient at any point, so
that a method can look twice at the same batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Problem(Protocol):
    """What the experiments need to know."""

    @property
    def smooth(self) -> float:
        """L."""

    @property
    def pl(self) -> float:
        """mu."""

    @property
    def minimum(self) -> float:
        """F*."""

    def loss(self, w: Tensor) -> Tensor:
        """F(w), shape (R,)."""

    def gradient(self, w: Tensor) -> Tensor:
        """Gradient of F, shape (R, d)."""

    def draw(self, replicas: int, generator: torch.Generator) -> Tensor:
        """One independent batch for each replica."""

    def sample_gradient(self, x: Tensor, sample: Tensor) -> Tensor:
        """Gradient of that batch at x, shape (R, d)."""

    def variance(self, x: Tensor) -> Tensor:
        """E||sample_gradient(x) - gradient(x)||^2, exactly, shape (R,)."""

    def lipschitz(self, *, radius: float) -> float:
        """B on the ball of that radius around a minimiser: the largest gradient of an example there."""


@dataclass(frozen=True)
class Quadratic:
    r"""F(w) = (1/2) sum_i h_i w_i^2 with normal gradient noise; PL although some h_i may be 0.

    L = max h, mu = the smallest h above 0, F* = 0, sigma^2 = E||xi||^2, spread evenly over the coordinates;
    without noise B = L r within r of the minimum at 0.

    Raises:
        ValueError: a curvature is negative or none is above 0.

    Example:
        >>> q = Quadratic(torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64), sigma=0.1)
        >>> q.smooth, q.pl, q.loss(torch.ones(1, 3, dtype=torch.float64)).item()
        (2.0, 0.5, 1.25)
    """

    curvatures: Tensor
    sigma: float = 0.0
    smooth: float = field(init=False)
    pl: float = field(init=False)
    minimum: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        h = self.curvatures
        if bool((h < 0).any()) or not bool((h > 0).any()):
            raise ValueError("curvatures must be >= 0, and at least one above 0")
        object.__setattr__(self, "smooth", float(h.max()))
        object.__setattr__(self, "pl", float(h[h > 0].min()))

    def loss(self, w: Tensor) -> Tensor:
        """F(w)."""
        return 0.5 * (self.curvatures * w * w).sum(1)

    def gradient(self, w: Tensor) -> Tensor:
        """Of F."""
        return self.curvatures * w

    def draw(self, replicas: int, generator: torch.Generator) -> Tensor:
        """The noise itself."""
        d = len(self.curvatures)
        noise = torch.randn(replicas, d, dtype=self.curvatures.dtype, generator=generator)
        return noise * (self.sigma / math.sqrt(d))

    def sample_gradient(self, x: Tensor, sample: Tensor) -> Tensor:
        """H x + xi."""
        return self.gradient(x) + sample

    def variance(self, x: Tensor) -> Tensor:
        """sigma^2, everywhere."""
        return torch.full((len(x),), self.sigma**2, dtype=x.dtype)

    def lipschitz(self, *, radius: float) -> float:
        """L r, reached along the steepest weight; inf with noise, which has no largest draw."""
        return math.inf if self.sigma > 0 else self.smooth * radius


@dataclass(frozen=True)
class SineParabola:
    r"""F(w) = w^2 + 3 sin^2 w, one weight: not convex, yet PL; with normal gradient noise of variance sigma^2.

    L = 8, the maximum of |2 + 6 cos 2w|. mu = 0.1755 is inf F'^2 / (2F), reached near |w| = 2.20, rounded down; the
    value usually quoted is 1/32.

    Source: Karimi, Nutini, Schmidt, "Linear convergence of gradient and proximal-gradient methods under the
    Polyak-Lojasiewicz condition", 2016, section 2.2.

    Example:
        >>> SineParabola().gradient(torch.tensor([[0.0]])).item()
        0.0
    """

    sigma: float = 0.0
    smooth: float = field(init=False, default=8.0)
    pl: float = field(init=False, default=0.1755)
    minimum: float = field(init=False, default=0.0)

    def loss(self, w: Tensor) -> Tensor:
        """F(w)."""
        return (w**2 + 3 * torch.sin(w) ** 2).sum(1)

    def gradient(self, w: Tensor) -> Tensor:
        """2 w + 3 sin 2w."""
        return 2 * w + 3 * torch.sin(2 * w)

    def draw(self, replicas: int, generator: torch.Generator) -> Tensor:
        """The noise itself."""
        return torch.randn(replicas, 1, dtype=torch.float64, generator=generator) * self.sigma

    def sample_gradient(self, x: Tensor, sample: Tensor) -> Tensor:
        """F'(x) + xi."""
        return self.gradient(x) + sample

    def variance(self, x: Tensor) -> Tensor:
        """sigma^2, everywhere."""
        return torch.full((len(x),), self.sigma**2, dtype=x.dtype)

    def lipschitz(self, *, radius: float) -> float:
        """max |F'| on [-r, r]: at r or the last place before it where 2 + 6 cos 2w falls through 0; inf with noise."""
        if self.sigma > 0:
            return math.inf
        first = math.acos(-1 / 3) / 2
        tops = [first + math.pi * math.floor((radius - first) / math.pi)] if radius >= first else []
        return max(2 * w + 3 * math.sin(2 * w) for w in (radius, *tops))


@dataclass(frozen=True)
class LeastSquares:
    r"""F(w) = (1/2n) ||A w - y||^2, a batch being b rows drawn uniformly with replacement.

    L and mu are the largest and the smallest eigenvalue above 0 of A^T A / n, so it is PL also with more weights than
    rows. The variance of a batch depends on the point and is computed from all rows; it vanishes at the minimum if the
    data are fitted exactly.

    Example:
        >>> p = LeastSquares(torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
        >>> p.smooth, p.pl, p.minimum, p.loss(torch.zeros(1, 2, dtype=torch.float64)).item()
        (0.5, 0.5, 0.0, 0.5)
    """

    rows: Tensor  #: A, (n, d)
    targets: Tensor  #: y, (n,)
    batch: int = 1
    smooth: float = field(init=False)
    pl: float = field(init=False)
    minimum: float = field(init=False)

    def __post_init__(self) -> None:
        eigenvalues = torch.linalg.svdvals(self.rows) ** 2 / len(self.rows)
        present = eigenvalues[eigenvalues > 1e-10 * eigenvalues.max()]
        object.__setattr__(self, "smooth", float(present.max()))
        object.__setattr__(self, "pl", float(present.min()))
        lowest = float(self.loss(self._best()[None]))
        object.__setattr__(self, "minimum", 0.0 if lowest < 1e-24 else lowest)

    def loss(self, w: Tensor) -> Tensor:
        """F(w)."""
        return 0.5 * self._residuals(w).square().mean(1)

    def gradient(self, w: Tensor) -> Tensor:
        """A^T (A w - y) / n."""
        return self._residuals(w) @ self.rows / len(self.rows)

    def draw(self, replicas: int, generator: torch.Generator) -> Tensor:
        """Numbers of rows, shape (R, b)."""
        return torch.randint(len(self.rows), (replicas, self.batch), generator=generator)

    def sample_gradient(self, x: Tensor, sample: Tensor) -> Tensor:
        """Mean over the rows drawn."""
        rows = self.rows[sample]
        residuals = (rows * x[:, None]).sum(2) - self.targets[sample]
        return (residuals[..., None] * rows).mean(1)

    def variance(self, x: Tensor) -> Tensor:
        """(mean_i ||grad f_i(x)||^2 - ||grad F(x)||^2) / b."""
        squares = (self._residuals(x) ** 2 * (self.rows**2).sum(1)).mean(1)
        return (squares - (self.gradient(x) ** 2).sum(1)).clamp(min=0) / self.batch

    def lipschitz(self, *, radius: float) -> float:
        """max_i ||a_i|| (|a_i w_* - y_i| + ||a_i|| r), w_* the shortest minimiser; reached from it along some a_i."""
        lengths = torch.linalg.vector_norm(self.rows, dim=1)
        return float((lengths * (self._residuals(self._best()[None])[0].abs() + lengths * radius)).max())

    def _best(self) -> Tensor:
        return torch.linalg.pinv(self.rows) @ self.targets

    def _residuals(self, w: Tensor) -> Tensor:
        return w @ self.rows.T - self.targets


@dataclass(frozen=True)
class MeanEstimation:
    r"""F_S(w) = (1/2n) sum_i (w - z_i)^T H (w - z_i), H diagonal: a finite sum in which everything is exact.

    The minimum is at the mean of z; L = max h, mu = min h; a batch of b examples drawn uniformly with replacement has
    sigma^2 = mean_i ||H (z_i - mean z)||^2 / b wherever it is taken. If z has mean m, the risk is
    F(w) - F(m) = (1/2) (w - m)^T H (w - m).

    Args:
        examples: z, shape (n, d).
        curvatures: the diagonal of H, all above 0.
        batch: b.

    Raises:
        ValueError: a curvature is not above 0.

    Example:
        >>> z = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        >>> p = MeanEstimation(z, torch.tensor([2.0], dtype=torch.float64))
        >>> p.minimum, p.variance(torch.zeros(1, 1)).item(), p.lipschitz(radius=0.5)
        (1.0, 4.0, 3.0)
    """

    examples: Tensor
    curvatures: Tensor
    batch: int = 1
    smooth: float = field(init=False)
    pl: float = field(init=False)
    minimum: float = field(init=False)

    def __post_init__(self) -> None:
        if not bool((self.curvatures > 0).all()):
            raise ValueError("curvatures must all be above 0")
        object.__setattr__(self, "smooth", float(self.curvatures.max()))
        object.__setattr__(self, "pl", float(self.curvatures.min()))
        object.__setattr__(self, "minimum", float(self.loss(self.center[None])))

    @property
    def center(self) -> Tensor:
        """The mean of the examples, which minimises F_S; shape (d,)."""
        return self.examples.mean(0)

    def lipschitz(self, *, radius: float) -> float:
        """B on the ball of that radius around the center; attained if H is a multiple of the identity."""
        return self.smooth * radius + float(self._pulls().square().sum(1).max().sqrt())

    def loss(self, w: Tensor) -> Tensor:
        """F_S(w)."""
        apart = w - self.examples.mean(0)
        spread = (self.curvatures * (self.examples - self.examples.mean(0)) ** 2).sum(1).mean()
        return 0.5 * ((self.curvatures * apart**2).sum(1) + spread)

    def gradient(self, w: Tensor) -> Tensor:
        """H (w - mean z)."""
        return self.curvatures * (w - self.examples.mean(0))

    def draw(self, replicas: int, generator: torch.Generator) -> Tensor:
        """Numbers of examples, shape (R, b)."""
        return torch.randint(len(self.examples), (replicas, self.batch), generator=generator)

    def sample_gradient(self, x: Tensor, sample: Tensor) -> Tensor:
        """H (x - mean of the examples drawn)."""
        return self.curvatures * (x - self.examples[sample].mean(1))

    def variance(self, x: Tensor) -> Tensor:
        """The same everywhere."""
        value = self._pulls().square().sum(1).mean() / self.batch
        return value.expand(len(x))

    def _pulls(self) -> Tensor:
        return self.curvatures * (self.examples - self.examples.mean(0))
