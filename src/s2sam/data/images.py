"""What every loader returns: images and labels in memory, checked once, with a digest that identifies them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import torch
from torch import Tensor

Pair: TypeAlias = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class ImageData:
    """Training, validation and test images. Build it with :meth:`build`, which fills mean, std and digest.

    Shapes: images uint8 (N, C, H, W), the same C, H, W everywhere; labels int64 (N,) in [0, len(classes)).
    `mean`, `std`: float32 (C,) of the training images on the [0, 1] scale; a constant channel has std 1.
    `digest`: sha256 over all images and labels. Validation may be empty, training and test may not.

    Raises:
        ValueError: a tensor is none of this; the sentence names the tensor and the first bad row.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    digest: str
    notes: str = ""

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError(f"{self.name}: there are no classes")
        for split in ("train", "val", "test"):
            images, labels = self.split(split)
            if split != "val" and len(images) == 0:
                raise ValueError(f"{self.name}: there are no {split} images")
            check_images(images, f"{self.name}: {split}_x")
            check_labels(labels, len(images), len(self.classes), f"{self.name}: {split}_y")
            if images.shape[1:] != self.train_x.shape[1:]:
                raise ValueError(
                    f"{self.name}: images of train and {split} differ in shape, {tuple(self.train_x.shape[1:])} "
                    f"and {tuple(images.shape[1:])}"
                )
        for what, moment in (("mean", self.mean), ("std", self.std)):
            if moment.shape != self.train_x.shape[1:2] or not bool(torch.isfinite(moment).all()):
                raise ValueError(f"{self.name}: {what} must hold one finite number per channel")

    def split(self, name: str) -> Pair:
        """Images and labels of "train", "val" or "test"."""
        if name not in ("train", "val", "test"):
            raise ValueError(f"a split is 'train', 'val' or 'test', got {name!r}")
        return getattr(self, f"{name}_x"), getattr(self, f"{name}_y")

    def to(self, device: torch.device | str) -> ImageData:
        """All tensors on `device`, once and for all, so that no batch waits for a transfer; the digest stays.

        Cost: the bytes of all images there, 184 MB for CIFAR. What lies on the device already is not copied.

        >>> data = ImageData.build("one", *[(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.arange(2))] * 3, "ab")
        >>> data.to("meta").train_x.device, data.to("cpu").train_x is data.train_x
        (device(type='meta'), True)
        """
        out = copy.copy(self)  # checked when it was made
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), Tensor):
                object.__setattr__(out, field.name, value.to(device))
        return out

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    @classmethod
    def build(cls, name: str, train: Pair, val: Pair, test: Pair, classes: Sequence[str], notes: str = "") -> ImageData:
        """An :class:`ImageData` whose mean and std come from the training images and whose digest from all of it."""
        check_images(train[0], f"{name}: train_x")
        mean, std = channel_moments(train[0]) if len(train[0]) else (torch.zeros(1), torch.ones(1))
        return cls(name, *train, *val, *test, tuple(classes), mean, std, digest_of(*train, *val, *test), notes)


def check_images(images: Tensor, what: str) -> None:
    """Raise ValueError unless `images` is uint8 (N, C, H, W); NaN and infinity are named with their row first."""
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(f"{what} must have the shape (images, channels, height, width), got {tuple(images.shape)}")
    if images.is_floating_point():
        refuse_rows(~torch.isfinite(images), what, "holds NaN or infinite pixels; remove or repair it")
    if images.dtype != torch.uint8:
        raise ValueError(f"{what} must be uint8 in 0..255, got {str(images.dtype).removeprefix('torch.')}")


def refuse_rows(bad: Tensor, what: str, why: str) -> None:
    """Raise ValueError naming the first row of `bad`, bool (N, ...), that is True anywhere."""
    rows = bad.flatten(1).any(dim=1) if bad.ndim > 1 else bad
    if bool(rows.any()):
        raise ValueError(f"{what} row {int(rows.nonzero()[0])} {why}")


def check_labels(labels: Tensor, count: int, classes: int, what: str) -> None:
    """Raise ValueError unless `labels` is int64 (count,) in [0, classes); the first bad row is named."""
    if labels.dtype != torch.int64 or labels.ndim != 1:
        kind = str(labels.dtype).removeprefix("torch.")
        raise ValueError(f"{what} must be int64 of shape ({count},), got {kind} of shape {tuple(labels.shape)}")
    if len(labels) != count:
        raise ValueError(f"{what} must hold one label an image, but there are {count} images and {len(labels)} labels")
    bad = (labels < 0) | (labels >= classes)
    if bool(bad.any()):
        first = int(labels[bad][0])
        refuse_rows(bad, what, f"has the label {first}, but with {classes} classes labels are 0 to {classes - 1}")


def numbered_classes(*labels: Tensor, what: str) -> tuple[str, ...]:
    """Names "0", "1", ... up to the largest label; `what` holds them, for the message.

    Raises:
        ValueError: the largest label is no class number, as there are fewer images than that.
    """
    largest = max((int(y.max()) for y in labels if len(y)), default=0)
    count = sum(len(y) for y in labels)
    if largest >= max(count, 1):
        raise ValueError(
            f"{what}: the label {largest} cannot be a class number among {count} images; number classes from 0"
        )
    return tuple(str(c) for c in range(max(largest, 0) + 1))


def channel_moments(images: Tensor) -> Pair:
    """Mean and standard deviation of each channel on the [0, 1] scale, exact up to the last rounding.

    From integer histograms, so that no order of summation matters. Shapes: uint8 (N, C, H, W) -> 2 x float32 (C,).

    >>> channel_moments(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    (tensor([0.5000]), tensor([0.5000]))
    """
    level = torch.arange(256, dtype=torch.float64) / 255
    histograms = [channel.flatten().bincount(minlength=256) for channel in images.unbind(dim=1)]
    counts = torch.stack(histograms).cpu().double()
    share = counts / counts.sum(dim=1, keepdim=True)
    mean = share @ level
    std = (share * (level - mean[:, None]).square()).sum(dim=1).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def digest_of(*tensors: Tensor) -> str:
    """sha256 over type, shape and bytes of all tensors, in order, as 64 hex digits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        array = tensor.detach().cpu().contiguous().numpy()
        sha.update(f"{array.dtype}{array.shape}".encode())
        sha.update(array.data if array.size else b"")
    return sha.hexdigest()
