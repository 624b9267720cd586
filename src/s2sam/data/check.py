"""What is wrong, or worth knowing, about images and labels that could be read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from s2sam.data.images import ImageData

MOST_NAMED = 5


@dataclass(frozen=True)
class Findings:
    """Problems make training or its result meaningless; remarks are for the reader to judge."""

    problems: tuple[str, ...]
    remarks: tuple[str, ...]


def class_counts(data: ImageData) -> Tensor:
    """Images of each class in train, val and test: int64 (classes, 3)."""
    labels = [data.split(name)[1] for name in ("train", "val", "test")]
    return torch.stack([y.bincount(minlength=data.num_classes) for y in labels], dim=1)


def examine(data: ImageData) -> Findings:
    """Look at classes and at single images.

    Problems: a class without training images; one class only; all images alike. Remarks: a class without test images;
    images that are in training and test; equal images with different labels; images of one colour.
    Cost: a hash of each image, about a second for CIFAR.

    >>> x, y = torch.arange(8, dtype=torch.uint8).reshape(4, 1, 1, 2), torch.tensor([0, 0, 2, 2])
    >>> examine(ImageData.build("toy", (x, y), (x[:0], y[:0]), (x[:1], y[:1]), "abc")).problems
    ('no training image in 1 of 3 classes: b',)
    """
    problems, remarks = [], []
    counts = class_counts(data)
    trained, tested = counts[:, 0] + counts[:, 1], counts[:, 2]
    if bool((trained == 0).any()):
        problems.append(f"no training image in {_named(data, trained == 0)}")
    if bool((tested == 0).any()):
        remarks.append(f"no test image in {_named(data, tested == 0)}")
    if data.num_classes < 2:
        problems.append("there is one class only, so nothing can be learnt")
    train = _hashes(data.train_x) + _hashes(data.val_x)
    test, known = _hashes(data.test_x), set(train)
    if len(known) == 1 and len(train) > 1:
        problems.append("all training images are alike")
    if both := sum(image in known for image in test):
        remarks.append(f"{both} test images are also among the training images")
    labels = dict[bytes, set[int]]()
    for image, label in zip(train, torch.cat([data.train_y, data.val_y]).tolist(), strict=True):
        labels.setdefault(image, set()).add(label)
    if repeated := len(train) - len(labels):
        remarks.append(f"{repeated} training images repeat another one")
    if contradicted := sum(len(found) > 1 for found in labels.values()):
        remarks.append(f"{contradicted} training images occur with different labels")
    for name in ("train", "test"):
        x = data.split(name)[0].flatten(2)
        if blank := int((x.amax(dim=2) == x.amin(dim=2)).all(dim=1).sum()):
            remarks.append(f"{blank} {name} images are of one colour")
    return Findings(tuple(problems), tuple(remarks))


def _named(data: ImageData, chosen: Tensor) -> str:
    """How many classes are `chosen`, and the names of a few of them."""
    names = [name for name, hit in zip(data.classes, chosen.tolist(), strict=True) if hit]
    more = ", ..." if len(names) > MOST_NAMED else ""
    return f"{len(names)} of {data.num_classes} classes: {', '.join(names[:MOST_NAMED])}{more}"


def _hashes(images: Tensor) -> list[bytes]:
    """16 bytes that tell each image from the others."""
    rows = images.cpu().flatten(1).contiguous().numpy()
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]
