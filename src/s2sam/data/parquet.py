"""Folders of parquet files with encoded images, as data sets lie on the Hugging Face hub.

Expected in the folder: `train.parquet` and `test.parquet` or `validation.parquet` (or shards as
`train-00000-of-00002.parquet`); a column img|image of struct{bytes, path}, an integer column label|fine_label|labels.
Class names come from the metadata key `huggingface`; without it classes are numbered. Only the images that are asked
for are decoded; nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from s2sam.data.decode import check_resize, decode_images, resize_note
from s2sam.data.images import ImageData, check_labels, numbered_classes
from s2sam.data.splits import train_val_split
from s2sam.outside import NUMBER, DamagedError, fit, parse_json, reading

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")


@dataclass(frozen=True)
class Split:
    """One split as read: encoded images, labels, class names if the file has any, and where it came from."""

    where: str
    encoded: pa.ChunkedArray
    labels: Tensor
    names: tuple[str, ...] | None


def load(
    spec: str | Path,
    *,
    train_size: int | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    resize: int | None = None,
) -> ImageData:
    """The folder `spec` as RGB images of one size; test.parquet is the test set, else validation.parquet.

    Validation images are always taken from the training file (see :func:`s2sam.data.splits.train_val_split`).
    `resize`: the centre square of each image is scaled to this side; None = images must have one size.
    Cost: 60,000 JPEGs of 32x32 decode in some seconds; memory = the files + C*H*W bytes an image.

    Raises:
        ValueError: a file or column is missing, a file is truncated, an image does not decode or differs in size, or a
            label is not one of the classes.
    """
    folder = Path(spec)
    check_resize(resize)
    train_files = split_files(folder, "train")
    test_name = "test" if split_files(folder, "test") else "validation"
    test_files = split_files(folder, test_name)
    if not train_files:
        raise ValueError(f"{folder} has no train.parquet; give the folder that holds train.parquet and test.parquet")
    if not test_files:
        raise ValueError(f"{folder} has neither test.parquet nor validation.parquet beside train.parquet")
    train, test = read_split(train_files), read_split(test_files)
    classes = class_names(train, test)
    for split in (train, test):
        check_labels(split.labels, len(split.labels), len(classes), split.where)
    train_rows, val_rows = train_val_split(
        train.labels, len(classes), train_size=train_size, val_fraction=val_fraction, seed=seed
    )
    rows = torch.cat([train_rows, val_rows])
    x = _decode(train, rows.tolist(), None, resize)
    test_x = _decode(test, range(len(test.labels)), (x.shape[2], x.shape[3]), resize)
    n = len(train_rows)
    return ImageData.build(
        folder.resolve().name,
        (x[:n], train.labels[train_rows]),
        (x[n:], train.labels[val_rows]),
        (test_x, test.labels),
        classes,
        f"test images from {test_name}" + resize_note(resize) + _encoding_note(train.encoded),
    )


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of one split: `split.parquet`, or all shards `split-IIIII-of-NNNNN.parquet`, or none.

    Raises:
        ValueError: some shards are missing.
    """
    whole = folder / f"{split}.parquet"
    if whole.is_file():
        return [whole]
    shards = sorted(folder.glob(f"{split}-*-of-*.parquet"))
    if shards:
        total = shards[0].stem.rsplit("-of-", 1)[1]
        if not total.isdigit() or len(shards) != int(total):
            raise ValueError(f"{folder} has {len(shards)} of the {total} shards of {split}; fetch the others")
    return shards


def read_split(files: Sequence[Path]) -> Split:
    """Read columns, labels and class names of one split; images stay encoded.

    Raises:
        ValueError: not a whole parquet file, a column missing or of another type, no rows, or an empty label.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables, where = [], str(files[0])
    for file in files:
        with reading(file, "not a readable parquet file, perhaps truncated", "fetch it again"):
            schema = pq.read_schema(file)
            image, label = _column(schema, IMAGE_COLUMNS, file), _column(schema, LABEL_COLUMNS, file)
            table = pq.read_table(file, columns=[image, label])
            table.validate(full=True)
        images, kind = table.column(image), table.schema.field(label).type
        if not pa.types.is_struct(images.type) or images.type.get_field_index("bytes") < 0:
            raise ValueError(f"{file}: column {image!r} must be struct{{bytes, path}}, not {images.type}")
        stored = images.type.field("bytes").type
        if not (pa.types.is_binary(stored) or pa.types.is_large_binary(stored)):
            raise ValueError(f"{file}: the bytes of column {image!r} must be binary, not {stored}")
        if not pa.types.is_integer(kind):
            raise ValueError(f"{file}: column {label!r} must hold integers, not {kind}")
        if table.column(label).null_count:
            raise ValueError(f"{file}: column {label!r} has {table.column(label).null_count} empty rows; remove them")
        with reading(file, "of no use", "give labels that number the classes"):
            labels = table.column(label).cast(pa.int64())
        tables.append(pa.table({"image": images, "label": labels}))
    with reading(where, "of another kind than its other shards", "fetch them again"):
        table = pa.concat_tables(tables)
    if table.num_rows == 0:
        raise ValueError(f"{where} has no rows")
    labels = torch.from_numpy(np.array(table.column("label").to_numpy()))
    encoded = pa.chunked_array([chunk.field("bytes") for chunk in table.column("image").chunks])
    return Split(where, encoded, labels, _metadata_names(schema, label, files[-1]))


def _decode(split: Split, rows: Sequence[int], size: tuple[int, int] | None, resize: int | None) -> Tensor:
    """The images `rows` of a split."""
    flat = split.encoded.combine_chunks()
    return decode_images(
        len(rows), lambda i: flat[rows[i]].as_py(), lambda i: f"{split.where} row {rows[i]}", size=size, resize=resize
    )


def class_names(train: Split, test: Split) -> tuple[str, ...]:
    """The class names both files agree on; without any, "0", "1", ... up to the largest label."""
    if train.names is not None and test.names is not None and train.names != test.names:
        raise ValueError(f"{train.where} and {test.where} name different classes; they are not of one data set")
    names = train.names or test.names
    return names or numbered_classes(train.labels, test.labels, what=f"{train.where} and {test.where}")


def _column(schema: pa.Schema, wanted: Sequence[str], file: Path) -> str:
    for name in wanted:
        if name in schema.names:
            return name
    raise DamagedError(f"{file} has no column {' or '.join(wanted)}; its columns are {', '.join(schema.names)}")


def _metadata_names(schema: pa.Schema, label: str, file: Path) -> tuple[str, ...] | None:
    """names of the ClassLabel feature `label`, from the JSON under the metadata key `huggingface`."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        names = parse_json(text)["info"]["features"][label].get("names")
        fit(names, ([(str, NUMBER)], None))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: the metadata key 'huggingface' does not describe column {label!r}") from error
    return None if names is None else tuple(str(name) for name in names)


def _encoding_note(encoded: pa.ChunkedArray) -> str:
    """A warning where the first image is a JPEG: its losses cost accuracy against the original pixels."""
    first = encoded[0].as_py()
    if first is not None and first.startswith(b"\xff\xd8"):
        return "; JPEG-compressed images, so compare runs with each other and not with published accuracies"
    return ""
