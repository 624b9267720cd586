"""Norms of lists of tensors: one number for the whole model, accumulated in fp32 or wider."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from s2sam.sam.sharded import any_rank, global_sum, has_shards, local
from s2sam.tensors import by_kind

FLOOR = 1e-19  #: its square is the smallest normal fp32 number


def total_norm(tensors: Sequence[Tensor], *, floor: bool = False, over: Sequence[Tensor] | None = None) -> Tensor:
    """||v||_2 over all entries of all tensors, as a 0-dim tensor on the first tensor's device.

    Of DTensors it is the norm over all ranks (see :mod:`s2sam.sam.sharded`). `over` are the parameters that the tensors
    belong to, if the tensors are local shards.

    Half-precision entries are squared and summed in fp32, so that neither 1e-5 underflows nor 300 overflows. An empty
    list has norm 0. With `floor` the result is sqrt(||v||^2 + 1e-38), so that one can divide by it.
    Cost: one read of the tensors, three calls for a list of one dtype and device.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.bfloat16)])
        tensor(5.)
    """
    if not tensors:
        return torch.full((), FLOOR * floor)
    if has_shards(tensors if over is None else over):
        return global_norm(total_norm, tensors if over is None else over, tensors, floor=floor)
    norms: list[Tensor] = []
    for part in by_kind(tensors):
        half = part[0].dtype in (torch.float16, torch.bfloat16)
        norms += torch._foreach_norm(part, 2, dtype=torch.float32 if half else None)
    kinds = {(n.device, n.dtype) for n in norms}
    if len(kinds) > 1:
        dtype = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
        norms = [n.to(tensors[0].device, dtype) for n in norms]
    if floor:
        norms.append(constant(FLOOR, norms[0].device, norms[0].dtype))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


@functools.lru_cache(maxsize=256)
def constant(value: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`value` as a 0-dim tensor that nobody may change; made once, so that a step need not copy it to the device."""
    return torch.full((), value, device=device, dtype=dtype)


def global_norm(norm: Callable[..., Tensor], over: Sequence[Tensor], *lists: Sequence[Tensor], floor: bool) -> Tensor:
    """The norm over all ranks, where `norm(*lists)` is that over local shards; see :func:`global_sum`."""
    square = global_sum(lambda *parts: norm(*parts).double().square(), over, *lists)
    return (square + floor * FLOOR**2).sqrt().to(real(over[0]))


def root_of_count(tensors: Sequence[Tensor]) -> Tensor:
    """sqrt(p) for the number p of entries that are not 0, over all tensors and ranks.

    Cost: one read of the tensors, a call for each of them.

    Example:
        >>> root_of_count([torch.tensor([3.0, 0.0]), torch.ones(3)])
        tensor(2.)
    """
    if has_shards(tensors):
        return global_norm(root_of_count, tensors, tensors, floor=False)
    count = torch.stack([torch.count_nonzero(t).to(tensors[0].device) for t in tensors]).sum()
    return count.to(real(tensors[0])).sqrt()


def total_dot(a: Sequence[Tensor], b: Sequence[Tensor], *, over: Sequence[Tensor] | None = None) -> Tensor:
    """Re <a, b> over all entries, accumulated like :func:`total_norm`, which tells what `over` is."""
    if has_shards(a if over is None else over):
        return global_sum(total_dot, a if over is None else over, a, b).to(real(a[0]))
    dots = [torch.sum(widen(x) * widen(y).conj()).real for x, y in zip(a, b, strict=True)]
    return torch.stack([d.to(a[0].device) for d in dots]).sum() if dots else torch.zeros(())


def largest(tensors: Sequence[Tensor]) -> Tensor:
    """max |v| over all entries, as a 0-dim tensor: not finite exactly if some entry is not (it cannot overflow).

    Cost: one read of the tensors, three calls for a list of one dtype and device.
    """
    norms = [n for part in by_kind(t for t in tensors if t.numel()) for n in torch._foreach_norm(part, math.inf)]
    if not norms:
        return torch.zeros(())
    if len({(n.device, n.dtype) for n in norms}) > 1:
        norms = [n.to(norms[0].device, torch.float64) for n in norms]
    return torch.stack(norms).max()


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """True if every entry is finite, of DTensors on every rank. Reads one number from the device.

    Example:
        >>> all_finite([torch.tensor([1e30])]), all_finite([torch.ones(2), torch.tensor([float("nan")])])
        (True, False)
    """
    if has_shards(tensors):
        return not any_rank(not math.isfinite(float(largest(local(list(tensors))))), tensors)
    return math.isfinite(float(largest(tensors)))


def widen(t: Tensor) -> Tensor:
    """`t`, in fp32 if it is in half precision."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def real(t: Tensor) -> torch.dtype:
    """The dtype that norms of `t` have."""
    return torch.float64 if t.dtype in (torch.float64, torch.complex128) else torch.float32
