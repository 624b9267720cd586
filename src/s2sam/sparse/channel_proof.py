"""Proof that channels can be cut: a copy of the model without them gives the same output as one where they are 0."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from s2sam.sparse.channel_cut import cut
from s2sam.sparse.channels import ChannelGroup, Channels, masks_of, rows
from s2sam.sparse.saliency import Batch

_NORMS = (nn.modules.batchnorm._BatchNorm,)


def proved(twin: nn.Module, example: Batch, groups: Sequence[ChannelGroup], dense: Mapping[str, str]) -> Channels:
    """The groups that can be cut, one and all."""
    if not groups or survives(twin, example, groups):
        return Channels(tuple(groups), dense)
    good: list[ChannelGroup] = []
    reasons = dict(dense)
    for group in groups:
        if survives(twin, example, [*good, group]):
            good.append(group)
        else:
            reasons[group.name] = "the model computes something else without some of its channels"
    return Channels(tuple(good), reasons)


@torch.no_grad()
def survives(twin: nn.Module, example: Batch, groups: Sequence[ChannelGroup]) -> bool:
    """Whether half of the channels of each of these groups can go."""
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for group in groups:
        keep[group.name] = torch.randperm(group.size, generator=generator) >= max(1, group.size // 2)
    masked, slim = copy.deepcopy(twin), copy.deepcopy(twin)
    parameters = dict(masked.named_parameters())
    for name, mask in masks_of(groups, keep, parameters).items():
        parameters[name].mul_(mask)
    slim.load_state_dict(masked.state_dict())
    cut(slim, rows(groups, keep))
    try:
        return same_output(masked, slim, example, tolerance=1e-9) and trains_alike(masked, slim, example)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return False  # a size in its code


@torch.no_grad()
def trains_alike(one: nn.Module, two: nn.Module, example: Batch) -> bool:
    """Whether `two` does in training mode what `one` does, which may have heads for that mode alone.

    True where that cannot be told: `one` does not run (BatchNorm on a single value), or is random. Raises what `two`
    raises. Both are in training mode afterwards, their statistics moved.
    """
    one.train()
    two.train()
    with torch.random.fork_rng(devices=[]):
        try:
            steady = same_output(one, one, example, tolerance=1e-9)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            return True
        return same_output(one, two, example, tolerance=1e-9 if steady else torch.inf)


@torch.no_grad()
def same_output(one: nn.Module, two: nn.Module, example: Batch, *, tolerance: float) -> bool:
    """Whether both models give outputs of the same shapes, equal up to `tolerance` of the largest entry."""
    pairs = [[t for t in tree_leaves(m(*example.args, **example.kwargs)) if isinstance(t, Tensor)] for m in (one, two)]
    if [t.shape for t in pairs[0]] != [t.shape for t in pairs[1]]:
        return False
    return all(
        bool(torch.isfinite(a).all()) and bool(((a - b).abs() <= tolerance * a.abs().max()).all())
        for a, b in zip(*pairs, strict=True)
        if a.numel()
    )


@torch.no_grad()
def randomise(twin: nn.Module) -> None:
    """Random parameters and statistics, so that no zero or one of an initialisation hides a difference."""
    generator = torch.Generator().manual_seed(0)
    for p in twin.parameters():
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.copy_(drawn / max(1, p[0].numel()) ** 0.5 if p.dim() > 1 else 0.5 + drawn.abs() / 2)
    for module in twin.modules():
        if isinstance(module, _NORMS) and isinstance(module.running_mean, Tensor):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
            variance = 0.5 + torch.rand(module.running_mean.shape, generator=generator)
            module.running_var.copy_(variance)  # type: ignore[union-attr]
