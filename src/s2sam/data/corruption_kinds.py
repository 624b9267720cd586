"""The 15 corruptions, each a function (x, c, draws) -> y of images in [0, 1]; values outside are cut off afterwards.

x, y: float64 (N, C, H, W). c: the constants of a severity, see :mod:`s2sam.data.corruption_constants`. Sides that are
no multiple of anything, grey images and images smaller than a filter are served as well as RGB. What differs from
hendrycks/robustness:ImageNet-C/create_c is said where it does.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2sam.data.corruption_draws import Draws
from s2sam.data.corruption_filters import disk_blur, gaussian_blur, motion_blur, sample, zoomed

Kind = Callable[[Tensor, Any, Draws], Tensor]
GREY = (0.299, 0.587, 0.114)  #: of red, green and blue
ICE = (0.88, 0.95, 1.0)  #: the tint of our frost


def gaussian_noise(x: Tensor, c: float, draws: Draws) -> Tensor:
    """y = x + c n, n ~ N(0, 1) for every value."""
    return x + c * draws.normal(*x.shape[1:])


def shot_noise(x: Tensor, c: float, draws: Draws) -> Tensor:
    """y ~ Poisson(c x) / c."""
    return draws.poisson(x * c).to(x) / c


def impulse_noise(x: Tensor, c: float, draws: Draws) -> Tensor:
    """A share c of the values becomes 0 or 1, with equal chance."""
    hit, salt = draws.uniform(2, *x.shape[1:]).unbind(dim=1)
    return torch.where(hit <= c, (salt <= 0.5).to(x), x)


def defocus_blur(x: Tensor, c: tuple[float, float], draws: Draws) -> Tensor:
    """A disk of radius c[0] with an edge softened by c[1]."""
    return disk_blur(x, *c)


def glass_blur(x: Tensor, c: tuple[float, int, int], draws: Draws) -> Tensor:
    """Blur, then each pixel in turn takes the place of one at most `reach` away, several times; then blur again.

    The original code means to swap two pixels; as it swaps views of one array, it copies one onto the other, and so do
    we. Cost: a loop over the pixels, in which the whole batch goes at once.
    """
    sigma, reach, times = c
    x = (gaussian_blur(x, sigma) * 255 + 1e-6).floor() / 255
    count, _, height, width = x.shape
    offsets = draws.integers(-reach, reach, times, height, width, 2).cpu().numpy()
    place = np.tile(np.arange(height * width).reshape(height, width), (count, 1, 1))
    images = np.arange(count)
    for time in range(times):
        for h in range(height - reach, reach, -1):
            for w in range(width - reach, reach, -1):
                down, right = offsets[:, time, h, w].T
                place[:, h, w] = place[images, h + down, w + right]
    flat = torch.from_numpy(place).to(x.device).reshape(count, 1, -1).expand(-1, x.shape[1], -1)
    return gaussian_blur(x.flatten(2).gather(2, flat).reshape(x.shape), sigma)


def moving_blur(x: Tensor, c: tuple[int, float], draws: Draws) -> Tensor:
    """Along a line of radius c[0] and sigma c[1] at an angle of -45 to 45 degrees."""
    return motion_blur(x, *c, draws.uniform(low=-45.0, high=45.0))


def zoom_blur(x: Tensor, c: tuple[float, float], draws: Draws) -> Tensor:
    """The mean of x and of x enlarged by 1, 1 + step, ... below the end."""
    factors = np.arange(1.0, *c)
    return (x + sum(zoomed(x, float(factor)) for factor in factors)) / (len(factors) + 1)


def snow(x: Tensor, c: tuple[float, ...], draws: Draws) -> Tensor:
    """Flakes that fell, and a second layer turned by 180 degrees, on an image whose colours are paler."""
    mean, deviation, factor, threshold, radius, sigma, share = c
    flakes = zoomed(mean + deviation * draws.normal(1, *x.shape[2:]), factor)
    flakes = torch.where(flakes < threshold, 0.0, flakes).clamp(0, 1)
    flakes = motion_blur((flakes * 255).floor(), int(radius), sigma, draws.uniform(low=-135.0, high=-45.0))
    flakes = flakes.round() / 255
    pale = share * x + (1 - share) * torch.maximum(x, grey(x) * 1.5 + 0.5)
    return pale + flakes + flakes.rot90(2, dims=(2, 3))


def grey(x: Tensor) -> Tensor:
    """Luma (N, 1, H, W) of RGB images; the mean of the channels of others."""
    if x.shape[1] != 3:
        return x.mean(dim=1, keepdim=True)
    return (x * x.new_tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True)


def frost(x: Tensor, c: tuple[float, float], draws: Draws) -> Tensor:
    """y = c[0] x + c[1] ice. OURS: the original's ice is six photographs, this one's is drawn from plasma.

    ice = 1/4 + 9/20 p + 3/10 (1 - |2 q - 1|)^4, bluish, with two plasmas p and q of much detail: clouds and needles.
    """
    clouds, needles = (plasma(x, 1.6, draws) for _ in range(2))
    ice = 0.25 + 0.45 * clouds + 0.3 * (1 - (2 * needles - 1).abs()) ** 4
    tint = x.new_tensor(ICE) if x.shape[1] == 3 else x.new_ones(1)
    return c[0] * x + c[1] * ice * tint[:, None, None]


def fog(x: Tensor, c: tuple[float, float], draws: Draws) -> Tensor:
    """y = (x + c[0] p) m / (m + c[0]), m = max x, p a plasma of decay c[1]."""
    largest = x.amax(dim=(1, 2, 3), keepdim=True)
    return (x + c[0] * plasma(x, c[1], draws)) * largest / (largest + c[0])


def plasma(x: Tensor, decay: float, draws: Draws) -> Tensor:
    """Heights in [0, 1] by diamonds and squares on a torus, float64 (N, 1, H, W); each level moves 1 / decay^2 as much.

    Source: `plasma_fractal` of hendrycks/robustness, for a side that is the next power of two.
    """
    side = 1 << (max(x.shape[2:]) - 1).bit_length()
    noise, used = draws.uniform(side * side, low=-1.0, high=1.0), 0
    field = noise.new_zeros(len(x), side, side)
    step, wibble = side, 100.0

    def level(total: Tensor) -> Tensor:
        nonlocal used
        own = noise[:, used : used + total[0].numel()].view_as(total)
        used += total[0].numel()
        return total / 4 + wibble**2 * own

    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        sums = corners + corners.roll(-1, 1)
        field[:, half::step, half::step] = level(sums + sums.roll(-1, 2))
        middles = field[:, half::step, half::step]
        field[:, ::step, half::step] = level(middles + middles.roll(1, 1) + corners + corners.roll(-1, 2))
        field[:, half::step, ::step] = level(middles + middles.roll(1, 2) + corners + corners.roll(-1, 1))
        step, wibble = half, wibble / decay
    low, high = (end.unflatten(0, (-1, 1, 1)) for end in (field.flatten(1).amin(1), field.flatten(1).amax(1)))
    return ((field - low) / (high - low).clamp(min=1e-12))[:, None, : x.shape[2], : x.shape[3]]


def brightness(x: Tensor, c: float, draws: Draws) -> Tensor:
    """The value of HSV, v = max over the channels, becomes min(v + c, 1); hue and saturation stay."""
    value = x.amax(dim=1, keepdim=True)
    brighter = (value + c).clamp(max=1.0)
    return torch.where(value > 0, x * (brighter / value.clamp(min=1e-12)), brighter)


def contrast(x: Tensor, c: float, draws: Draws) -> Tensor:
    """y = c (x - m) + m, m the mean of each channel of the image."""
    means = x.mean(dim=(2, 3), keepdim=True)
    return (x - means) * c + means


def elastic_transform(x: Tensor, c: tuple[float, float, float], draws: Draws) -> Tensor:
    """A random affine map, then every pixel moves by a smooth random field."""
    amplitude, sigma, offset = (share * min(x.shape[2:]) for share in c)
    height, width = x.shape[2:]
    reach = max(1, min(height, width) // 3)
    middle = x.new_tensor([width // 2, height // 2])
    corners = middle + reach * x.new_tensor([[1, 1], [1, -1], [-1, -1]])
    moved = corners + draws.uniform(3, 2, low=-offset, high=offset)
    back = torch.linalg.solve(torch.cat([moved, moved.new_ones(len(x), 3, 1)], dim=2), corners.expand(len(x), -1, -1))
    down, right = torch.meshgrid(
        *(torch.arange(side, dtype=x.dtype, device=x.device) for side in (height, width)), indexing="ij"
    )
    source = torch.stack([right, down, torch.ones_like(down)], dim=-1).flatten(0, 1) @ back
    from_right, from_down = source.unflatten(1, (height, width)).unbind(dim=-1)
    x = sample(x, from_down, from_right, "reflect")
    field = gaussian_blur(draws.uniform(2, height, width, low=-1.0, high=1.0), sigma, rule="symmetric", truncate=3.0)
    field = field * amplitude
    return sample(x, down + field[:, 1], right + field[:, 0], "symmetric")


def pixelate(x: Tensor, c: float, draws: Draws) -> Tensor:
    """Made smaller by c and larger again, with Pillow's box filter."""
    from PIL import Image

    def change(image: Image.Image) -> Image.Image:
        small = image.resize((max(1, int(image.width * c)), max(1, int(image.height * c))), Image.Resampling.BOX)
        return small.resize(image.size, Image.Resampling.BOX)

    return _by_pillow(x, change)


def jpeg_compression(x: Tensor, c: int, draws: Draws) -> Tensor:
    """Written as JPEG of quality c and read again, by Pillow."""
    from PIL import Image

    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=c)
        return Image.open(buffer)

    return _by_pillow(x, change)


def _by_pillow(x: Tensor, change: Callable[[Any], Any]) -> Tensor:
    """`change` of every image; of every channel where there are neither 1 nor 3."""
    from PIL import Image

    pixels = (x * 255).round().to(torch.uint8).cpu()
    colour = x.shape[1] == 3
    arrays = (pixels.permute(0, 2, 3, 1).contiguous() if colour else pixels.flatten(0, 1)).numpy()
    changed = torch.from_numpy(np.stack([np.asarray(change(Image.fromarray(array))) for array in arrays]))
    changed = changed.permute(0, 3, 1, 2) if colour else changed.reshape(x.shape)
    return changed.to(x) / 255


#: in the order of the paper, by group
GROUPS: Mapping[str, Mapping[str, Kind]] = {
    "noise": {"gaussian_noise": gaussian_noise, "shot_noise": shot_noise, "impulse_noise": impulse_noise},
    "blur": {
        "defocus_blur": defocus_blur, "glass_blur": glass_blur, "motion_blur": moving_blur, "zoom_blur": zoom_blur,
    },
    "weather": {"snow": snow, "frost": frost, "fog": fog, "brightness": brightness},
    "digital": {
        "contrast": contrast, "elastic_transform": elastic_transform, "pixelate": pixelate,
        "jpeg_compression": jpeg_compression,
    },
}  # fmt: skip
