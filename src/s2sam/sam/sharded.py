"""Sharded parameters: DTensors, which FSDP2 (`fully_shard`) and tensor parallelism make of the parameters of a model.

Weights move on the local shards, without communication. Norms are global: sums of squares over the local shards, then
one all_reduce for each set of parameters that are sharded over the same dims of the same mesh; what is replicated
counts once. Whether a step is skipped is agreed on by all ranks. Every rank takes part in all of this, also one whose
shard of a parameter is empty.

FSDP2 gathers whole weights for a forward and keeps those of its root until the backward. Weights that move in between
would not be seen, so the gathered copies are dropped with every move.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from s2sam import private_torch

T = TypeVar("T", bound=Sequence[Tensor])


def _dtensor() -> Any:
    """The class DTensor, or None where nobody has imported it, so that no tensor can be one."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_sharded(t: object) -> bool:
    """True for a DTensor, whatever its placements."""
    kind = _dtensor()
    return kind is not None and isinstance(t, kind)


def has_shards(tensors: Iterable[Tensor]) -> bool:
    """True if one of the tensors is a DTensor. Cost: one look at the types, and none outside distributed runs."""
    kind = _dtensor()
    if kind is None or not (dist.is_available() and dist.is_initialized()):
        return False
    return any(issubclass(t, kind) for t in set(map(type, tensors)))


@torch.no_grad()
def shard(t: Tensor) -> Tensor:
    """This rank's part of `t`, which shares its storage; `t` itself if it is not a DTensor."""
    if not is_sharded(t):
        return t
    part = t.to_local()  # type: ignore[attr-defined]
    wait = getattr(part, "wait", None)  # a collective that is still under way
    return part if wait is None else wait()  # type: ignore[no-any-return]


def local(tensors: list[Tensor]) -> list[Tensor]:
    """The list of the :func:`shard` of each tensor; the same list if none is a DTensor."""
    return [shard(t) for t in tensors] if has_shards(tensors) else tensors


def address(t: Tensor) -> int:
    """Where the entries of `t`, or of its local shard, begin in memory."""
    return shard(t).data_ptr()


def storage(t: Tensor) -> int:
    """Where the storage of `t`, or of its local shard, begins in memory."""
    return shard(t).untyped_storage().data_ptr()


def placed_like(t: Tensor, p: Tensor) -> Tensor:
    """`t`, which belongs to the parameter `p`, with the placements of `p`: a Partial one is summed, for instance.

    Raises:
        RuntimeError: one of them is a DTensor and the other is not.
    """
    if not is_sharded(p) and not is_sharded(t):
        return t
    if not (is_sharded(p) and is_sharded(t)):
        raise RuntimeError(
            f"S2SAM: a parameter is {'' if is_sharded(p) else 'not '}sharded and what belongs to it in the optimizer's "
            "state is the other way round; load the state of a sharded optimizer with "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    if t.placements == p.placements:  # type: ignore[attr-defined]
        return t
    return t.redistribute(placements=p.placements)  # type: ignore[attr-defined, no-any-return]


@torch.no_grad()
def place_gradients(parameters: Iterable[Tensor]) -> None:
    """Give every gradient the placements of its parameter, as the base optimizer will have to anyway."""
    for p in parameters:
        if p.grad is not None:
            placed = placed_like(p.grad, p)
            if placed is not p.grad:
                p.grad = placed


def shard_like(whole: Tensor, p: Tensor) -> Tensor:
    """This rank's shard of `whole`, which is the same on all ranks, as `p` is sharded; without communication."""
    if not is_sharded(p):
        return whole
    spread = sys.modules["torch.distributed.tensor"].distribute_tensor
    return shard(spread(whole, p.device_mesh, p.placements, src_data_rank=None))  # type: ignore[attr-defined]


# Sums over ranks


def _spread(t: Tensor) -> tuple[Any, tuple[int, ...]] | None:
    """The mesh of a DTensor and the dims of it over which its entries are spread; None if every rank has them all."""
    if not is_sharded(t):
        return None
    dims = tuple(i for i, placement in enumerate(t.placements) if not placement.is_replicate())  # type: ignore[attr-defined]
    return (t.device_mesh, dims) if dims else None  # type: ignore[attr-defined]


def _all_reduce(value: Tensor, mesh: Any, dims: Iterable[int], op: Any) -> Tensor:
    """Combine `value` over these dims of the mesh; unchanged on a rank that is not in the mesh."""
    if mesh.get_coordinate() is None:
        return value
    moved = value.to(mesh.device_type, copy=True)  # parameters may be offloaded to the CPU, the network is not
    for dim in dims:
        if mesh.size(dim) > 1:
            dist.all_reduce(moved, op=op, group=mesh.get_group(dim))
    return moved.to(value.device)


def global_sum(part: Callable[..., Tensor], over: Sequence[Tensor], *lists: Sequence[Tensor]) -> Tensor:
    """The sum of `part(*lists)` over everything that the ranks hold, in float64, on the device of `over[0]`.

    `lists` are parallel to `over`, whose members say how they are sharded; `part` gets local shards, and those of one
    mesh and one set of sharded dims at a time.
    """
    chosen: dict[Any, list[int]] = {}
    for i, t in enumerate(over):
        chosen.setdefault(_spread(t), []).append(i)
    total = torch.zeros((), dtype=torch.float64, device=over[0].device)
    for spread, indices in chosen.items():
        value = part(*(local([members[i] for i in indices]) for members in lists)).double()
        if spread is not None:
            value = _all_reduce(value, spread[0], spread[1], dist.ReduceOp.SUM)
        total += value.to(total.device)
    return total


def any_rank(here: bool, tensors: Iterable[Tensor]) -> bool:
    """True on all ranks if `here` is on one of those that share these DTensors. Reads one number from the device."""
    flag = torch.full((), float(here), dtype=torch.float32)
    for mesh in dict.fromkeys(t.device_mesh for t in tensors if is_sharded(t)):  # type: ignore[attr-defined]
        flag = _all_reduce(flag, mesh, range(mesh.ndim), dist.ReduceOp.MAX)
    return bool(flag)


# What FSDP2 has gathered


def refuse_inside_forward(parameters: Sequence[Tensor]) -> None:
    """Raise RuntimeError if FSDP2 has gathered these weights for a forward, which would not see them move."""
    if any(private_torch.fsdp_in_forward(group) for group in private_torch.fsdp_groups(parameters)):
        raise RuntimeError(
            "the weights cannot move inside a forward of fully_shard, which has gathered them already: pass the module "
            "that was given to fully_shard last (the root) as model=...; if an exception ended that forward, call the "
            "root's reset_iter_state()"
        )


def weights_move(parameters: Sequence[Tensor], *, for_a_look: bool = False) -> None:
    """To be called with DTensors when their shards move: gathered copies go, and autograd learns of the change.

    A pending backward then raises, as it does for parameters that are not sharded; not `for_a_look`, after which they
    are what they were.
    """
    changed = [p for p in parameters if is_sharded(p)]
    for group in private_torch.fsdp_groups(parameters):
        private_torch.fsdp_forget_gathered(group)
        changed += private_torch.fsdp_gathered(group)
    if not for_a_look:
        torch.autograd.graph.increment_version([t for t in changed if not t.is_inference()])


def gathered_copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The whole weights that FSDP2 has gathered, or will gather, of these."""
    return [t for group in private_torch.fsdp_groups(parameters) for t in private_torch.fsdp_gathered(group)]


# Refusals


def check_sharding(optimizers: Iterable[Optimizer], models: Iterable[nn.Module], *, filters: bool = False) -> None:
    """Raise ValueError for a way of sharding that S2SAM and SAM cannot follow. FSDP2's gathered weights are dropped.

    Args:
        optimizers: those to attach to.
        models: the models whose forwards will be followed.
        filters: norms of slices along dim 0 are needed.
    """
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    wrapper = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    wrapped = wrapper is not None and any(isinstance(part, wrapper) for m in models for part in m.modules())
    if wrapped or any(private_torch.is_fsdp1_parameter(p) for p in parameters):
        raise ValueError(
            "FullyShardedDataParallel (FSDP1) is not supported: it hides how its flat parameters are sharded, so each "
            "rank would take the norm of its own shard; use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    sharded = [p for p in parameters if is_sharded(p)]
    if sharded:
        check_placements(sharded, filters=filters)
        weights_move(sharded, for_a_look=True)  # while gathered, a model lists other parameters than its optimizer


def check_placements(parameters: Iterable[Tensor], *, filters: bool) -> None:
    """Raise ValueError if these DTensors are sharded in a way that a global norm, or one of filters, cannot follow."""
    ranks: set[frozenset[int]] = set()
    for p in parameters:
        ranks.add(_ranks(p.device_mesh))  # type: ignore[attr-defined]
        for placement in p.placements:  # type: ignore[attr-defined]
            if placement.is_partial():
                raise ValueError(f"a parameter of shape {tuple(p.shape)} is Partial; redistribute it before training")
            if filters and p.dim() > 1 and getattr(placement, "dim", 0) % p.dim() != 0:
                raise ValueError(
                    f"scale='filter' needs whole slices along dim 0, and a parameter of shape {tuple(p.shape)} is "
                    f"sharded along dim {placement.dim}; use another scale, or shard it along dim 0"
                )
    if len(ranks) > 1:
        raise ValueError(
            "the parameters lie on meshes of different ranks "
            f"({' and '.join(str(sorted(some)) for some in sorted(ranks, key=sorted))}), so some ranks could not know "
            "the common norm; use slices of one mesh, or one optimizer with its own S2SAM for each mesh"
        )


@functools.lru_cache(maxsize=64)
def _ranks(mesh: Any) -> frozenset[int]:
    return frozenset(private_torch.root_mesh(mesh).mesh.flatten().tolist())
