"""Filters that corruptions are made of: blurs with the borders of the original libraries, shifts, and sampling.

All take and give floating images (N, C, H, W). A blur is a product with a banded matrix, which holds the border rule.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def border(places: Tensor, side: int, rule: str) -> Tensor:
    """Where to look instead of `places` outside of [0, side): int64, the same shape.

    Rules, by their names in numpy.pad: "edge" (a a | a b c | c c), "reflect" (c b | a b c | b a), "symmetric"
    (b a | a b c | c b).

    >>> where = torch.arange(-2, 5)
    >>> [border(where, 3, rule).tolist() for rule in ("edge", "reflect", "symmetric")]
    [[0, 0, 0, 1, 2, 2, 2], [2, 1, 0, 1, 2, 1, 0], [1, 0, 0, 1, 2, 2, 1]]
    """
    if rule == "edge" or side == 1:
        return places.clamp(0, side - 1)
    if rule == "reflect":
        folded = places.remainder(2 * side - 2)
        return torch.where(folded < side, folded, 2 * side - 2 - folded)
    assert rule == "symmetric", rule
    folded = places.remainder(2 * side)
    return torch.where(folded < side, folded, 2 * side - 1 - folded)


def gaussian_blur(x: Tensor, sigma: float, *, rule: str = "edge", truncate: float = 4.0) -> Tensor:
    """x convolved with a Gaussian that ends at `truncate` sigma, as scipy.ndimage.gaussian_filter does it.

    Cost: two products with matrices (H, H) and (W, W).
    """
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return x
    taps = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    weights = (-0.5 * (taps / sigma).square()).exp()
    weights = weights / weights.sum()
    high, wide = (_banded(side, weights, rule) for side in x.shape[-2:])
    return high @ x @ wide.T


def _banded(side: int, weights: Tensor, rule: str) -> Tensor:
    """The (side, side) matrix that convolves a line of `side` values."""
    radius = len(weights) // 2
    offsets = torch.arange(-radius, radius + 1, device=weights.device)
    columns = border(torch.arange(side, device=weights.device)[:, None] + offsets, side, rule)
    matrix = torch.zeros(side, side, dtype=weights.dtype, device=weights.device)
    return matrix.scatter_add_(1, columns, weights.expand(side, -1))


def disk_blur(x: Tensor, radius: float, edge_sigma: float) -> Tensor:
    """x correlated with a disk whose edge is softened by a 3 x 3 Gaussian (5 x 5 for radii above 8); reflecting border.

    Source: `disk` of hendrycks/robustness, with cv2.GaussianBlur and cv2.filter2D.
    """
    reach, soft = (8, 1) if radius <= 8 else (int(radius), 2)
    taps = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    disk = (taps[:, None].square() + taps.square() <= radius**2).to(x.dtype)
    disk = disk / disk.sum()
    near = torch.arange(-soft, soft + 1, dtype=x.dtype, device=x.device)
    weights = (-0.5 * (near / edge_sigma).square()).exp()
    matrix = _banded(len(taps), weights / weights.sum(), "reflect")
    kernel = matrix @ disk @ matrix.T
    rows, columns = (
        border(torch.arange(-reach, side + reach, device=x.device), side, "reflect") for side in x.shape[-2:]
    )
    padded = x[:, :, rows][:, :, :, columns]
    size = padded.shape[-2:]
    both = torch.fft.irfft2(torch.fft.rfft2(padded) * torch.fft.rfft2(kernel, s=size), s=size)
    return both[..., 2 * reach :, 2 * reach :]  # what does not wrap around


def motion_blur(x: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """x averaged along a line from each pixel, weighted by half a Gaussian; the angle is that of each image.

    y(p) = sum_i k_i x(p + o_i),  k_i ~ exp(-i^2 / (2 sigma^2)),  o_i = ceil(i (sin a, cos a) - 1/2),  i = 0 .. 2 radius

    Borders are extended. Shapes: x (N, C, H, W), degrees (N,). Source: ImageMagick's MotionBlurImage, which ImageNet-C
    and CIFAR-C were made with. Cost: 2 radius + 1 gathers.
    """
    count, _, height, width = x.shape
    images = torch.arange(count, device=x.device)[:, None, None]
    down, right = (torch.arange(side, device=x.device) for side in (height, width))
    i = torch.arange(2 * radius + 1, dtype=x.dtype, device=x.device)
    weights = (-0.5 * (i / sigma).square()).exp()
    weights = weights / weights.sum()
    angle = degrees.to(x)[:, None] * (math.pi / 180)
    moved_x, moved_y = ((turn(angle) * i - 0.5).ceil().long() for turn in (torch.cos, torch.sin))
    last = x.permute(0, 2, 3, 1)
    total = torch.zeros_like(last)
    for step, weight in enumerate(weights):
        rows = border(down + moved_y[:, step, None], height, "edge")
        columns = border(right + moved_x[:, step, None], width, "edge")
        total += weight * last[images, rows[:, :, None], columns[:, None, :]]
    return total.permute(0, 3, 1, 2)


def zoomed(x: Tensor, factor: float) -> Tensor:
    """The centre of x, 1 / `factor` of each side, enlarged to the size of x: linear, corners on corners.

    Source: `clipped_zoom` of hendrycks/robustness, with scipy.ndimage.zoom of order 1.
    """
    sides = x.shape[-2:]
    cut = [math.ceil(side / factor) for side in sides]
    first = [(side - length) // 2 for side, length in zip(sides, cut, strict=True)]
    x = x[..., first[0] : first[0] + cut[0], first[1] : first[1] + cut[1]]
    size = [round(length * factor) for length in cut]
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    trim = [(length - side) // 2 for length, side in zip(size, sides, strict=True)]
    return x[..., trim[0] : trim[0] + sides[0], trim[1] : trim[1] + sides[1]]


def sample(x: Tensor, down: Tensor, right: Tensor, rule: str) -> Tensor:
    """x at fractional places, linear between pixels; `down` and `right` are (N, H, W), `rule` as in :func:`border`."""
    height, width = x.shape[-2:]
    images = torch.arange(len(x), device=x.device)[:, None, None]
    top, left = down.floor(), right.floor()
    below, beside = (down - top)[..., None], (right - left)[..., None]
    rows = [border(top.long() + k, height, rule) for k in (0, 1)]
    columns = [border(left.long() + k, width, rule) for k in (0, 1)]
    last = x.permute(0, 2, 3, 1)
    upper, lower = (
        last[images, row, columns[0]] * (1 - beside) + last[images, row, columns[1]] * beside for row in rows
    )
    return (upper * (1 - below) + lower * below).permute(0, 3, 1, 2)
