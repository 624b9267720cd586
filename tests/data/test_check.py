"""Findings about readable data: each defect, planted once, is found and counted."""

from __future__ import annotations

import torch
from torch import Tensor

from s2sam.data.check import class_counts, examine
from s2sam.data.images import ImageData


def images(n: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def make(train: Tensor, y: list[int], test: Tensor, test_y: list[int], classes: str = "abc", val: int = 0) -> ImageData:
    labels, test_labels = torch.tensor(y), torch.tensor(test_y)
    n = len(y) - val
    return ImageData.build("toy", (train[:n], labels[:n]), (train[n:], labels[n:]), (test, test_labels), tuple(classes))


def test_sound_data_has_no_findings() -> None:
    data = make(images(6, 0), [0, 1, 2] * 2, images(3, 1), [0, 1, 2], val=2)
    found = examine(data)
    assert (found.problems, found.remarks) == ((), ())
    assert class_counts(data).tolist() == [[2, 0, 1], [1, 1, 1], [1, 1, 1]]


def test_planted_defects_are_counted() -> None:
    train, test = images(8, 0), images(4, 1)
    train[3] = train[0]  # repeated with the same label
    train[4] = train[1]  # repeated with another label
    train[2] = 9
    test[2] = train[5]
    test[3] = train[5]
    data = make(train, [0, 1, 0, 0, 0, 1, 0, 1], test, [0, 0, 0, 2], val=3)
    found = examine(data)
    assert found.problems == ("no training image in 1 of 3 classes: c",)
    assert set(found.remarks) == {
        "no test image in 1 of 3 classes: b",
        "2 test images are also among the training images",
        "2 training images repeat another one",
        "1 training images occur with different labels",
        "1 train images are of one colour",
    }


def test_images_of_one_colour_and_one_class() -> None:
    grey = torch.full((4, 3, 4, 4), 5, dtype=torch.uint8)
    found = examine(make(grey, [0] * 4, images(2, 0), [0, 0], classes="a"))
    assert found.problems == ("there is one class only, so nothing can be learnt", "all training images are alike")
    assert "4 train images are of one colour" in found.remarks
    assert "3 training images repeat another one" in found.remarks


def test_many_classes_are_not_all_named() -> None:
    found = examine(make(images(2, 0), [0, 1], images(2, 1), [0, 1], classes="abcdefghij"))
    assert found.problems == ("no training image in 8 of 10 classes: c, d, e, f, g, ...",)
