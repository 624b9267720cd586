"""The official corrupted test sets, from the files of their authors; checked, and read batch by batch.

    CIFAR-10-C, CIFAR-100-C         CORRUPTION.npy, labels.npy          uint8 (50000, 32, 32, 3): severities 1 to 5
    ImageNet-C, Tiny-ImageNet-C     CORRUPTION/SEVERITY/CLASS/*.JPEG    the same files in every folder

The groups of ImageNet-C's archives may stand in front: noise/gaussian_noise/1/CLASS/*.JPEG.
Source: Hendrycks and Dietterich, 2019; https://zenodo.org/records/2535967, 3555552 and 2235448.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from s2sam.data.corruptions import CORRUPTIONS, SEVERITIES, group_of
from s2sam.data.decode import decode_images, decode_rgb
from s2sam.data.folder import Files, list_files


class Source(Protocol):
    """Where corrupted images come from: :class:`s2sam.data.corruptions.Generated`, or one of these files."""

    @property
    def facts(self) -> dict[str, object]:
        """What identifies the images, as plain values; `source` is "generated" or "official"."""

    def check(self, corruptions: Sequence[str], severities: Sequence[int]) -> None:
        """Raise ValueError, naming the file, if something of this is missing or not what it should be."""

    def batches(self, corruption: str, severity: int, rows: Tensor, size: int) -> Iterator[Tensor]:
        """The images at these places of the clean test set, uint8 (n, C, H, W), at most `size` at a time."""


def open_official(folder: str | Path, test_y: Tensor, shape: tuple[int, int, int], classes: Sequence[str]) -> Source:
    """The official files in `folder`, corrupted versions of the test images that `test_y` labels.

    Args:
        folder: with labels.npy, or with a folder for each corruption.
        test_y: labels of the clean test images in their order, int64 (N,).
        shape: (C, H, W) of the images that the network takes.
        classes: their names.

    Raises:
        ValueError: there are no such files, or they belong to other test images.
    """
    folder = Path(folder)
    if (folder / "labels.npy").is_file():
        return CifarFiles(folder, test_y, shape)
    if any(_place(folder, corruption).is_dir() for corruption in CORRUPTIONS):
        return FolderFiles(folder, test_y, shape, tuple(classes))
    raise ValueError(
        f"{folder} holds no corrupted test set: it needs labels.npy beside the .npy files of CIFAR-10-C or "
        "CIFAR-100-C, or ImageNet-C's folders CORRUPTION/SEVERITY/CLASS"
    )


class CifarFiles:
    """CIFAR-10-C or CIFAR-100-C: one array a corruption, mapped into memory and never read as a whole."""

    def __init__(self, folder: Path, test_y: Tensor, shape: tuple[int, int, int]) -> None:
        self.folder, self.count = folder, len(test_y)
        channels, height, width = shape
        self.shape = (len(SEVERITIES) * self.count, height, width, channels)
        path = folder / "labels.npy"
        labels = _open_array(path)
        if labels.shape != self.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{path} holds {labels.dtype} of shape {labels.shape}, not one label for each of {self.shape[0]} "
                f"images, 5 times the {self.count} test images of the run; give the files made from its test set"
            )
        blocks = torch.from_numpy(labels.astype(np.int64)).view(len(SEVERITIES), -1)
        if not bool((blocks == test_y.cpu()).all()):
            raise ValueError(
                f"{path} does not list the labels of the run's test images in their order; give the files made from "
                "its test set, and train on the authors' files of CIFAR"
            )

    @property
    def facts(self) -> dict[str, object]:
        """What identifies the images."""
        return {"source": "official", "layout": "cifar-c", "files": self.folder.resolve().name}

    def check(self, corruptions: Sequence[str], severities: Sequence[int]) -> None:
        """Open each file once."""
        for corruption in corruptions:
            self._open(corruption)

    def batches(self, corruption: str, severity: int, rows: Tensor, size: int) -> Iterator[Tensor]:
        """The rows of that severity; a row that is all 0 was never written, and is refused."""
        array, first = self._open(corruption), (severity - 1) * self.count
        for part in rows.cpu().split(size):
            images = torch.from_numpy(array[(first + part).numpy()]).permute(0, 3, 1, 2).contiguous()
            blank = images.flatten(1).amax(dim=1) == 0
            if bool(blank.any()):
                row = first + int(part[blank][0])
                raise ValueError(f"{self._path(corruption)} is damaged: row {row} is blank; get it again")
            yield images

    def _path(self, corruption: str) -> Path:
        return self.folder / f"{corruption}.npy"

    def _open(self, corruption: str) -> np.ndarray[Any, Any]:
        array = _open_array(self._path(corruption))
        if array.shape != self.shape or array.dtype != np.uint8:
            raise ValueError(
                f"{self._path(corruption)} holds {array.dtype} of shape {array.shape}, not uint8 of shape "
                f"{self.shape}; give the official file, made from the run's test set"
            )
        return array


def _open_array(path: Path) -> np.ndarray[Any, Any]:
    """A .npy file mapped into memory."""
    try:
        array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; get the archive again, or leave it out of --corruptions") from error
    except Exception as error:  # whatever damaged bytes make its reader stumble over
        raise ValueError(f"{path} is damaged, perhaps truncated ({error}); get it again") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path} is no .npy file; give the official one")
    return array


class FolderFiles:
    """ImageNet-C, or another test set in its layout: one file an image, decoded batch by batch."""

    def __init__(self, folder: Path, test_y: Tensor, shape: tuple[int, int, int], classes: tuple[str, ...]) -> None:
        self.folder, self.test_y, self.shape, self.classes = folder, test_y.cpu(), shape, classes
        self.files: dict[tuple[str, int], Files] = {}
        if shape[0] != 3:
            raise ValueError(f"{folder} holds colour images, the network takes {shape[0]} channels")

    @property
    def facts(self) -> dict[str, object]:
        """What identifies the images."""
        return {"source": "official", "layout": "imagenet-c", "files": self.folder.resolve().name}

    def check(self, corruptions: Sequence[str], severities: Sequence[int]) -> None:
        """List all files, compare their classes with those of the clean test images, and read the first of each."""
        for corruption in corruptions:
            for severity in severities:
                self._list(corruption, severity)

    def batches(self, corruption: str, severity: int, rows: Tensor, size: int) -> Iterator[Tensor]:
        """The images, decoded in threads."""
        paths = self._list(corruption, severity).paths
        for part in rows.cpu().split(size):
            chosen = [paths[row] for row in part.tolist()]
            yield _decode(chosen, self.shape[1:])

    def _list(self, corruption: str, severity: int) -> Files:
        key = corruption, severity
        if key not in self.files:
            folder = _place(self.folder, corruption) / str(severity)
            if not folder.is_dir():
                raise ValueError(f"{folder} is missing; get the archive again, or leave it out")
            found = list_files(folder, self.classes)
            if not torch.equal(found.labels, self.test_y):
                raise ValueError(
                    f"{folder} does not hold the run's {len(self.test_y)} test images class by class (it has "
                    f"{len(found.labels)}); give the official files, made from its test set"
                )
            height, width = decode_rgb(found.paths[0].read_bytes(), str(found.paths[0])).shape[:2]
            if (height, width) != self.shape[1:]:
                raise ValueError(
                    f"{found.paths[0]} has {width}x{height} pixels, the network takes {self.shape[2]}x{self.shape[1]}"
                )
            self.files[key] = found
        return self.files[key]


def _place(folder: Path, corruption: str) -> Path:
    """Where the images of a corruption lie, with or without the folder of its group."""
    grouped = folder / group_of(corruption) / corruption
    return grouped if grouped.is_dir() else folder / corruption


def _decode(paths: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """The images at `paths`, all of this size."""
    return decode_images(len(paths), lambda i: paths[i].read_bytes(), lambda i: str(paths[i]), size=size)
