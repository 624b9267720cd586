"""What a sparsifier tells of its masks: how sparse it is, where, how far the topology has moved, and what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from s2sam.sparse import sync
from s2sam.sparse.masks import counts as count_true
from s2sam.sparse.report import Report, make_report

if TYPE_CHECKING:
    from s2sam.sparse.part import Part
    from s2sam.sparse.prunable import Entry


class Measures:
    """Reads masks and weights, changes nothing."""

    parts: Sequence[Part]
    _ready: bool  # whether there are masks
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
        """The share of the prunable weights that are pruned, measured: masked, and exactly 0 in the weights."""
        return self.report().sparsity

    def report(self) -> Report:
        """Every parameter: layer, shape, kept, sparsity, and why it is not prunable; `str()` of it is a table."""
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

    def verify(self) -> None:
        """Raise RuntimeError if a pruned weight is not exactly 0, or if ranks disagree on the masks; for all ranks."""
        self.check_fit()
        sync.check_same(self.masks)

    def check_fit(self) -> None:
        """Raise RuntimeError if there are no masks, or a pruned weight is not exactly 0. Asks no other rank."""
        self.require_masks()
        for part in self.parts:
            part.layers.follow_device()
        wrong = [name for part in self.parts for name in part.layers.misfits()]
        if wrong:
            raise RuntimeError(
                f"the masks do not fit the weights: {len(wrong)} layers have pruned weights that are not 0 "
                f"({', '.join(wrong[:3])}); load the weights and the sparsifier's state from one checkpoint, or call "
                "sparsifier.apply() to prune the weights that are there"
            )

    def require_masks(self) -> None:
        """Raise RuntimeError if there are no masks yet."""
        if not self._ready:
            raise RuntimeError("init=False: load the masks with sparsifier.load_state_dict(...) before the first step")
