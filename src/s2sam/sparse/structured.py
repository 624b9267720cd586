"""Structured: the common frame of methods that prune whole channels of any model, found by its dependency graph.

A channel that is pruned is 0 everywhere: its rows in all layers that make it, their biases and BatchNorm's gamma and
beta, and the columns of the layers that read it. So nothing of it reaches the output, in training as in evaluation, its
gradients are exactly 0, and :func:`s2sam.export.slim.slim` can cut it out.

`masks` are of the prunable weights, as ever; biases, BatchNorm and depthwise weights ride along with the channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2sam.hooks import StepContext
from s2sam.sparse import sync
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.channel_graph import channel_groups
from s2sam.sparse.channels import ChannelGroup, Channels, masks_of, touched
from s2sam.sparse.masks import MaskSet, pack_bits, unpack_bits
from s2sam.sparse.options import check_batches, check_list, check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.prunable import unwrap


@dataclass(frozen=True)
class ChannelOptions:
    """Channels that each group keeps at least; shape of one sample, such as (3, 32, 32), None = that of `batches`."""

    min_channels: int = 1
    input_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_whole("min_channels", self.min_channels)
        if self.input_shape is not None:
            check_list("input_shape", self.input_shape, "(3, 32, 32)")
            for side in self.input_shape:
                check_whole("each number of input_shape", side)


class Structured(Sparsifier):
    """Sparse training whose masks follow from `keep`, the channels that are alive.

    Raises:
        ValueError: no example of an input, no channels to prune, more than one optimizer, the extra is missing.
    """

    needs_batches = True
    Options: ClassVar[type] = ChannelOptions
    options: Any

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._network = unwrap(model)
        super().__init__(model, *args, **kwargs)

    def check_options(self) -> None:
        """Find the channels."""
        if len(self.parts) > 1:
            raise ValueError(
                f"method {self.method!r} prunes channels that several layers share; hold all prunable weights in one "
                "optimizer with several param_groups"
            )
        self.channels = self._find()
        self.keep = self.channels.all_alive()  #: True = alive, by group
        names = touched(self.channels.groups)
        held: dict[str, Tensor] = dict(self._network.named_parameters())
        self.riders: list[tuple[Optimizer | None, MaskSet]] = []
        free = {name: held[name] for name in names if name in held and name not in self.weights}
        for one in self.optimizers:
            ids = {id(p) for group in one.param_groups for p in group["params"]}
            self.riders.append((one, MaskSet({name: p for name, p in free.items() if id(p) in ids})))
            free = {name: p for name, p in free.items() if id(p) not in ids}
        self.riders.append((None, MaskSet(free)))

    def _find(self) -> Channels:
        fixed = {e.name: e.reason for e in self.entries if e.reason and e.reason != "depthwise convolution"}
        found = channel_groups(self._network, self._example())
        for name, reason in fixed.items():
            found = found.without([name], f"{name!r}: {reason}")
        if not found.groups:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in list(found.dense.items())[:3])
            raise ValueError(
                f"the model has no channels to prune ({reasons or 'no layer makes any'}); prune weights instead, by a "
                "method such as 'rigl'"
            )
        return found

    def _example(self) -> Any:
        """An (input, target) pair."""
        if self.options.input_shape is not None:
            some = next(iter(self.weights.values()))
            return torch.zeros(2, *self.options.input_shape, device=some.device), None
        check_batches(self.batches)
        first = next(iter(self.batches or ()), None)
        if first is None:
            raise ValueError(
                f"method {self.method!r} finds channels by running the model: give batches=, a list of one (input, "
                "target) pair as in training, or input_shape=, such as (3, 32, 32)"
            )
        return first

    # -- the channels -----------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers of the model that are there now, by name."""
        return {**dict(self._network.named_parameters()), **dict(self._network.named_buffers())}

    def least(self, group: ChannelGroup) -> int:
        """How many channels the group keeps at least."""
        return min(int(self.options.min_channels), group.size)

    def agreed(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rank 0's choice of channels, on every rank."""
        device = next(iter(self.weights.values())).device
        moved = {name: k.to(device) for name, k in keep.items()}
        sync.broadcast_masks(moved)
        return {name: k.cpu() for name, k in moved.items()}

    def weight_masks(self) -> dict[str, Tensor]:
        """Masks of the prunable weights: True where all channels that an entry belongs to are alive."""
        return masks_of(self.channels.groups, self.keep, self.weights)

    def alive(self) -> dict[str, int]:
        """Channels alive in each group."""
        return {name: int(k.sum()) for name, k in self.keep.items()}

    def channel_sparsity(self) -> float:
        """The share of the channels of all groups that are pruned."""
        return 1 - sum(self.alive().values()) / self.channels.total

    # -- what rides along -------------------------------------------------------------------------------------------

    def _set_riders(self) -> None:
        for _, riders in self.riders:
            riders.follow_device()
            riders.set_(masks_of(self.channels.groups, self.keep, riders.weights))

    def _clear_riders(self) -> None:
        for optimizer, riders in self.riders:
            riders.follow_device()
            riders.apply_to_weights()
            if optimizer is not None:
                riders.apply_to_state(optimizer)

    def change_topology(self, part: Part) -> None:
        """And biases, BatchNorm and depthwise weights with the masks; those of new channels start at 0."""
        before = [{name: m.clone() for name, m in riders.masks.items()} for _, riders in self.riders]
        super().change_topology(part)
        self._set_riders()
        for (optimizer, riders), old in zip(self.riders, before, strict=True):
            both = {name: m & old[name].to(m.device) for name, m in riders.masks.items()}
            riders.apply_to_weights(both)
            riders.apply_to_gradients(both)
            if optimizer is not None:
                riders.apply_to_state(optimizer, both)

    @torch.no_grad()
    def mask_more(self) -> None:
        """Mask the gradients of what rides along."""
        for _, riders in self.riders:
            riders.follow_device()
            riders.apply_to_gradients()

    def moved(self, part: Part, context: StepContext) -> None:
        """Keep what rides along at 0."""
        self._clear_riders()

    def apply(self) -> None:
        """Zero pruned channels and their optimizer state now."""
        super().apply()
        self._clear_riders()

    def held(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """And what rides along."""
        weights, masks = super().held()
        for _, riders in self.riders:
            weights, masks = weights | riders.weights, masks | riders.masks
        return weights, masks

    def check_fit(self) -> None:
        """Raise RuntimeError if something of a pruned channel is not exactly 0."""
        super().check_fit()
        for _, riders in self.riders:
            riders.follow_device()
        wrong = [name for _, riders in self.riders for name in riders.misfits()]
        if wrong:
            raise RuntimeError(
                f"{wrong[0]!r} is not 0 where its channel is pruned; load the weights and the sparsifier's state from "
                "one checkpoint, or call sparsifier.apply() to prune the weights that are there"
            )

    # -- state ------------------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """The channels that are alive."""
        sizes = {g.name: g.size for g in self.channels.groups}
        return {"channels": {name: pack_bits(k) for name, k in self.keep.items()}, "sizes": sizes}

    def load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """The channels that are alive."""
        sizes = {g.name: g.size for g in self.channels.groups}
        if extra.get("sizes") != sizes:
            raise ValueError("this state belongs to a model with other groups of channels; build the model as it was")
        self.keep = {name: unpack_bits(extra["channels"][name], (n,)) for name, n in sizes.items()}
        self._set_riders()
