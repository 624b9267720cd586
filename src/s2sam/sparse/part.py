"""Part: the sparse weights of one optimizer, and what happens to them in each of its steps.

    MASK      the method looks at the gradients, then those of pruned weights become 0; but if this step changes the
              topology in place of moving the weights (RigL), they stay dense, as growth scores, and the step is
              announced as replaced
    REMASK    the method may move the weights further; then weights and optimizer state of pruned positions become 0,
              whatever the optimizer did to them
    TOPOLOGY  the masks change; at dropped and grown positions weight, state and gradient become 0, so that whoever
              reads the gradient afterwards (S2SAM's direction) sees the new mask with grown positions at 0

A change that is due in a step whose gradients are not finite does not happen, and such a step is not replaced either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from s2sam.hooks import Handle, Phase, StepContext, step_hooks
from s2sam.sparse.masks import MaskSet
from s2sam.tensors import by_kind

if TYPE_CHECKING:
    from s2sam.sparse.base import Sparsifier


class Part:
    """The weights of `owner` that `optimizer` moves. `step` counts the calls of `optimizer.step()`."""

    def __init__(self, owner: Sparsifier, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
        self.owner, self.optimizer = owner, optimizer
        self.layers = MaskSet(weights)
        self.kept: dict[str, int] = {}  #: active weights per layer, known on the host
        self.step = 0
        self.plan_step = 0  #: the step of the plan whose change is made now
        self._changing = self._shown = False
        self._handles: list[Handle] = []
        if any(group.get("eps") == 0 for group in optimizer.param_groups):
            raise ValueError("eps=0 makes the update of a pruned weight 0 / 0; give the optimizer an eps above 0")

    def attach(self) -> None:
        """Register the phases."""
        hooks = step_hooks(self.optimizer)
        hooks.gradient_masks.append(self.mask_gradients)
        hooks.look_after(self.masked)
        for phase, function in (
            (Phase.MASK, self._mask),
            (Phase.REMASK, self._remask),
            (Phase.TOPOLOGY, self._topology),
        ):
            self._handles.append(hooks.register(phase, function))

    def remove(self) -> None:
        """Unregister the phases; calling it twice is harmless."""
        hooks = step_hooks(self.optimizer)
        if self.mask_gradients in hooks.gradient_masks:
            hooks.gradient_masks.remove(self.mask_gradients)
            hooks.looked_after.remove(self.masked)
        while self._handles:
            self._handles.pop().remove()

    def masked(self) -> Iterable[Tensor]:
        """The weights that no other optimizer may move: it would bring pruned ones back to life."""
        return self.layers.weights.values()

    def mask_gradients(self) -> None:
        """The gradients of pruned weights become 0, now."""
        self.layers.follow_device()
        self.layers.apply_to_gradients()
        self.owner.mask_more()

    def in_groups(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        """Name, weight and the optimizer's group of each layer."""
        names = {id(weight): name for name, weight in self.layers.weights.items()}
        for group in self.optimizer.param_groups:
            yield from ((names[id(p)], p, group) for p in group["params"] if id(p) in names)

    @torch.no_grad()
    def show_gradients(self) -> None:
        """Let the method look at the gradients, before :meth:`mask_gradients` takes those of pruned weights away."""
        self._shown = True
        self.layers.follow_device()
        if not self.owner.frozen:
            self.owner.look(self)

    def gradients(self) -> dict[str, Tensor]:
        """Copies of the layers' gradients for a :meth:`Sparsifier.look`: unscaled, 0 where not finite."""
        scale = getattr(self.optimizer, "grad_scale", None)  # of a GradScaler that leaves unscaling to the optimizer
        found = {}
        for name, weight in self.layers.weights.items():
            if weight.grad is not None:
                grad = torch.nan_to_num(weight.grad, 0.0, 0.0, 0.0)
                found[name] = grad if scale is None else grad / scale.to(grad.device)
        return found

    def resting(self) -> set[str]:
        """The layers without a gradient in this step: frozen, or in a branch that was not used."""
        return {name for name, weight in self.layers.weights.items() if weight.grad is None}

    def missed(self) -> None:
        """A step that never reached the optimizer: it counts, and what the method saw of its gradients is void."""
        self.step += 1
        self._shown = False

    def apply(self) -> None:
        """Weights and optimizer state of pruned positions become 0, now."""
        self.layers.apply_to_weights()
        if not self.owner.dense_state:
            self.layers.apply_to_state(self.optimizer)

    def due_at(self, t: int) -> int:
        """The step of the plan whose change of the topology step `t` makes; 0 for none.

        That is `t` itself; but where every batch is visited twice in a row (echo), changes that are due in a second
        visit, in which S2SAM has displaced the weights, are made in the first visit after it.
        """
        if self.owner.frozen or (step_hooks(self.optimizer).visits == 2 and t % 2 == 0):
            return 0
        planned = (t, t - 1) if step_hooks(self.optimizer).visits == 2 and t > 1 else (t,)
        return next((s for s in planned if self.owner.due(self, s)), 0)

    def replaces_next(self) -> bool:
        """Whether the next step is to change the topology in place of moving the weights."""
        return self.owner.placement == "replace" and self.due_at(self.step + 1) > 0

    def change(self, masks: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
        """Clear what must not outlive the change from `old` to `masks`: weight, state and gradient outside both."""
        both = {name: mask & masks[name] for name, mask in old.items()}
        self.layers.apply_to_weights(both)
        self.layers.apply_to_gradients(both)
        if not self.owner.dense_state:
            self.layers.apply_to_state(self.optimizer, both)

    def _mask(self, context: StepContext) -> None:
        self.owner.check_ready()
        self.plan_step = self.due_at(self.step + 1)
        due = self.plan_step > 0
        self._changing = due and not context.nothing_moved() and finite(context.gradients())
        if self._changing and self.owner.placement == "replace":
            context.replace = True
        else:
            if not self._shown and not context.skip:
                self.show_gradients()
            self.mask_gradients()
        self._shown = False

    def _remask(self, context: StepContext) -> None:
        self.owner.moved(self, context)
        self.apply()
        self.step += 1

    def _topology(self, context: StepContext) -> None:
        if self._changing:
            self._changing = False
            self.owner.change_topology(self)
        self.plan_step = 0


@torch.no_grad()
def finite(gradients: Iterable[Tensor]) -> bool:
    """Whether all gradients are finite everywhere; one host read."""
    dense = [g if g.layout == torch.strided else g.coalesce().values() for g in gradients]
    norms = torch._foreach_norm([g for g in dense if g.numel()], torch.inf)
    return all(bool(torch.stack(part).isfinite().all()) for part in by_kind(norms))
