"""The trace of a symmetric matrix from products with it: Hutch++."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from s2sam.analysis.lanczos import Operator
from s2sam.hooks import check_number


@dataclass(frozen=True)
class Trace:
    """An estimate and the standard error of its random part; `queries` are the products that it took."""

    value: float
    error: float
    queries: int


@torch.no_grad()
def trace(
    operator: Operator,
    size: int,
    generator: torch.Generator,
    *,
    queries: int = 30,
    chunk: int = 16,
    like: Tensor | None = None,
) -> Trace:
    r"""tr H by Hutch++: exactly on a sketch Q of the dominant subspace, by random signs g on what is left.

    .. math:: \mathrm{tr}(Q^T H Q) + \frac1q \sum_{i \le q} \tilde g_i^T H \tilde g_i,
        \qquad \tilde g = (I - QQ^T) g, \quad Q = \mathrm{orth}(H S), \quad q = \lfloor\text{queries}/3\rfloor

    Unbiased; exact if the rank of H is at most q; its variance falls as 1/q^2 where Hutchinson's falls as 1/q. The
    error is the deviation of the q random terms divided by sqrt(q), 0 where nothing is left.

    Args:
        operator: maps (k, n) to (k, n).
        size: n.
        generator: draws signs.
        queries: products, at least 6. With q >= n the trace is taken exactly, from n products.
        chunk: vectors in one call of the operator.
        like: dtype and device of the vectors; None = float64 on the CPU.

    Raises:
        ValueError: a number out of range.
        RuntimeError: the operator gives numbers that are not finite.

    Source: Meyer, Musco, Musco, Woodruff, Hutch++: Optimal stochastic trace estimation, 2021, algorithm 1.
    Cost: 3 q products; 4 q vectors of n numbers.

    Example:
        >>> u = torch.tensor([[1.0, 2.0, 2.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
        >>> found = trace(lambda v: v @ u.T @ u, 6, torch.Generator().manual_seed(0), queries=6)
        >>> round(found.value, 9), found.error < 1e-6
        (11.0, True)
    """
    check_number("queries", queries, 6)
    check_number("chunk", chunk, 1)
    like = torch.zeros((), dtype=torch.float64) if like is None else like
    q = queries // 3

    def product(rows: Tensor) -> Tensor:
        return torch.cat([operator(part) for part in rows.split(chunk)])

    if q >= size:
        identity = torch.eye(size, device=like.device, dtype=like.dtype)
        return Trace(_finite(float(product(identity).diagonal().sum(dtype=torch.float64))), 0.0, size)
    basis = torch.linalg.qr(product(_signs(q, size, generator, like)).T).Q.T.contiguous()  # rows
    exact = float((basis * product(basis)).sum(dtype=torch.float64))
    _finite(exact)
    rest = _signs(q, size, generator, like)
    for _ in range(2):
        rest = rest - (rest @ basis.T) @ basis
    terms = (rest * product(rest)).sum(1, dtype=torch.float64)
    return Trace(_finite(exact + float(terms.mean())), float(terms.std()) / math.sqrt(q), 3 * q)


def _signs(count: int, size: int, generator: torch.Generator, like: Tensor) -> Tensor:
    bits = torch.randint(2, (count, size), generator=generator, device=generator.device)
    return bits.to(like.device, like.dtype).mul_(2).sub_(1)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise RuntimeError("the products with the Hessian are not finite, so it has no trace")
    return value
