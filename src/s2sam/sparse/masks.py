"""MaskSet: one bool mask per weight, the single source of what is pruned, and what follows from it.

The masks live beside the model, change in place (their storage stays, so nothing that looks at them goes stale and a
compiled model is not compiled again), and are stored as bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer


class MaskSet:
    """Masks of named weights, True = active. All True at first.

    Cost: one byte per weight. A step's three calls (gradients, weights, state) read and write each tensor once.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = dict(weights)
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}

    def set_(self, masks: Mapping[str, Tensor]) -> None:
        """Copy new masks into the old storages."""
        for name, mask in masks.items():
            self.masks[name].copy_(mask)

    def follow_device(self) -> None:
        """Bring the masks to where the weights are now, after `model.to(device)`."""
        for name, w in self.weights.items():
            if self.masks[name].device != w.device:
                self.masks[name] = self.masks[name].to(w.device)

    @torch.no_grad()
    def apply_to_weights(self, by: Mapping[str, Tensor] | None = None) -> None:
        """w <- m w, with the masks of the set or those in `by`."""
        masks = self.masks if by is None else by
        if masks:
            torch._foreach_mul_([self.weights[name] for name in masks], list(masks.values()))

    @torch.no_grad()
    def apply_to_gradients(self, by: Mapping[str, Tensor] | None = None) -> None:
        """g <- g where m, else 0: no product, so that NaN at a pruned position becomes 0.

        Raises:
            RuntimeError: a gradient is sparse (`nn.Embedding(sparse=True)`).
        """
        zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for name, mask in (self.masks if by is None else by).items():
            grad = self.weights[name].grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise RuntimeError(f"gradient of {name!r} is sparse; build its layer with sparse=False or exclude it")
            kind = (grad.dtype, grad.device)
            if kind not in zeros:
                zeros[kind] = torch.zeros((), dtype=grad.dtype, device=grad.device)
            torch.where(mask, grad, zeros[kind], out=grad)

    @torch.no_grad()
    def apply_to_state(self, optimizer: Optimizer, by: Mapping[str, Tensor] | None = None) -> None:
        """s <- m s for every state tensor s of the weight's shape, whoever put it into the optimizer's state."""
        states, chosen = [], []
        for name, mask in (self.masks if by is None else by).items():
            for value in state_tensors(optimizer, self.weights[name]):
                states.append(value)
                chosen.append(mask)
        if states:
            torch._foreach_mul_(states, chosen)

    def kept(self) -> dict[str, int]:
        """Active weights per layer; one host read."""
        return counts(self.masks)

    def misfits(self, weights: Mapping[str, Tensor] | None = None) -> list[str]:
        """Names of the weights (or of the tensors given) that are not exactly 0 where pruned; one host read."""
        given = self.weights if weights is None else weights
        wrong = counts({name: (w.detach() != 0) & ~self.masks[name] for name, w in given.items()})
        return [name for name, n in wrong.items() if n]

    def fits(self, weights: Mapping[str, Tensor] | None = None) -> bool:
        """Whether all pruned weights are exactly 0."""
        return not self.misfits(weights)

    def pack(self) -> dict[str, Tensor]:
        """The masks as bits, on the CPU."""
        return {name: pack_bits(mask) for name, mask in self.masks.items()}


def state_tensors(optimizer: Optimizer, weight: Tensor) -> list[Tensor]:
    """The tensors in the optimizer's state of `weight` that have its shape."""
    state = optimizer.state.get(weight, {})
    return [v for v in state.values() if isinstance(v, Tensor) and v.shape == weight.shape]


def counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """How many True per mask, with one host read for all on a device."""
    if not masks:
        return {}
    device = next(iter(masks.values())).device
    sums = torch.stack([m.sum().to(device) for m in masks.values()]).tolist()
    return dict(zip(masks, map(int, sums), strict=True))


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as a 1-D uint8 tensor of ceil(n / 8) bytes, first element in the lowest bit.

    >>> pack_bits(torch.tensor([True, False, True])).tolist()
    [5]
    """
    return torch.from_numpy(np.packbits(mask.cpu().numpy().ravel(), bitorder="little"))


def unpack_bits(packed: Tensor, shape: Iterable[int]) -> Tensor:
    """The bool tensor of `shape` that :func:`pack_bits` packed.

    >>> unpack_bits(torch.tensor([5], dtype=torch.uint8), (3, 1)).flatten().tolist()
    [True, False, True]

    Raises:
        ValueError: the number of bytes does not fit the shape.
    """
    size = torch.Size(shape)
    if packed.dtype != torch.uint8 or packed.numel() != (size.numel() + 7) // 8:
        raise ValueError(f"{packed.numel()} bytes of {packed.dtype} are no packed mask of shape {tuple(size)}")
    bits = np.unpackbits(packed.cpu().numpy(), count=size.numel(), bitorder="little")
    return torch.from_numpy(bits).bool().view(size)
