"""Random directions in weight space, scaled filter by filter so that surfaces of different networks can be compared."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

EPS = 1e-10  #: keeps a filter without active weights at 0


def movable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that a direction moves, by name: those with two or more dims.

    Biases and the weights of normalisation layers stay: they have no filters, and moving them mostly shows what a shift
    of the activations does.
    """
    return {name: p for name, p in model.named_parameters() if p.ndim >= 2}


@torch.no_grad()
def filter_direction(
    weights: Mapping[str, Tensor], generator: torch.Generator, masks: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    r"""A Gaussian direction on the active weights, each filter as long as that of the weights.

    .. math:: d_f \leftarrow \frac{m_f\, d_f}{\lVert m_f\, d_f\rVert + 10^{-10}}\, \lVert w_f\rVert, d \sim N(0, I)

    A filter is a row of the tensor: an output channel or neuron. The mask m acts before the scaling, so that the
    direction of a sparse network stays in its subspace and keeps its length.

    Draws are made on the generator's device in the order of `weights`, as many for a sparse as for a dense network:
    with one seed, two networks of one architecture get the same noise.

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets, 2018, section 4. Theirs knows no masks.
    Cost: one tensor for each weight.

    Args:
        weights: by name, each of two or more dims.
        generator: makes the draws.
        masks: True = active, by name; a weight without one is dense.

    Returns:
        One tensor for each weight, in order, of its shape, dtype and device.

    Raises:
        ValueError: a mask names no weight or has another shape.

    >>> w = {"fc": torch.tensor([[3.0, 4.0], [0.0, 0.0]])}
    >>> d = filter_direction(w, torch.Generator().manual_seed(0), {"fc": torch.tensor([[True, False], [True, True]])})
    >>> d[0].abs()
    tensor([[5., 0.],
            [0., 0.]])
    """
    masks = masks or {}
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            raise ValueError(f"the mask {name!r} fits no weight of the network; take the masks of the same run")
    found = []
    for name, w in weights.items():
        noise = torch.randn(w.shape, generator=generator, device=generator.device).to(w.device, torch.float32)
        if name in masks:
            noise = torch.where(masks[name].to(w.device), noise, 0.0)
        length = w.float().flatten(1).norm(dim=1) / (noise.flatten(1).norm(dim=1) + EPS)
        found.append((noise * length.view(-1, *[1] * (w.ndim - 1))).to(w.dtype))
    return found
