"""One's own arrays: from memory, or from an .npz file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from s2sam.data.images import ImageData, check_labels, numbered_classes, refuse_rows
from s2sam.data.splits import train_val_split
from s2sam.outside import reading

KEYS = ("train_x", "train_y", "test_x", "test_y")


def from_arrays(
    name: str,
    train_x: ArrayLike | Tensor,
    train_y: ArrayLike | Tensor,
    test_x: ArrayLike | Tensor,
    test_y: ArrayLike | Tensor,
    *,
    classes: Sequence[str] | None = None,
    train_size: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
) -> ImageData:
    """An :class:`ImageData` from images (N, C, H, W), uint8 or floating in [0, 1], and integer labels (N,).

    Floating images are rounded to 256 levels. `classes=None` names the classes 0, 1, ... up to the largest label.

    Raises:
        ValueError: NaN, infinite or out-of-range pixels, or labels outside the classes; the row is named.

    >>> import numpy as np
    >>> x, y = np.zeros((20, 1, 4, 4), np.uint8), np.arange(20) % 2
    >>> from_arrays("zeros", x, y, x, y).val_y.sort().values.tolist()
    [0, 1]
    """
    xs = {"train": _images(train_x, f"{name}: train_x"), "test": _images(test_x, f"{name}: test_x")}
    ys = {"train": _labels(train_y, f"{name}: train_y"), "test": _labels(test_y, f"{name}: test_y")}
    if classes is None:
        classes = numbered_classes(*ys.values(), what=name)
    for split in ("train", "test"):
        if len(xs[split]) == 0:
            raise ValueError(f"{name}: there are no {split} images")
        check_labels(ys[split], len(xs[split]), len(classes), f"{name}: {split}_y")
    x, y = xs["train"], ys["train"]
    train, val = train_val_split(y, len(classes), train_size=train_size, val_fraction=val_fraction, seed=seed)
    return ImageData.build(
        name, (x[train], y[train]), (x[val], y[val]), (xs["test"], ys["test"]), classes, "arrays given by the user"
    )


def load(spec: str | Path, *, train_size: int | None = None, val_fraction: float = 0.1, seed: int = 0) -> ImageData:
    """The arrays train_x, train_y, test_x, test_y and, if there, classes of an .npz file; see :func:`from_arrays`."""
    path = Path(spec)
    with reading(path, "not a readable .npz file", "write it with numpy.savez"):
        with zipfile.ZipFile(path):  # np.load takes other formats too
            file = np.load(path, allow_pickle=False)
        with file:
            arrays = {key: file[key] for key in file.files}
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        raise ValueError(f"{path} has no array {missing[0]!r}; it must hold {', '.join(KEYS)}")
    classes = [str(c) for c in arrays["classes"].ravel()] if "classes" in arrays else None
    return from_arrays(
        path.name,
        *(arrays[key] for key in KEYS),
        classes=classes,
        train_size=train_size,
        val_fraction=val_fraction,
        seed=seed,
    )


def _tensor(values: ArrayLike | Tensor, what: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        return torch.from_numpy(np.ascontiguousarray(values))
    except (TypeError, ValueError, RuntimeError) as error:  # objects, texts, another byte order
        raise ValueError(f"{what} must be an array of numbers, got {np.asarray(values).dtype}") from error


def _images(values: ArrayLike | Tensor, what: str) -> Tensor:
    x = _tensor(values, what)
    if x.ndim != 4:
        raise ValueError(f"{what} must have the shape (images, channels, height, width), got {tuple(x.shape)}")
    if not x.is_floating_point():
        return x
    refuse_rows(~torch.isfinite(x), what, "holds NaN or infinite pixels; remove or repair it")
    refuse_rows((x < 0) | (x > 1), what, "holds pixels outside [0, 1]; scale the images, or give uint8")
    return (x.double() * 255).round().to(torch.uint8)


def _labels(values: ArrayLike | Tensor, what: str) -> Tensor:
    y = _tensor(values, what)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(f"{what} must hold integers, got {str(y.dtype).removeprefix('torch.')}")
    return y.to(torch.int64)
