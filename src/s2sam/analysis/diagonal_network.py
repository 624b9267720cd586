r"""Which displacements find the sparse solution of a diagonal linear network, at an equal number of gradients.

The model is <a, u * v> with u, v in R^60; 30 rows a of normal numbers, targets from a solution with 3 weights of +-1
and no noise, so infinitely many u * v fit all rows. SGD ends at one that has nothing to do with the sparse one; a
method that prefers flat minima (small sum_i u_i^2 + v_i^2) finds it. The test error is that of new rows, relative to
the variance of their targets: ||u * v - w_*||^2 / ||w_*||^2; 0 = found, 1 = what u * v = 0 has.

All methods begin at u = 1, v = 0, take batches of 2 rows drawn with replacement, and have constant learning rates and
radii for half of the run, which then fall to 0 together along a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2sam.analysis.bound_check import ERRORS, Check, mean_and_error
from s2sam.analysis.descent import unit

ROWS, WEIGHTS, ACTIVE, BATCH = 30, 60, 3, 2
FOUND, MISSED = 0.02, 0.05  #: test errors: at most, at least
GRADIENTS = 8_000  #: of every method
REPLICAS = 64  #: fresh problems


@dataclass(frozen=True)
class Arm:
    """A method with the learning rate and radius that `results/theory/tune_diagonal_network.py` chose for it."""

    name: str
    #: "none", "same batch" (SAM), "other batch" (SAM, its direction from a batch of its own), "previous" (+g_{t-1}),
    #: "echo" or "random"
    direction: str
    lr: float
    rho: float  #: ||e||; of echo: in second visits
    finds: bool | None = None  #: whether it is claimed to find the sparse solution; None = it is what others beat


ARMS = (
    Arm("SGD", "none", 0.005, 0.0),
    Arm("SAM, same batch", "same batch", 0.05, 0.3, finds=True),
    Arm("SAM, independent batch", "other batch", 0.05, 1.0, finds=False),
    Arm("S2-SAM +g_{t-1}", "previous", 0.05, 1.0, finds=False),
    Arm("S2-SAM echo", "echo", 0.05, 0.3, finds=True),
    Arm("isotropic noise", "random", 0.05, 3.0, finds=True),
)


@dataclass(frozen=True)
class DiagonalNetworks:
    """R problems, each with rows and a sparse solution of its own; weights are (u, v), shape (R, 120).

    Example:
        >>> problem = DiagonalNetworks.drawn(2, torch.Generator().manual_seed(0))
        >>> problem.test_error(problem.start()).tolist(), int((problem.solutions != 0).sum())
        ([1.0, 1.0], 6)
    """

    rows: Tensor  #: (R, n, d)
    solutions: Tensor  #: w_*, (R, d)
    targets: Tensor = field(init=False)  #: (R, n)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", torch.einsum("rnd,rd->rn", self.rows, self.solutions))

    @classmethod
    def drawn(cls, replicas: int, generator: torch.Generator) -> DiagonalNetworks:
        """Normal rows, and solutions with signs in random places."""
        rows = torch.randn(replicas, ROWS, WEIGHTS, dtype=torch.float64, generator=generator)
        places = torch.rand(replicas, WEIGHTS, generator=generator).argsort(1)[:, :ACTIVE]
        signs = 2.0 * torch.randint(2, (replicas, ACTIVE), generator=generator).double() - 1
        return cls(rows, torch.zeros(replicas, WEIGHTS, dtype=torch.float64).scatter_(1, places, signs))

    def start(self) -> Tensor:
        """u = 1, v = 0: no knowledge of the solution, and not a saddle."""
        one = torch.ones_like(self.solutions)
        return torch.cat([one, 0 * one], dim=1)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Numbers of rows: a batch for each problem, shape (R, 2)."""
        return torch.randint(self.rows.shape[1], (len(self.rows), BATCH), generator=generator)

    def sample_gradient(self, x: Tensor, sample: Tensor) -> Tensor:
        """Gradient of the mean of (<a, u * v> - y)^2 / 2 over each problem's batch, shape (R, 2d)."""
        u, v = x.chunk(2, dim=1)
        each = torch.arange(len(sample))[:, None]
        rows, targets = self.rows[each, sample], self.targets[each, sample]
        residuals = (rows @ (u * v)[:, :, None])[:, :, 0] - targets
        pull = (residuals[:, None] @ rows)[:, 0] / sample.shape[1]
        return torch.cat([pull * v, pull * u], dim=1)

    def test_error(self, x: Tensor) -> Tensor:
        """||u * v - w_*||^2 / ||w_*||^2, shape (R,)."""
        u, v = x.chunk(2, dim=1)
        return (u * v - self.solutions).square().sum(1) / self.solutions.square().sum(1)


def train(arm: Arm, problem: DiagonalNetworks, *, gradients: int, generator: torch.Generator) -> Tensor:
    """The weights after that many gradients, shape (R, 2d): steps of SGD, all problems at once, without hooks.

    With lr and rho as they fade, x = w + rho d / ||d|| and w <- w - lr grad L_B(x). A first visit of echo is plain.
    """
    w, last, spent, second = problem.start(), torch.zeros_like(problem.start()), 0, False
    while spent < gradients:
        share = fade(spent, gradients)
        if not second:
            batch = problem.draw(generator)
        direction = torch.zeros_like(w)
        if arm.direction in ("same batch", "other batch"):
            other = batch if arm.direction == "same batch" else problem.draw(generator)
            direction = problem.sample_gradient(w, other)
            spent += 1
        elif arm.direction == "random":
            direction = torch.randn(w.shape, dtype=w.dtype, generator=generator)
        elif arm.direction == "previous" or second:
            direction = last
        last = problem.sample_gradient(w + share * arm.rho * unit(direction), batch)
        w = w - share * arm.lr * last
        spent += 1
        second = arm.direction == "echo" and not second
    return w


def fade(spent: int, gradients: int) -> float:
    """What lr and rho are multiplied by: 1 for half of the run, then along a line to 0.

    >>> [fade(t, 8) for t in (0, 4, 6, 7)]
    [1.0, 1.0, 0.5, 0.25]
    """
    return min(1.0, 2 * (1 - spent / gradients))


def recovery(
    generator: torch.Generator,
    *,
    arms: tuple[Arm, ...] = ARMS,
    replicas: int = REPLICAS,
    gradients: int = GRADIENTS,
) -> Iterator[Check]:
    """Same-batch SAM, echo and noise find the sparse solution; SAM on independent batches, +g_{t-1} and SGD do not.

    The interval of a mean over fresh problems is 4 standard errors to either side. An arm that finds it must lie below
    0.02 with its whole interval, and every other arm above 0.05 with its own; and against SGD on the same problems the
    former must be better by at least 0.2, again with the whole interval of the difference. A test error above 1, also
    that of weights that diverged, counts as 1: what knowing nothing has.

    Cost: about 10 s on one core.
    """
    problem = DiagonalNetworks.drawn(replicas, generator)
    errors: dict[str, Tensor] = {}
    for arm in arms:
        found = problem.test_error(train(arm, problem, gradients=gradients, generator=generator))
        errors[arm.name] = found.nan_to_num(nan=1.0).clamp(max=1.0)
    for arm in arms:
        mean, error = mean_and_error(errors[arm.name])
        if not arm.finds:
            yield Check("sparse solution missed", arm.name, mean, MISSED, error=error, control=True, unit="test error")
            continue
        upper = mean + ERRORS * error
        yield Check("sparse solution found", f"{arm.name}, upper end", upper, FOUND, 0.0, unit="test error")
        gain, error = mean_and_error(errors["SGD"] - errors[arm.name])
        setting = f"SGD minus {arm.name}, lower end"
        yield Check("sparse solution found", setting, gain - ERRORS * error, 1.0, 0.2, unit="test error")


def same_batch_force(generator: torch.Generator, *, rho: float = 1e-5) -> Iterator[Check]:
    r"""What a small displacement adds to the mean gradient, over all rows: SAM adds rho grad E||g_B||, others do not.

    .. math::
        E[g_B(w + \rho u) - g_B(w)] / \rho, \qquad u = g_B / \|g_B\| \text{ or } g_{B'} / \|g_{B'}\|

    The second, over all pairs of rows, is H E[g/||g||]. Echo's u is taken at w and used at w' = w - eta g_B(w); what is
    compared is then the mean over rows of grad ||g_B|| at each row's own w', so that it may differ by 2 eta L^2.
    """
    problem = DiagonalNetworks.drawn(1, generator)
    w = torch.randn(1, 2 * WEIGHTS, dtype=torch.float64, generator=generator)
    every, lr = torch.arange(ROWS), 1e-6

    def gradient(x: Tensor, row: Tensor) -> Tensor:
        return problem.sample_gradient(x, row.view(1, 1))

    def slope_of_norm(x: Tensor, row: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(gradient(x, row).norm(), x)[0]

    def force(x: Tensor, row: Tensor, direction: Tensor) -> Tensor:
        return (gradient(x + rho * unit(direction), row) - gradient(x, row)) / rho

    def mean(forces: list[Tensor]) -> Tensor:
        return torch.cat(forces).mean(0)

    flat = mean([slope_of_norm(w, i) for i in every])
    later = [w - lr * gradient(w, i) for i in every]
    echo = mean([force(x, i, gradient(w, i)) for i, x in zip(every, later, strict=True)])
    for name, found, of, control in (
        ("SAM", mean([force(w, i, gradient(w, i)) for i in every]), flat, False),
        ("echo", echo, mean([slope_of_norm(x, i) for i, x in zip(every, later, strict=True)]), False),
        ("independent batch", mean([force(w, i, gradient(w, j)) for i in every for j in every]), flat, True),
    ):
        apart = float((found - of).norm() / of.norm())
        high = 0.5 if control else 1e-3
        yield Check("force is rho grad E||g||", f"relative difference, {name}", apart, high, control=control)
