"""Data sets by name or by path, as tensors in memory. Rows are data (:data:`DATA`); torch is imported at first use.

A source of data is one file and one row. Its loader takes the spec and `train_size, val_fraction, seed`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from s2sam import registry

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


def load_data(
    spec: str | Path, *, train_size: int | None = None, val_fraction: float = 0.1, seed: int = 0
) -> ImageData:
    """Load the images that `spec` names: "digits", the path of a parquet folder, or the path of an .npz file.

    A name wins over a path of the same spelling (write `./digits` for the folder). Nothing is downloaded or cached.

    Args:
        spec: what to load, see `s2sam list data`.
        train_size: number of training images, an equal number per class as far as there are enough; None = all.
        val_fraction: share of the training images held out for validation, stratified; the same for every `train_size`.
        seed: decides validation split and subset; the test images never depend on it.

    Raises:
        ValueError: unknown name, missing file, or content that is not what it should be; one sentence says which.

    >>> data = load_data("digits", train_size=100)
    >>> data.train_x.shape, data.train_x.dtype, data.train_y.bincount().tolist()
    (torch.Size([100, 1, 8, 8]), torch.uint8, [10, 10, 10, 10, 10, 10, 10, 10, 10, 10])
    """
    data: ImageData = _row(spec).load()(spec, train_size=train_size, val_fraction=val_fraction, seed=seed)
    return data


def _row(spec: str | Path) -> registry.DataInfo:
    by_name = {row.name: row for row in DATA}
    path = Path(spec)
    if spec == "digits":
        return by_name["digits"]
    if path.is_dir():
        return by_name["parquet"]
    if path.suffix == ".npz" and path.is_file():
        return by_name["npz"]
    if spec in ("parquet", "npz"):
        what = "folder that holds train.parquet" if spec == "parquet" else ".npz file"
        raise ValueError(f"{spec!r} is a form, not a data set: give the path of a {what}")
    if path.exists():
        raise ValueError(f"{path} is neither a folder with train.parquet nor an .npz file")
    if len(path.parts) > 1 or path.suffix:
        raise ValueError(f"there is no data at {path}: give 'digits', a folder with train.parquet, or an .npz file")
    return registry.find(registry.list_data(), str(spec), "data")
