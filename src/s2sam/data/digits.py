"""scikit-learn's digits: 1,797 images, 8x8 grey, inside the library itself, so that a first run needs no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from s2sam.data.images import ImageData
from s2sam.data.splits import draw, proportional_counts, train_val_split, without

TEST_SEED = 1797  #: of the data set, not of a run: every run has the same test images
TEST_FRACTION = 0.2


def load(
    spec: str | Path = "digits", *, train_size: int | None = None, val_fraction: float = 0.1, seed: int = 0
) -> ImageData:
    """The digits as uint8 (N, 1, 8, 8): 0..16 of the source becomes 0..255, v -> round(v * 255 / 16).

    359 images test, stratified and the same for every seed; see :func:`s2sam.data.splits.train_val_split` for the rest.
    Source: scikit-learn, `sklearn.datasets.load_digits` (UCI Optical Recognition of Handwritten Digits, test part).
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    x = torch.from_numpy(np.rint(source.images * (255 / 16)).astype(np.uint8))[:, None]
    y = torch.from_numpy(source.target.astype(np.int64))
    counts = proportional_counts(y.bincount(), round(TEST_FRACTION * len(y)))
    test = draw(y, counts, torch.Generator().manual_seed(TEST_SEED))
    pool = without(len(y), test)
    train, val = train_val_split(y[pool], 10, train_size=train_size, val_fraction=val_fraction, seed=seed)
    train, val = pool[train], pool[val]
    return ImageData.build(
        "digits",
        (x[train], y[train]),
        (x[val], y[val]),
        (x[test], y[test]),
        [str(digit) for digit in source.target_names],
        "8x8 grey digits of scikit-learn; the split mixes writers, so accuracies are higher than on unseen writers",
    )
