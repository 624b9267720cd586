"""Initial weights from one generator, without touching the global random state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def build(make: Callable[[], M], generator: torch.Generator) -> M:
    """`make()` with all weights drawn from `generator`, on its device.

    The network is laid out on the meta device, where construction draws nothing, and then filled by
    :func:`kaiming_normal`. Cost: each weight is written once.
    """
    with torch.device("meta"):
        model = make()
    model.to_empty(device=generator.device)
    kaiming_normal(model, generator)
    return model


@torch.no_grad()
def kaiming_normal(model: nn.Module, generator: torch.Generator) -> None:
    """Fill `model`: convolutions and linear layers W ~ N(0, 2 / fan_in), biases 0; BatchNorm as torch does.

    Source: He et al., Delving Deep into Rectifiers, 2015, equation 10; modules are visited in `model.modules()` order.

    Raises:
        TypeError: a module holds parameters or buffers and is none of these, so that it would stay unset.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.reset_parameters()
        elif [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            raise TypeError(f"no initialisation is defined for {type(module).__name__}")


def scaled(channels: int, width: float) -> int:
    """`channels` x `width`, rounded to a whole number of channels.

    >>> scaled(16, 2.0), scaled(16, 0.5)
    (32, 8)
    """
    if not (isinstance(width, (int, float)) and abs(width) <= 1e6 and round(channels * width) >= 1):
        raise ValueError(f"width must be a number that leaves at least one of {channels} channels, got {width!r}")
    return round(channels * width)
