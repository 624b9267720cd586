"""Lists of tensors, cut into those that one foreach or fused kernel takes at once. Below all other modules."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def kinds(tensors: Iterable[Tensor]) -> list[list[int]]:
    """The positions of the tensors of each device and dtype, in order: for several lists that go together.

    >>> kinds([torch.zeros(1), torch.zeros(2, dtype=torch.bool), torch.zeros(3)])
    [[0, 2], [1]]
    """
    found: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        found.setdefault((t.device, t.dtype), []).append(i)
    return list(found.values())


def alike(tensors: Iterable[Tensor]) -> list[list[int]]:
    """The positions of the tensors of each device, dtype and shape, in order: those that can be stacked.

    >>> alike([torch.zeros(1), torch.zeros(2), torch.ones(1)])
    [[0, 2], [1]]
    """
    found: dict[tuple[torch.device, torch.dtype, torch.Size], list[int]] = {}
    for i, t in enumerate(tensors):
        found.setdefault((t.device, t.dtype, t.shape), []).append(i)
    return list(found.values())


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the CPU to a GPU by way of pinned memory, so that the host does not wait for the GPU.

    A plain `.to("cuda")` of a tensor in ordinary memory waits for all that is queued there.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def by_kind(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors as lists of one device and dtype each, order kept.

    >>> [len(part) for part in by_kind([torch.zeros(1), torch.zeros(2, dtype=torch.bool), torch.zeros(3)])]
    [2, 1]
    """
    tensors = list(tensors)
    return [[tensors[i] for i in chosen] for chosen in kinds(tensors)]
