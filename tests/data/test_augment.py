"""Crops are shifts, flips are mirror images, both as often as they should be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2sam.data.augment import AUGMENTATIONS, Augment, flip, normalise, pad_crop


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
