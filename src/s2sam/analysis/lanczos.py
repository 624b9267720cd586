r"""Lanczos: what products with a symmetric matrix tell about its spectrum. Nothing here knows of networks.

An *operator* maps k vectors of n numbers, the rows of a (k, n) tensor, to their products with H, in the same shape.
Each step keeps one more vector of n numbers for each row, against all of which the next is made orthogonal, twice: that
keeps the famous "ghosts" (one eigenvalue found again and again) away at a price that is small beside a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from s2sam.hooks import check_number

Operator = Callable[[Tensor], Tensor]
Array = NDArray[np.float64]
BROKEN = 8.0  #: times the machine precision and the largest number met: a coupling below it is 0


@dataclass(frozen=True, eq=False)
class Tridiagonal:
    """T = Q^T H Q of k independent rows after m steps, and the basis Q.

    Shapes: diagonal (k, m) and couplings (k, m), float64; the last coupling is that to the vector not yet in the basis,
    whose size is the error; basis (k, m, n).
    """

    diagonal: Array
    couplings: Array
    basis: Tensor

    def solve(self, row: int = 0) -> tuple[Array, Array]:
        """Eigenvalues (ascending) and eigenvectors (columns) of T."""
        inner = self.couplings[row, :-1]
        found = np.linalg.eigh(np.diag(self.diagonal[row]) + np.diag(inner, 1) + np.diag(inner, -1))
        return found.eigenvalues, found.eigenvectors


@torch.no_grad()
def lanczos(operator: Operator, start: Tensor, steps: int, generator: torch.Generator) -> Iterator[Tridiagonal]:
    r"""T after 1, 2, ... steps, for each row of `start` (k, n) by itself.

    .. math:: \beta_j q_{j+1} = H q_j - \alpha_j q_j - \beta_{j-1} q_{j-1}

    A row whose basis spans an invariant subspace goes on with a random vector orthogonal to it (beta_j = 0), so that
    multiple eigenvalues are found as often as they occur.

    Cost: a step is one product with k vectors and two passes over the basis, steps x k x n numbers in all.
    """
    k, n = start.shape
    steps = min(steps, n)
    basis = start.new_empty(k, steps, n)
    diagonal, couplings = np.zeros((k, steps)), np.zeros((k, steps))
    size = 0.0  # the largest number met so far: the scale of H
    q = start / start.norm(dim=1, keepdim=True)
    for j in range(steps):
        basis[:, j] = q
        r = operator(q)
        diagonal[:, j] = (q * r).sum(1, dtype=torch.float64).cpu().numpy()
        r = _orthogonal(r, basis[:, : j + 1])
        length = r.norm(dim=1)
        couplings[:, j] = length.double().cpu().numpy()
        size = max(size, float(np.abs(diagonal[:, j]).max()), float(couplings[:, j].max()))
        broken = couplings[:, j] <= BROKEN * torch.finfo(start.dtype).eps * size
        couplings[broken, j] = 0.0
        for row in np.flatnonzero(broken) if j + 1 < n else ():
            r[row] = _orthogonal(gaussian((1, n), generator, start), basis[row : row + 1, : j + 1])[0]
            length[row] = r[row].norm()
        yield Tridiagonal(diagonal[:, : j + 1].copy(), couplings[:, : j + 1].copy(), basis[:, : j + 1])
        q = r / length[:, None]


def _orthogonal(r: Tensor, basis: Tensor) -> Tensor:
    """r (k, n) without its parts along basis (k, m, n)."""
    for _ in range(2):
        along = torch.bmm(basis, r[:, :, None])
        r = r - torch.bmm(basis.transpose(1, 2), along)[:, :, 0]
    return r


def gaussian(shape: tuple[int, int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Independent N(0, 1), drawn on the generator's device, as `like` is."""
    return torch.randn(shape, generator=generator, device=generator.device).to(like.device, like.dtype)


@dataclass(frozen=True)
class Eigenvalue:
    """An approximate eigenvalue. Of the k largest it is a lower bound, of the lowest an upper one, converged or not."""

    value: float
    residual: float  #: ||H v - value v|| for its unit vector v: some eigenvalue is as near as that
    converged: bool  #: the residual is at most the tolerance times the largest |eigenvalue|


@dataclass(frozen=True, eq=False)
class Extremes:
    """Both ends of a spectrum."""

    top: tuple[Eigenvalue, ...]  #: the largest, in descending order
    lowest: Eigenvalue  #: found on the way; it is not waited for
    vectors: Tensor  #: of `top`, (k, n), rows of length 1
    steps: int  #: products used

    @property
    def converged(self) -> bool:
        """True if all of `top` are."""
        return all(one.converged for one in self.top)


def extremes(
    operator: Operator,
    size: int,
    generator: torch.Generator,
    *,
    count: int = 1,
    tolerance: float = 1e-3,
    max_steps: int = 60,
    like: Tensor | None = None,
) -> Extremes:
    r"""The `count` algebraically largest eigenvalues and the lowest, by Lanczos from a random start.

    It stops as soon as all of the `count` have a residual |beta_m s_mi| of at most `tolerance` max |theta|, or after
    `max_steps`: then `converged` is False, and the values are bounds, not eigenvalues.

    Args:
        operator: maps (1, n) to (1, n).
        size: n.
        generator: draws the start.
        count: how many, at most n of them are found.
        tolerance: relative, above 0 and below 1.
        max_steps: products at most.
        like: dtype and device of the vectors; None = float64 on the CPU.

    Raises:
        ValueError: a number out of range.
        RuntimeError: the operator gives numbers that are not finite.

    Cost: one product a step; steps x n numbers.

    Example:
        >>> h = torch.diag(torch.tensor([3.0, 1.0, -2.0, 0.5], dtype=torch.float64))
        >>> found = extremes(lambda v: v @ h, 4, torch.Generator().manual_seed(0), count=2)
        >>> [round(one.value, 6) for one in found.top], round(found.lowest.value, 6), found.converged
        ([3.0, 1.0], -2.0, True)
    """
    check_number("count", count, 1)
    check_number("max_steps", max_steps, 1)
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance must be above 0 and below 1, got {tolerance}")
    like = torch.zeros((), dtype=torch.float64) if like is None else like
    count = min(count, size)
    t: Tridiagonal | None = None
    for t in lanczos(operator, gaussian((1, size), generator, like), max_steps, generator):
        if not np.isfinite(t.diagonal[0, -1]) or not np.isfinite(t.couplings[0, -1]):
            raise RuntimeError("the products with the Hessian are not finite, so it has no eigenvalues to look for")
        values, vectors = t.solve()
        residuals = np.abs(t.couplings[0, -1] * vectors[-1])
        fine = residuals <= tolerance * np.abs(values).max()
        inside = t.couplings[0, -1] == 0 and len(values) < size  # what lies outside this subspace is not seen yet
        if len(values) >= count and fine[-count:].all() and not inside:
            break
    assert t is not None
    found = [Eigenvalue(*row) for row in zip(values.tolist(), residuals.tolist(), fine.tolist(), strict=True)]
    # too few steps for all that were asked for: those that are there do not count as converged
    found = found if len(values) >= count else [Eigenvalue(one.value, one.residual, False) for one in found]
    combination = torch.tensor(vectors[:, ::-1][:, :count].T.copy()).to(t.basis.device, t.basis.dtype)
    return Extremes(tuple(found[::-1][:count]), found[0], combination @ t.basis[0], len(values))


@dataclass(frozen=True, eq=False)
class Quadrature:
    """A spectrum as weighted points, of several random starts.

    Shapes: nodes and weights (probes, steps), float64; the weights of a probe add up to 1.
    """

    nodes: Array
    weights: Array

    @property
    def mean(self) -> float:
        """Of the eigenvalues, that is trace / n."""
        return float((self.nodes * self.weights).sum(1).mean())


def quadrature(
    operator: Operator,
    size: int,
    generator: torch.Generator,
    *,
    probes: int = 2,
    steps: int = 30,
    like: Tensor | None = None,
) -> Quadrature:
    r"""The spectral density by stochastic Lanczos quadrature.

    .. math:: \phi(t) = \frac1n \sum_i \delta(t - \lambda_i) \approx \frac1p \sum_{l \le p} \sum_j s_{1j}^2\,
        \delta(t - \theta_j^{(l)})

    theta and s_1 are the eigenvalues of T and the first entries of its eigenvectors. Moments up to 2 steps - 1 are
    exact for each start, and their means over starts are those of H.

    Source: Ubaru, Chen, Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature, 2017; for networks
    Ghorbani, Krishnan, Xiao, 2019.
    Cost: steps products with `probes` vectors; probes x steps x n numbers.

    Raises:
        ValueError: a number out of range.
        RuntimeError: the operator gives numbers that are not finite.

    Example:
        >>> h = torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0], dtype=torch.float64))
        >>> found = quadrature(lambda v: v @ h, 4, torch.Generator().manual_seed(0), probes=400)
        >>> found.nodes.shape, abs(found.mean - 1.0) < 0.05
        ((400, 4), True)
    """
    check_number("probes", probes, 1)
    check_number("steps", steps, 1)
    like = torch.zeros((), dtype=torch.float64) if like is None else like
    t: Tridiagonal | None = None
    for t in lanczos(operator, gaussian((probes, size), generator, like), steps, generator):
        if not np.isfinite(t.diagonal[:, -1]).all():
            raise RuntimeError("the products with the Hessian are not finite, so it has no spectrum to look at")
    assert t is not None
    solved = [t.solve(row) for row in range(probes)]
    return Quadrature(np.stack([values for values, _ in solved]), np.stack([v[0] ** 2 for _, v in solved]))


def density(nodes: Array, weights: Array, grid: Array, width: float) -> Array:
    """The density on `grid` (g,), each node a bell of standard deviation `width`, the mean over starts.

    >>> grid = np.linspace(-3.0, 5.0, 801)
    >>> phi = density(np.array([[0.0, 2.0]]), np.array([[0.75, 0.25]]), grid, 0.1)
    >>> round(float(np.trapezoid(phi, grid)), 6), int(grid[phi.argmax()])
    (1.0, 0)
    """
    distance = (grid[:, None] - nodes.reshape(1, -1)) / width
    bells = np.exp(-0.5 * distance**2) / (width * np.sqrt(2 * np.pi))
    return (bells @ weights.reshape(-1)) / len(nodes)
