"""Data sets by name or by path, as tensors in memory. Rows are data (:data:`DATA`); torch is imported at first use.

A source of data is one file and one row. Its loader takes the spec, `train_size, val_fraction, seed` and its own
keyword options. A folder is recognised by the names of the files in it.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2sam import registry
from s2sam.data.echoing import echo as echo
from s2sam.sparse.names import unknown

if TYPE_CHECKING:
    from s2sam.data.images import ImageData

DATA: tuple[registry.DataInfo, ...] = (
    registry.DataInfo(
        "digits",
        "s2sam.data.digits:load",
        "1,797 handwritten digits of 8x8 grey pixels, 10 classes; fixed test split of 20 %",
        "scikit-learn (UCI Optical Recognition of Handwritten Digits); nothing is downloaded",
    ),
    registry.DataInfo(
        "cifar",
        "s2sam.data.cifar:load",
        "--data DIR: CIFAR-10 or CIFAR-100 in its authors' files, binary or Python version; option labels=fine|coarse",
        "https://www.cs.toronto.edu/~kriz/cifar.html; `s2sam data get cifar10` or cifar100",
    ),
    registry.DataInfo(
        "images",
        "s2sam.data.folder:load",
        "--data DIR: train/CLASS/*.png and test/ or val/ with the same classes, images of one size or option resize=N",
        "your folder of PNG, JPEG, BMP, GIF, WebP, TIFF or PPM files",
    ),
    registry.DataInfo(
        "parquet",
        "s2sam.data.parquet:load",
        "--data DIR: train.parquet with test.parquet or validation.parquet, as on the Hugging Face hub",
        "your folder; columns img|image = struct{bytes, path} and label|fine_label|labels = integer",
    ),
    registry.DataInfo(
        "npz",
        "s2sam.data.arrays:load",
        "--data FILE.npz: arrays train_x, train_y, test_x, test_y, images (N, C, H, W) uint8 or float in [0, 1]",
        "your file, written with numpy.savez",
    ),
)


#: what is in a folder of each form
_SIGNS = {
    "parquet": ("train.parquet", "test.parquet", "validation.parquet", "train-*.parquet", "test-*.parquet"),
    "cifar": ("data_batch_*", "test_batch*", "train.bin", "test.bin", "train", "test"),
    "images": ("train", "test", "val", "validation"),
}
_FORMS = "train.parquet, the files of CIFAR, or train/CLASS/*.png"
_GIVEN = ("spec", "train_size", "val_fraction", "seed")


def load_data(
    spec: str | Path,
    *,
    train_size: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    label_noise: float = 0.0,
    **options: Any,
) -> ImageData:
    """Load the images that `spec` names: "digits", a folder, or an .npz file; `s2sam list data` tells the forms.

    A name wins over a path of the same spelling (write `./digits` for the folder). Nothing is downloaded or cached.

    Args:
        spec: what to load.
        train_size: number of training images, an equal number per class as far as there are enough; None = all.
        val_fraction: share of the training images held out for validation, stratified; the same for every `train_size`.
        seed: decides validation split, subset and wrong labels; the test images never depend on it.
        label_noise: share of the training labels that are replaced by a wrong one, see
            :func:`s2sam.data.splits.noisy_labels`; validation and test labels stay right.
        **options: keyword options of that form, see :func:`data_options`.

    Raises:
        ValueError: unknown name or option, missing file, or content that is not what it should be; one sentence says
            which.

    >>> data = load_data("digits", train_size=100)
    >>> data.train_x.shape, data.train_x.dtype, data.train_y.bincount().tolist()
    (torch.Size([100, 1, 8, 8]), torch.uint8, [10, 10, 10, 10, 10, 10, 10, 10, 10, 10])
    """
    row, valid = find_row(spec), data_options(spec)
    for option in options:
        if not valid:
            raise ValueError(f"unknown option of {row.name} data {option!r}: it has none, leave this one out")
        if option not in valid:
            raise unknown(f"option of {row.name} data", option, valid)
    data: ImageData = row.load()(spec, train_size=train_size, val_fraction=val_fraction, seed=seed, **options)
    return with_label_noise(data, label_noise, seed) if label_noise else data


def with_label_noise(data: ImageData, share: float, seed: int) -> ImageData:
    """The same images with some training labels wrong; the notes tell how many."""
    from s2sam.data.images import digest_of
    from s2sam.data.splits import noisy_labels

    labels = noisy_labels(data.train_y, data.num_classes, share=share, seed=seed)
    wrong = int((labels != data.train_y).sum())
    note = f"{wrong:,} of {len(labels):,} training labels are made wrong"
    notes = f"{data.notes}; {note}" if data.notes else note
    digest = digest_of(data.train_x, labels, *data.split("val"), *data.split("test"))
    return replace(data, train_y=labels, digest=digest, notes=notes)


def data_options(spec: str | Path) -> dict[str, Any]:
    """The options of the loader that `spec` needs, and their defaults.

    >>> data_options("digits")
    {}
    """
    parameters = inspect.signature(find_row(spec).load()).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _GIVEN}


def find_row(spec: str | Path) -> registry.DataInfo:
    """The row whose loader reads `spec`.

    Raises:
        ValueError: there is no such name, path or form.
    """
    by_name = {row.name: row for row in DATA}
    path = Path(spec)
    if spec == "digits":
        return by_name["digits"]
    if path.is_dir():
        return by_name[recognise(path)]
    if path.suffix == ".npz" and path.is_file():
        return by_name["npz"]
    if spec in by_name:
        raise ValueError(f"{spec!r} is a form, not a data set: give the path, see `s2sam list data`")
    if spec in ("cifar10", "cifar100"):
        raise ValueError(f"there is no folder {spec}: `s2sam data get {spec}` gets it, then give --data data/{spec}")
    if path.exists():
        raise ValueError(f"{path} is neither a folder with images nor an .npz file")
    if path.name != str(spec) or path.suffix:  # ./nowhere is a path, nowhere could be a name
        raise ValueError(
            f"there is no data at {spec}: no such path exists; give 'digits', an .npz file, or a folder with {_FORMS}"
        )
    raise unknown("data", str(spec), ["digits", "cifar10", "cifar100"])


def recognise(folder: Path) -> str:
    """The name of the form that the files in `folder` have: "parquet", "cifar" or "images".

    Raises:
        ValueError: it has none or several; a folder in it that has one is named.
    """
    found = _forms(folder)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder} holds both {' and '.join(found)} data; keep one of them in a folder")
    inner = next((entry for entry in sorted(folder.iterdir()) if entry.is_dir() and _forms(entry)), None)
    if inner is not None:
        raise ValueError(f"{folder} holds no data itself; did you mean {inner}?")
    raise ValueError(f"{folder} holds no data that is known: it needs {_FORMS}")


def _forms(folder: Path) -> list[str]:
    """All forms of which `folder` shows a sign: folders for images, files for the others."""
    return [
        form
        for form, signs in _SIGNS.items()
        if any(hit.is_dir() if form == "images" else hit.is_file() for sign in signs for hit in folder.glob(sign))
    ]
