"""LT: lottery tickets by iterative magnitude pruning with rewinding (Frankle and Carbin 2019, arXiv:1803.03635)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2sam.hooks import Handle, Phase, StepContext, check_number, step_hooks
from s2sam.sparse import scores, sync
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.budget import Distribution
from s2sam.sparse.options import check_whole
from s2sam.sparse.part import Part
from s2sam.sparse.prunable import unwrap


@dataclass(frozen=True)
class LTOptions:
    """The share of the remaining weights to remove at each level, and the step whose weights they are rewound to.

    `min_per_filter`: how many of its largest weights a filter keeps, while there are enough; 0: as published.
    """

    rate: float = 0.2
    rewind_step: int = 0
    min_per_filter: int = 1

    def __post_init__(self) -> None:
        if not 0 < check_number("rate", self.rate, 0.0, 1.0) < 1:
            raise ValueError(f"rate must be above 0 and below 1, got {self.rate!r}")
        check_whole("rewind_step", self.rewind_step, 0)
        check_whole("min_per_filter", self.min_per_filter, 0)


class LT(Sparsifier):
    """Train dense, remove a share of the smallest |w|, rewind the others to where they began, train again, and so on.

    s_k = min(s, 1 - (1 - rate)^k),  k = 0 .. levels;  w <- m_k w_0

    `levels + 1` trainings: the first is dense, the last has exactly the target. Weights are compared over all layers
    together; another `distribution` compares within each layer, which is at s_l s_k / s on its way to its target s_l.
    Masks are nested. :meth:`next_level` between two trainings makes the masks and resets all that has been learned:
    every parameter and buffer of the model (BatchNorm's statistics among them) is a copy of the snapshot again, kept
    weights bit by bit, pruned ones 0; the state of the optimizers is empty, and with it S2SAM's direction, so that the
    first step of a level is a plain one; gradients are gone. The snapshot is taken when this is attached, or after step
    `rewind_step` of the first training (late rewinding, arXiv:1903.01611). Learning rate schedule, order of the data,
    moving averages, and what an optimizer keeps in its param_groups are the loop's: start them afresh.

    After facebookresearch/open_lth:pruning/sparse_global.py, which prunes the output layer as well unless told not to
    (`exclude`). On several ranks all begin a level with rank 0's weights.

    Cost: levels + 1 trainings (12 for 90 % at a rate of 0.2); a copy of the model on the CPU, also in the state_dict.

    >>> import torch
    >>> from s2sam import sparsify
    >>> layer = nn.Linear(10, 10)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    >>> lt = sparsify(layer, optimizer, method="lt", sparsity=0.4)
    >>> while True:
    ...     for _ in range(5):                                           # a whole training
    ...         layer(torch.randn(4, 10)).square().sum().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...     print(lt.level, lt.levels, round(lt.sparsity(), 2))
    ...     if not lt.next_level():
    ...         break
    0 3 0.0
    1 3 0.2
    2 3 0.36
    3 3 0.4

    Raises:
        ValueError: rate or rewind_step cannot be used; rewind_step is not below `total_steps`, if that is given.
        RuntimeError: :meth:`next_level` before step `rewind_step`.
    """

    method = "lt"
    cannot_adopt = "its first training is dense"
    default_distribution = "global"
    Options = LTOptions
    options: LTOptions

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self._model = unwrap(model)
        self._snapshot: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}
        self._watchers: list[Handle] = []
        super().__init__(model, *args, **kwargs)
        if self._ready:
            self._take_snapshot()
        for part in self.parts:
            self._watchers.append(step_hooks(part.optimizer).register(Phase.TOPOLOGY, self._after_step))

    def check_options(self) -> None:
        """Make the plan: what each level keeps."""
        step, total = self.options.rewind_step, self.total_steps
        if total is not None and step >= total:
            raise ValueError(
                f"rewind_step {step} is not inside the first training, which has {total} steps; lower it, "
                "or train longer"
            )
        self.budget(self.final_sparsity, self.distribution, self.power_scale)  # refuses what is not feasible
        self.sparsities = level_sparsities(self.final_sparsity, self.options.rate)
        self.levels = len(self.sparsities) - 1
        self.plan = self.budgets(self.sparsities)

    def target_sparsity(self, t: int) -> float:
        """That of the level."""
        return self.sparsities[self.level]

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """All active."""
        return {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}

    @torch.no_grad()
    def next_level(self) -> bool:
        """Prune and rewind; False, and nothing done, after the last level or :meth:`freeze`."""
        if self.frozen or self.level == self.levels:
            return False
        self.check_ready()
        if not self._snapshot:
            raise RuntimeError(
                f"there are no weights to rewind to before step rewind_step={self.options.rewind_step}; train at least "
                "as long before next_level()"
            )
        for optimizer in self.optimizers:
            forget(optimizer)
        self.level += 1
        for part in self.parts:
            part.layers.follow_device()
        left = {
            name: scores.magnitude(self.weights[name]).masked_fill(~m, -torch.inf) for name, m in self.masks.items()
        }
        self._next = self.pick(left, self.plan[self.level])
        for part in self.parts:
            self.change_topology(part)
        self._rewind()
        return True

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """The part's share of the level's masks."""
        return {name: self._next[name] for name in part.layers.masks}

    def remove(self) -> None:
        """As any sparsifier."""
        super().remove()
        while self._watchers:
            self._watchers.pop().remove()

    def extra_state(self) -> dict[str, Any]:
        """The level and the snapshot."""
        return {"level": self.level, "snapshot": self._snapshot}

    def load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """Refuses a level or a snapshot that is not of this model and these settings."""
        level, snapshot = extra["level"], extra["snapshot"]
        here = {name: tensor.shape for name, tensor in self._tensors().items()}
        if not 0 <= level <= self.levels:
            raise ValueError(f"this state is at level {level} of another plan; resume with the same sparsity and rate")
        if snapshot and {name: tensor.shape for name, tensor in snapshot.items()} != here:
            raise ValueError("the snapshot in this state belongs to another model; resume with the same one")
        self.level, self._snapshot = level, {name: tensor.cpu().clone() for name, tensor in snapshot.items()}

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def _after_step(self, context: StepContext) -> None:
        self._take_snapshot()

    def _take_snapshot(self) -> None:
        at = min(part.step for part in self.parts)
        if self.level == 0 and not self._snapshot and at >= self.options.rewind_step:  # >: that step was missed
            self._snapshot = {name: t.detach().to("cpu", copy=True) for name, t in self._tensors().items()}

    def _rewind(self) -> None:
        tensors = self._tensors()
        for name, tensor in tensors.items():
            tensor.copy_(self._snapshot[name])
        sync.broadcast(tensors.values())
        for part in self.parts:
            part.layers.apply_to_weights()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def level_sparsities(sparsity: float, rate: float) -> list[float]:
    """0, then 1 - (1 - rate)^k as long as that is below `sparsity`, then `sparsity`.

    >>> [round(s, 3) for s in level_sparsities(0.5, 0.2)], len(level_sparsities(0.9, 0.2)) - 1
    ([0.0, 0.2, 0.36, 0.488, 0.5], 11)
    """
    found = [0.0]
    while found[-1] < sparsity:
        reached = 1 - (1 - rate) ** len(found)
        found.append(reached if reached < sparsity - 1e-9 else sparsity)
    return found


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Empty the optimizer's state by loading an empty one, so that whoever hooks into loading hears of it.

    S2SAM does: it brings displaced weights back and has no direction afterwards. The param_groups stay as they are.
    """
    groups, first = [], 0
    for group in optimizer.param_groups:
        last = first + len(group["params"])
        groups.append({**group, "params": list(range(first, last))})
        first = last
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
