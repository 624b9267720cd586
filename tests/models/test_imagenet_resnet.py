"""ResNet-34 and ResNet-50: published counts of parameters and operations, the fractions that ERK leaves, options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2sam.analysis.flops import Flops, count_macs
from s2sam.models import create_model, model_options
from s2sam.models.cifar_resnet import BasicBlock
from s2sam.models.imagenet_resnet import BLOCKS, CHANNELS, Bottleneck, ImageNetResNet
from s2sam.models.init import build
from s2sam.sparse.budget import counts, densities
from s2sam.sparse.prunable import discover


def on_meta(depth: int, classes: int = 1000) -> ImageNetResNet:
    with torch.device("meta"):
        return ImageNetResNet(BLOCKS[depth], depth == 50, CHANNELS, classes, 3, "imagenet")


def net(name: str = "resnet50", seed: int = 0, **options: object) -> ImageNetResNet:
    given = {"num_classes": 5, "width": 0.125, **options}
    model = create_model(name, generator=torch.Generator().manual_seed(seed), **given)
    assert isinstance(model, ImageNetResNet)
    return model


@pytest.fixture(scope="module")
def macs() -> dict[int, dict[str, int]]:
    return {depth: count_macs(on_meta(depth), torch.zeros(1, 3, 224, 224, device="meta")) for depth in (34, 50)}


def prunable(depth: int) -> dict[str, tuple[int, ...]]:
    return {e.name: tuple(e.parameter.shape) for e in discover(on_meta(depth)) if e.prunable}


@pytest.mark.parametrize(
    ("depth", "parameters", "weights", "layers"), [(34, 21_797_672, 21_779_648, 37), (50, 25_557_032, 25_502_912, 54)]
)
def test_published_counts(depth: int, parameters: int, weights: int, layers: int) -> None:
    """The parameters are torchvision's and timm's; stem, blocks, projections and classifier are all prunable."""
    assert sum(p.numel() for p in on_meta(depth).parameters()) == parameters
    shapes = prunable(depth)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == weights
    assert len(shapes) == layers
    assert next(iter(shapes)) == "stem.weight"
    assert list(shapes)[-1] == "classifier.weight"


def by_hand(depth: int) -> int:
    """Multiply-accumulates, stage by stage: sides of 56, 28, 14, 7 pixels, and the stride in the 3x3 convolution."""
    total, c_in = 112**2 * 64 * 3 * 49, 64
    for stage, (n, c) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True)):
        side = 56 >> stage
        before = side if stage == 0 else 2 * side  # of the first block's input
        if depth == 50:
            first = before**2 * c_in * c + side**2 * (9 * c * c + 4 * c * c + 4 * c_in * c)
            total += first + (n - 1) * side**2 * (4 * c * c + 9 * c * c + 4 * c * c)
            c_in = 4 * c
        else:
            first = side**2 * (9 * c_in * c + 9 * c * c + (c_in * c if stage else 0))
            total += first + (n - 1) * side**2 * 18 * c * c
            c_in = c
    return total + 1000 * c_in


@pytest.mark.parametrize(("depth", "published"), [(34, 3_663_761_408), (50, 4_089_184_256)])
def test_dense_operations(macs: dict[int, dict[str, int]], depth: int, published: int) -> None:
    assert sum(macs[depth].values()) == published == by_hand(depth)
    assert list(macs[depth]) == list(prunable(depth))


@pytest.mark.parametrize(
    ("distribution", "fractions"),
    [("erk", (0.414, 0.242, 0.122)), ("uniform-first-dense", (0.223, 0.126, 0.077))],
)
def test_golden_fractions_of_resnet50(
    macs: dict[int, dict[str, int]], distribution: str, fractions: tuple[float, ...]
) -> None:
    """google-research/rigl states .42, .24, .12 for ERK over all layers and .23, .13, .08 with a dense stem."""
    shapes = prunable(50)
    for sparsity, fraction in zip((0.8, 0.9, 0.95), fractions, strict=True):
        exact = Flops(macs[50], densities(shapes, sparsity, distribution)).fraction
        assert round(exact, 3) == fraction
        kept = counts(shapes, sparsity, distribution)
        rounded = {name: n / torch.Size(shapes[name]).numel() for name, n in kept.items()}
        assert Flops(macs[50], rounded).fraction == pytest.approx(exact, abs=1e-5)


def test_erk_prunes_the_stem_as_any_layer() -> None:
    assert densities(prunable(50), 0.9, "erk")["stem.weight"] == pytest.approx(0.42003, abs=1e-5)


def test_the_image_shrinks_at_stem_pool_and_three_stages() -> None:
    for options, size, sides in (
        ({}, 64, [16, 8, 4, 2]),
        ({"stem": "small"}, 32, [32, 16, 8, 4]),
        ({"stem": "small"}, 9, [9, 5, 3, 2]),
    ):
        model, seen = net(**options), []
        for stage in model.stages:
            stage.register_forward_hook(lambda _m, _i, y, seen=seen: seen.append(y.shape[-1]))
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 5)
        assert seen == sides


def test_bottleneck_equals_its_formula() -> None:
    block = build(lambda: Bottleneck(6, 4, 2), torch.Generator().manual_seed(0)).eval()
    x = torch.randn(2, 6, 7, 7, generator=torch.Generator().manual_seed(1))
    norm = (1 + 1e-5) ** -0.5  # an untrained BatchNorm in eval mode
    y = torch.relu(norm * nn.functional.conv2d(x, block.conv1.weight))
    y = torch.relu(norm * nn.functional.conv2d(y, block.conv2.weight, stride=2, padding=1))
    y = norm * nn.functional.conv2d(y, block.conv3.weight)
    skip = norm * nn.functional.conv2d(x, block.shortcut.conv.weight, stride=2)  # type: ignore[union-attr]
    assert block(x).shape == (2, 16, 4, 4)
    torch.testing.assert_close(block(x), torch.relu(y + skip))


@pytest.mark.parametrize(("name", "kind", "last"), [("resnet34", BasicBlock, "bn2"), ("resnet50", Bottleneck, "bn3")])
def test_zero_init_makes_every_block_its_shortcut(name: str, kind: type, last: str) -> None:
    plain, zeroed = net(name).eval(), net(name, zero_init=True).eval()
    scales = {n for n, p in zeroed.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    blocks = [n for n, m in zeroed.named_modules() if isinstance(m, kind)]
    assert scales == {f"{block}.{last}.weight" for block in blocks}
    assert len(scales) == 16
    x = torch.randn(2, net(name).stem.out_channels * (4 if kind is Bottleneck else 1), 5, 5).relu()
    block = zeroed.stages[0][1]
    assert torch.equal(block(x), x)
    assert not torch.equal(plain.stages[0][1](x), x)


def test_options_and_their_errors() -> None:
    assert model_options("resnet50") == {"width": 1.0, "stem": "imagenet", "zero_init": False}
    with pytest.raises(ValueError, match=r"stem must be 'imagenet' .* or 'small' .*, got 'cifar'"):
        net(stem="cifar")
    with pytest.raises(ValueError, match="width must be"):
        net(width=0.0)
