"""CIFAR in its four forms, a few images each written here: equal pixels, labels, names and digest, and every fault."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from s2sam.data import load_data
from s2sam.data.cifar import LAYOUTS, find_layout
from s2sam.data.images import ImageData

ROWS = 6  # images a file


def some(seed: int, rows: int = ROWS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pixels (rows, 3072), fine labels, coarse labels)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, 3072), dtype=np.uint8), rng.integers(0, 100, rows), rng.integers(0, 20, rows)


def cifar10(seed: int) -> tuple[np.ndarray, np.ndarray]:
    pixels, fine, _ = some(seed)
    return pixels, fine % 10


def put(path: Path, value: Any) -> None:
    path.write_bytes(pickle.dumps(value, 2))


def write(folder: Path, form: str) -> Path:
    """One of the four forms, as the authors' files are made."""
    folder.mkdir(exist_ok=True)
    batches = [(f"data_batch_{i}", i) for i in range(1, 6)] + [("test_batch", 9)]
    splits = [("train", 1), ("test", 9)]
    if form == "10-python":
        for name, seed in batches:
            x, y = cifar10(seed)
            put(
                folder / name,
                {b"batch_label": b"x", b"labels": y.tolist(), b"data": x, b"filenames": [b"a.png"] * ROWS},
            )
        put(folder / "batches.meta", {b"num_vis": 3072, b"label_names": [f"name{i}".encode() for i in range(10)]})
    elif form == "10-binary":
        for name, seed in batches:
            x, y = cifar10(seed)
            np.concatenate([y[:, None].astype(np.uint8), x], axis=1).tofile(folder / f"{name}.bin")
        (folder / "batches.meta.txt").write_text("".join(f"name{i}\n" for i in range(10)) + "\n")
        (folder / "readme.html").write_text("<html>")
    elif form == "100-python":
        for name, seed in splits:
            x, fine, coarse = some(seed, 40)
            put(folder / name, {b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist(), b"data": x})
        names = {f"{k}_label_names".encode(): [f"{k}{i}" for i in range(n)] for k, n in (("fine", 100), ("coarse", 20))}
        put(folder / "meta", names)
    else:
        for name, seed in splits:
            x, fine, coarse = some(seed, 40)
            heads = np.stack([coarse, fine], axis=1).astype(np.uint8)
            np.concatenate([heads, x], axis=1).tofile(folder / f"{name}.bin")
        for k, n in (("fine", 100), ("coarse", 20)):
            (folder / f"{k}_label_names.txt").write_text("\n".join(f"{k}{i}" for i in range(n)))
    return folder


FORMS = ("10-python", "10-binary", "100-python", "100-binary")


@pytest.mark.parametrize("form", ["10-python", "10-binary"])
def test_cifar10_is_exact(tmp_path: Path, form: str) -> None:
    data = load_data(write(tmp_path, form), val_fraction=0.0)
    x, y = (np.concatenate([cifar10(i)[part] for i in range(1, 6)]) for part in (0, 1))
    assert np.array_equal(data.train_x.numpy(), x.reshape(-1, 3, 32, 32))
    assert data.train_y.tolist() == y.tolist()
    assert np.array_equal(data.test_x.numpy(), cifar10(9)[0].reshape(-1, 3, 32, 32))
    assert data.test_y.tolist() == cifar10(9)[1].tolist()
    assert data.classes == tuple(f"name{i}" for i in range(10))
    assert data.name == "cifar10"
    assert data.train_x.is_contiguous()


@pytest.mark.parametrize("form", ["100-python", "100-binary"])
@pytest.mark.parametrize("labels", ["fine", "coarse"])
def test_cifar100_is_exact(tmp_path: Path, form: str, labels: str) -> None:
    data = load_data(write(tmp_path, form), val_fraction=0.0, labels=labels)
    x, fine, coarse = some(1, 40)
    assert np.array_equal(data.train_x.numpy(), x.reshape(-1, 3, 32, 32))
    assert data.train_y.tolist() == (fine if labels == "fine" else coarse).tolist()
    assert data.num_classes == {"fine": 100, "coarse": 20}[labels]
    assert data.classes[3] == f"{labels}3"
    assert f"{labels} labels" in data.notes


def test_planes_are_red_green_blue(tmp_path: Path) -> None:
    """The first 1024 bytes of an image are its red channel, row by row."""
    write(tmp_path, "10-binary")
    pixels = np.concatenate([np.arange(1024) % 256, np.full(1024, 7), np.full(1024, 9)]).astype(np.uint8)
    (tmp_path / "test_batch.bin").write_bytes(bytes([4]) + pixels.tobytes())
    image = load_data(tmp_path).test_x[0]
    assert image[0, 0, :3].tolist() == [0, 1, 2]
    assert image[0, 1, :3].tolist() == [32, 33, 34]
    assert (image[1] == 7).all()
    assert (image[2] == 9).all()


@pytest.mark.parametrize("kind", ["10", "100"])
def test_both_versions_are_the_same_data(tmp_path: Path, kind: str) -> None:
    loaded: list[ImageData] = []
    for form in ("python", "binary"):
        loaded.append(load_data(write(tmp_path / form, f"{kind}-{form}"), train_size=10, val_fraction=0.2, seed=3))
    assert loaded[0].digest == loaded[1].digest
    assert loaded[0].classes == loaded[1].classes
    assert len(loaded[0].train_x) == 10
    assert len(loaded[0].val_x) == (6 if kind == "10" else 8)
    assert torch.equal(loaded[0].mean, loaded[1].mean)


def test_labels_may_be_arrays_and_names_may_be_missing(tmp_path: Path) -> None:
    write(tmp_path, "10-python")
    x, y = cifar10(9)
    put(tmp_path / "test_batch", {"data": x, "labels": y})
    (tmp_path / "batches.meta").unlink()
    data = load_data(tmp_path)
    assert data.classes == tuple("0123456789")
    assert data.test_y.tolist() == y.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_file_is_named(tmp_path: Path, form: str) -> None:
    layout = find_layout(write(tmp_path, form))
    (tmp_path / layout.files[-1]).unlink()
    with pytest.raises(ValueError, match=f"lacks {layout.files[-1]} of CIFAR-1.*fetch the archive again"):
        load_data(tmp_path)
    for name in layout.files[:-1]:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="has none of the files of CIFAR"):
        find_layout(tmp_path)


def test_two_versions_in_one_folder(tmp_path: Path) -> None:
    write(tmp_path, "10-python")
    write(tmp_path, "10-binary")
    with pytest.raises(
        ValueError, match=r"holds CIFAR-10 \(Python version\) and CIFAR-10 \(binary version\); keep one"
    ):
        load_data(tmp_path)


@pytest.mark.parametrize(("form", "record"), [("10-binary", 3073), ("100-binary", 3074)])
@pytest.mark.parametrize("change", [-1, 1, None])
def test_truncated_binaries(tmp_path: Path, form: str, record: int, change: int | None) -> None:
    layout = find_layout(write(tmp_path, form))
    file = tmp_path / layout.train[0]
    whole = file.read_bytes()
    file.write_bytes(b"" if change is None else whole[:change] if change < 0 else whole + b"x")
    with pytest.raises(ValueError, match=rf"{file.name} has \d+ bytes, no multiple of the {record}") as error:
        load_data(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"data": some(1)[0], "labels": [1] * 5}, "data_batch_3 holds 6 images but 5 of 'labels'"),
        ({"data": some(1)[0], "labels": [1] * 7}, "data_batch_3 holds 6 images but 7 of 'labels'"),
        ({"data": some(1)[0], "labels": [1] * 5 + [10]}, "data_batch_3 row 5 has the label 10, but with 10 classes"),
        ({"data": some(1)[0], "labels": [-1] * 6}, "data_batch_3 row 0 has the label -1"),
        ({"data": some(1)[0], "labels": [2**70] * 6}, "data_batch_3: 'labels' must be a list of integers"),
        ({"data": some(1)[0], "labels": ["1"] * 6}, "data_batch_3: 'labels' must be a list of integers"),
        ({"data": some(1)[0], "labels": [0.5] * 6}, "'labels' must be a list of integers"),
        ({"data": some(1)[0]}, "data_batch_3 has no 'labels'; it holds data"),
        ({"labels": [1]}, "data_batch_3 has no 'data'; it holds labels"),
        ({}, "data_batch_3 has no 'data'; it holds nothing"),
        (
            {"data": some(1)[0].astype(float), "labels": [1] * 6},
            r"must be uint8 of shape .*got float64 of shape \(6, 3072",
        ),
        (
            {"data": some(1)[0][:, :9], "labels": [1] * 6},
            r"must be uint8 of shape \(images, 3072\), got uint8 of shape",
        ),
        ({"data": [1, 2], "labels": [1] * 6}, "must be uint8 of shape .*got list"),
        ([1, 2], "data_batch_3 must hold a dict"),
    ],
)
def test_bad_batches(tmp_path: Path, value: Any, message: str) -> None:
    put(write(tmp_path, "10-python") / "data_batch_3", value)
    with pytest.raises(ValueError, match=message) as error:
        load_data(tmp_path)
    assert "\n" not in str(error.value)


def test_bad_labels_of_a_binary(tmp_path: Path) -> None:
    file = write(tmp_path, "10-binary") / "data_batch_2.bin"
    raw = bytearray(file.read_bytes())
    raw[2 * 3073] = 12
    file.write_bytes(raw)
    with pytest.raises(
        ValueError, match=r"data_batch_2\.bin row 2 has the label 12, but with 10 classes labels are 0 to 9"
    ):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("form", "file", "count"),
    [
        ("10-python", "batches.meta", 10),
        ("10-binary", "batches.meta.txt", 10),
        ("100-binary", "fine_label_names.txt", 100),
    ],
)
def test_class_names_of_another_number(tmp_path: Path, form: str, file: str, count: int) -> None:
    names = [f"n{i}" for i in range(count - 1)]
    target = write(tmp_path, form) / file
    if file.endswith(".txt"):
        target.write_text("\n".join(names))
    else:
        put(target, {"label_names": names})
    with pytest.raises(ValueError, match=f"{file} names {count - 1} classes where CIFAR-.* has {count}"):
        load_data(tmp_path)


def test_class_names_that_are_no_list(tmp_path: Path) -> None:
    put(write(tmp_path, "100-python") / "meta", {"fine_label_names": 3})
    with pytest.raises(ValueError, match="meta has no list 'fine_label_names'"):
        load_data(tmp_path)


def test_wrong_options(tmp_path: Path) -> None:
    write(tmp_path, "10-binary")
    with pytest.raises(ValueError, match=r"CIFAR-10 \(binary version\), which has no coarse labels"):
        load_data(tmp_path, labels="coarse")
    with pytest.raises(ValueError, match="labels must be 'fine' or 'coarse', got 'corse'"):
        load_data(tmp_path, labels="corse")
    with pytest.raises(ValueError, match="unknown option of cifar data 'label'; did you mean 'labels'"):
        load_data(tmp_path, label="fine")


def test_layouts_share_no_file() -> None:
    files = [name for layout in LAYOUTS for name in layout.files]
    assert len(set(files)) == len(files) == 16
