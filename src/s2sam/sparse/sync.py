"""What must be the same on every rank: the seed of the draws and the masks. One process alone does nothing here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from s2sam.sparse.masks import pack_bits


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shared_seed() -> int:
    """Rank 0's `torch.initial_seed()`, on every rank."""
    seed = [torch.initial_seed()]
    if world_size() > 1:
        dist.broadcast_object_list(seed, src=0)
    return seed[0]


def share(generator: torch.Generator) -> None:
    """Give the generator the state of rank 0's."""
    if world_size() > 1:
        state = [generator.get_state()]
        dist.broadcast_object_list(state, src=0)
        generator.set_state(state[0])


@torch.no_grad()
def broadcast_masks(masks: Mapping[str, Tensor]) -> None:
    """Overwrite the masks with rank 0's, in place. Cost: one broadcast of one byte per weight."""
    if world_size() == 1 or not masks:
        return
    device = next(iter(masks.values())).device
    flat = torch.cat([m.flatten().to(device, torch.uint8) for m in masks.values()])
    dist.broadcast(flat, src=0)
    for mask, part in zip(masks.values(), torch.split(flat, [m.numel() for m in masks.values()]), strict=True):
        mask.copy_(part.view(mask.shape))


@torch.no_grad()
def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor by its sum over all ranks, in place."""
    if world_size() > 1:
        for tensor in tensors:
            whole = tensor.contiguous()
            dist.all_reduce(whole)
            if whole is not tensor:
                tensor.copy_(whole)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite every tensor with rank 0's, in place."""
    if world_size() > 1:
        for tensor in tensors:
            whole = tensor.contiguous()
            dist.broadcast(whole, src=0)
            if whole is not tensor:
                tensor.copy_(whole)


@contextmanager
def together() -> Iterator[None]:
    """An exception that one rank meets inside is raised on all of them at the end: else the others wait for that rank.

    Nothing inside may wait for another rank.

    Raises:
        ValueError: another rank has met an exception; the sentence is its own.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001  # raised below, once the others know
        problem = error
    found = [""] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, "" if problem is None else str(problem) or type(problem).__name__)
    if problem is not None:
        raise problem
    for rank, sentence in enumerate(found):
        if sentence:
            raise ValueError(f"rank {rank}: {sentence}")


def largest(value: float) -> float:
    """The largest value of all ranks."""
    found = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(found, value)
    return max(found)


def check_same(masks: Mapping[str, Tensor], problem: RuntimeError | None = None) -> None:
    """Compare a digest of the masks over all ranks; a `problem` that one rank has found is raised on every rank.

    Raises:
        RuntimeError: a rank has other masks than rank 0, or a problem.
    """
    found: list[tuple[str, str]] = [("", "" if problem is None else str(problem))]
    if world_size() > 1:
        digest = hashlib.sha256(b"".join(pack_bits(m).numpy().tobytes() for m in masks.values())).hexdigest()
        mine, found = (digest, found[0][1]), found * world_size()
        dist.all_gather_object(found, mine)
    different = [rank for rank, (digest, _) in enumerate(found) if digest != found[0][0]]
    if different:
        raise RuntimeError(f"the masks of ranks {different} differ from rank 0's; load one checkpoint on every rank")
    if problem is not None:
        raise problem
    for rank, (_, sentence) in enumerate(found):
        if sentence:
            raise RuntimeError(f"rank {rank}: {sentence}")
