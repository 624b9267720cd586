"""The ResNets for small images: a 3x3 stem, three stages of 16-32-64 channels x width, global average pooling.

Depth = 6 n + 2 with n basic blocks a stage (8, 14, 20, 32, 56 for n = 1, 2, 3, 5, 9). Where the shape changes, the
shortcut is

- "B" (default): a 1x1 convolution with stride 2 and BatchNorm. It is the default because the ResNet-32 of the
  sparse-training literature has it: at double width it holds 1,855,584 prunable weights (stem, blocks, two
  projections, classifier) and 275,612,928 multiply-accumulates an image, to which published densities refer.
- "A": stride 2 and zero channels, no parameters; as in the CIFAR networks of He et al. (ResNet-20: 269,722 parameters).

Source: He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2; double width and "B" as in the
pruning experiments of Wang et al., Picking Winning Tickets Before Training (GraSP), 2020.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2sam.models.init import build, scaled

STAGES = (16, 32, 64)
SHORTCUTS = ("A", "B")


class PadShortcut(nn.Module):
    """Shortcut "A": every `stride`-th pixel, and zeros for the channels that are new. No parameters.

    Shapes: (N, C, H, W) -> (N, C + new, ceil(H / stride), ceil(W / stride)); new channels are split to both sides.
    """

    def __init__(self, new: int, stride: int) -> None:
        super().__init__()
        self.before, self.after, self.stride = new // 2, new - new // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad `x`."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), both convolutions 3x3."""

    def __init__(self, c_in: int, c_out: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module
        if stride == 1 and c_in == c_out:
            self.shortcut = nn.Identity()
        elif shortcut == "A":
            self.shortcut = PadShortcut(c_out - c_in, stride)
        else:
            project = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=project, bn=nn.BatchNorm2d(c_out)))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, c_in, H, W) -> (N, c_out, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The whole network. Shapes: (N, in_channels, H, W) -> (N, num_classes), any H and W (8x8 grey digits work).

    Raises:
        ValueError: depth is not 6 n + 2, width leaves no channel, or shortcut is neither "A" nor "B".
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int, width: float, shortcut: str) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"the depth of a CIFAR ResNet is 6 n + 2 (8, 14, 20, ...), got {depth}")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut must be 'A' (parameter-free) or 'B' (1x1 projection), got {shortcut!r}")
        channels = [scaled(c, width) for c in STAGES]
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels[0])
        stages, c_in = [], channels[0]
        for stage, c_out in enumerate(channels):
            blocks = []
            for i in range((depth - 2) // 6):
                blocks.append(BasicBlock(c_in, c_out, 2 if stage > 0 and i == 0 else 1, shortcut))
                c_in = c_out
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of a batch of images."""
        x = self.stages(F.relu(self.bn(self.stem(x))))
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


def resnet(
    depth: int,
    *,
    num_classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    generator: torch.Generator,
    width: float = 1.0,
    shortcut: str = "B",
) -> CifarResNet:
    """The :class:`CifarResNet` of `depth` layers; the image size is free, as the last feature map is averaged."""
    return build(lambda: CifarResNet(depth, num_classes, in_channels, width, shortcut), generator)


resnet8: Callable[..., CifarResNet] = functools.partial(resnet, 8)
resnet14: Callable[..., CifarResNet] = functools.partial(resnet, 14)
resnet20: Callable[..., CifarResNet] = functools.partial(resnet, 20)
resnet32: Callable[..., CifarResNet] = functools.partial(resnet, 32)
resnet56: Callable[..., CifarResNet] = functools.partial(resnet, 56)
