"""Parquet folders: exact pixels, class names, every kind of broken file, and CIFAR-10 itself where it is there."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from s2sam.data import load_data
from s2sam.data.decode import CHUNK, decode_rgb

RNG_SEED = 0


def pixels(n: int, size: tuple[int, int] = (6, 5), channels: int = 3, seed: int = RNG_SEED) -> np.ndarray:
    shape = (n, *size, channels) if channels > 1 else (n, *size)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(image: np.ndarray | Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form)
    return buffer.getvalue()


def metadata(label: str, names: Sequence[str] | None) -> dict[str, str]:
    feature: dict[str, Any] = {"_type": "ClassLabel" if names else "Value"}
    if names:
        feature["names"] = list(names)
    return {"huggingface": json.dumps({"info": {"features": {label: feature}}})}


def write(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[Any],
    names: Sequence[str] | None = ("cat", "dog"),
    columns: tuple[str, str] = ("img", "label"),
    label_type: pa.DataType | None = None,
) -> None:
    struct = pa.array(
        [{"bytes": b, "path": None} for b in images], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    table = pa.table({columns[0]: struct, columns[1]: pa.array(labels, label_type or pa.int64())})
    pq.write_table(table.replace_schema_metadata(metadata(columns[1], names)), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 training and 6 test images of 6x5 pixels in two classes."""
    for split, n, seed in (("train", 20, 1), ("test", 6, 2)):
        write(tmp_path / f"{split}.parquet", [encode(p) for p in pixels(n, seed=seed)], [i % 2 for i in range(n)])
    return tmp_path


def rewrite_train(folder: Path, row: int, data: bytes | None) -> None:
    images: list[bytes | None] = [encode(p) for p in pixels(20, seed=1)]
    images[row] = data
    write(folder / "train.parquet", images, [i % 2 for i in range(20)])


def test_pixels_labels_and_names_are_exact(folder: Path) -> None:
    data = load_data(folder, val_fraction=0.0)
    assert torch.equal(data.train_x, torch.from_numpy(pixels(20, seed=1)).permute(0, 3, 1, 2))
    assert torch.equal(data.test_x, torch.from_numpy(pixels(6, seed=2)).permute(0, 3, 1, 2))
    assert data.train_y.tolist() == [i % 2 for i in range(20)]
    assert (data.classes, data.image_shape, data.name) == (("cat", "dog"), (3, 6, 5), folder.name)
    assert data.train_x.is_contiguous()
    assert data.notes == "test images from test"


def test_images_and_labels_stay_together_in_every_split(folder: Path) -> None:
    rows = {p.transpose(2, 0, 1).tobytes(): i for i, p in enumerate(pixels(20, seed=1))}
    data = load_data(folder, train_size=9, val_fraction=0.4, seed=2)
    found = []
    for split in ("train", "val"):
        for x, y in zip(*data.split(split), strict=True):
            found.append(rows[x.numpy().tobytes()])
            assert y == found[-1] % 2
    assert len(set(found)) == len(found) == 9 + 8


def test_only_what_is_asked_for_is_decoded(folder: Path) -> None:
    full = load_data(folder, seed=4)
    part = load_data(folder, seed=4, train_size=6)
    assert torch.equal(full.val_x, part.val_x)
    assert len(full.train_x) == 18
    assert part.train_y.tolist().count(0) == 3
    kept = {x.numpy().tobytes() for x in torch.cat([part.train_x, part.val_x])}
    unused = next(
        i
        for i, p in enumerate(pixels(20, seed=1))
        if torch.from_numpy(p).permute(2, 0, 1).contiguous().numpy().tobytes() not in kept
    )
    rewrite_train(folder, unused, b"no image")
    assert load_data(folder, seed=4, train_size=6).digest == part.digest
    with pytest.raises(ValueError, match=f"train.parquet row {unused} is not a readable image"):
        load_data(folder, seed=4)


@pytest.mark.parametrize(
    ("columns", "name"),
    [(("image", "label"), "test"), (("img", "fine_label"), "test"), (("image", "labels"), "validation")],
)
def test_column_and_file_names(tmp_path: Path, columns: tuple[str, str], name: str) -> None:
    for split in ("train", name):
        write(tmp_path / f"{split}.parquet", [encode(p) for p in pixels(8)], [0, 1] * 4, columns=columns)
    data = load_data(tmp_path)
    assert len(data.test_x) == 8
    assert data.notes == f"test images from {name}"
    assert data.classes == ("cat", "dog")


def test_test_parquet_wins_over_validation(folder: Path) -> None:
    write(folder / "validation.parquet", [encode(p) for p in pixels(3)], [0, 1, 0])
    assert len(load_data(folder).test_x) == 6


def test_shards_are_joined_in_order(folder: Path) -> None:
    whole = load_data(folder).digest
    images = [encode(p) for p in pixels(20, seed=1)]
    (folder / "train.parquet").unlink()
    for i, rows in enumerate((range(0, 7), range(7, 20))):
        write(folder / f"train-0000{i}-of-00002.parquet", [images[r] for r in rows], [r % 2 for r in rows])
    assert load_data(folder).digest == whole
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="has 1 of the 00002 shards of train; fetch the others"):
        load_data(folder)


def test_without_metadata_classes_are_numbered(folder: Path) -> None:
    for split, n, seed in (("train", 20, 1), ("test", 6, 2)):
        table = pq.read_table(folder / f"{split}.parquet").replace_schema_metadata(None)
        pq.write_table(table, folder / f"{split}.parquet")
        assert len(pixels(n, seed=seed)) == n
    assert load_data(folder).classes == ("0", "1")
    write(folder / "test.parquet", [encode(p) for p in pixels(6)], [0, 1, 2, 3, 4, 5], names=None)
    assert load_data(folder).classes == ("0", "1", "2", "3", "4", "5")


def test_grey_palette_and_alpha_become_rgb() -> None:
    grey = pixels(1, channels=1)[0]
    assert np.array_equal(decode_rgb(encode(grey), "row"), np.repeat(grey[:, :, None], 3, axis=2))
    colour = pixels(1)[0]
    rgba = Image.fromarray(colour).convert("RGBA")
    assert np.array_equal(decode_rgb(encode(rgba), "row"), colour)
    palette = Image.fromarray(grey // 128 * 255).convert("P")
    assert np.array_equal(decode_rgb(encode(palette), "row")[..., 1], grey // 128 * 255)


def test_jpeg_is_decoded_as_pillow_does_and_noted(folder: Path) -> None:
    smooth = np.linspace(0, 255, 6 * 5 * 3).reshape(6, 5, 3).astype(np.uint8)
    jpeg = encode(smooth, "JPEG")
    for split, n in (("train", 20), ("test", 6)):
        write(folder / f"{split}.parquet", [jpeg] * n, [i % 2 for i in range(n)])
    data = load_data(folder)
    assert (data.test_x[0].permute(1, 2, 0).int() - torch.from_numpy(smooth).int()).abs().max() < 40
    assert np.array_equal(data.test_x[3].permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(jpeg))))
    assert "not with published accuracies" in data.notes


def test_more_rows_than_one_thread_takes(tmp_path: Path) -> None:
    n = 2 * CHUNK + 10
    images = pixels(n, size=(2, 2))
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", [encode(p) for p in images], [i % 2 for i in range(n)])
    data = load_data(tmp_path, val_fraction=0.0)
    assert torch.equal(data.train_x, torch.from_numpy(images).permute(0, 3, 1, 2))


def float_tiff(value: float) -> bytes:
    return encode(Image.fromarray(np.full((6, 5), value, dtype=np.float32)), "TIFF")


def png_of_16_bits() -> bytes:
    return encode(Image.fromarray(np.full((6, 5), 1000, dtype=np.uint16)))


GOOD = encode(pixels(1)[0])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "train.parquet row 7 has no image bytes"),
        (b"", "train.parquet row 7 has no image bytes"),
        (b"hello", "train.parquet row 7 is not a readable image"),
        (GOOD[: len(GOOD) // 2], "train.parquet row 7 is not a readable image, perhaps truncated"),
        (encode(pixels(1)[0], "JPEG")[:-40], "train.parquet row 7 is not a readable image, perhaps truncated"),
        (encode(pixels(1, size=(6, 6))[0]), "train.parquet row 7 is 6x6 pixels where the first image is 5x6"),
        (float_tiff(float("nan")), "train.parquet row 7 holds NaN or infinite pixels"),
        (float_tiff(0.5), "train.parquet row 7 has more than 8 bits a channel"),
        (png_of_16_bits(), "train.parquet row 7 has more than 8 bits a channel"),
    ],
    ids=["null", "empty", "text", "cut-png", "cut-jpeg", "size", "nan", "float", "16-bit"],
)
def test_a_bad_image_is_named(folder: Path, data: bytes | None, message: str) -> None:
    rewrite_train(folder, 7, data)
    with pytest.raises(ValueError, match=message) as error:
        load_data(folder, val_fraction=0.0)
    assert "\n" not in str(error.value)


def test_the_other_bad_images_are_named_too(folder: Path) -> None:
    images: list[bytes | None] = [encode(p) for p in pixels(20, seed=1)]
    for row in (0, 4, 7, 11, 12):
        images[row] = b"broken"
    write(folder / "train.parquet", images, [i % 2 for i in range(20)])
    with pytest.raises(ValueError, match="row 0 is not a readable image") as error:
        load_data(folder, val_fraction=0.0)
    rows = ", ".join(f"{folder / 'train.parquet'} row {row}" for row in (4, 7, 11))
    assert str(error.value).endswith(f"(4 more cannot be used: {rows}, ...)")


def test_a_program_of_postscript_is_no_image(folder: Path) -> None:
    rewrite_train(folder, 7, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match="row 7 is not a readable image"):
        load_data(folder, val_fraction=0.0)


def test_resize_takes_the_centre_square(folder: Path) -> None:
    wide = np.zeros((8, 12, 3), dtype=np.uint8)
    wide[:, 2:10] = 200  # the centre square is of one colour
    for split in ("train", "test"):
        write(folder / f"{split}.parquet", [encode(wide)] * 10, [0, 1] * 5)
    data = load_data(folder, resize=4)
    assert data.image_shape == (3, 4, 4)
    assert (data.train_x == 200).all()
    assert (data.test_x == 200).all()
    assert "the centre square of each image, scaled to 4x4" in data.notes
    with pytest.raises(ValueError, match="resize must be a whole number of pixels or None, got 0"):
        load_data(folder, resize=0)


def test_test_images_must_have_the_size_of_the_training_images(folder: Path) -> None:
    write(folder / "test.parquet", [encode(p) for p in pixels(4, size=(8, 8))], [0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"test\.parquet row 0 is 8x8 pixels where the first image is 5x6"):
        load_data(folder)


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_a_truncated_file_is_named(folder: Path, keep: float) -> None:
    file = folder / "train.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"train\.parquet is not a readable parquet file, perhaps truncated") as error:
        load_data(folder)
    assert "\n" not in str(error.value)


def test_damage_inside_a_file_is_named(folder: Path) -> None:
    file = folder / "train.parquet"
    whole = bytearray(file.read_bytes())
    whole[4:40] = bytes(36)  # the head of the first page
    file.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match=r"train\.parquet is not a readable parquet file"):
        load_data(folder)


@pytest.mark.parametrize(("label", "split"), [(2, "train"), (-1, "train"), (9, "test")])
def test_labels_out_of_range_are_named(folder: Path, label: int, split: str) -> None:
    n = 20 if split == "train" else 6
    labels = [i % 2 for i in range(n)]
    labels[3] = label
    write(folder / f"{split}.parquet", [encode(p) for p in pixels(n)], labels)
    with pytest.raises(ValueError, match=f"{split}.parquet row 3 has the label {label}, but with 2 classes"):
        load_data(folder)


def test_missing_files_and_columns(folder: Path, tmp_path: Path) -> None:
    write(folder / "test.parquet", [GOOD], [0], columns=("picture", "label"))
    with pytest.raises(ValueError, match="has no column img or image; its columns are picture, label"):
        load_data(folder)
    write(folder / "test.parquet", [GOOD], [0], columns=("img", "class"))
    with pytest.raises(ValueError, match="has no column label or fine_label or labels; its columns are img, class"):
        load_data(folder)
    (folder / "test.parquet").unlink()
    with pytest.raises(ValueError, match=r"has neither test\.parquet nor validation\.parquet beside train\.parquet"):
        load_data(folder)
    (folder / "train.parquet").unlink()
    with pytest.raises(ValueError, match=r"holds no data that is known: it needs train\.parquet"):
        load_data(folder)
    write(folder / "test.parquet", [GOOD], [0])
    with pytest.raises(ValueError, match=r"has no train\.parquet; give the folder that holds"):
        load_data(folder)


def test_wrong_column_types(folder: Path) -> None:
    pq.write_table(pa.table({"img": ["a", "b"], "label": [0, 1]}), folder / "test.parquet")
    with pytest.raises(ValueError, match=r"column 'img' must be struct\{bytes, path\}, not string"):
        load_data(folder)
    write(folder / "test.parquet", [GOOD], ["cat"], label_type=pa.string())
    with pytest.raises(ValueError, match="column 'label' must hold integers, not string"):
        load_data(folder)
    write(folder / "test.parquet", [GOOD, GOOD], [0, None])
    with pytest.raises(ValueError, match="column 'label' has 1 empty rows"):
        load_data(folder)
    write(folder / "test.parquet", [], [])
    with pytest.raises(ValueError, match="has no rows"):
        load_data(folder)


def test_metadata_that_disagrees_or_misleads(folder: Path) -> None:
    write(folder / "test.parquet", [GOOD], [0], names=("dog", "cat"))
    with pytest.raises(ValueError, match="name different classes; they are not of one data set"):
        load_data(folder)
    table = pq.read_table(folder / "test.parquet").replace_schema_metadata({"huggingface": "{"})
    pq.write_table(table, folder / "test.parquet")
    with pytest.raises(ValueError, match="the metadata key 'huggingface' does not describe column 'label'"):
        load_data(folder)


def test_real_cifar10(cifar10: Path) -> None:
    data = load_data(cifar10, train_size=1000, val_fraction=0.01)
    assert (len(data.train_x), len(data.val_x), len(data.test_x)) == (1000, 500, 10_000)
    assert data.train_y.bincount().tolist() == [100] * 10
    assert data.test_y.bincount().tolist() == [1000] * 10
    assert data.image_shape == (3, 32, 32)
    assert data.classes[0] == "airplane"
    assert data.classes[9] == "truck"
    published = torch.tensor([0.4914, 0.4822, 0.4465])  # mean of the original training images
    assert ((data.mean - published).abs() < 0.02).all()
    assert "JPEG" in data.notes


def test_real_images_with_grey_ones_among_them(real_data: Path) -> None:
    folder = real_data / "tiny-imagenet-40"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    data = load_data(folder, train_size=400, val_fraction=0.02)
    assert data.image_shape == (3, 64, 64)
    assert len(data.classes) == 40
    grey = ((data.test_x[:, 0] == data.test_x[:, 1]) & (data.test_x[:, 1] == data.test_x[:, 2])).flatten(1).all(dim=1)
    assert 0 < grey.sum() < 200
