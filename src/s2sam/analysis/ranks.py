"""The processes that share the images of a measurement: each sums over its own batches, and all get the whole sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class LostRankError(RuntimeError):
    """Another process of the measurement is gone, so that this one cannot go on."""


class Ranks:
    """A process group, or this process alone.

    Sums are taken in float64, so that the number of processes, which only changes their order, changes nothing that
    float32 could show. They, and vectors that rank 0 gives, are the same bits on every rank: all ranks that run the
    same code on machines of one kind take the same decisions.

    Args:
        group: of torch.distributed; None = this process alone, whether torch.distributed is initialised or not.

    Example:
        >>> import torch
        >>> alone = Ranks()
        >>> alone.share([3, 4, 5]), alone.total(torch.ones(2)).dtype, alone.gather([3, 4, 5])
        ([3, 4, 5], torch.float64, [3, 4, 5])
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every `size`-th item, this rank's."""
        return items[self.rank :: self.size]

    def lead(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank. Cost: a broadcast."""
        if self.size == 1:
            return tensor
        there = self._there(tensor)
        try:
            dist.broadcast(there, group_src=0, group=self.group)
        except RuntimeError as error:
            raise self._lost() from error
        return there.to(tensor.device)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, float64, on every rank. Cost: an all-reduce of float64."""
        tensor = tensor.double()
        if self.size == 1:
            return tensor
        there = self._there(tensor)
        try:
            dist.all_reduce(there, group=self.group)
        except RuntimeError as error:
            raise self._lost() from error
        return there.to(tensor.device)

    def gather(self, values: Sequence[T]) -> list[T]:
        """The values that the ranks found for their :meth:`share`, in the order of the items."""
        if self.size == 1:
            return list(values)
        found: list[list[T]] = [[] for _ in range(self.size)]
        try:
            dist.all_gather_object(found, list(values), group=self.group)
        except RuntimeError as error:
            raise self._lost() from error
        return [part[i] for i in range(len(found[0])) for part in found if i < len(part)]

    def _there(self, tensor: Tensor) -> Tensor:
        """A copy where the group talks: gloo on the CPU."""
        on_cpu = dist.get_backend(self.group) == "gloo"
        return tensor.to("cpu" if on_cpu else tensor.device, copy=True).contiguous()

    def _lost(self) -> LostRankError:
        return LostRankError(f"rank {self.rank} of {self.size} lost the others of its process group; start them again")
