"""ImageData checks itself; digest and moments are what they say; arrays and .npz files; digits."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from s2sam.data import DATA, data_options, find_row, load_data
from s2sam.data.arrays import from_arrays
from s2sam.data.images import ImageData, channel_moments, digest_of
from s2sam.models import MODELS


def images(n: int, seed: int = 0, shape: tuple[int, ...] = (3, 4, 4)) -> Tensor:
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def labels(n: int, classes: int = 2) -> Tensor:
    return torch.arange(n) % classes


def make() -> ImageData:
    return ImageData.build("toy", (images(8), labels(8)), (images(4, 1), labels(4)), (images(6, 2), labels(6)), "ab")


def test_build_fills_moments_and_digest() -> None:
    data = make()
    pixels = data.train_x.double() / 255
    torch.testing.assert_close(data.mean, pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(data.std, pixels.std((0, 2, 3), correction=0).float())
    assert len(data.digest) == 64
    assert data.digest == make().digest
    assert (data.num_classes, data.image_shape, data.classes) == (2, (3, 4, 4), ("a", "b"))
    assert data.split("val")[0] is data.val_x
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="got 'valid'"):
        data.split("valid")


def test_digest_sees_every_bit_and_every_boundary() -> None:
    x = images(4)
    digests = {digest_of(x, labels(4)), digest_of(labels(4), x), digest_of(x), digest_of(x[:2], x[2:])}
    flipped = x.clone()
    flipped[3, 2, 3, 3] ^= 1
    digests |= {digest_of(flipped), digest_of(x.reshape(2, 2, 3, 4, 4)), digest_of(x.to(torch.int8))}
    assert len(digests) == 7
    by_hand = hashlib.sha256(b"uint8(2,)\x01\x02").hexdigest()
    assert digest_of(torch.tensor([1, 2], dtype=torch.uint8)) == by_hand
    assert digest_of(torch.empty(0, 3)) != digest_of(torch.empty(0, 4))
    assert digest_of(x.transpose(2, 3)) == digest_of(x.transpose(2, 3).contiguous())


def test_moments_are_exact_and_never_divide_by_zero() -> None:
    x = torch.zeros(4, 2, 1, 1, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.tensor([0, 0, 255, 255])
    mean, std = channel_moments(x)
    assert mean.tolist() == [0.5, 0.0]
    assert std.tolist() == [0.5, 1.0]


def test_validation_may_be_empty() -> None:
    data = from_arrays("toy", images(6), labels(6), images(2), labels(2), val_fraction=0.0)
    assert len(data.val_x) == len(data.val_y) == 0
    assert len(data.train_x) == 6


NAN = images(8).float() / 255
NAN[5, 1, 2, 3] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_x": NAN}, "toy: train_x row 5 holds NaN or infinite pixels"),
        ({"val_x": torch.full((4, 3, 4, 4), torch.inf)}, "toy: val_x row 0 holds NaN or infinite"),
        ({"train_x": images(8).float()}, "train_x must be uint8 in 0..255, got float32"),
        ({"test_x": images(6).to(torch.int16)}, "test_x must be uint8 in 0..255, got int16"),
        ({"train_x": images(8).reshape(8, 48)}, r"train_x must have the shape .*got \(8, 48\)"),
        ({"train_x": images(8)[..., :0]}, "train_x must have the shape"),
        ({"test_x": images(6, shape=(3, 5, 4))}, r"train and test differ in shape, \(3, 4, 4\) and \(3, 5, 4\)"),
        ({"val_x": images(4, shape=(1, 4, 4))}, "train and val differ in shape"),
        ({"train_y": labels(8) * 2}, "train_y row 1 has the label 2, but with 2 classes labels are 0 to 1"),
        ({"test_y": -labels(6)}, "test_y row 1 has the label -1"),
        ({"train_y": labels(7)}, "train_y must hold one label an image, but there are 8 images and 7 labels"),
        ({"train_y": labels(8)[:, None]}, r"train_y must be int64 of shape \(8,\), got int64 of shape \(8, 1\)"),
        ({"val_y": labels(4).int()}, r"val_y must be int64 of shape \(4,\), got int32"),
        ({"test_y": labels(6).float()}, "test_y must be int64"),
        ({"train_x": images(0), "train_y": labels(0)}, "there are no train images"),
        ({"test_x": images(0), "test_y": labels(0)}, "there are no test images"),
        ({"classes": ()}, "there are no classes"),
        ({"mean": torch.zeros(2)}, "mean must hold one finite number per channel"),
        ({"std": torch.full((3,), torch.nan)}, "std must hold one finite number per channel"),
    ],
)
def test_image_data_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(make(), **change)
    assert "\n" not in str(error.value)


def test_from_arrays_takes_floats_and_numpy() -> None:
    x = images(10)
    a = from_arrays("a", x, labels(10), x, labels(10))
    b = from_arrays("a", (x.float() / 255).numpy(), labels(10).int().numpy(), (x.double() / 255), labels(10).numpy())
    assert a.digest == b.digest
    assert a.classes == ("0", "1")
    assert torch.equal(a.test_x, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_x": NAN}, "mine: train_x row 5 holds NaN or infinite pixels"),
        ({"test_x": images(6).float()}, r"mine: test_x row 0 holds pixels outside \[0, 1\]"),
        ({"train_x": np.zeros((8, 4, 4), np.uint8)}, "train_x must have the shape"),
        ({"train_x": np.zeros((8, 1, 4, 4), np.int32)}, "train_x must be uint8"),
        ({"train_x": np.array([["a"]])}, "train_x must be an array of numbers"),
        ({"train_y": labels(8).float()}, "train_y must hold integers, got float32"),
        ({"train_y": labels(9)}, "mine: train_y must hold one label an image, but there are 8 images and 9 labels"),
        ({"test_y": labels(6) + 5, "classes": ["a", "b"]}, "test_y row 0 has the label 5, but with 2 classes"),
        ({"train_y": labels(8) - 1}, "train_y row 0 has the label -1"),
        ({"train_x": images(0), "train_y": labels(0)}, "there are no train images"),
        ({"train_y": labels(8) + 10**12}, "the label 1000000000001 cannot be a class number among 14 images"),
    ],
)
def test_from_arrays_refuses(change: dict, message: str) -> None:
    good = {"train_x": images(8), "train_y": labels(8), "test_x": images(6), "test_y": labels(6)}
    with pytest.raises(ValueError, match=message):
        from_arrays("mine", **(good | change))


def write_npz(path: Path, **change: object) -> Path:
    arrays = {"train_x": images(20), "train_y": labels(20), "test_x": images(6), "test_y": labels(6)} | change
    np.savez(path, **{k: np.asarray(v) for k, v in arrays.items() if v is not None})
    return path


def test_npz_round_trip(tmp_path: Path) -> None:
    data = load_data(write_npz(tmp_path / "own.npz", classes=["cat", "dog"]), train_size=10, seed=1)
    assert (data.name, data.classes, len(data.train_x), len(data.val_x)) == ("own.npz", ("cat", "dog"), 10, 2)
    assert torch.equal(data.test_x, images(6))
    assert data.train_y.bincount().tolist() == [5, 5]


def test_bad_npz_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no array 'test_y'; it must hold train_x"):
        load_data(write_npz(tmp_path / "a.npz", test_y=None))
    with pytest.raises(ValueError, match="row 5 holds NaN"):
        load_data(write_npz(tmp_path / "b.npz", train_x=NAN, train_y=labels(8)))
    whole = write_npz(tmp_path / "c.npz").read_bytes()
    for cut in (10, len(whole) // 2):
        (tmp_path / "c.npz").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"not a readable \.npz file"):
            load_data(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", train_x=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"not a readable \.npz file"):
        load_data(tmp_path / "d.npz")


def test_digits() -> None:
    data = load_data("digits")
    assert data.image_shape == (1, 8, 8)
    assert [len(data.split(s)[0]) for s in ("train", "val", "test")] == [1294, 144, 359]
    assert data.classes == tuple("0123456789")
    for split in ("train", "val", "test"):  # stratified: every class keeps its tenth
        share = data.split(split)[1].bincount().double() / len(data.split(split)[1])
        assert ((share - 0.1).abs() < 0.01).all()
    levels = data.train_x.unique().tolist()
    assert levels == [round(v * 255 / 16) for v in range(17)]


def test_digits_are_the_originals_each_once() -> None:
    from sklearn.datasets import load_digits

    data = load_data("digits", seed=3)
    source = load_digits()
    want = sorted((round_pixels(x), int(y)) for x, y in zip(source.images, source.target, strict=True))
    have = [
        (bytes(x.numpy().tobytes()), int(y))
        for split in ("train", "val", "test")
        for x, y in zip(*data.split(split), strict=True)
    ]
    assert sorted(have) == want


def round_pixels(image: np.ndarray) -> bytes:
    return bytes(int(v * 255 / 16 + 0.5) for v in image.flatten())


def test_digits_test_images_are_the_same_for_every_seed() -> None:
    a, b, c = load_data("digits"), load_data("digits", seed=7), load_data("digits", seed=7, train_size=200)
    assert torch.equal(a.test_x, b.test_x)
    assert torch.equal(a.test_y, c.test_y)
    assert not torch.equal(a.val_x, b.val_x)
    assert torch.equal(b.val_x, c.val_x)
    assert c.train_y.bincount().tolist() == [20] * 10
    assert load_data("digits", seed=7).digest == b.digest != a.digest


def test_loading_leaves_the_global_random_state_alone() -> None:
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    load_data("digits", train_size=100)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "unknown data 'digit'; did you mean 'digits'"),
        ("parquet", "'parquet' is a form, not a data set: give the path"),
        ("npz", "'npz' is a form, not a data set"),
        ("cifar", "'cifar' is a form, not a data set"),
        ("cifar10", "there is no folder cifar10: `s2sam data get cifar10` gets it, then give --data data/cifar10"),
        ("cifar1000", "unknown data 'cifar1000'; did you mean 'cifar100'"),
        ("no/such/folder", "there is no data at no/such/folder: no such path exists; give 'digits', an .npz file, or"),
        ("./nowhere", "there is no data at ./nowhere: no such path exists; give 'digits'"),
        ("nowhere/", "there is no data at nowhere/: no such path exists"),
        ("images.npz", "there is no data at images.npz"),
    ],
)
def test_unknown_data(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(spec)


def test_a_file_that_is_neither(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"neither a folder with images nor an \.npz file"):
        load_data(tmp_path / "train.csv")


def test_a_name_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_data("digits").name == "digits"
    with pytest.raises(ValueError, match=r"digits holds no data that is known: it needs train\.parquet, the files of"):
        load_data("./digits")


def test_a_folder_is_recognised_or_its_fault_is_named(tmp_path: Path) -> None:
    (tmp_path / "data" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_1").touch()
    with pytest.raises(ValueError, match=r"holds no data itself; did you mean .*data/cifar-10-batches-py\?"):
        load_data(tmp_path / "data")
    (tmp_path / "train").mkdir()
    (tmp_path / "train.parquet").touch()
    with pytest.raises(ValueError, match="holds both parquet and images data; keep one of them"):
        load_data(tmp_path)
    assert find_row("digits").name == "digits"
    assert data_options(write_npz(tmp_path / "own.npz")) == {}
    with pytest.raises(ValueError, match="unknown option of digits data 'resize': it has none, leave this one out"):
        load_data("digits", resize=4)


def test_all_tensors_move_and_nothing_else_changes() -> None:
    data = make()
    moved = data.to("meta")
    for field in dataclasses.fields(data):
        before, after = getattr(data, field.name), getattr(moved, field.name)
        if isinstance(before, Tensor):
            assert (after.device.type, before.device.type) == ("meta", "cpu")
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
        else:
            assert after == before
    assert data.to("cpu").train_x is data.train_x


@pytest.mark.parametrize("row", DATA, ids=[row.name for row in DATA])
def test_rows_are_complete(row: object) -> None:
    loader: Callable[..., ImageData] = row.load()  # type: ignore[attr-defined]
    assert callable(loader)
    assert row.description  # type: ignore[attr-defined]
    assert row.source  # type: ignore[attr-defined]


def test_rows_are_there_without_torch() -> None:
    code = (
        "import sys; from s2sam.registry import list_data, list_models; print(len(list_data()), len(list_models()));"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, [str(len(DATA)), str(len(MODELS))]), done.stderr
