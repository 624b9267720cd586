"""Encoded images (JPEG, PNG, ...) to one uint8 tensor, in threads: Pillow decodes without the interpreter lock."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

CHUNK = 256
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  #: Pillow knows others, some of which start programs
MOST_NAMED = 3


def decode_images(
    count: int,
    fetch: Callable[[int], bytes | None],
    name: Callable[[int], str],
    *,
    size: tuple[int, int] | None = None,
    resize: int | None = None,
) -> Tensor:
    """Decode `count` images to RGB, uint8 (count, 3, H, W); grey images become three equal channels.

    Args:
        count: number of images.
        fetch: `fetch(i)` -> the encoded image; called from threads.
        name: `name(i)` -> where it is, for errors.
        size: the (H, W) all must have; None = that of the first that can be read.
        resize: None = as they are; else the centre square of each image is scaled to this side, see :func:`decode_rgb`.

    Cost: one copy of the pixels, `min(8, cores)` threads.

    Raises:
        ValueError: some are missing, do not decode, or have another size; the first is named, and a few of the others.
    """
    if resize is not None:
        size = (resize, resize)
    faults: dict[int, str] = {}
    for i in range(count):
        if size is not None:
            break
        try:
            size = decode_rgb(fetch(i), name(i)).shape[:2]
        except ValueError as error:
            faults[i] = str(error)
    out = np.empty((count, 3, *(size or (1, 1))), dtype=np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + CHUNK, count)):
            try:
                pixels = decode_rgb(fetch(i), name(i), resize)
            except ValueError as error:
                faults[i] = str(error)
                continue
            have = pixels.shape[:2]
            if have == size:
                out[i] = pixels.transpose(2, 0, 1)
            else:
                assert size is not None
                faults[i] = (
                    f"{name(i)} is {have[1]}x{have[0]} pixels where the first image is {size[1]}x{size[0]}; bring all "
                    "images to one size first, or load them with resize=PIXELS"
                )

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, range(0, count, CHUNK)):
            pass
    if faults:
        raise ValueError(_together(faults, name))
    return torch.from_numpy(out)


def decode_rgb(data: bytes | None, row: str, resize: int | None = None) -> np.ndarray:
    """One encoded image as uint8 (H, W, 3). `row` says where it is, for the error.

    Grey, palette and CMYK images become RGB; transparency is dropped, an animation gives its first frame. With `resize`
    the largest centred square is scaled to that side (bicubic, antialiased).

    Raises:
        ValueError: no bytes, not an image, truncated, or more than 8 bits a channel.
    """
    from PIL import Image

    if not data:
        raise ValueError(f"{row} has no image bytes; only images stored in the file itself can be read")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            mode = image.mode
            deep = mode in ("I", "F") or mode.startswith("I;")
            plain = image if deep or mode == "RGB" else image.convert("RGB")
            if resize is not None and not deep:
                side = min(plain.size)
                left, top = (plain.width - side) // 2, (plain.height - side) // 2
                square = plain.crop((left, top, left + side, top + side))
                plain = square.resize((resize, resize), Image.Resampling.BICUBIC)
            pixels = np.asarray(plain)
    except Exception as error:  # Pillow has no base class for what its readers stumble over
        raise ValueError(f"{row} is not a readable image, perhaps truncated; remove or repair it") from error
    if mode == "F" and not bool(np.isfinite(pixels).all()):
        raise ValueError(f"{row} holds NaN or infinite pixels; remove or repair it")
    if deep:
        raise ValueError(f"{row} has more than 8 bits a channel (mode {mode}); convert it first")
    return pixels


def check_resize(resize: int | None) -> None:
    """Raise ValueError unless `resize` is None or a whole number of pixels."""
    if resize is not None and (isinstance(resize, bool) or not isinstance(resize, int) or resize < 1):
        raise ValueError(f"resize must be a whole number of pixels or None, got {resize!r}")


def resize_note(resize: int | None) -> str:
    """What to note about images that were scaled."""
    return "" if resize is None else f"; the centre square of each image, scaled to {resize}x{resize}"


def _together(faults: dict[int, str], name: Callable[[int], str]) -> str:
    """The first fault, and the names of some of the others."""
    first, *others = sorted(faults)
    if not others:
        return faults[first]
    named = ", ".join(name(i) for i in others[:MOST_NAMED])
    more = ", ..." if len(others) > MOST_NAMED else ""
    return f"{faults[first]} ({len(others)} more cannot be used: {named}{more})"
