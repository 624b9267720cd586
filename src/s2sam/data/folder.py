"""Folders of image files: train/CLASS/*.png, and test/ or val/ beside it.

A class is a folder in `train`; labels number the classes by sorted name, whatever folders `test` has. Images may lie
deeper (train/CLASS/images/*.JPEG). Hidden files are passed over, files that are no images by their suffix are counted
in the notes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s2sam.data.decode import check_resize, decode_images, resize_note
from s2sam.data.images import ImageData
from s2sam.data.splits import train_val_split

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
TEST_NAMES = ("test", "val", "validation")


@dataclass(frozen=True)
class Files:
    """The images of one split: paths and the class of each, and how many files were left out."""

    paths: tuple[Path, ...]
    labels: Tensor
    left_out: int


def load(
    spec: str | Path,
    *,
    train_size: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    resize: int | None = None,
) -> ImageData:
    """The folder `spec` as RGB images of one size; test/ is the test set, else val/ or validation/.

    Validation images are always taken from train/ (see :func:`s2sam.data.splits.train_val_split`). `resize`: the centre
    square of each image is scaled to this side; None = images must have one size. Only images that are asked for are
    decoded. Cost: C*H*W bytes an image.

    Raises:
        ValueError: a folder is missing or empty, classes differ between train and test, or an image is broken or of
            another size; the sentence names folder or file.
    """
    folder = Path(spec)
    check_resize(resize)
    tests = [name for name in TEST_NAMES if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not tests:
        raise ValueError(f"{folder} needs the folders train and test (or val), each with one folder a class")
    classes = class_folders(folder / "train")
    if len(classes) < 2:
        raise ValueError(f"{folder / 'train'} has {len(classes)} folders, and each class needs one: train/CLASS/*.png")
    train, test = list_files(folder / "train", classes), list_files(folder / tests[0], classes)
    train_rows, val_rows = train_val_split(
        train.labels, len(classes), train_size=train_size, val_fraction=val_fraction, seed=seed
    )
    rows = torch.cat([train_rows, val_rows])
    x = _decode([train.paths[i] for i in rows.tolist()], None, resize)
    test_x = _decode(test.paths, (x.shape[2], x.shape[3]), resize)
    n = len(train_rows)
    notes = f"test images from {tests[0]}" + resize_note(resize)
    if len(tests) > 1:
        notes += f"; {', '.join(tests[1:])} not used, validation images are from train"
    if left_out := train.left_out + test.left_out:
        notes += f"; {left_out} files left out that are no images by their suffix"
    return ImageData.build(
        folder.resolve().name,
        (x[:n], train.labels[train_rows]),
        (x[n:], train.labels[val_rows]),
        (test_x, test.labels),
        classes,
        notes,
    )


def class_folders(split: Path) -> tuple[str, ...]:
    """The names of the folders in `split`, sorted."""
    return tuple(sorted(e.name for e in split.iterdir() if e.is_dir() and not e.name.startswith(".")))


def list_files(split: Path, classes: tuple[str, ...]) -> Files:
    """All images of `split`, class by class in the order of `classes`, within a class by path.

    Raises:
        ValueError: a class is not in `classes`, or has a folder without images; or images lie outside of all classes.
    """
    unknown = [name for name in class_folders(split) if name not in classes]
    if unknown:
        raise ValueError(f"{split / unknown[0]} is a class that train does not have; the classes are its folders")
    stray = [entry.name for entry in split.iterdir() if entry.is_file() and entry.suffix.lower() in SUFFIXES]
    if stray:
        raise ValueError(f"{split / min(stray)} lies in no class; move it into a folder named after its class")
    paths: list[Path] = []
    labels: list[int] = []
    left_out = 0
    for label, name in enumerate(classes):
        if not (split / name).is_dir():
            continue
        files = sorted(Path(top) / file for top, _, found in os.walk(split / name) for file in found)
        files = [file for file in files if not file.name.startswith(".")]
        images = [file for file in files if file.suffix.lower() in SUFFIXES]
        if not images:
            raise ValueError(f"the class folder {split / name} holds no images; fill or remove it")
        left_out += len(files) - len(images)
        paths += images
        labels += [label] * len(images)
    return Files(tuple(paths), torch.tensor(labels, dtype=torch.int64), left_out)


def _decode(paths: list[Path] | tuple[Path, ...], size: tuple[int, int] | None, resize: int | None) -> Tensor:
    """The images at `paths`."""
    return decode_images(len(paths), lambda i: paths[i].read_bytes(), lambda i: str(paths[i]), size=size, resize=resize)
