"""Index arithmetic of the splits: exact counts, disjointness, independence of what should not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from s2sam.data import load_data
from s2sam.data.splits import draw, equal_counts, noisy_labels, proportional_counts, train_val_split, without

CLASS_SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) >= 2)


def labels_of(sizes: list[int], seed: int = 0) -> Tensor:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]


@given(sizes=CLASS_SIZES, share=st.floats(0, 1))
def test_proportional_counts_are_within_one_of_the_quota(sizes: list[int], share: float) -> None:
    available = torch.tensor(sizes)
    total = round(share * sum(sizes))
    counts = proportional_counts(available, total)
    assert counts.sum() == total
    assert (counts <= available).all()
    assert ((counts - available * total / sum(sizes)).abs() < 1 + 1e-9).all()


@given(sizes=CLASS_SIZES, share=st.floats(0, 1))
def test_equal_counts_fill_like_water(sizes: list[int], share: float) -> None:
    available = torch.tensor(sizes)
    total = round(share * sum(sizes))
    counts = equal_counts(available, total)
    assert counts.sum() == total
    assert (counts <= available).all()
    not_full = counts[counts < available]
    if len(not_full):  # classes with images to spare differ by at most one, and nobody has more than they
        assert not_full.max() - not_full.min() <= 1
        assert counts.max() <= not_full.min() + 1


@settings(deadline=None, max_examples=50)
@given(sizes=CLASS_SIZES, fraction=st.floats(0, 0.6), seed=st.integers(-(2**40), 2**63 - 1))
def test_split_is_a_partition(sizes: list[int], fraction: float, seed: int) -> None:
    labels = labels_of(sizes)
    if round(fraction * len(labels)) == len(labels):
        return
    train, val = train_val_split(labels, len(sizes), train_size=None, val_fraction=fraction, seed=seed)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(len(labels)))
    assert len(val) == round(fraction * len(labels))
    assert torch.equal(train, train.sort().values)


def test_validation_does_not_depend_on_the_training_size() -> None:
    labels = labels_of([60, 50, 40])
    full = train_val_split(labels, 3, train_size=None, val_fraction=0.2, seed=5)
    small = train_val_split(labels, 3, train_size=31, val_fraction=0.2, seed=5)
    assert torch.equal(full[1], small[1])
    assert labels[full[1]].bincount().tolist() == [12, 10, 8]
    assert labels[small[0]].bincount().tolist() == [11, 10, 10]
    assert set(small[0].tolist()) <= set(full[0].tolist())


def test_seeds_decide_and_repeat() -> None:
    labels = labels_of([100, 100])

    def split(seed: int) -> tuple[Tensor, Tensor]:
        return train_val_split(labels, 2, train_size=40, val_fraction=0.3, seed=seed)

    for part in (0, 1):
        assert torch.equal(split(1)[part], split(1)[part])
        assert not torch.equal(split(1)[part], split(2)[part])


def test_draw_is_uniform_within_a_class() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3)
    generator = torch.Generator().manual_seed(0)
    hits = torch.zeros(9)
    for _ in range(2000):
        hits[draw(labels, torch.tensor([3, 1]), generator)] += 1
    expected = torch.tensor([1000.0] * 6 + [2000 / 3] * 3)
    assert ((hits - expected).abs() < 5 * 23).all()  # five standard deviations of a binomial count


def test_without() -> None:
    assert without(4, torch.tensor([], dtype=torch.int64)).tolist() == [0, 1, 2, 3]
    assert without(4, torch.tensor([3, 0])).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("train_size", "fraction", "message"),
    [
        (None, 1.0, "val_fraction must be at least 0 and below 1, got 1.0"),
        (None, -0.1, "val_fraction"),
        (None, float("nan"), "val_fraction"),
        (None, 0.99, "leaves none to train on"),
        (0, 0.1, "train_size must be a whole number from 1 to 18.*got 0"),
        (19, 0.1, "from 1 to 18, the training images left after 2 for validation, got 19"),
        (2.5, 0.1, "train_size"),
    ],
)
def test_bad_requests(train_size: int | None, fraction: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_val_split(labels_of([10, 10]), 2, train_size=train_size, val_fraction=fraction, seed=0)


@given(sizes=CLASS_SIZES.filter(lambda sizes: len(sizes) > 1), share=st.floats(0, 1, exclude_max=True))
def test_the_share_of_wrong_labels_is_exact(sizes: list[int], share: float) -> None:
    labels = labels_of(sizes)
    noisy = noisy_labels(labels, len(sizes), share=share, seed=3)
    assert int((noisy != labels).sum()) == round(share * len(labels))
    assert noisy.min() >= 0
    assert noisy.max() < len(sizes)
    assert torch.equal(noisy, noisy_labels(labels, len(sizes), share=share, seed=3))


def test_a_wrong_label_is_each_other_class_equally_often() -> None:
    labels = torch.zeros(30_000, dtype=torch.int64)
    counts = noisy_labels(labels, 4, share=0.9, seed=0).bincount(minlength=4)
    assert counts[0] == 3_000
    assert ((counts[1:] - 9_000).abs() < 400).all()  # five standard deviations


def test_wrong_labels_are_in_the_training_images_alone() -> None:
    right, wrong = (load_data("digits", val_fraction=0.2, label_noise=noise) for noise in (0.0, 0.25))
    assert torch.equal(right.train_x, wrong.train_x)
    assert int((right.train_y != wrong.train_y).sum()) == round(0.25 * len(right.train_y))
    assert torch.equal(right.val_y, wrong.val_y)
    assert torch.equal(right.test_y, wrong.test_y)
    assert right.digest != wrong.digest
    assert "training labels are made wrong" in wrong.notes


@pytest.mark.parametrize(("share", "classes", "match"), [(1.0, 4, "below 1"), (-0.1, 4, "at least 0"), (0.5, 1, "two")])
def test_impossible_label_noise_is_refused(share: float, classes: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        noisy_labels(torch.zeros(4, dtype=torch.int64), classes, share=share, seed=0)
