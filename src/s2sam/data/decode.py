"""Encoded images (JPEG, PNG, ...) to one uint8 tensor, in threads: Pillow decodes without the interpreter lock."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 256


def decode_images(
    encoded: pa.ChunkedArray, rows: Sequence[int], where: str, *, size: tuple[int, int] | None = None
) -> Tensor:
    """Decode `rows` of `encoded` to RGB, uint8 (len(rows), 3, H, W); grey images become three equal channels.

    `size` = the (H, W) all must have; None = that of the first. Cost: one copy of the pixels, `min(8, cores)` threads.

    Raises:
        ValueError: a row has no image, does not decode, or has another size; file and row are named.
    """
    if not len(rows):
        return torch.empty((0, 3, *(size or (1, 1))), dtype=torch.uint8)
    flat = encoded.combine_chunks()
    if size is None:
        size = decode_rgb(flat[rows[0]].as_py(), f"{where} row {rows[0]}").shape[:2]
    out = np.empty((len(rows), 3, *size), dtype=np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + CHUNK, len(rows))):
            row = f"{where} row {rows[i]}"
            pixels = decode_rgb(flat[rows[i]].as_py(), row)
            if pixels.shape[:2] != size:
                have, want = pixels.shape[:2], size
                raise ValueError(
                    f"{row} is {have[1]}x{have[0]} pixels where the first image is {want[1]}x{want[0]}; bring all "
                    "images to one size first"
                )
            out[i] = pixels.transpose(2, 0, 1)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(fill, range(0, len(rows), CHUNK)):  # the first error, in row order, is raised here
            pass
    return torch.from_numpy(out)


def decode_rgb(data: bytes | None, row: str) -> np.ndarray:
    """One encoded image as uint8 (H, W, 3). `row` says where it is, for the error.

    Raises:
        ValueError: no bytes, not an image, truncated, or more than 8 bits a channel.
    """
    from PIL import Image

    if not data:
        raise ValueError(f"{row} has no image bytes; only images stored in the file itself can be read")
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode = image.mode
            deep = mode in ("I", "F") or mode.startswith("I;")
            pixels = np.asarray(image if deep or mode == "RGB" else image.convert("RGB"))
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"{row} is not a readable image, perhaps truncated; remove or repair it") from error
    if mode == "F" and not bool(np.isfinite(pixels).all()):
        raise ValueError(f"{row} holds NaN or infinite pixels; remove or repair it")
    if deep:
        raise ValueError(f"{row} has more than 8 bits a channel (mode {mode}); convert it first")
    return pixels
