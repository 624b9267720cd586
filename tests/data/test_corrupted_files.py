"""The official files: what is read from them, and what is refused with the name of the file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from s2sam.data.corrupted_files import CifarFiles, FolderFiles, open_official

LABELS = torch.tensor([0, 0, 1, 1, 1])
CLASSES = ("ape", "bee")
SHAPE = (3, 4, 6)


def arrays(folder, names=("fog", "snow")):
    """A CIFAR-C of 5 test images of 4 x 6 pixels: pixel value = 1 + row."""
    folder.mkdir(exist_ok=True)
    for name in names:
        rows = np.arange(1, 26, dtype=np.uint8)[:, None, None, None]
        np.save(folder / f"{name}.npy", np.broadcast_to(rows, (25, 4, 6, 3)))
    np.save(folder / "labels.npy", np.tile(LABELS.numpy().astype(np.uint8), 5))
    return folder


def folders(folder, *, group=""):
    """An ImageNet-C of 5 test images of 4 x 6 pixels: pixel value = 40 severity + image."""
    for severity in range(1, 6):
        for image, label in enumerate(LABELS.tolist()):
            place = folder / group / "fog" / str(severity) / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            pixels = np.full((4, 6, 3), 40 * severity + image, np.uint8)
            Image.fromarray(pixels).save(place / f"val_{image}.JPEG", "JPEG", quality=100)
    return folder


def test_rows_and_severities_of_arrays(tmp_path):
    source = open_official(arrays(tmp_path / "c"), LABELS, SHAPE, CLASSES)
    assert isinstance(source, CifarFiles) and source.facts == {"source": "official", "layout": "cifar-c", "files": "c"}
    source.check(["fog", "snow"], [1, 5])
    found = [*source.batches("fog", 3, torch.tensor([0, 2, 4]), 2)]
    assert [tuple(x.shape) for x in found] == [(2, 3, 4, 6), (1, 3, 4, 6)]
    assert torch.cat(found)[:, 0, 0, 0].tolist() == [11, 13, 15]  # severity 3 begins at row 10
    assert isinstance(source._open("fog"), np.memmap)


@pytest.mark.parametrize("group", ["", "weather"])
def test_rows_and_severities_of_folders(tmp_path, group):
    source = open_official(folders(tmp_path / "c", group=group), LABELS, SHAPE, CLASSES)
    assert isinstance(source, FolderFiles) and source.facts["layout"] == "imagenet-c"
    source.check(["fog"], [1, 2, 3, 4, 5])
    x = torch.cat([*source.batches("fog", 3, torch.tensor([1, 4]), 1)])
    assert x.shape == (2, 3, 4, 6) and x[:, 0, 0, 0].tolist() == [121, 124]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "zip", "zip head"])
def test_a_damaged_array_is_named(tmp_path, damage):
    folder = arrays(tmp_path / "c")
    path = folder / "snow.npy"
    whole = path.read_bytes()
    if damage == "zip":
        with open(path, "wb") as file:
            np.savez(file, whole=np.zeros(3))
    else:
        path.write_bytes(
            {"cut": whole[:-100], "empty": b"", "text": b"not an array", "zip head": b"PK\x03\x04 and no more"}[damage]
        )
    source = open_official(folder, LABELS, SHAPE, CLASSES)
    source.check(["fog"], [1])
    with pytest.raises(ValueError, match=r"snow.npy is (damaged, perhaps truncated|no .npy file)") as caught:
        source.check(["fog", "snow"], [1])
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda f: (f / "snow.npy").unlink(), "snow.npy is missing; get the archive again"),
    (lambda f: np.save(f / "snow.npy", np.zeros((20, 4, 6, 3), np.uint8)), r"not uint8 of shape \(25, 4, 6, 3\)"),
    (lambda f: np.save(f / "snow.npy", np.zeros((25, 4, 6, 3))), "snow.npy holds float64 of shape"),
    (lambda f: np.save(f / "labels.npy", np.zeros(25)), "labels.npy holds float64 of shape"),
    (lambda f: np.save(f / "labels.npy", np.zeros(24, int)), "not one label for each of 25 images, 5 times the 5"),
    (lambda f: np.save(f / "labels.npy", np.zeros(25, int)), "labels.npy does not list the labels of the run's test"),
])  # fmt: skip
def test_arrays_of_something_else(tmp_path, change, sentence):
    folder = arrays(tmp_path / "c")
    change(folder)
    with pytest.raises(ValueError, match=sentence):
        open_official(folder, LABELS, SHAPE, CLASSES).check(["snow"], [1])


def test_a_row_that_was_never_written(tmp_path):
    folder = arrays(tmp_path / "c")
    images = np.load(folder / "fog.npy")
    images[13] = 0
    np.save(folder / "fog.npy", images)
    source = open_official(folder, LABELS, SHAPE, CLASSES)
    assert len([*source.batches("fog", 2, torch.arange(5), 5)]) == 1
    with pytest.raises(ValueError, match=r"fog.npy is damaged: row 13 is blank"):
        [*source.batches("fog", 3, torch.arange(5), 5)]


def test_folders_of_something_else(tmp_path):
    folder = folders(tmp_path / "c")
    source = open_official(folder, LABELS, SHAPE, CLASSES)
    with pytest.raises(ValueError, match=r"snow/1 is missing; get the archive again"):
        source.check(["fog", "snow"], [1])
    with pytest.raises(ValueError, match=r"has 6x4 pixels, the network takes 8x8"):
        open_official(folder, LABELS, (3, 8, 8), CLASSES).check(["fog"], [1])
    with pytest.raises(ValueError, match="the network takes 1 channels"):
        open_official(folder, LABELS, (1, 4, 6), CLASSES)
    image = folder / "fog" / "2" / "bee" / "val_3.JPEG"
    image.write_bytes(image.read_bytes()[:60])
    source = open_official(folder, LABELS, SHAPE, CLASSES)
    source.check(["fog"], [2])
    with pytest.raises(ValueError, match=r"val_3.JPEG is not a readable image, perhaps truncated"):
        [*source.batches("fog", 2, torch.arange(5), 5)]
    image.unlink()
    with pytest.raises(ValueError, match=r"fog/2 does not hold the run's 5 test images class by class \(it has 4\)"):
        open_official(folder, LABELS, SHAPE, CLASSES).check(["fog"], [2])
    (folder / "fog" / "2" / "bee").rename(folder / "fog" / "2" / "cat")
    with pytest.raises(ValueError, match="cat is a class that train does not have"):
        open_official(folder, LABELS, SHAPE, CLASSES).check(["fog"], [2])


def test_a_folder_of_neither(tmp_path):
    with pytest.raises(ValueError, match="holds no corrupted test set: it needs labels.npy"):
        open_official(tmp_path, LABELS, SHAPE, CLASSES)
    with pytest.raises(ValueError, match="nowhere holds no corrupted test set"):
        open_official(tmp_path / "nowhere", LABELS, SHAPE, CLASSES)
