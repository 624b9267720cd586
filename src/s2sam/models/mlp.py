"""A small multilayer perceptron: enough for 8x8 digits, quick enough for a demonstration."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from s2sam.models.init import build, scaled

HIDDEN = 256


class MLP(nn.Module):
    """flatten -> (linear -> BatchNorm -> ReLU) x 2 -> linear, or without BatchNorm.

    With BatchNorm the hidden linear layers have no bias, as it would subtract it again; without it they have one.
    Shapes: (N, C, H, W) -> (N, num_classes); `in_features` = C*H*W.
    """

    def __init__(self, in_features: int, hidden: int, num_classes: int, norm: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        for i, width in enumerate((in_features, hidden), 1):
            layers[f"fc{i}"] = nn.Linear(width, hidden, bias=not norm)
            if norm:
                layers[f"bn{i}"] = nn.BatchNorm1d(hidden)
            layers[f"relu{i}"] = nn.ReLU()
        self.body = nn.Sequential(layers)
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of a batch of images. Raises ValueError for images of another size."""
        if x[0].numel() != self.in_features:
            raise ValueError(f"this MLP takes images of {self.in_features} values, got {tuple(x.shape[1:])}")
        logits: Tensor = self.classifier(self.body(x))
        return logits


def mlp(
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    generator: torch.Generator,
    width: float = 1.0,
    norm: bool = True,
) -> MLP:
    """The :class:`MLP` with two hidden layers of 256 x `width` units; `norm=False` leaves BatchNorm out.

    Raises:
        ValueError: `norm` is neither true nor false.
    """
    if not isinstance(norm, bool):
        raise ValueError(f"norm must be true or false, got {norm!r}")
    in_features = in_channels * image_size[0] * image_size[1]
    return build(lambda: MLP(in_features, scaled(HIDDEN, width), num_classes, norm), generator)
