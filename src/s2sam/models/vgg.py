"""VGG-19 with BatchNorm for small images: 16 convolutions in five groups, global average pooling, one linear layer.

    64 64 | 128 128 | 256 x 4 | 512 x 4 | 512 x 4 | average | num_classes          (channels x width, all 3x3)

A 2x2 max-pooling stands at each of the first four bars. This is the VGG-19 of the sparse-training literature, without
the two hidden linear layers of the original: 20,024,000 prunable weights for 10 classes and 398,136,320
multiply-accumulates for a 32x32 image, to which published densities refer.

Source: Simonyan and Zisserman, Very Deep Convolutional Networks, 2015, table 1 column E; one linear layer and BatchNorm
as in the pruning experiments of Wang et al., Picking Winning Tickets Before Training (GraSP), 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from s2sam.models.init import build, scaled

GROUPS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)


class VGG(nn.Module):
    """(conv3x3 -> BatchNorm -> ReLU) x n with max-pooling between groups -> mean over the image -> linear.

    Convolutions have no bias, as BatchNorm would subtract it again. Pooling rounds up, so that images of fewer than 16
    pixels pass as well; at 32x32 the groups see sides of 32, 16, 8, 4 and 2 pixels.
    Shapes: (N, in_channels, H, W) -> (N, num_classes).
    """

    def __init__(self, num_classes: int, in_channels: int, width: float) -> None:
        super().__init__()
        groups, c_in = [], in_channels
        for i, channels in enumerate(GROUPS):
            layers: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if i else []
            for c in channels:
                c_out = scaled(c, width)
                layers += [nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
                c_in = c_out
            groups.append(nn.Sequential(*layers))
        self.groups = nn.Sequential(*groups)
        self.classifier = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of a batch of images."""
        logits: Tensor = self.classifier(self.groups(x).mean(dim=(2, 3)))
        return logits


def vgg19(
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    generator: torch.Generator,
    width: float = 1.0,
) -> VGG:
    """The :class:`VGG`, channels x `width`; the image size is free, as the last feature map is averaged."""
    return build(lambda: VGG(num_classes, in_channels, width), generator)
