"""Graphs that are kept change no bit of a product, save its forward passes, and are let go when the weights move."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from s2sam.analysis.hessian import ActiveLoss
from s2sam.analysis.hessian_graphs import saved_bytes

BATCHES = 3


@pytest.fixture
def build(make_generator):
    """`build(keep=...)` -> a loss in three batches, and the list of its forward passes so far."""

    def build(**options):
        torch.random.default_generator.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))
        x = torch.randn(11, 1, 5, 5, generator=make_generator(2))
        y = torch.randint(0, 3, (11,), generator=make_generator(3))
        passes = []
        loss = ActiveLoss(model, x, y, lambda part: (passes.append(len(part)), part)[1], batch_size=4, **options)
        return loss, passes

    return build


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_later_products_pass_no_images_and_are_the_same_bits(build, make_generator, bn):
    kept, passes = build(bn=bn)
    fresh, all_passes = build(bn=bn, keep=0)
    v = torch.randn(4, 2, kept.size, generator=make_generator())
    found = [(kept.product(rows), fresh.product(rows)) for rows in v]
    assert all(torch.equal(a, b) and a.any() for a, b in found)
    assert len(passes) == BATCHES + 1 + BATCHES  # the first keeps nothing, the second sees how large a graph is
    assert len(all_passes) == 4 * BATCHES


def test_what_was_kept_is_let_go_when_the_weights_move(build, make_generator):
    loss, passes = build()
    v = torch.randn(1, loss.size, generator=make_generator())
    first = [loss.product(v) for _ in range(3)][-1]
    for move in (
        lambda: loss.loss(v[0]),
        lambda: loss.gradient(v[0]),
        lambda: loss.split(4)[0].loss(v[0]),  # a part moves the weights of the whole
    ):
        move()
        del passes[:]
        assert torch.equal(loss.product(v), first)
        assert len(passes) == BATCHES
    loss.gradient()
    loss.product(v)
    del passes[:]
    assert torch.equal(loss.product(v), first) and passes == []  # at the weights nothing moves


def test_parts_have_graphs_of_their_own(build, make_generator):
    loss, _ = build()
    v = torch.randn(1, loss.size, generator=make_generator())
    for _ in range(3):
        loss.product(v)
    one, two, *_ = loss.split(4)
    alone = [[part.product(v) for _ in range(3)] for part in (one, two)]
    assert all(torch.equal(a, b) for products in alone for a, b in itertools.pairwise(products))
    assert not torch.allclose(alone[0][0], alone[1][0], rtol=1e-3)


def test_as_many_are_kept_as_fit(build, make_generator):
    loss, passes = build()
    v = torch.randn(1, loss.size, generator=make_generator())
    each = saved_bytes(lambda: loss._slope(loss.x[:4], loss.y[:4]), loss._weights)
    assert each > 4 * 4 * 2 * 9  # at least the activations of the convolution
    loss, passes = build(keep=2 * each + 1)
    found = []
    for _ in range(4):
        del passes[:]
        found.append(loss.product(v))
    assert len(passes) == 1 and all(torch.equal(one, found[0]) for one in found)
