"""Soft thresholds and the number s that each layer's comes from, g(s) = sigmoid(s). Pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s2sam.hooks import check_number


def soft_threshold(theta: Tensor, s: Tensor) -> Tensor:
    """S(theta, s) = sign(theta) relu(|theta| - g(s)).

    >>> [round(w, 6) for w in soft_threshold(torch.tensor([-0.75, 0.5, 0.25]), torch.tensor(0.0)).tolist()]
    [-0.25, 0.0, 0.0]
    """
    return theta.sign() * (theta.abs() - torch.sigmoid(s)).relu()


def s_for_sparsity(weight: Tensor, sparsity: float) -> float:
    """The s whose threshold g(s) is above the share `sparsity` of all |w|: `s_init` for a wanted sparsity at the start.

    >>> s = s_for_sparsity(torch.tensor([0.1, -0.2, 0.3, 0.4]), 0.5)
    >>> round(float(torch.sigmoid(torch.tensor(s))), 6)      # half-way between the second and the third
    0.25

    Raises:
        ValueError: the share is no number from 0 to 1, or the threshold would have to be above 1, which g is not.
    """
    check_number("sparsity", sparsity, 0.0, 1.0)
    size = weight.detach().double().abs().flatten().sort().values
    k = round(sparsity * len(size))
    threshold = float((size[max(k - 1, 0)] * (k > 0) + size[min(k, len(size) - 1)]) / 2)
    if not 0 < threshold < 1:
        raise ValueError(f"no s has the threshold {threshold:g}: sigmoid(s) is between 0 and 1; scale the weights")
    return math.log(threshold / (1 - threshold))


def s_before_decay(s_end: float, sum_lr: float, weight_decay: float, momentum: float = 0.0) -> float:
    """The `s_init` that weight decay alone carries to `s_end`; `sum_lr` is the sum of the learning rates of all steps.

    s_T = s_init exp(-lambda sum_t lr_t / (1 - mu))

    Below about -104 sigmoid(s) is 0 in float32, and its slope too: decay alone moves s there, and nothing is pruned.

    >>> round(s_before_decay(-0.031, 500_400 * 0.256 / 2, 2.2517578e-5, 0.875), -2)      # ImageNet, 100 epochs, cosine
    -3200.0
    >>> round(s_before_decay(-140.0, 62_560 * 0.1 / 2, 1e-4, 0.9), -2)      # CIFAR, 160: from there -140 is all it does
    -3200.0

    Raises:
        ValueError: momentum is not in [0, 1), or the sum or the decay is negative.
    """
    check_number("sum_lr", sum_lr)
    check_number("weight_decay", weight_decay)
    check_number("momentum", momentum, 0.0, 0.999999)
    return s_end * math.exp(weight_decay * sum_lr / (1 - momentum))


def logit(a: Tensor) -> Tensor:
    """log(a / (1 - a)), the s whose threshold is a; from a = 0.999 on its tangent, so that larger is larger.

    >>> [round(x, 3) for x in logit(torch.tensor([0.5, 0.999, 1.0, 2.0])).tolist()]
    [0.0, 6.907, 7.908, 1008.909]
    """
    top = 0.999
    tangent = math.log(top / (1 - top)) + (a - top) / (top * (1 - top))
    return torch.where(a < top, torch.logit(a.clamp(torch.finfo(a.dtype).tiny, top)), tangent)


def shift(above: list[Tensor], masks: list[Tensor]) -> Tensor:
    """What to add to s so that all that is not in the masks is at or below its threshold, and the rest above it."""
    device = above[0].device
    highest = [a.masked_fill(mask, -torch.inf).amax().to(device) for a, mask in zip(above, masks, strict=True)]
    lowest = [a.masked_fill(~mask, torch.inf).amin().to(device) for a, mask in zip(above, masks, strict=True)]
    out = torch.stack(highest).amax()
    return torch.where(out.isfinite(), out, torch.stack(lowest).amin().clamp(max=0.0))
