"""Augmentation of whole batches on their device: random crop after zero padding, random mirror image, normalisation.

Every draw takes a generator and is made for the whole batch at once. Crops and flips work on raw pixels (0 = black),
normalisation comes last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENTATIONS = ("auto", "none", "crop", "flip", "crop+flip")


def pad_crop(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Pad each image with `padding` zeros on all sides and cut one window of the old size out of it, at random.

    y[n, c, i, j] = padded[n, c, i + dy_n, j + dx_n], dy_n and dx_n uniform on 0 .. 2 * padding.
    Shapes: (N, C, H, W) -> (N, C, H, W), any type. Cost: a padded copy, a gather, 2 N draws (none if padding = 0).
    """
    if padding == 0:
        return x
    n, _, height, width = x.shape
    shift = torch.randint(0, 2 * padding + 1, (2, n), generator=generator, device=generator.device).to(x.device)
    windows = F.pad(x, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, dy, dx, H, W)
    return windows[torch.arange(n, device=x.device), :, shift[0], shift[1]]


def flip(x: Tensor, generator: torch.Generator, p: float = 0.5) -> Tensor:
    """Mirror each image left to right with probability `p`.

    Shapes: (N, C, H, W) -> (N, C, H, W), any type. Cost: N draws, two copies.
    """
    mirrored = torch.rand(len(x), generator=generator, device=generator.device).to(x.device) < p
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x / 255 - mean) / std per channel for uint8 x, (x - mean) / std for floating x on the [0, 1] scale.

    Shapes: (N, C, H, W), (C,), (C,) -> (N, C, H, W), float32 (floating x keeps its type).
    """
    dtype = x.dtype if x.is_floating_point() else torch.float32
    unit = 1.0 if x.is_floating_point() else 255.0
    scale = (1 / (unit * std)).to(x.device, dtype)[:, None, None]
    shift = (mean / std).to(x.device, dtype)[:, None, None]
    return x.to(dtype) * scale - shift


class Augment:
    """`augment(batch, generator)` -> the normalised batch a network sees; `augment(batch)` only normalises.

    Args:
        mean, std: per channel, of :class:`s2sam.data.images.ImageData`.
        kind: "none", "crop", "flip" or "crop+flip"; "auto" = "crop+flip" for colour and "crop" for grey images, as
            mirrored characters are other characters.
        padding: of the crop, in pixels; None = an eighth of the height (4 at 32 pixels, 1 at 8).

    Raises:
        ValueError: unknown kind, or a padding that is no whole number >= 0.

    >>> grey = torch.full((2, 1, 8, 8), 255, dtype=torch.uint8)
    >>> Augment(torch.tensor([0.5]), torch.tensor([0.25]), kind="none")(grey)[0, 0, 0, :2]
    tensor([2., 2.])
    """

    def __init__(self, mean: Tensor, std: Tensor, kind: str = "auto", padding: int | None = None) -> None:
        if kind not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {kind!r}")
        if padding is not None and (isinstance(padding, bool) or not isinstance(padding, int) or padding < 0):
            raise ValueError(f"padding must be a whole number of pixels >= 0 or None, got {padding!r}")
        self.mean, self.std, self.padding = mean, std, padding
        self.kind = ("crop+flip" if len(mean) >= 3 else "crop") if kind == "auto" else kind

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment with draws from `generator`, then normalise: (N, C, H, W) -> float32 (N, C, H, W)."""
        if generator is not None:
            if "crop" in self.kind:
                x = pad_crop(x, x.shape[2] // 8 if self.padding is None else self.padding, generator)
            if "flip" in self.kind:
                x = flip(x, generator)
        return normalise(x, self.mean, self.std)
