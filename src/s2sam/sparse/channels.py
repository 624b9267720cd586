"""Channels that live and die together, as data: which rows of which tensors a channel is, and what follows from it.

A convolution's output channel is a row of its weight, an entry of its bias and of the BatchNorm behind it, and a column
of every layer that reads it; where a residual sum or a shared depthwise layer joins several convolutions, all of their
rows go together. A :class:`ChannelGroup` lists these for channels that can be chosen independently of each other:

    mask of a tensor = product over its dimensions of keep[owner]          (rows that no channel owns stay)

`s2sam.sparse.channel_graph` finds the groups of a model. Everything here is pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2sam.sparse.names import unknown
from s2sam.sparse.topk import global_topk, topk_mask

OUT, IN, SCALE, SHIFT, SLOPE, STATISTIC = "out", "in", "scale", "shift", "slope", "statistic"


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one tensor, and for each of its rows the channel of the group that it belongs to, or -1.

    `role` says what the rows are to the channel: "out" make it (weights), "shift" are added to it (biases), "scale"
    multiply it (gamma of BatchNorm), "slope" are of PReLU, "statistic" the buffers of BatchNorm; "in" are the weights
    that read it.
    """

    name: str
    dim: int
    owner: Tensor
    role: str

    def alive(self, keep: Tensor) -> Tensor:
        """Which rows stay when the channels `keep` do, as a bool tensor."""
        return (self.owner < 0) | keep.to(self.owner.device)[self.owner.clamp(min=0)]

    def columns(self, tensor: Tensor, size: int) -> Tensor:
        """What of `tensor` belongs to each channel, shape (size, most entries of a channel), filled up with zeros."""
        rows = tensor.detach().movedim(self.dim, 0).reshape(len(self.owner), -1)
        mine = (self.owner >= 0).nonzero().flatten()
        owner = self.owner[mine]
        order = torch.argsort(owner, stable=True)
        counts = torch.bincount(owner, minlength=size)
        rank = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner[order]]
        found = rows.new_zeros(size, int(counts.max()), rows.shape[1])
        found[owner[order].to(rows.device), rank.to(rows.device)] = rows[mine[order].to(rows.device)]
        return found.flatten(1)


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """`size` channels that can be pruned one by one; `name` is that of the first layer which makes them."""

    name: str
    size: int
    members: tuple[Member, ...]

    def of(self, *roles: str) -> list[Member]:
        """The members with one of these roles."""
        return [m for m in self.members if m.role in roles]

    def matrix(self, tensors: Mapping[str, Tensor], *roles: str) -> Tensor:
        """All entries of these roles, a row for each channel; shape (size, entries), on the first tensor's device."""
        parts = [m.columns(tensors[m.name], self.size) for m in self.of(*roles)]
        return torch.cat([p.to(parts[0]) for p in parts], 1)

    def to(self, device: torch.device) -> ChannelGroup:
        """The same with its owners on `device`."""
        return replace(self, members=tuple(replace(m, owner=m.owner.to(device)) for m in self.members))


@dataclass(frozen=True, eq=False)
class Channels:
    """The groups of a model, and why other layers keep all their channels."""

    groups: tuple[ChannelGroup, ...]
    dense: Mapping[str, str]

    def __getitem__(self, name: str) -> ChannelGroup:
        """The group of that name; ValueError if there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise unknown("channel group", name, [g.name for g in self.groups])

    @property
    def total(self) -> int:
        """Channels in all groups."""
        return sum(g.size for g in self.groups)

    def all_alive(self) -> dict[str, Tensor]:
        """Channel masks that keep everything."""
        return {g.name: torch.ones(g.size, dtype=torch.bool) for g in self.groups}

    def without(self, names: Iterable[str], reason: str) -> Channels:
        """The same without groups that have one of the tensors `names` among those that make their channels."""
        names = set(names)
        out = {g.name for g in self.groups if any(m.name in names for m in g.of(OUT))}
        left = tuple(g for g in self.groups if g.name not in out)
        return Channels(left, {**self.dense, **dict.fromkeys(sorted(out), reason)})


def rows(groups: Sequence[ChannelGroup], keep: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Which rows stay, as bool tensors by tensor name and dimension; a dimension that loses none is not named.

    >>> member = Member("weight", 0, torch.tensor([0, 0, 1, -1]), OUT)
    >>> rows([ChannelGroup("", 2, (member,))], {"": torch.tensor([False, True])})["weight"][0].tolist()
    [False, False, True, True]
    """
    found: dict[str, dict[int, Tensor]] = {}
    for group in groups:
        for member in group.members if not bool(keep[group.name].all()) else ():
            dims, alive = found.setdefault(member.name, {}), member.alive(keep[group.name])
            dims[member.dim] = dims[member.dim] & alive if member.dim in dims else alive
    return found


def masks_of(
    groups: Sequence[ChannelGroup], keep: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Masks of `tensors`, True where an entry stays; those that no group touches are all True.

    >>> member = Member("weight", 1, torch.tensor([0, 1]), IN)
    >>> group = ChannelGroup("", 2, (member,))
    >>> masks_of([group], {"": torch.tensor([True, False])}, {"weight": torch.zeros(2, 2)})["weight"].tolist()
    [[True, False], [True, False]]
    """
    masks = {name: torch.ones_like(t, dtype=torch.bool) for name, t in tensors.items()}
    for name, dims in rows(groups, keep).items():
        for dim, alive in dims.items() if name in masks else ():
            shape = [-1 if d == dim else 1 for d in range(masks[name].dim())]
            masks[name] &= alive.to(masks[name].device).view(shape)
    return masks


def touched(groups: Sequence[ChannelGroup], *roles: str) -> list[str]:
    """Names of the tensors that have a member (of these roles, if any are given), each once."""
    return list(dict.fromkeys(m.name for g in groups for m in g.members if not roles or m.role in roles))


def choose_channels(scores: Mapping[str, Tensor], k: int, least: Mapping[str, int]) -> dict[str, Tensor]:
    """Channel masks with exactly `k` True: the largest scores of all groups, and `least` of each group at least.

    Where more than `k` are guaranteed, they are what is kept.

    >>> found = choose_channels({"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([1.0, 0.0])}, 2, {"a": 0, "b": 1})
    >>> found["a"].tolist(), found["b"].tolist()
    ([True, False], [True, False])
    """
    sure = {name: topk_mask(s, least[name]) for name, s in scores.items()}
    others = {name: s.masked_fill(sure[name], -torch.inf) for name, s in scores.items()}
    rest = global_topk(others, max(0, k - sum(least.values())))
    return {name: mask | rest[name] for name, mask in sure.items()}


def cost(group: ChannelGroup, totals: Mapping[str, int], lengths: Mapping[str, Sequence[int]]) -> Tensor:
    """What one channel costs in weights or in multiply-accumulates: its share of the totals of the tensors it is in.

    Args:
        group: of the channels.
        totals: numbers of weights, or MACs (`s2sam.analysis.flops.count_macs`), by tensor name; others count nothing.
        lengths: the tensors' shapes.

    Shape: (size,), float64. The costs of two channels that meet in one layer overlap in what they share.

    >>> member = Member("weight", 0, torch.tensor([0, 1, 1]), OUT)
    >>> cost(ChannelGroup("", 2, (member,)), {"weight": 30}, {"weight": (3, 10)}).tolist()
    [10.0, 20.0]
    """
    found = torch.zeros(group.size, dtype=torch.float64)
    for m in group.of(OUT, IN):
        mine = m.owner[m.owner >= 0].cpu()
        share = totals.get(m.name, 0) / lengths[m.name][m.dim]
        found += torch.bincount(mine, minlength=group.size) * share
    return found
