"""SAM: the two-gradient method that S2SAM is measured against, as hooks on any torch optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2sam.detached import DetachedCopy
from s2sam.hooks import (
    Closure,
    Phase,
    StepContext,
    check_number,
    check_optimizers,
    claim_sharpness,
    release_sharpness,
    rho_key,
)
from s2sam.sam.displacement import pieces, restore_
from s2sam.sam.model_hooks import check_models
from s2sam.sam.norms import all_finite, total_norm
from s2sam.sam.scales import SCALES, fixed
from s2sam.sam.sharded import check_sharding, has_shards, local, place_gradients, refuse_inside_forward, weights_move
from s2sam.tensors import by_kind

SAM_SCALES = ("norm", "relative", "asam", "filter", "rms")  #: of SCALES; "step" has no norm of its own


class SAM:
    r"""Displace by the gradient of the same batch, then step from the clean weights with the second gradient.

    .. math::
        e_t = \rho\, \nabla L_t(w_t) / \|\nabla L_t(w_t)\|_2, \qquad g_t = \nabla L_t(w_t + e_t), \qquad
        w_{t+1} = w_t - \eta\,\mathrm{base}(g_t, w_t)

    Use it as `loss = optimizer.step(closure)`: the closure runs forward and backward and returns the loss, and is
    called exactly twice. Gradients are cleared before the second call, masks of an attached sparsifier act before the
    norm, and the loss returned is the first one. With `model`, buffers (BatchNorm statistics) come from the first pass.

    Args:
        optimizer: any first-order torch optimizer.
        model: Module or list of Modules whose buffers the second pass must not change.
        rho: radius, >= 0, put into every param_group that has no "rho" of its own.
        scale: "norm", "relative", "asam", "filter" or "rms", as in :class:`~s2sam.sam.single_step.S2SAM`.

    Raises:
        ValueError: as S2SAM.
        RuntimeError: step() without a closure, which is also what a GradScaler does.

    Cost: two gradients a step; one copy of the parameters while the second is computed.

    Source: Foret et al., ICLR 2021; buffers from the first pass as in google-research/sam:sam_jax.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = torch.optim.SGD([w], lr=0.1)
        >>> sam = SAM(optimizer, rho=0.5)
        >>> def closure():
        ...     loss = (w ** 2).sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item(), round(w.item(), 4)    # 3 - 0.1 * (3 + 0.5)
        (4.5, 2.65)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        model: nn.Module | Sequence[nn.Module] | None = None,
        rho: float = 0.05,
        scale: str = "norm",
    ) -> None:
        if scale not in SAM_SCALES:
            raise ValueError(f"scale must be one of {', '.join(map(repr, SAM_SCALES))} for SAM, got {scale!r}")
        check_number("rho", rho)
        self.optimizer, self.scale = optimizer, SCALES[scale]
        self._models = check_models(model)
        check_sharding(check_optimizers(optimizer), self._models)
        (self._hooks,) = claim_sharpness([optimizer], self, rho)
        self._hooks.run_closure = self._two_passes
        self._handle = self._hooks.register(Phase.CHECK, self._check)
        self._finite = True

    def __reduce__(self) -> tuple[type[DetachedCopy], tuple[str, str]]:
        return DetachedCopy, ("a SAM", "call SAM(optimizer, model=model) on the copied model and optimizer")

    def remove(self) -> None:
        """Take everything off the optimizer again."""
        self._handle.remove()
        release_sharpness(self._hooks)

    def _check(self, context: StepContext) -> None:
        if not context.has_closure:
            raise RuntimeError(
                "SAM computes two gradients a step: call optimizer.step(closure) with a closure that runs forward and "
                "backward and returns the loss; a GradScaler cannot do that, so use bfloat16 autocast or S2SAM"
            )
        if has_shards(context.gradients()):
            place_gradients(context.parameters())
        context.skip = not (self._finite and all_finite(context.gradients()))

    def _two_passes(self, closure: Closure) -> Any:
        self._hooks.preview = any(self._rho(group) > 0 for group in self.optimizer.param_groups)
        try:
            loss = closure()
        finally:
            self._hooks.preview = False
        groups = [(self._rho(g), [p for p in g["params"] if p.grad is not None]) for g in self.optimizer.param_groups]
        if has_shards(p for _, params in groups for p in params):
            place_gradients(p for _, params in groups for p in params)
        blocks = [(rho, ps) for rho, params in groups if rho > 0 for ps in by_kind(params)]
        self._finite = all_finite([p.grad for _, ps in blocks for p in ps if p.grad is not None])
        if not blocks or not self._finite:
            return loss
        self._hooks.mask_gradients()
        with self._displaced(blocks), self._frozen_buffers():
            closure()
        return loss

    def _rho(self, group: dict[str, Any]) -> float:
        """The radius of a group; the common one where a checkpoint of the plain optimizer has none."""
        key = rho_key(self.optimizer)
        return float(group.get(key, self.optimizer.defaults[key]))

    @contextmanager
    def _displaced(self, blocks: list[tuple[float, list[Tensor]]]) -> Iterator[None]:
        """w -> w + e, with the gradients cleared; back to w exactly, whatever happens inside."""
        with torch.no_grad():
            refuse_inside_forward([p for _, ps in blocks for p in ps])
            gradients = [[p.grad for p in ps if p.grad is not None] for _, ps in blocks]
            shards = [local(ps) for _, ps in blocks]
            weights = [list(torch._foreach_mul(ps, 1)) for ps in shards]
            norm = total_norm([self.scale.direction_norm(g, ps) for g, (_, ps) in zip(gradients, blocks, strict=True)])
            unit = self.scale.unit([p for _, ps in blocks for p in ps])
            self._moves(blocks)
            for g, (rho, _), ps in zip(gradients, blocks, shards, strict=True):
                c = fixed(rho, ps[0]) if not self.scale.common else self.scale.coefficient(rho, norm, unit)
                c = c.to(ps[0].device)
                for w, d in pieces(ps, local(g)):
                    torch._foreach_add_(w, torch._foreach_mul(self.scale.shaped(d, w), c))
        torch.clear_autocast_cache()  # copies of the weights in an open autocast context, which moving in place leaves
        self.optimizer.zero_grad(set_to_none=True)
        try:
            yield
        finally:
            with torch.no_grad():
                self._moves(blocks)
                for (_, ps), saved in zip(blocks, weights, strict=True):
                    restore_(local(ps), saved)
            torch.clear_autocast_cache()

    @staticmethod
    def _moves(blocks: list[tuple[float, list[Tensor]]]) -> None:
        """Whoever holds something made of sharded weights learns that they move."""
        parameters = [p for _, ps in blocks for p in ps]
        if has_shards(parameters):
            weights_move(parameters)

    @contextmanager
    def _frozen_buffers(self) -> Iterator[None]:
        """Buffers of the models are what they were before, whatever happens inside."""
        buffers = [b for model in self._models for b in model.buffers()]
        saved = [b.clone() for b in buffers]
        try:
            yield
        finally:
            with torch.no_grad():
                for b, old in zip(buffers, saved, strict=True):
                    b.copy_(old)
