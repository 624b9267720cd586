"""Crops are shifts, flips are mirror images, both as often as they should be."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2sam.data.augment import (
    AUGMENTATIONS,
    Augment,
    cutout,
    flip,
    mixed_loss,
    mixup,
    normalise,
    pad_crop,
    soft_targets,
)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(n: int, c: int, h: int, w: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Pixels 1, 2, 3, ...: no two alike and none like the padding."""
    return (torch.arange(n * c * h * w) + 1).reshape(n, c, h, w).to(dtype)


def shifted(image: Tensor, dy: int, dx: int) -> Tensor:
    """`image` moved by (dy, dx) with zeros coming in, pixel by pixel: slow and obvious."""
    _, h, w = image.shape
    out = torch.zeros_like(image)
    for i in range(h):
        for j in range(w):
            if 0 <= i + dy < h and 0 <= j + dx < w:
                out[:, i, j] = image[:, i + dy, j + dx]
    return out


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 4), c=st.integers(1, 3), h=st.integers(1, 7), w=st.integers(1, 7), p=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_a_crop_is_a_shift_within_the_padding(n: int, c: int, h: int, w: int, p: int, seed: int) -> None:
    x = numbered(n, c, h, w)
    y = pad_crop(x, p, gen(seed))
    assert y.shape == x.shape
    assert y.is_contiguous()
    for image, crop in zip(x, y, strict=True):
        assert any(torch.equal(crop, shifted(image, dy, dx)) for dy in range(-p, p + 1) for dx in range(-p, p + 1))


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 6), w=st.integers(2, 5), seed=st.integers(0, 2**32), p=st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_a_flip_is_the_image_or_its_mirror(n: int, w: int, seed: int, p: float) -> None:
    x = numbered(n, 2, 3, w)
    for image, y in zip(x, flip(x, gen(seed), p), strict=True):
        same, mirrored = torch.equal(y, image), torch.equal(y, image[:, :, torch.arange(w - 1, -1, -1)])
        assert same != mirrored
        assert same or p > 0.0
        assert mirrored or p < 1.0


def shifts_of(y: Tensor, size: int, padding: int) -> Tensor:
    """The (dy, dx) of crops of an image that is one bright pixel in the middle."""
    flat = y.flatten(1).argmax(dim=1)
    middle = size // 2
    return torch.stack([middle - flat // size, middle - flat % size], dim=1) + padding


def test_all_shifts_are_equally_frequent_and_independent() -> None:
    size, p, n = 9, 2, 25_000
    x = torch.zeros(n, 1, size, size, dtype=torch.uint8)
    x[:, 0, size // 2, size // 2] = 255
    s = shifts_of(pad_crop(x, p, gen(1)), size, p)
    counts = (s[:, 0] * 5 + s[:, 1]).bincount(minlength=25).double()
    assert len(counts) == 25
    assert ((counts - 1000) ** 2 / 1000).sum() < 60  # chi-squared with 24 degrees of freedom, far tail
    neighbours = torch.corrcoef(torch.stack([s[:-1, 0], s[1:, 0]]).double())[0, 1]
    assert abs(neighbours) < 0.04


def test_half_of_the_images_are_flipped() -> None:
    x = torch.zeros(10_000, 1, 1, 2)
    x[..., 1] = 1.0
    assert abs(flip(x, gen(2))[:, 0, 0, 0].mean() - 0.5) < 0.025
    assert abs(flip(x, gen(2), p=0.1)[:, 0, 0, 0].mean() - 0.1) < 0.015


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_types_are_kept_and_inputs_unchanged(dtype: torch.dtype) -> None:
    x = numbered(3, 1, 4, 4).to(dtype)
    saved = x.clone()
    for y in (pad_crop(x, 2, gen()), flip(x, gen())):
        assert y.dtype == dtype
        assert y.data_ptr() != x.data_ptr()
    assert torch.equal(x, saved)


def test_no_padding_means_no_draw() -> None:
    generator = gen(3)
    before = generator.get_state()
    x = numbered(2, 1, 3, 3)
    assert torch.equal(pad_crop(x, 0, generator), x)
    assert torch.equal(generator.get_state(), before)


def test_draws_repeat_and_leave_the_global_state_alone() -> None:
    x = numbered(16, 3, 8, 8)
    before = torch.random.get_rng_state()
    for augmentation in (lambda g: pad_crop(x, 4, g), lambda g: flip(x, g)):
        assert torch.equal(augmentation(gen(5)), augmentation(gen(5)))
        assert not torch.equal(augmentation(gen(5)), augmentation(gen(6)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_normalise_equals_its_formula() -> None:
    x = numbered(2, 3, 4, 4, torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 2.0])
    want = (x / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(normalise(x, mean, std), want)
    torch.testing.assert_close(normalise(x / 255, mean, std), want)
    assert normalise(x, mean, std).dtype == torch.float32
    assert normalise(x.double(), mean, std).dtype == torch.float64


def test_auto_depends_on_the_channels_and_the_size() -> None:
    three, one = torch.ones(3), torch.ones(1)
    assert Augment(three, three).kind == "crop+flip"
    assert Augment(one, one).kind == "crop"
    x = torch.zeros(20_000, 1, 8, 8)
    x[:, 0, 4, 4] = 1.0
    s = shifts_of(Augment(torch.zeros(1), one)(x, gen()), 8, 1)
    assert s.unique().tolist() == [0, 1, 2]  # one pixel of padding at 8x8


@pytest.mark.parametrize("kind", AUGMENTATIONS)
def test_kinds_do_what_they_say(kind: str) -> None:
    x = numbered(64, 3, 8, 8).float()
    augment = Augment(torch.zeros(3), torch.ones(3), kind, padding=2)
    y = augment(x, gen())
    assert torch.equal(augment(x), x)  # without a generator: only normalised
    moved = {"auto": True, "none": False, "crop": True, "flip": True, "crop+flip": True}[kind]
    assert torch.equal(y, x) != moved
    cropped = (y == 0).any().item()
    assert cropped == (kind in ("auto", "crop", "crop+flip"))
    backwards = (y[..., 3] > y[..., 4]).flatten(1).any(dim=1)
    assert backwards.any().item() == (kind in ("auto", "flip", "crop+flip"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cutout"}, "augment must be one of auto, none, crop, flip, crop\\+flip, got 'cutout'"),
        ({"padding": -1}, "padding must be a whole number of pixels >= 0 or None, got -1"),
        ({"padding": 1.5}, "padding must be"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(torch.ones(3), torch.ones(3), **options)


def square(image: Tensor, size: int, row: int, column: int) -> Tensor:
    """`image` with the pixels around (row, column) blanked, pixel by pixel."""
    out = image.clone()
    for i in range(image.shape[1]):
        for j in range(image.shape[2]):
            if -(size // 2) <= i - row < size - size // 2 and -(size // 2) <= j - column < size - size // 2:
                out[:, i, j] = 0
    return out


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 4), c=st.integers(1, 3), h=st.integers(1, 6), w=st.integers(1, 6), size=st.integers(0, 7),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_a_cutout_is_one_square_around_a_pixel(n: int, c: int, h: int, w: int, size: int, seed: int) -> None:
    x = numbered(n, c, h, w)
    for image, y in zip(x, cutout(x, size, gen(seed)), strict=True):
        assert any(torch.equal(y, square(image, size, i, j)) for i in range(h) for j in range(w))


def test_cutout_centres_are_uniform_and_rows_and_columns_independent() -> None:
    x = torch.ones(20_000, 2, 5, 4)
    y = cutout(x, 1, gen(1))
    assert torch.equal(y[:, 0], y[:, 1])
    assert (y[:, 0] == 0).sum((1, 2)).eq(1).all()
    hits = (y[:, 0] == 0).sum(0).double().flatten()
    assert ((hits - 1000) ** 2 / 1000).sum() < 50  # chi-squared with 19 degrees of freedom, far tail
    assert torch.equal(x, torch.ones_like(x))


def test_cutout_of_cifar_blanks_its_share() -> None:
    """16 of 32 pixels: a quarter where nothing is cut off, (16 * 3/4 / 32 + edge)^2 in the mean."""
    kept = cutout(torch.ones(5_000, 1, 32, 32), 16, gen(2)).mean()
    side = sum(min(32, c + 8) - max(0, c - 8) for c in range(32)) / 32**2
    assert kept == pytest.approx(1 - side**2, abs=0.003)


def test_mixup_is_its_formula() -> None:
    x, y = torch.randn(6, 2, 3, 3, generator=gen(0)), torch.arange(6)
    mixed, y_a, y_b, lam = mixup(x, y, 0.4, gen(3))
    assert 0.0 <= lam <= 1.0
    assert torch.equal(y_a, y)
    assert sorted(y_b.tolist()) == list(range(6))
    torch.testing.assert_close(mixed, lam * x + (1 - lam) * x[y_b])
    assert torch.equal(mixup(x, y, 0.4, gen(3))[0], mixed)
    assert not torch.equal(mixup(x, y, 0.4, gen(4))[0], mixed)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_lam_is_beta_distributed(alpha: float) -> None:
    generator, one = gen(5), torch.zeros(1, 1, 1, 1)
    lams = torch.tensor([mixup(one, torch.zeros(1), alpha, generator)[3] for _ in range(4000)], dtype=torch.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(lams.mean() - 0.5) < 5 * math.sqrt(variance / 4000)
    assert lams.var() == pytest.approx(variance, rel=0.12)


def test_mixed_loss_equals_the_loss_of_mixed_targets() -> None:
    logits, y_a = torch.randn(5, 4, generator=gen(1)), torch.tensor([0, 1, 2, 3, 0])
    y_b, lam = torch.tensor([3, 3, 2, 0, 1]), 0.3
    mixed = lam * soft_targets(y_a, 4) + (1 - lam) * soft_targets(y_b, 4)
    torch.testing.assert_close(mixed_loss(F.cross_entropy, logits, y_a, y_b, lam), F.cross_entropy(logits, mixed))


@given(
    smoothing=st.floats(0, 0.99),
    classes=st.integers(2, 20),
    labels=st.lists(st.integers(0, 1000), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=40)
def test_smoothed_labels_are_probabilities(smoothing: float, classes: int, labels: list[int]) -> None:
    y = torch.tensor(labels) % classes
    targets = soft_targets(y, classes, smoothing, torch.float64)
    torch.testing.assert_close(targets.sum(1), torch.ones(len(y), dtype=torch.float64))
    assert (targets >= 0).all()
    others = targets.scatter(1, y[:, None], smoothing / classes)
    torch.testing.assert_close(others, torch.full_like(others, smoothing / classes))


def test_smoothed_labels_give_the_loss_of_torch() -> None:
    logits, y = torch.randn(8, 5, generator=gen(1)), torch.arange(8) % 5
    want = F.cross_entropy(logits, y, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, soft_targets(y, 5, 0.1)), want)


def test_augment_cuts_out_after_normalisation() -> None:
    x = torch.full((3, 3, 8, 8), 255, dtype=torch.uint8)
    augment = Augment(torch.full((3,), 0.5), torch.full((3,), 0.25), "none", cutout=3)
    assert torch.equal(augment(x), torch.full((3, 3, 8, 8), 2.0))
    y = augment(x, gen(0))
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert 4 <= (y[0, 0] == 0).sum() <= 9


@pytest.mark.parametrize(
    "augmentation", [lambda x, g: cutout(x, 2, g), lambda x, g: mixup(x, x[:, 0, 0, 0], 0.5, g)[0]]
)
def test_new_draws_repeat_and_leave_the_global_state_alone(augmentation: object) -> None:
    x = numbered(16, 3, 8, 8, torch.float32)
    before = torch.random.get_rng_state()
    assert torch.equal(augmentation(x, gen(5)), augmentation(x, gen(5)))
    assert not torch.equal(augmentation(x, gen(5)), augmentation(x, gen(6)))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: cutout(x, -1, gen()), ValueError, "size of a cutout must be a whole number of pixels >= 0, got -1"),
        (lambda x: Augment(torch.ones(3), torch.ones(3), cutout=1.5), ValueError, "cutout must be a whole number"),
        (lambda x: mixup(x, torch.zeros(2), 0.0, gen()), ValueError, "alpha of mixup must be above 0, got 0.0"),
        (lambda x: mixup(x, torch.zeros(2), math.nan, gen()), ValueError, "alpha of mixup must be above 0"),
        (
            lambda x: mixup(x.to(torch.uint8), torch.zeros(2), 1.0, gen()),
            TypeError,
            "takes floating images, got .*uint8",
        ),
        (lambda x: mixup(x, torch.zeros(3), 1.0, gen()), ValueError, "got 2 images and 3 labels"),
        (lambda x: soft_targets(torch.zeros(2, dtype=torch.int64), 3, 1.0), ValueError, "label smoothing must be"),
    ],
)
def test_bad_arguments_of_the_new_ones(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3, 4, 4))
