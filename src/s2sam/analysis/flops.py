"""Multiply-accumulates of one forward pass, dense and at given densities.

    MACs_sparse = sum over weights l of density_l * MACs_l + (MACs without a weight)

Each matrix product or convolution counts for the weight whose memory takes part in it, whatever module runs it; a
weight used twice counts twice. Products of activations (attention scores) have no weight and stay dense. Element-wise
work (BatchNorm, ReLU) is not counted, as in the tables of the sparse-training literature; 1 MAC = 2 FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

NO_WEIGHT = ""


@dataclass(frozen=True)
class Flops:
    """Cost of one forward pass of one input, in multiply-accumulates."""

    macs: dict[str, int]  #: per weight, by parameter name; "" = products without a weight
    densities: dict[str, float]  #: share of nonzero weights; 1 where none is given

    @property
    def dense(self) -> int:
        """MACs with all weights."""
        return sum(self.macs.values())

    @property
    def sparse(self) -> float:
        """MACs with only the active weights, sum of density * MACs."""
        return sum(self.densities.get(name, 1.0) * macs for name, macs in self.macs.items())

    @property
    def fraction(self) -> float:
        """sparse / dense."""
        return self.sparse / self.dense if self.dense else 1.0


def count_macs(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Dense MACs of `model(*inputs)` per weight name, in the order of the parameters; "" (no weight) last.

    Runs one forward in eval mode without gradients; modes, buffers and the random state are as before afterwards.
    Source of the per-operation formulas: `torch.utils.flop_counter`.

    >>> count_macs(nn.Linear(3, 5), torch.zeros(1, 3))
    {'weight': 15}
    """
    owners = {_storage(p): name for name, p in model.named_parameters() if p.ndim >= 2}
    counter = FlopCounterMode(display=False)
    attribute = _Attribute(counter, owners)
    with _undisturbed(model), torch.no_grad(), counter, attribute:
        model(*inputs)
    order = [*owners.values(), NO_WEIGHT]
    return {name: attribute.flops[name] // 2 for name in order if attribute.flops.get(name)}


def inference_flops(
    model: nn.Module, image_shape: tuple[int, ...], densities: Mapping[str, float] | None = None
) -> Flops:
    """:class:`Flops` of one image, shape `image_shape` without the batch axis.

    Args:
        model: a network that takes (N, *image_shape).
        image_shape: (C, H, W).
        densities: share of active weights by parameter name; None = counted from the nonzero weights.

    Raises:
        ValueError: a density is outside [0, 1] or names a parameter that does not exist.

    >>> from s2sam.models import create_model
    >>> net = create_model("resnet32", num_classes=10, generator=torch.Generator(), width=2.0)
    >>> inference_flops(net, (3, 32, 32)).dense
    275612928
    """
    weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    if densities is None:
        densities = {name: float(torch.count_nonzero(p.detach())) / max(p.numel(), 1) for name, p in weights.items()}
    for name, density in densities.items():
        if name not in weights:
            raise ValueError(f"the model has no weight {name!r}; densities go by parameter name, as 'stem.weight'")
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"the density of {name!r} must be between 0 and 1, got {density!r}")
    first = next(iter(weights.values()), torch.empty(0))
    image = torch.zeros((1, *image_shape), device=first.device, dtype=first.dtype)
    return Flops(count_macs(model, image), dict(densities))


class _Attribute(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds what `counter` counts for each operation to the weight whose storage is among its arguments."""

    def __init__(self, counter: FlopCounterMode, owners: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counter, self.owners, self.flops = counter, owners, dict[str, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        if counted := self.counter.get_total_flops() - before:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            names = [self.owners.get(_storage(t)) for t in tensors]
            name = next((n for n in names if n is not None), NO_WEIGHT)
            self.flops[name] = self.flops.get(name, 0) + counted
        return out


def _storage(tensor: Tensor) -> int:
    """What identifies a tensor's memory; unlike its address it tells meta tensors apart."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, without fused attention, which no formula counts; all is put back, exceptions included."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=cuda):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            model.eval()
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, saved in buffers:
                    if not torch.equal(buffer, saved):
                        buffer.copy_(saved)
