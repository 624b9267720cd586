"""Folders of image files: exact pixels, labels by sorted names, every kind of picture, every fault with its file."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from s2sam.data import load_data

CLASSES = ("Zebra", "ant", "bee")  # capital letters sort first


def picture(seed: int, size: tuple[int, int] = (6, 5), channels: int = 3) -> np.ndarray:
    shape = (*size, channels) if channels > 1 else size
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, image: np.ndarray | Image.Image, form: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, form)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with four training images and one test image each, 6x5 pixels."""
    for c, name in enumerate(CLASSES):
        for i in range(4):
            save(tmp_path / "train" / name / f"{i}.png", picture(10 * c + i))
        save(tmp_path / "test" / name / "t.png", picture(100 + c))
    return tmp_path


def test_pixels_and_labels_are_exact(folder: Path) -> None:
    data = load_data(folder, val_fraction=0.0)
    want = np.stack([picture(10 * c + i) for c in range(3) for i in range(4)]).transpose(0, 3, 1, 2)
    assert np.array_equal(data.train_x.numpy(), want)
    assert data.train_y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.classes == CLASSES
    assert data.test_y.tolist() == [0, 1, 2]
    assert np.array_equal(data.test_x[2].permute(1, 2, 0).numpy(), picture(102))
    assert (data.name, data.notes) == (folder.name, "test images from test")


def test_labels_go_by_name_whatever_the_test_folder_has(folder: Path) -> None:
    for file in (folder / "test" / "Zebra").iterdir():
        file.unlink()
    (folder / "test" / "Zebra").rmdir()
    data = load_data(folder)
    assert data.test_y.tolist() == [1, 2]
    assert np.array_equal(data.test_x[0].permute(1, 2, 0).numpy(), picture(101))


@pytest.mark.parametrize("name", ["val", "validation"])
def test_val_is_the_test_set_if_there_is_no_test(folder: Path, name: str) -> None:
    (folder / "test").rename(folder / name)
    data = load_data(folder)
    assert len(data.test_x) == 3
    assert data.notes == f"test images from {name}"
    (folder / name).rename(folder / "test")
    save(folder / name / "ant" / "v.png", picture(7))
    assert f"; {name} not used, validation images are from train" in load_data(folder).notes


def test_every_kind_of_picture_becomes_rgb(folder: Path) -> None:
    rgb, grey = picture(50), picture(51, channels=1)
    ant = folder / "train" / "ant"
    save(ant / "a_grey.png", grey)
    save(ant / "b_two.png", Image.fromarray(grey > 127))
    save(ant / "c_alpha.png", Image.fromarray(np.dstack([rgb, grey])))
    save(ant / "d_palette.gif", Image.fromarray(rgb).quantize(16))
    save(ant / "e_cmyk.jpg", Image.fromarray(np.full((6, 5, 4), 90, np.uint8), "CMYK"))
    save(ant / "f.bmp", rgb)
    save(ant / "g.JPEG", rgb, "JPEG")
    save(ant / "h.ppm", rgb)
    save(ant / "i.webp", Image.fromarray(rgb), "WEBP")
    save(ant / "j.tiff", rgb)
    data = load_data(folder, val_fraction=0.0)
    found = data.train_x[8:18].permute(0, 2, 3, 1).numpy()  # digits sort before letters
    assert np.array_equal(found[0], np.repeat(grey[:, :, None], 3, axis=2))
    assert np.array_equal(found[1][..., 0], (grey > 127) * np.uint8(255))
    for exact in (2, 5, 7, 9):
        assert np.array_equal(found[exact], rgb)
    assert abs(found[3].astype(int) - rgb).mean() < 40
    want = 255 - 90 - 90 + 90 * 90 / 255  # (255 - C) (255 - K) / 255
    assert abs(found[4].astype(int) - want).max() < 6
    assert data.train_y[8:18].tolist() == [1] * 10


def test_deeper_files_hidden_files_and_others(folder: Path) -> None:
    save(folder / "train" / "bee" / "images" / "deep" / "z.png", picture(60))
    (folder / "train" / "bee" / ".DS_Store").write_bytes(b"x")
    (folder / "train" / "bee" / "boxes.txt").write_text("0 0 1 1")
    (folder / "train" / ".cache").mkdir()
    data = load_data(folder, val_fraction=0.0)
    assert len(data.train_x) == 13
    assert np.array_equal(data.train_x[-1].permute(1, 2, 0).numpy(), picture(60))
    assert data.notes.endswith("; 1 files left out that are no images by their suffix")


def test_resize_makes_one_size_of_many(folder: Path) -> None:
    save(folder / "train" / "ant" / "0.png", np.full((40, 80, 3), 77, np.uint8))
    with pytest.raises(ValueError, match="0.png is 80x40 pixels where the first image is 5x6; bring all images to one"):
        load_data(folder, val_fraction=0.0)
    data = load_data(folder, val_fraction=0.0, resize=8)
    assert data.image_shape == (3, 8, 8)
    assert (data.train_x[4] == 77).all()
    assert "centre square of each image, scaled to 8x8" in data.notes
    small = np.asarray(Image.fromarray(picture(0)).crop((0, 0, 5, 5)).resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(data.train_x[0].permute(1, 2, 0).numpy(), small)
    with pytest.raises(ValueError, match="resize must be a whole number of pixels or None, got True"):
        load_data(folder, resize=True)


@pytest.mark.parametrize("content", [b"", b"hello", None, "exe"], ids=["empty", "text", "cut", "program"])
def test_a_broken_file_is_named(folder: Path, content: bytes | str | None) -> None:
    file = folder / "train" / "bee" / "2.png"
    if content == "exe":
        content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n%%EndComments\nshowpage\n"
    file.write_bytes(file.read_bytes()[:60] if content is None else content)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"train/bee/2\.png (is not a readable image|has no image bytes)") as error:
        load_data(folder, val_fraction=0.0)
    assert "\n" not in str(error.value)


def test_all_broken_files_are_counted(folder: Path) -> None:
    for i in range(4):
        (folder / "train" / "Zebra" / f"{i}.png").write_bytes(b"x")  # the first image of all among them
    with pytest.raises(
        ValueError, match=r"Zebra/0\.png is not a readable image.*\(3 more cannot be used: .*Zebra/1\.png"
    ):
        load_data(folder, val_fraction=0.0)
    for file in folder.glob("train/*/*.png"):
        file.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"Zebra/0\.png is not a readable image.*\(11 more"):
        load_data(folder, val_fraction=0.0)


def test_sixteen_bits_are_refused(folder: Path) -> None:
    save(folder / "test" / "ant" / "t.png", np.full((6, 5), 1000, np.uint16))
    with pytest.raises(ValueError, match=r"test/ant/t\.png has more than 8 bits a channel"):
        load_data(folder)


def test_faults_of_the_folders(folder: Path) -> None:
    save(folder / "test" / "cow" / "c.png", picture(1))
    with pytest.raises(ValueError, match=r"test/cow is a class that train does not have"):
        load_data(folder)
    (folder / "test" / "cow").rename(folder / "train" / "cow")
    (folder / "train" / "cow" / "c.png").unlink()
    with pytest.raises(ValueError, match=r"the class folder .*train/cow holds no images; fill or remove it"):
        load_data(folder)
    (folder / "train" / "cow").rmdir()
    save(folder / "train" / "loose.png", picture(1))
    with pytest.raises(ValueError, match=r"train/loose\.png lies in no class; move it into a folder"):
        load_data(folder)
    (folder / "train" / "loose.png").unlink()
    load_data(folder)
    (folder / "test").rename(folder / "other")
    with pytest.raises(ValueError, match=r"needs the folders train and test \(or val\)"):
        load_data(folder)


def test_one_class_or_none(tmp_path: Path) -> None:
    save(tmp_path / "train" / "only" / "a.png", picture(0))
    save(tmp_path / "test" / "only" / "a.png", picture(0))
    with pytest.raises(ValueError, match=r"train has 1 folders, and each class needs one: train/CLASS/\*\.png"):
        load_data(tmp_path)


def test_only_what_is_asked_for_is_decoded(folder: Path) -> None:
    full, part = load_data(folder, seed=2), load_data(folder, seed=2, train_size=3)
    assert torch.equal(full.val_x, part.val_x)
    assert part.train_y.tolist() == [0, 1, 2]
    kept = {x.numpy().tobytes() for x in torch.cat([part.train_x, part.val_x])}
    for file in folder.glob("train/*/*.png"):
        if np.asarray(Image.open(file)).transpose(2, 0, 1).copy().tobytes() not in kept:
            file.write_bytes(b"broken")
    assert load_data(folder, seed=2, train_size=3).digest == part.digest


def test_the_bytes_of_a_file_decide_not_its_suffix(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(3)).save(buffer, "PNG")
    file = folder / "train" / "ant" / "9.jpg"
    file.write_bytes(buffer.getvalue())
    assert np.array_equal(load_data(folder, val_fraction=0.0).train_x[8].permute(1, 2, 0).numpy(), picture(3))
    save(file, picture(3), "PCX")
    assert np.array_equal(np.asarray(Image.open(file)), picture(3))  # Pillow can, but it is not one of FORMATS
    with pytest.raises(ValueError, match=r"ant/9\.jpg is not a readable image"):
        load_data(folder)
