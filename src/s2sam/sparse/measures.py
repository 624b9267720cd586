"""What a sparsifier tells of its masks: how sparse it is, where, how far the topology has moved, and what is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from s2sam.sparse import sync
from s2sam.sparse.masks import counts as count_true
from s2sam.sparse.places import Places, mask_copy
from s2sam.sparse.report import Report, make_report

if TYPE_CHECKING:
    from s2sam.sparse.part import Part
    from s2sam.sparse.prunable import Entry


class Measures:
    """Reads masks and weights, changes nothing."""

    parts: Sequence[Part]
    places: Places
    zeroes_active: ClassVar[bool]
    _ready: bool  # whether there are masks
    _stayed: dict[str, Tensor]  # active ever since, from the first change on
    _blank: set[str]  # layers that were 0 where active when they were attached
    _warned: bool
    entries: Sequence[Entry]
    weights: dict[str, Tensor]
    _initial: dict[str, Tensor]  # masks at the first step, and the union of all since; kept
    _explored: dict[str, Tensor]  # from the first change on
    _final_sparsity: float

    @property
    def final_sparsity(self) -> float:
        """The sparsity that was asked for. It holds for the whole run: budgets and schedules are made from it."""
        return self._final_sparsity

    @final_sparsity.setter
    def final_sparsity(self, value: float) -> None:
        raise AttributeError(
            f"the sparsity of a run cannot change under way, from {self._final_sparsity} to {value}; call "
            "sparsifier.remove() and sparsify() with the new one"
        )

    @property
    def masks(self) -> dict[str, Tensor]:
        """The live masks by parameter name, True = active, in the order of the model. Read them, do not change them."""
        found = {name: mask for part in self.parts for name, mask in part.layers.masks.items()}
        return {name: found[name] for name in self.weights}

    def sparsity(self) -> float:
        """The share of the prunable weights that are pruned, measured: masked, and exactly 0 in the weights.

        Warns once if most of the others are 0 too, see :meth:`verify`. Raises as :meth:`check_places`.
        """
        found = self.report().sparsity
        if not self._warned and (told := self.zeroed_by_others()):
            self._warned = True
            warnings.warn(f"sparsity() counts masks, and {told}", stacklevel=2)
        return found

    def report(self) -> Report:
        """Every parameter: layer, shape, kept, not 0, sparsity, and why it is not prunable; `str()` of it is a table.

        Raises as :meth:`check_places`.
        """
        self.check_places()
        return make_report(self.entries, self.masks)

    def density(self) -> dict[str, float]:
        """The share of active weights per layer."""
        return {name: n / self.weights[name].numel() for name, n in count_true(self.masks).items()}

    def survival(self) -> float:
        """The share of the weights active at the start that are active now."""
        if not self._initial:
            return 1.0
        alive = count_true({name: self._initial[name].to(m.device) & m for name, m in self.masks.items()})
        return sum(alive.values()) / sum(count_true(self._initial).values())

    def explored(self) -> float:
        """The share of the prunable weights that were active at any time so far (R_s of arXiv:2102.02887)."""
        union = count_true(self._explored or self.masks)
        return sum(union.values()) / sum(w.numel() for w in self.weights.values())

    def apply_to(self, model: nn.Module) -> nn.Module:
        """Zero in another model, an average or a copy of the one that is trained, what is pruned there; it is returned.

        An average (torch's AveragedModel) of a method that moves its masks is denser than the network, as it remembers
        weights that were dropped. Call this before it is evaluated or saved, or after each of its updates. Parameters
        are found by name, inside AveragedModel, DDP and compiled wrappers; buffers stay as they are.

        >>> import torch
        >>> from s2sam import sparsify
        >>> net = nn.Linear(8, 8)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> moving = sparsify(net, optimizer, method="set", sparsity=0.75, delta_t=1)
        >>> ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        >>> for _ in range(6):
        ...     net(torch.randn(4, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     ema.update_parameters(net)
        >>> pruned = ~moving.masks["weight"]
        >>> bool(ema.module.weight[pruned].any()), bool(moving.apply_to(ema).module.weight[pruned].any())
        (True, False)

        Raises:
            ValueError: the model's parameters have other names or shapes, or are the trained ones; nothing is changed.
            RuntimeError: there are no masks yet.
        """
        self.require_masks()
        weights, masks = self.held()
        mask_copy(model, weights, masks)
        return model

    def held(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All parameters that are masked, and their masks, by name."""
        return dict(self.weights), self.masks

    def verify(self) -> None:
        """Check masks and weights; call it on all ranks, and all raise what one of them finds.

        Raises:
            RuntimeError: a pruned weight is not exactly 0, most weights that were always active are, the model holds
                other weights, or ranks disagree on the masks.
        """
        problem = None
        try:
            self.check_fit()
        except RuntimeError as error:
            problem = error
        sync.check_same(self.masks, problem)

    def check_fit(self) -> None:
        """As :meth:`verify`, but asks no other rank."""
        self.require_masks()
        self.check_places()
        for part in self.parts:
            part.layers.follow_device()
        wrong = [name for part in self.parts for name in part.layers.misfits()]
        if wrong:
            raise RuntimeError(
                f"the masks do not fit the weights: {len(wrong)} layers have pruned weights that are not 0 "
                f"({', '.join(wrong[:3])}); load the weights and the sparsifier's state from one checkpoint, or call "
                "sparsifier.apply() to prune the weights that are there"
            )
        if told := self.zeroed_by_others():
            raise RuntimeError(told)

    def check_places(self) -> None:
        """Raise RuntimeError if the model holds other parameters in the place of those that are masked."""
        if missing := self.places.missing():
            raise RuntimeError(
                f"the model no longer holds {len(missing)} of the {len(self.weights)} weights that this sparsifier "
                f"masks, for instance {missing[0]!r}: a new layer, FSDP (fully_shard) or a conversion has put others "
                "in their place; keep sparsifier.state_dict(), call sparsifier.remove(), build the optimizer from the "
                "parameters that are there, and load the state into sparsify(..., init=False)"
            )

    def zeroed_by_others(self) -> str:
        """A sentence if more than half of the weights that were active at all times are exactly 0; else "".

        Layers that were 0 when they were attached do not count, nor do methods that zero active weights themselves.
        """
        held = {name: mask for name, mask in (self._stayed or self.masks).items() if name not in self._blank}
        if self.zeroes_active or not held:
            return ""
        zero, total = (sum(found.values()) for found in self.zeros_in(held))
        if 2 * zero <= total:
            return ""
        return (
            f"{zero} of the {total} weights that were active at all times are exactly 0: something else has zeroed "
            "them (weights that were sparse already got new masks, or another tool prunes this model); load weights "
            "and masks from one checkpoint, or call sparsifier.remove() and sparsify() again with init='adopt'"
        )

    def mostly_zero(self) -> set[str]:
        """The layers most of whose active weights are exactly 0."""
        zero, total = self.zeros_in(self.masks)
        return {name for name in total if 2 * zero[name] > total[name]}

    def all_zero(self) -> set[str]:
        """The layers whose weights are all exactly 0."""
        real = {name: w.detach() for name, w in self.weights.items() if w.device.type != "meta"}
        nonzero = count_true({name: w != 0 for name, w in real.items()})
        return {name for name, n in nonzero.items() if n == 0}

    def zeros_in(self, masks: Mapping[str, Tensor]) -> tuple[dict[str, int], dict[str, int]]:
        """How many of each layer's weights in the masks are 0, and how many these are; one host read."""
        zero = {f"zero {n}": m.to(self.weights[n].device) & (self.weights[n].detach() == 0) for n, m in masks.items()}
        found = count_true({**zero, **masks})
        return {name: found[f"zero {name}"] for name in masks}, {name: found[name] for name in masks}

    def require_masks(self) -> None:
        """Raise RuntimeError if there are no masks yet."""
        if not self._ready:
            raise RuntimeError("init=False: load the masks with sparsifier.load_state_dict(...) before the first step")
