"""Augmentation of whole batches on their device: crop after zero padding, mirror image, normalisation, cutout, mixup.

Every draw takes a generator and is made for the whole batch at once. Crops and flips work on raw pixels (0 = black),
normalisation comes next, cutout (0 = the mean colour) and mixup last.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from s2sam.tensors import upload

AUGMENTATIONS = ("auto", "none", "crop", "flip", "crop+flip")


def pad_crop(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad each image with `padding` zeros on all sides and cut one window of the old size out of it, at random.

    y[n, c, i, j] = padded[n, c, i + dy_n, j + dx_n], dy_n and dx_n uniform on 0 .. 2 * padding.
    Shapes: (N, C, H, W) -> (N, C, H, W), any type. Cost: a padded copy, a gather, 2 N draws (none if padding = 0).
    """
    if padding == 0:
        return x
    return crop_at(x, padding, upload(draw_crops(len(x), padding, generator), x.device))


def draw_crops(n: int, padding: int, generator: torch.Generator) -> Tensor:
    """dy, dx of `n` crops: int64 (2, n), uniform on 0 .. 2 * padding."""
    return torch.randint(0, 2 * padding + 1, (2, n), generator=generator, device=generator.device)


def crop_at(x: Tensor, padding: int, shift: Tensor) -> Tensor:
    """:func:`pad_crop` with the windows that `shift` names."""
    n, _, height, width = x.shape
    windows = F.pad(x, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, dy, dx, H, W)
    return windows[torch.arange(n, device=x.device), :, shift[0], shift[1]]


def flip(x: Tensor, generator: torch.Generator, p: float = 0.5) -> Tensor:
    """Mirror each image left to right with probability `p`.

    Shapes: (N, C, H, W) -> (N, C, H, W), any type. Cost: N draws, two copies.
    """
    return flip_where(x, upload(draw_flips(len(x), generator, p), x.device))


def draw_flips(n: int, generator: torch.Generator, p: float = 0.5) -> Tensor:
    """Which of `n` images to mirror: bool (n,)."""
    return torch.rand(n, generator=generator, device=generator.device) < p


def flip_where(x: Tensor, mirrored: Tensor) -> Tensor:
    """:func:`flip` of the images for which `mirrored` is true."""
    return torch.where(mirrored.bool()[:, None, None, None], x.flip(3), x)


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x / 255 - mean) / std per channel for uint8 x, (x - mean) / std for floating x on the [0, 1] scale.

    Shapes: (N, C, H, W), (C,), (C,) -> (N, C, H, W), float32 (floating x keeps its type).
    """
    dtype = x.dtype if x.is_floating_point() else torch.float32
    unit = 1.0 if x.is_floating_point() else 255.0
    scale = (1 / (unit * std)).to(x.device, dtype)[:, None, None]
    shift = (mean / std).to(x.device, dtype)[:, None, None]
    return x.to(dtype) * scale - shift


def cutout(x: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Set one square of `size` pixels to zero in each image, around a pixel drawn uniformly, cut off at the border.

    y[n, c, i, j] = 0 if -(size // 2) <= i - r_n < size - size // 2, and so for j and its centre; else x[n, c, i, j].
    Shapes: (N, C, H, W) -> (N, C, H, W), any type. Cost: 2 N draws, a copy.
    Source: DeVries and Taylor, Improved Regularization with Cutout, 2017 (16 pixels for CIFAR-10, 8 for CIFAR-100).
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"the size of a cutout must be a whole number of pixels >= 0, got {size!r}")
    return cut_at(x, size, upload(draw_centres(x.shape, generator), x.device))


def draw_centres(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Row and column of a pixel in each image of a batch (N, C, H, W): int64 (2, N)."""
    n, _, height, width = shape
    draws = [torch.randint(0, side, (n,), generator=generator, device=generator.device) for side in (height, width)]
    return torch.stack(draws)


def cut_at(x: Tensor, size: int, centres: Tensor) -> Tensor:
    """:func:`cutout` around these pixels."""
    inside = []
    for side, centre in zip(x.shape[2:], centres, strict=True):
        offset = torch.arange(side, device=x.device) - centre[:, None] + size // 2
        inside.append((offset >= 0) & (offset < size))
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def mixup(x: Tensor, y: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, float]:
    """(lam x + (1 - lam) x', y, y', lam): each image mixed with one of the batch, lam ~ Beta(alpha, alpha) for all.

    x', y' are the batch in random order. The loss is lam loss(y) + (1 - lam) loss(y'), see :func:`mixed_loss`; where
    targets must be one tensor, lam * soft_targets(y, ...) + (1 - lam) * soft_targets(y', ...).
    Shapes: floating (N, C, H, W), (N,) -> the same, (N,), (N,), a number in [0, 1]. Cost: N + 1 draws, a copy; a
    generator on a GPU makes the host wait for it.
    Source: Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018 (alpha 0.2 to 1).

    Raises:
        ValueError: alpha is not above 0, or images and labels differ in number.
        TypeError: images of whole numbers, which cannot be mixed without rounding; normalise them first.
    """
    if not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha of mixup must be above 0, got {alpha!r}; leave mixup out instead of alpha 0")
    if not x.is_floating_point():
        raise TypeError(f"mixup takes floating images, got {x.dtype}; normalise them first")
    if len(x) != len(y):
        raise ValueError(f"mixup takes one label an image, got {len(x)} images and {len(y)} labels")
    seed = int(torch.randint(0, 2**62, (), generator=generator, device=generator.device))
    lam = float(np.random.default_rng(seed).beta(alpha, alpha))  # torch draws no Beta from a generator
    order = upload(torch.randperm(len(x), generator=generator, device=generator.device), x.device)
    return torch.lerp(x[order], x, lam), y, y[order], lam


def mixed_loss(
    loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y_a: Tensor, y_b: Tensor, lam: float
) -> Tensor:
    """lam loss(logits, y_a) + (1 - lam) loss(logits, y_b), the loss that goes with :func:`mixup`.

    >>> logits, y = torch.tensor([[0.0, 0.0]]), torch.tensor([1])
    >>> mixed_loss(F.cross_entropy, logits, y, 1 - y, lam=0.3).item() == F.cross_entropy(logits, y).item()
    True
    """
    return lam * loss(logits, y_a) + (1.0 - lam) * loss(logits, y_b)


def soft_targets(y: Tensor, num_classes: int, smoothing: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """(1 - smoothing) one_hot(y) + smoothing / num_classes: smoothed labels as probabilities.

    F.cross_entropy takes them in place of labels, and gives what its own `label_smoothing` gives.
    Shapes: int64 (N,) -> `dtype` (N, num_classes), rows of sum 1.
    Source: Szegedy et al., Rethinking the Inception Architecture, 2016, section 7.

    >>> soft_targets(torch.tensor([0, 3]), 4, smoothing=0.4)
    tensor([[0.7000, 0.1000, 0.1000, 0.1000],
            [0.1000, 0.1000, 0.1000, 0.7000]])
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"label smoothing must be at least 0 and below 1, got {smoothing!r}")
    return F.one_hot(y, num_classes).to(dtype) * (1.0 - smoothing) + smoothing / num_classes


class Augment:
    """`augment(batch, generator)` -> the normalised batch a network sees; `augment(batch)` only normalises.

    Args:
        mean, std: per channel, of :class:`s2sam.data.images.ImageData`.
        kind: "none", "crop", "flip" or "crop+flip"; "auto" = "crop+flip" for colour and "crop" for grey images, as
            mirrored characters are other characters.
        padding: of the crop, in pixels; None = an eighth of the height (4 at 32 pixels, 1 at 8).
        cutout: side of the square that :func:`cutout` blanks after normalisation, in pixels; 0 = none.

    Raises:
        ValueError: unknown kind, or a padding or cutout that is no whole number >= 0.

    >>> grey = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    >>> Augment(torch.tensor([0.5]), torch.tensor([0.25]), kind="none")(grey)[0, 0, 0, :2]
    tensor([2., 2.])
    """

    def __init__(
        self, mean: Tensor, std: Tensor, kind: str = "auto", padding: int | None = None, cutout: int = 0
    ) -> None:
        if kind not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {kind!r}")
        if padding is not None and (isinstance(padding, bool) or not isinstance(padding, int) or padding < 0):
            raise ValueError(f"padding must be a whole number of pixels >= 0 or None, got {padding!r}")
        if isinstance(cutout, bool) or not isinstance(cutout, int) or cutout < 0:
            raise ValueError(f"cutout must be a whole number of pixels >= 0, got {cutout!r}")
        self.mean, self.std, self.padding, self.cutout = mean, std, padding, cutout
        self.kind = ("crop+flip" if len(mean) >= 3 else "crop") if kind == "auto" else kind

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment with draws from `generator`, then normalise: (N, C, H, W) -> float32 (N, C, H, W).

        All draws of a batch go to its device in one transfer, for which the host does not wait.
        """
        if generator is None:
            return normalise(x, self.mean, self.std)
        padding = x.shape[2] // 8 if self.padding is None else self.padding
        drawn = {
            "crop": draw_crops(len(x), padding, generator) if "crop" in self.kind and padding else None,
            "flip": draw_flips(len(x), generator)[None] if "flip" in self.kind else None,
            "cutout": draw_centres(x.shape, generator) if self.cutout else None,
        }
        draws = {name: rows for name, rows in drawn.items() if rows is not None}
        if draws:
            there = upload(torch.cat([rows.long() for rows in draws.values()]), x.device)
            draws = dict(zip(draws, there.split([len(rows) for rows in draws.values()]), strict=True))
        if "crop" in draws:
            x = crop_at(x, padding, draws["crop"])
        if "flip" in draws:
            x = flip_where(x, draws["flip"][0])
        x = normalise(x, self.mean, self.std)
        return cut_at(x, self.cutout, draws["cutout"]) if "cutout" in draws else x
