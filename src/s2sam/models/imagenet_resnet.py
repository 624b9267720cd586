"""The ResNets for large images: ResNet-34 of basic blocks, ResNet-50 of bottlenecks, four stages, at 224x224 pixels.

    stem 7x7, stride 2 | max-pooling 3x3, stride 2 | 64 x n1 | 128 x n2 | 256 x n3 | 512 x n4 | average | num_classes

A bottleneck puts out 4 times the channels of its stage. Stages 2 to 4 halve the image in their first block, ResNet-50
in its 3x3 convolution ("v1.5", the network of the published sparse-training numbers), not in the 1x1 before it.

For 1,000 classes: 21,797,672 and 25,557,032 parameters; 21,779,648 and 25,502,912 of them are weights of convolutions
and of the classifier, with 3,663,761,408 and 4,089,184,256 multiply-accumulates an image of 224x224.
Published densities count all of these as prunable, stem and classifier too, and so do the fractions that ERK leaves of
ResNet-50's multiply-accumulates, .414, .242 and .122 at 80, 90 and 95 % (google-research/rigl states .42, .24, .12).

Sources: He et al., Deep Residual Learning for Image Recognition, 2016, table 1; Goyal et al., Accurate, Large Minibatch
SGD, 2017, for the place of the stride and for `zero_init`.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2sam.models.cifar_resnet import BasicBlock
from s2sam.models.init import build, scaled

CHANNELS = (64, 128, 256, 512)
BLOCKS = {34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  #: blocks a stage, by depth
STEMS = ("imagenet", "small")
EXPANSION = 4  #: of a bottleneck's channels in its last convolution


class Bottleneck(nn.Module):
    """relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)): 1x1, 3x3 with the stride, 1x1."""

    def __init__(self, c_in: int, c: int, stride: int) -> None:
        super().__init__()
        c_out = EXPANSION * c
        self.conv1 = nn.Conv2d(c_in, c, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv2 = nn.Conv2d(c, c, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c)
        self.conv3 = nn.Conv2d(c, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            project = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=project, bn=nn.BatchNorm2d(c_out)))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (N, c_in, H, W) -> (N, 4 c, ceil(H / stride), ceil(W / stride))."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ImageNetResNet(nn.Module):
    """The whole network. Shapes: (N, in_channels, H, W) -> (N, num_classes), any H and W.

    Args:
        blocks: how many blocks each of the four stages has.
        bottleneck: whether they are bottlenecks.
        channels: of the stages.
        stem: "imagenet" as above, or "small": 3x3 without a stride and no pooling, for images of 32 or 64 pixels.
    """

    def __init__(
        self, blocks: Sequence[int], bottleneck: bool, channels: Sequence[int], num_classes: int, in_channels: int,
        stem: str,
    ) -> None:  # fmt: skip
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem must be 'imagenet' (7x7, stride 2, pooling) or 'small' (3x3), got {stem!r}")
        size, stride, padding = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
        self.stem = nn.Conv2d(in_channels, channels[0], size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels[0])
        self.pool: nn.Module = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        stages, c_in = [], channels[0]
        for stage, (n, c) in enumerate(zip(blocks, channels, strict=True)):
            made: list[nn.Module] = []
            for i in range(n):
                step = 2 if stage > 0 and i == 0 else 1
                made.append(Bottleneck(c_in, c, step) if bottleneck else BasicBlock(c_in, c, step, "B"))
                c_in = EXPANSION * c if bottleneck else c
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of a batch of images."""
        x = self.stages(self.pool(F.relu(self.bn(self.stem(x)))))
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
    stem: str = "imagenet",
    zero_init: bool = False,
) -> ImageNetResNet:
    """The :class:`ImageNetResNet` of 34 or 50 layers; the image size is free, as the last feature map is averaged.

    `width` is a factor of all channels, `stem` is "imagenet" or "small". With `zero_init` the last BatchNorm of each
    block begins with a scale of 0, so that every block starts as its shortcut (Goyal et al. 2017; google-research/rigl
    does so); the default is torch's, 1.

    Raises:
        ValueError: no such stem, or a width that leaves no channel.
    """
    channels = [scaled(c, width) for c in CHANNELS]
    model = build(
        lambda: ImageNetResNet(BLOCKS[depth], depth >= 50, channels, num_classes, in_channels, stem), generator
    )
    if zero_init:
        for block in model.modules():
            if isinstance(block, (BasicBlock, Bottleneck)):
                nn.init.zeros_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight)
    return model


resnet34: Callable[..., ImageNetResNet] = functools.partial(resnet, 34)
resnet50: Callable[..., ImageNetResNet] = functools.partial(resnet, 50)
