"""Norms of lists of tensors: one number for the whole model, accumulated in fp32 or wider."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

WIDE = {torch.float64: torch.float64, torch.complex128: torch.float64}


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """||v||_2 over all entries of all tensors, as a 0-dim tensor on the first tensor's device.

    Half-precision entries are squared and summed in fp32, so that neither 1e-5 underflows nor 300 overflows. An empty
    list has norm 0. Cost: one read of the tensors, three calls for a list of one dtype and device.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.bfloat16)])
        tensor(5.)
    """
    if not tensors:
        return torch.zeros(())
    norms: list[Tensor] = []
    for part in by_kind(tensors):
        wide = WIDE.get(part[0].dtype, torch.float32)
        norms += torch._foreach_norm(part, 2, dtype=None if part[0].dtype == wide else wide)
    kinds = {(n.device, n.dtype) for n in norms}
    if len(kinds) > 1:
        dtype = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
        norms = [n.to(tensors[0].device, dtype) for n in norms]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def total_dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """<a, b> over all entries, accumulated like :func:`total_norm`."""
    dots = [torch.sum(x.to(wide) * y.to(wide)) for x, y in zip(a, b, strict=True) for wide in [_wide(x)]]
    return torch.stack([d.to(a[0].device) for d in dots]).sum() if dots else torch.zeros(())


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors as lists of one device and dtype each, order kept (what foreach kernels are fast on)."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault((t.device, t.dtype), []).append(t)
    return list(kinds.values())


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """True if every entry is finite. Reads one number from the device, more only if the squares overflow.

    Example:
        >>> all_finite([torch.tensor([1e30])]), all_finite([torch.ones(2), torch.tensor([float("nan")])])
        (True, False)
    """
    return math.isfinite(float(total_norm(tensors))) or all(bool(torch.isfinite(t).all()) for t in tensors)


def _wide(t: Tensor) -> torch.dtype:
    return WIDE.get(t.dtype, torch.float32)
