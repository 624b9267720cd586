"""SGD with a displaced gradient, R replicas at a time: the recursion that the corollary is about, without hooks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2sam.analysis.problems import Problem
from s2sam.sparse.names import unknown

#: where u_t comes from; all but "same batch" are known before batch t is drawn
DIRECTIONS = ("none", "+previous", "-previous", "random", "same batch")


@dataclass(frozen=True)
class Descent:
    """What a run leaves; T steps of R replicas."""

    gaps: Tensor  #: F(w_t) - F*, shape (T, R)
    variances: Tensor  #: E||g_t - grad F(x_t)||^2 given the past, shape (T, R)
    iterates: Tensor  #: w_t, shape (T, R, d)
    last: Tensor  #: w_T, shape (R, d)


def descend(
    problem: Problem,
    start: Tensor,
    *,
    lr: float,
    steps: int,
    rho: float,
    direction: str,
    generator: torch.Generator,
    decay: float = 0.0,
    decay_at: str = "w",
    objective: Problem | None = None,
) -> Descent:
    r"""T steps from `start`, shape (R, d).

    .. math::
        x_t = w_t + \rho u_t, \qquad w_{t+1} = w_t - \eta\, (g_t(x_t) + \lambda w_t)

    u_t is 0 ("none"), +-g_{t-1}/||g_{t-1}|| (S2-SAM; 0 in the first step), a uniformly random unit vector, or the unit
    gradient of batch t itself (SAM). lambda acts at x_t instead with `decay_at="x"`. Gaps are those of `objective`, by
    default the problem without weight decay.

    Raises:
        ValueError: an unknown direction.

    Example:
        >>> from s2sam.analysis.problems import Quadratic
        >>> q = Quadratic(torch.tensor([1.0], dtype=torch.float64))
        >>> run = descend(q, torch.tensor([[3.0]], dtype=torch.float64), lr=0.1, steps=2, rho=1.0,
        ...               direction="+previous", generator=torch.Generator())
        >>> run.last                                # 2.7 - 0.1 * (2.7 + 1), as in s2sam.sam.reference
        tensor([[2.3300]], dtype=torch.float64)
    """
    if direction not in DIRECTIONS:
        raise unknown("direction", direction, DIRECTIONS)
    objective = problem if objective is None else objective
    w, previous = start.clone(), torch.zeros_like(start)
    gaps, variances, iterates = [], [], []
    for _ in range(steps):
        sample = problem.draw(len(w), generator)
        if direction == "none":
            x = w
        elif direction == "random":
            x = w + rho * unit(torch.randn(w.shape, dtype=w.dtype, generator=generator))
        elif direction == "same batch":
            x = w + rho * unit(problem.sample_gradient(w, sample))
        else:
            x = w + (rho if direction == "+previous" else -rho) * unit(previous)
        iterates.append(w)
        gaps.append(objective.loss(w) - objective.minimum)
        variances.append(problem.variance(x))
        g = problem.sample_gradient(x, sample)
        if decay:
            g = g + decay * x if decay_at == "x" else g
        previous = g
        w = w - lr * (g + decay * w if decay and decay_at == "w" else g)
    return Descent(torch.stack(gaps), torch.stack(variances), torch.stack(iterates), w)


def unit(vectors: Tensor) -> Tensor:
    """Each row divided by its length; a row of 0 stays 0.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return torch.where(lengths > 0, vectors / lengths, 0.0)
