"""CIFAR-10 and CIFAR-100 in the files of their authors: the binary version, or the Python version (pickles).

    CIFAR-10 binary      data_batch_1.bin .. data_batch_5.bin, test_batch.bin     records of label, 3072 pixels
    CIFAR-100 binary     train.bin, test.bin                                      coarse label, fine label, 3072 pixels
    CIFAR-10 Python      data_batch_1 .. data_batch_5, test_batch                 dicts of data (N, 3072) and labels
    CIFAR-100 Python     train, test                                              data, fine_labels, coarse_labels

Both versions hold the same images in the same order, so they have the same digest. Pickles are read by
:mod:`s2sam.data.pickles`, which runs nothing in them.
Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from s2sam.data.images import ImageData, Pair, check_labels
from s2sam.data.pickles import load_pickle
from s2sam.data.splits import train_val_split

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
CLASSES = {"": 10, "fine": 100, "coarse": 20}
LABELS = ("fine", "coarse")


@dataclass(frozen=True)
class Layout:
    """One of the four forms: its files, and how one of them is read."""

    name: str
    train: tuple[str, ...]
    test: str
    names: tuple[str, ...]  #: files of class names: all labels, or fine and coarse ones
    read: Callable[[Path, str], Pair]

    @property
    def cifar100(self) -> bool:
        """Whether each image has a fine and a coarse label."""
        return self.name.startswith("CIFAR-100")

    @property
    def files(self) -> tuple[str, ...]:
        """All files with images."""
        return (*self.train, self.test)


def load(
    spec: str | Path,
    *,
    train_size: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    labels: str = "fine",
) -> ImageData:
    """The folder `spec` as uint8 (N, 3, 32, 32); validation images come from the training files.

    `labels`: "fine" (100 classes) or "coarse" (20 superclasses) of CIFAR-100. Without the file of class names
    (batches.meta, meta, ...) classes are numbered. Cost: 184 MB for all images, twice that while they are read.

    Raises:
        ValueError: a file is missing, truncated or foreign, labels and images or classes and names differ in number, or
            a label is out of range; the file is named.
    """
    folder = Path(spec)
    if labels not in LABELS:
        raise ValueError(f"labels must be 'fine' or 'coarse', got {labels!r}")
    layout = find_layout(folder)
    if labels == "coarse" and not layout.cifar100:
        raise ValueError(f"{folder} holds {layout.name}, which has no coarse labels; only CIFAR-100 does")
    kind = labels if layout.cifar100 else ""
    classes = class_names(folder, layout, kind)
    parts = {name: layout.read(folder / name, kind) for name in layout.files}
    for name, (x, y) in parts.items():
        check_labels(y, len(x), len(classes), str(folder / name))
    x, y = (torch.cat([parts[name][i] for name in layout.train]) for i in (0, 1))
    train, val = train_val_split(y, len(classes), train_size=train_size, val_fraction=val_fraction, seed=seed)
    return ImageData.build(
        ("cifar100-coarse" if labels == "coarse" else "cifar100") if layout.cifar100 else "cifar10",
        (x[train], y[train]),
        (x[val], y[val]),
        parts[layout.test],
        classes,
        f"{layout.name}" + (f", {labels} labels" if layout.cifar100 else ""),
    )


def find_layout(folder: Path) -> Layout:
    """The one of :data:`LAYOUTS` whose files are in `folder`.

    Raises:
        ValueError: none or several are, or one is not complete.
    """
    found = [layout for layout in LAYOUTS if any((folder / name).is_file() for name in layout.files)]
    if not found:
        raise ValueError(f"{folder} has none of the files of CIFAR, as {LAYOUTS[0].train[0]} or {LAYOUTS[3].train[0]}")
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(f.name for f in found)}; keep one of them in a folder")
    missing = [name for name in found[0].files if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)} of {found[0].name}; fetch the archive again")
    return found[0]


def class_names(folder: Path, layout: Layout, kind: str) -> tuple[str, ...]:
    """The names of the classes of `kind`, from the files that come with the images, else their numbers.

    Raises:
        ValueError: there are more or fewer names than classes.
    """
    count = CLASSES[kind]
    path = folder / layout.names[kind == "coarse" and len(layout.names) > 1]
    if not path.is_file():
        return tuple(str(c) for c in range(count))
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.strip() for line in lines if line.strip()]
    else:
        key = f"{kind}_label_names" if kind else "label_names"
        listed = load_pickle(path).get(key)
        if not isinstance(listed, list):
            raise ValueError(f"{path} has no list {key!r}; fetch the archive again")
        names = [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in listed]
    if len(names) != count:
        raise ValueError(f"{path} names {len(names)} classes where {layout.name} has {count}; fetch the archive again")
    return tuple(names)


def read_binary(path: Path, kind: str) -> Pair:
    """Images and labels of a file of records: one label byte (CIFAR-100: coarse, then fine), then the pixels."""
    label_bytes = 2 if kind else 1
    raw = np.fromfile(path, np.uint8)
    if len(raw) == 0 or len(raw) % (label_bytes + PIXELS):
        raise ValueError(
            f"{path} has {len(raw)} bytes, no multiple of the {label_bytes + PIXELS} of an image, perhaps truncated; "
            "fetch it again"
        )
    records = torch.from_numpy(raw.reshape(-1, label_bytes + PIXELS))
    return records[:, label_bytes:].reshape(-1, *SHAPE), records[:, int(kind == "fine")].to(torch.int64)


def read_python(path: Path, kind: str) -> Pair:
    """Images and labels of a pickled dict."""
    found, key = load_pickle(path), f"{kind}_labels" if kind else "labels"
    for needed in ("data", key):
        if needed not in found:
            raise ValueError(f"{path} has no {needed!r}; it holds {', '.join(found) or 'nothing'}")
    data, labels = found["data"], _integers(found[key])
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        have = f"{data.dtype} of shape {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path}: 'data' must be uint8 of shape (images, {PIXELS}), got {have}")
    if labels is None:
        raise ValueError(f"{path}: {key!r} must be a list of integers")
    if len(labels) != len(data):
        raise ValueError(f"{path} holds {len(data)} images but {len(labels)} of {key!r}; fetch it again")
    return torch.from_numpy(data.reshape(-1, *SHAPE).copy()), torch.from_numpy(labels)


def _integers(values: Any) -> np.ndarray | None:
    """`values` as int64 (N,), or None if they are not integers."""
    if isinstance(values, list) and all(type(v) is int and -(2**63) <= v < 2**63 for v in values):
        return np.array(values, dtype=np.int64)
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu":
        return values.astype(np.int64)
    return None


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_BINARIES = tuple(f"{batch}.bin" for batch in _BATCHES)
_NAMES = ("fine_label_names.txt", "coarse_label_names.txt")
LAYOUTS = (
    Layout("CIFAR-10 (Python version)", _BATCHES, "test_batch", ("batches.meta",), read_python),
    Layout("CIFAR-10 (binary version)", _BINARIES, "test_batch.bin", ("batches.meta.txt",), read_binary),
    Layout("CIFAR-100 (Python version)", ("train",), "test", ("meta",), read_python),
    Layout("CIFAR-100 (binary version)", ("train.bin",), "test.bin", _NAMES, read_binary),
)
