"""Networks: golden parameter counts by formula, initialisation from one generator, and errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from s2sam.models import MODELS, create_model, model_options
from s2sam.models.cifar_resnet import BasicBlock, CifarResNet, PadShortcut
from s2sam.models.init import build, kaiming_normal, scaled

NAMES = [row.name for row in MODELS]


def net(name: str, seed: int = 0, **options: object) -> nn.Module:
    sizes = {"num_classes": 10, **options}
    return create_model(name, generator=torch.Generator().manual_seed(seed), **sizes)


def weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.ndim >= 2)


def resnet_weights(depth: int, width: int, shortcut: str, classes: int = 10, channels: int = 3) -> tuple[int, int]:
    """(prunable weights, all parameters) of a CIFAR ResNet, by hand."""
    n, c = (depth - 2) // 6, [16 * width, 32 * width, 64 * width]
    conv = 9 * channels * c[0] + 2 * n * 9 * c[0] ** 2
    conv += sum(9 * a * b + (2 * n - 1) * 9 * b * b for a, b in itertools.pairwise(c))
    norm = 2 * (c[0] + 2 * n * sum(c))
    if shortcut == "B":
        conv += c[0] * c[1] + c[1] * c[2]
        norm += 2 * (c[1] + c[2])
    prunable = conv + c[2] * classes
    return prunable, prunable + norm + classes


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("depth", [8, 14, 20, 32, 56])
def test_parameter_counts_follow_the_formula(depth: int, width: int, shortcut: str) -> None:
    model = net(f"resnet{depth}", width=float(width), shortcut=shortcut)
    assert (weights(model), sum(p.numel() for p in model.parameters())) == resnet_weights(depth, width, shortcut)


def test_golden_counts() -> None:
    assert weights(net("resnet32", width=2.0)) == 1_855_584  # stem, blocks, projections, classifier
    published = {"resnet20": 269_722, "resnet32": 464_154, "resnet56": 853_018}  # He et al.: 0.27, 0.46, 0.85 M
    for name, count in published.items():
        assert sum(p.numel() for p in net(name, shortcut="A").parameters()) == count


def vgg19_weights(width: float, classes: int = 10, channels: int = 3) -> tuple[int, int]:
    """(prunable weights, all parameters) of VGG-19 with one linear layer, by hand."""
    plan = [round(c * width) for c in [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8]
    prunable = sum(9 * a * b for a, b in itertools.pairwise([channels, *plan])) + plan[-1] * classes
    return prunable, prunable + 2 * sum(plan) + classes


@pytest.mark.parametrize(("width", "classes"), [(1.0, 10), (0.5, 100), (0.25, 7)])
def test_vgg19_counts_follow_the_formula(width: float, classes: int) -> None:
    model = net("vgg19", width=width, num_classes=classes)
    assert (weights(model), sum(p.numel() for p in model.parameters())) == vgg19_weights(width, classes)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 16
    assert all(m.bias is None and m.kernel_size == (3, 3) for m in convolutions)


def test_vgg19_golden_counts() -> None:
    assert vgg19_weights(1.0)[0] == 20_024_000
    assert weights(net("vgg19")) == 20_024_000


def test_vgg19_halves_the_image_between_groups_and_small_images_pass() -> None:
    model = net("vgg19", width=0.125)
    for size, sides in ((32, [32, 16, 8, 4, 2]), (8, [8, 4, 2, 1, 1]), (7, [7, 4, 2, 1, 1])):
        seen: list[int] = []
        record = lambda _m, _i, y, seen=seen: seen.append(y.shape[-1])  # noqa: E731
        handles = [group.register_forward_hook(record) for group in model.groups]  # type: ignore[union-attr]
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 10)
        assert seen == sides
        for handle in handles:
            handle.remove()


def test_projection_is_the_default_shortcut() -> None:
    assert model_options("resnet32") == {"width": 1.0, "shortcut": "B"}
    assert "stages.1.0.shortcut.conv.weight" in dict(net("resnet20").named_parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 8)])
def test_forward_and_backward_reach_every_parameter(name: str, channels: int, size: int) -> None:
    model = net(name, in_channels=channels, image_size=size, num_classes=7, width=0.5)
    x = torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(1))
    out = model(x)
    assert out.shape == (4, 7)
    assert out.dtype == torch.float32
    nn.functional.cross_entropy(out, torch.arange(4)).backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert 0 < p.grad.abs().sum() < math.inf, parameter_name


def test_feature_maps_halve_twice() -> None:
    model = net("resnet20")
    x = torch.zeros(1, 3, 32, 32)
    shapes = []
    for stage in model.stages:  # type: ignore[union-attr]
        stage.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape[1:])))
    model(x.expand(2, -1, -1, -1))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.mark.parametrize("size", [(7, 9), (8, 12)])
def test_odd_and_oblong_images_pass(size: tuple[int, int]) -> None:
    for shortcut in ("A", "B"):
        assert net("resnet20", image_size=size, shortcut=shortcut)(torch.zeros(2, 3, *size)).shape == (2, 10)
    assert net("mlp", image_size=size)(torch.zeros(2, 3, *size)).shape == (2, 10)


def test_pad_shortcut_subsamples_and_pads() -> None:
    x = torch.arange(2 * 2 * 4 * 4.0).reshape(2, 2, 4, 4)
    y = PadShortcut(new=3, stride=2)(x)
    assert y.shape == (2, 5, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert y[:, 0].abs().sum() == 0
    assert y[:, 3:].abs().sum() == 0


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_block_equals_its_formula(shortcut: str) -> None:
    block = build(lambda: BasicBlock(4, 8, 2, shortcut), torch.Generator().manual_seed(0)).eval()
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    y = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    if shortcut == "B":
        skip = nn.functional.conv2d(x, block.shortcut.conv.weight, stride=2)
        skip = skip / math.sqrt(1 + 1e-5)  # an untrained BatchNorm in eval mode
    else:
        skip = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    torch.testing.assert_close(block(x), torch.relu(y + skip))


@pytest.mark.parametrize("name", NAMES)
def test_initialisation_depends_on_the_generator_alone(name: str) -> None:
    before = torch.random.get_rng_state()
    a, b, c = net(name, seed=3), net(name, seed=3), net(name, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.random.default_generator.manual_seed(99)
    d = net(name, seed=3)
    for (key, x), y, z, w in zip(a.state_dict().items(), *(m.state_dict().values() for m in (b, c, d)), strict=True):
        assert torch.equal(x, y), key
        assert torch.equal(x, w), key
        if x.ndim >= 2:
            assert not torch.equal(x, z), key


def test_generator_is_advanced() -> None:
    generator = torch.Generator().manual_seed(0)
    first = create_model("mlp", num_classes=10, generator=generator)
    second = create_model("mlp", num_classes=10, generator=generator)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_initial_values(name: str) -> None:
    model = net(name)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            w = module.weight.detach()
            expected = math.sqrt(2 / w[0].numel())
            assert abs(w.std().item() / expected - 1) < 5 / math.sqrt(2 * w.numel())  # five standard errors
            assert abs(w.mean().item()) < 5 * expected / math.sqrt(w.numel())
            assert module.bias is None or module.bias.abs().sum() == 0
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert module.bias.abs().sum() == 0
            assert torch.equal(module.running_var, torch.ones_like(module.running_var))
            assert module.running_mean.abs().sum() == 0
            assert module.num_batches_tracked == 0
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_width_scales_the_mlp() -> None:
    for width, hidden in ((1.0, 256), (0.25, 64)):
        model = net("mlp", in_channels=1, image_size=8, width=width)
        assert weights(model) == 64 * hidden + hidden * hidden + 10 * hidden


def test_mlp_names_the_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"takes images of 64 values, got \(1, 9, 9\)"):
        net("mlp", in_channels=1, image_size=8)(torch.zeros(2, 1, 9, 9))


def test_uninitialisable_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="no initialisation is defined for LayerNorm"):
        kaiming_normal(nn.Sequential(nn.LayerNorm(3)), torch.Generator())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet23", {}, "unknown model 'resnet23'; did you mean 'resnet"),
        ("resnet20", {"widht": 2.0}, "unknown resnet20 option 'widht'; did you mean 'width'"),
        ("mlp", {"shortcut": "A"}, "unknown mlp option 'shortcut'.*one of: width"),
        ("resnet20", {"shortcut": "C"}, "shortcut must be 'A'.*got 'C'"),
        ("resnet20", {"width": 0.0}, "width must be .*got 0.0"),
        ("resnet20", {"width": math.nan}, "width must be"),
        ("mlp", {"width": "wide"}, "width must be"),
        ("mlp", {"num_classes": 1}, "num_classes must be an integer of at least 2, got 1"),
        ("mlp", {"in_channels": 0}, "in_channels must be"),
        ("mlp", {"image_size": 0}, "image_size must be"),
        ("mlp", {"image_size": "32"}, "image_size must be .*got '32'"),
        ("mlp", {"image_size": (8, 8, 1)}, "image_size must be"),
    ],
)
def test_bad_arguments_get_one_sentence(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        net(name, **options)
    assert "\n" not in str(error.value)


def test_wrong_depth() -> None:
    with pytest.raises(ValueError, match="6 n \\+ 2"):
        CifarResNet(21, 10, 3, 1.0, "B")


def test_scaled_rounds() -> None:
    assert [scaled(16, w) for w in (1, 0.3, 2.5)] == [16, 5, 40]


@pytest.mark.parametrize("row", MODELS, ids=NAMES)
def test_rows_are_complete(row: object) -> None:
    assert row.paper
    assert len(row.description) > 20
    assert callable(row.load())


def test_factories_take_the_common_arguments() -> None:
    build_any: list[Callable[..., nn.Module]] = [row.load() for row in MODELS]
    for make in build_any:
        model = make(num_classes=3, in_channels=1, image_size=(8, 8), generator=torch.Generator())
        assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
