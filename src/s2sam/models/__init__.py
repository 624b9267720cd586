"""Networks by name. Rows are data (:data:`MODELS`); nothing here imports torch before a network is built.

A network is one file and one row. Its factory takes `num_classes, in_channels, image_size, generator` and its own
keyword options, and draws every initial weight from `generator`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from s2sam import registry
from s2sam.sparse.names import unknown

if TYPE_CHECKING:
    import torch
    from torch import nn

_GIVEN = ("num_classes", "in_channels", "image_size", "generator")
_RESNET_PAPER = "He et al., Deep Residual Learning for Image Recognition, CVPR 2016"

MODELS: tuple[registry.ModelInfo, ...] = (
    registry.ModelInfo(
        "mlp",
        "s2sam.models.mlp:mlp",
        "-",
        "two hidden layers of 256 x width units with BatchNorm, for small images such as digits",
    ),
    *(
        registry.ModelInfo(
            f"resnet{depth}",
            f"s2sam.models.cifar_resnet:resnet{depth}",
            f"{_RESNET_PAPER}, section 4.2",
            f"ResNet-{depth} for 32x32 images, 16-32-64 channels x width, shortcut B (projection) or A (none)",
        )
        for depth in (8, 14, 20, 32, 56)
    ),
    *(
        registry.ModelInfo(
            f"resnet{depth}",
            f"s2sam.models.imagenet_resnet:resnet{depth}",
            f"{_RESNET_PAPER}, table 1",
            f"ResNet-{depth} for 224x224 images, {blocks}, 64 to 512 channels x width; stem imagenet or small",
        )
        for depth, blocks in ((34, "basic blocks"), (50, "bottlenecks"))
    ),
    registry.ModelInfo(
        "vgg19",
        "s2sam.models.vgg:vgg19",
        "Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015; one linear layer as in GraSP, ICLR 2020",
        "VGG-19 with BatchNorm and one linear layer for 32x32 images, 64 to 512 channels x width",
    ),
)


def create_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | tuple[int, int] = 32,
    generator: torch.Generator,
    **options: Any,
) -> nn.Module:
    """Build the network `name` on the device of `generator`, which alone decides the initial weights.

    Args:
        name: a row of :data:`MODELS`.
        num_classes: outputs of the classifier, at least 2.
        in_channels: channels of the images.
        image_size: side of square images in pixels, or (height, width).
        generator: source of all initial weights; the global random state is neither read nor moved.
        **options: keyword options of that network, see :func:`model_options`.

    Raises:
        ValueError: unknown name or option (the nearest valid one is named), or a size that makes no network.

    >>> import torch
    >>> net = create_model("resnet20", num_classes=10, generator=torch.Generator().manual_seed(0), width=0.5)
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    row = registry.find(registry.list_models(), name, "model")
    factory = row.load()
    valid = model_options(name)
    for option in options:
        if option not in valid:
            raise unknown(f"{name} option", option, valid)
    for what, value, least in (("num_classes", num_classes, 2), ("in_channels", in_channels, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{what} must be an integer of at least {least}, got {value!r}")
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side >= 1 for side in size):
        raise ValueError(f"image_size must be a whole number of pixels, or two of them, got {image_size!r}")
    model: nn.Module = factory(
        num_classes=num_classes, in_channels=in_channels, image_size=size, generator=generator, **options
    )
    return model


def model_options(name: str) -> dict[str, Any]:
    """The options of the network `name` and their defaults.

    >>> model_options("resnet32")
    {'width': 1.0, 'shortcut': 'B'}
    """
    factory = registry.find(registry.list_models(), name, "model").load()
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _GIVEN}
