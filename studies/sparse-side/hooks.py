"""HAM and SparseOpt: two published additions to an optimizer's step, as hooks on an optimizer that stays as it is.

    optimizer  = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    sparsifier = sparsify(model, optimizer, method="rigl", sparsity=0.9, total_steps=T)
    SparseOpt(sparsifier)                          # before the optimizer's step: scales gradients, neuron by neuron
    HAM(optimizer, alpha=200.0, beta=1e-3)         # after it: multiplies weights

The training loop does not change. README.md says what they were found to do. Both keep what the library promises:
pruned weights stay exactly 0, a skipped step changes nothing, and a step in which RigL changes its masks in place of
moving the weights stays as it is.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor
from torch.optim import Optimizer

from s2sam.hooks import Handle, Phase, StepContext, check_number, step_hooks
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.part import Part

CLAMP = 5.0  #: of HAM's exponent in one step, as in the authors' code
LARGEST_NORM = 1000.0  #: of one weight tensor after HAM's step


class _Hook:
    """Registered phases, which :meth:`remove` takes away again."""

    def __init__(self) -> None:
        self._handles: list[Handle] = []

    def remove(self) -> None:
        """Take the hooks away; the weights stay as they are."""
        while self._handles:
            self._handles.pop().remove()


class HAM(_Hook):
    """Hyperbolic aware minimization: after the optimizer's step every weight is multiplied by a factor.

        w <- w exp(-lr (alpha sign(w) g + beta))          w: after the optimizer's step, g: the gradient before it

    A weight moves faster the larger it is. g is the gradient that the optimizer was given, without its weight decay and
    momentum. Only parameters with two dimensions or more are multiplied: no bias, no BatchNorm. The exponent is kept
    within [-5, 5]. All of this is as in the authors' code, but for one thing: where the norm of a tensor would pass
    1,000 theirs scales the tensor down to it; here that is an error, before the weights change.

    Args:
        optimizer: any that `step_hooks` can hook.
        alpha: how strongly the gradient counts, at least 0.
        beta: a decay, as decoupled weight decay; at least 0. alpha = beta = 0 leaves every step as it is, bit for bit.
        scale_down: scale as the authors' code does, in place of that error.

    Raises:
        ValueError: alpha or beta is not such a number.
        RuntimeError: in a step: weights would become too large, or a GradScaler has left unscaling to the optimizer.

    Source: Jacobs, Gadhikar, Rubio-Madrigal, Burkholz, ICLR 2026, arXiv 2506.02630; their code is in the README of
    github.com/TomJacobs05/HAM (commit 5128597), whose defaults alpha and beta are here.
    Cost: one new tensor per weight, five elementwise passes over it and one read by the host in each step; no state.
    """

    def __init__(
        self, optimizer: Optimizer, *, alpha: float = 200.0, beta: float = 1e-3, scale_down: bool = False
    ) -> None:
        super().__init__()
        self.alpha, self.beta = check_number("alpha", alpha, 0.0), check_number("beta", beta, 0.0)
        self.scale_down = scale_down
        self._handles.append(step_hooks(optimizer).register(Phase.REMASK, self._after_step))

    def _after_step(self, context: StepContext) -> None:
        if context.replace or context.nothing_moved():
            return
        if getattr(context.optimizer, "grad_scale", None) is not None:
            raise RuntimeError("HAM needs unscaled gradients; call scaler.unscale_(optimizer) before scaler.step")
        weights, moved = [], []
        for group in context.optimizer.param_groups:
            for w in group["params"]:
                if w.grad is not None and w.dim() > 1:
                    weights.append(w)
                    moved.append(multiplied(w, w.grad, group["lr"], self.alpha, self.beta))
        if not moved:
            return
        norms = [float(torch.linalg.vector_norm(w)) for w in moved]
        largest = max(norms, key=lambda norm: math.inf if math.isnan(norm) else norm)
        if not largest <= (sys.float_info.max if self.scale_down else LARGEST_NORM):  # NaN neither
            rates = ", ".join(f"{float(group['lr']):g}" for group in context.optimizer.param_groups)
            raise RuntimeError(
                f"HAM's step would bring the norm of a weight tensor to {largest:.3g}, above {LARGEST_NORM:g}, and was "
                f"not made; lower alpha (now {self.alpha:g}), beta (now {self.beta:g}) or lr (now {rates})"
            )
        for w, new, norm in zip(weights, moved, norms, strict=True):
            w.copy_(new if norm <= LARGEST_NORM else new * (LARGEST_NORM / norm))


def multiplied(w: Tensor, g: Tensor, lr: float | Tensor, alpha: float | Tensor, beta: float) -> Tensor:
    """w exp(-lr (alpha sign(w) g + beta)), with an exponent within [-5, 5]; of the shape of w."""
    return w * (-lr * (alpha * w.sign() * g + beta)).clamp(-CLAMP, CLAMP).exp()


class SparseOpt(_Hook):
    """SparseOpt: before the optimizer's step the gradient of each neuron's incoming weights is scaled by its density.

        g_i <- g_i sqrt(1 - s_i) / sqrt(1 - s_avg)       s_i: share of pruned weights of neuron i, s_avg: of its layer

    BatchNorm behind a neuron divides by the deviation of what goes in, which is smaller the fewer inputs there are, and
    so makes the gradients of sparse neurons larger by 1 / sqrt(1 - s_i); this takes that back. The mean square of a
    layer's factors is 1; in a dense layer each is exactly 1. Momentum sees scaled gradients, weight decay no scale.
    Masks that change take their factors with them. RigL grows by unscaled gradients: of the two variants that the
    authors tell of, the one that explores more masks; which one their tables use we could not find out.

    Args:
        sparsifier: what `sparsify()` gave; all its layers of two dimensions or more are scaled, those of all its
            optimizers, whether BatchNorm follows or not (the rule names no exception). A neuron is a row along
            dimension 0.

    Source: Adnan, Jain, Jacobs, Sharma, Krishnan, Burkholz, Ioannou, ICML 2026, arXiv 2605.27541; the rule as one of
    the authors tells it (calgaryml/calgaryml.github.io, _posts/2026-05-04-sparseopt.md).
    Cost: one pass over each mask and one over its gradient in each step, no state, no read by the host.
    """

    def __init__(self, sparsifier: Sparsifier) -> None:
        super().__init__()
        for part in sparsifier.parts:

            def scale(context: StepContext, part: Part = part) -> None:
                if context.replace or context.skip:
                    return
                for name, weight in part.layers.weights.items():
                    if weight.grad is not None and weight.dim() > 1:
                        weight.grad.mul_(neuron_factors(part.layers.masks[name], weight.dtype))

            # the sparsifier's own work in this phase, which came first, is done: its method has seen the gradients
            self._handles.append(step_hooks(part.optimizer).register(Phase.MASK, scale))


def neuron_factors(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """sqrt(1 - s_i) / sqrt(1 - s_avg) for each row of a mask (n, ...), as (n, 1, ...); 0 for an empty row.

    >>> neuron_factors(torch.tensor([[True, True], [True, False]]), torch.float64).flatten() ** 2 * 3
    tensor([4., 2.], dtype=torch.float64)
    """
    wide = torch.promote_types(dtype, torch.float32)
    density = mask.flatten(1).mean(dim=1, dtype=wide)
    factors = (density / density.mean().clamp_min(torch.finfo(wide).tiny)).sqrt()
    return factors.to(dtype).view(-1, *[1] * (mask.dim() - 1))
