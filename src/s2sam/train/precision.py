"""Mixed precision and memory format: what a run computes in, and whether the device can."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn

LEAST_CHANNELS = 16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context for forwards: torch's autocast, or nothing for fp32. Weights and optimizer stay in fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """fp16 gradients underflow without a scaled loss; for the other precisions the scaler does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def check_precision(device: torch.device, precision: str) -> None:
    """Try it on a small network.

    Raises:
        ValueError: the device cannot compute in this precision.
    """
    if precision == "fp32":
        return
    try:
        _probe(device, DTYPES[precision])
    except RuntimeError as error:
        others = [name for name in ("bf16", "fp32") if name != precision]
        raise ValueError(
            f"this {device.type.upper()} cannot train in {precision} ({str(error).splitlines()[0][:80]}); "
            f"use --precision {' or '.join(others)}"
        ) from error


def to_channels_last(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with its convolutions in channels_last.

    Raises:
        ValueError: it has a convolution whose backward then writes past its memory on a CPU: 1x1 with a stride and
            fewer input channels than a vector register holds (uxlfoundation/oneDNN#6035).
    """
    for name, module in model.named_modules():
        if device.type == "cpu" and isinstance(module, nn.Conv2d):
            strided = tuple(module.kernel_size) == (1, 1) and max(module.stride) > 1
            if strided and module.in_channels // module.groups < LEAST_CHANNELS:
                raise ValueError(
                    f"channels_last would crash on this CPU: {name} is a strided 1x1 convolution of "
                    f"{module.in_channels // module.groups} channels, and oneDNN handles {LEAST_CHANNELS} and more; "
                    "leave --channels-last off, or use a wider network"
                )
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _probe(device: torch.device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(4, 4, 3, 3, generator=generator).to(device) for _ in range(2))
    a = torch.randn(4, 4, generator=generator).to(device)
    kernel, matrix = nn.Parameter(w), nn.Parameter(a)
    with torch.autocast(device.type, dtype=dtype):
        hidden = F.relu(F.conv2d(x, kernel, padding=1)).mean((2, 3))
        out = F.linear(hidden, matrix)
    out.float().square().sum().backward()
