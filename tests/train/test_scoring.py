"""The images that SNIP and GraSP see: balanced, drawn by the seed alone, and no other draw moves."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from s2sam.data import load_data
from s2sam.data.augment import Augment
from s2sam.train.config import SparseConfig, TrainConfig
from s2sam.train.scoring import LARGEST_BATCH, balanced, scoring_options
from s2sam.train.state import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    data = load_data("digits")
    return data, Augment(data.mean, data.std)


def config(method, seed=0, **kw):
    return TrainConfig(method=method, epochs=1, seed=seed, sparse=SparseConfig(), **kw)


def test_ten_of_each_class_normalised_and_from_the_training_split(digits):
    data, augment = digits
    options = scoring_options(config("snip"), data, augment, CPU)
    assert options["loss_fn"] is F.cross_entropy
    ((x, y),) = options["batches"]
    assert y.bincount().tolist() == [10] * 10
    pool = {row.numpy().tobytes() for row in augment(data.train_x)}
    assert all(row.numpy().tobytes() in pool for row in x)
    assert len({row.numpy().tobytes() for row in x}) > 90


def test_the_seed_decides_and_the_method_does_not(digits):
    first, other_method, other_seed = (
        scoring_options(c, *digits, CPU)["batches"][0][0] for c in (config("snip"), config("grasp"), config("snip", 1))
    )
    assert torch.equal(first, other_method)
    assert not torch.equal(first, other_seed)


@pytest.mark.parametrize("method", ["dense", "static", "rigl"])
def test_methods_without_data_get_none(digits, method):
    assert scoring_options(config(method), *digits, CPU) == {}


def test_many_classes_make_batches_of_equal_size():
    labels = torch.arange(100).repeat(12)
    rows = balanced(labels, 10, torch.Generator().manual_seed(0))
    assert labels[rows].bincount().tolist() == [10] * 100
    assert len(set(rows.tolist())) == 1000
    sizes = [len(part) for part in rows.tensor_split(-(-1000 // LARGEST_BATCH))]
    assert sizes == [125] * 8
    assert balanced(torch.tensor([3, 3, 5]), 2, torch.Generator().manual_seed(0)).sort().values.tolist() == [0, 1, 2]


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_a_run_is_built_sparse_and_otherwise_as_any_other(method):
    dense, state = build(config("dense")), build(config(method))
    assert state.sparsifier is not None
    assert state.sparsifier.sparsity() == pytest.approx(0.9, abs=1e-4)
    assert torch.equal(dense.batches.generator.get_state(), state.batches.generator.get_state())
    masks = state.sparsifier.masks
    for (name, p), (_, full) in zip(state.model.named_parameters(), dense.model.named_parameters(), strict=True):
        assert torch.equal(p, full * masks[name] if name in masks else full)
    for (name, b), (_, full) in zip(state.model.named_buffers(), dense.model.named_buffers(), strict=True):
        assert torch.equal(b, full), name
    again = build(config(method)).sparsifier.masks
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())
    lone = dataclasses.replace(config(method), sparse=SparseConfig(distribution="erk"))
    assert [int(m.sum()) for m in build(lone).sparsifier.masks.values()] == [
        int(m.sum()) for m in build(config("static")).sparsifier.masks.values()
    ]
