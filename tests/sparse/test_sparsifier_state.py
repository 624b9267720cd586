"""Sparsifier: state saved and loaded, masks that fit the weights or do not, gradients before the step."""

import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam.registry import find, list_methods

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import attach, copy_masks, equal_masks, loss_fn, make_batches, make_net, one_step, shaped_states

RIGL = find(list_methods(), "rigl", "method")
SET = find(list_methods(), "set", "method")
STATIC = find(list_methods(), "static", "method")


def sgd(net, **kw):
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1, "momentum": 0.9} | kw)


# -- saving and loading ----------------------------------------------------------------------------------------------


def round_trip(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_state_is_plain_small_and_detached_from_the_live_masks():
    net = nn.Linear(256, 256, bias=False)
    optimizer = sgd(net)
    sparsifier = attach(RIGL, net, optimizer)
    state = round_trip(sparsifier.state_dict())
    assert state["masks"]["weight"].numel() == 256 * 256 // 8
    assert state["method"] == "rigl"
    saved = copy_masks(sparsifier)
    for _ in range(6):
        net(torch.randn(4, 256)).square().sum().backward()
        optimizer.step()
    assert not equal_masks(saved, sparsifier.masks)
    sparsifier.load_state_dict(state)
    assert equal_masks(saved, sparsifier.masks)
    assert sparsifier.step == 0


def test_init_false_touches_nothing_and_wants_masks_before_the_first_step():
    net = make_net()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = sgd(net)
    sparsifier = attach(RIGL, net, optimizer, init=False)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="load the masks with sparsifier.load_state_dict"):
        one_step(net, optimizer, make_batches(1)[0])
    with pytest.raises(RuntimeError, match="init=False"):
        sparsifier.state_dict()


def test_weights_that_do_not_fit_the_masks_are_refused_and_apply_is_the_way_out():
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(STATIC, net, optimizer)
    net.load_state_dict(make_net(5).state_dict())
    with pytest.raises(
        RuntimeError, match=r"masks do not fit the weights: 3 layers .*0\.weight.*sparsifier\.apply\(\)"
    ):
        one_step(net, optimizer, make_batches(1)[0])
    sparsifier.apply()
    one_step(net, optimizer, make_batches(1)[0])
    one_step(net, optimizer, make_batches(1)[0])
    sparsifier.load_state_dict(attach(STATIC, twin := make_net(), sgd(twin), seed=9).state_dict())
    with pytest.raises(RuntimeError, match="masks do not fit"):
        one_step(net, optimizer, make_batches(1)[0])


def test_foreign_and_damaged_states_get_one_sentence():
    net = make_net()
    sparsifier = attach(RIGL, net, sgd(net))
    state = sparsifier.state_dict()
    before = copy_masks(sparsifier)
    other = nn.Linear(6, 12, bias=False)
    elsewhere = attach(RIGL, other, sgd(other)).state_dict()
    for bad, message in (
        ({}, "no sparsifier state"),
        ({"masks": 1}, "no sparsifier state"),
        (net.state_dict(), "no sparsifier state"),
        ({**state, "version": 99}, "has version 99; this s2sam reads version 1"),
        ({**state, "method": "set"}, "saved by method 'set', the sparsifier's is 'rigl'; resume with method='set'"),
        (elsewhere, "another set of weights"),
        ({**state, "shapes": {**state["shapes"], "0.weight": [1, 2]}}, "'0.weight' has shape [1, 2] in the state"),
        ({**state, "steps": [1, 2]}, "saved with 2 optimizers, there are 1"),
        ({**state, "masks": {}}, "damaged"),
        ({**state, "masks": {**state["masks"], "0.weight": torch.zeros(1, dtype=torch.uint8)}}, "no packed mask"),
        ({k: v for k, v in state.items() if k != "generator"}, "damaged: it has no 'generator'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            sparsifier.load_state_dict(bad)
        assert equal_masks(before, sparsifier.masks)


# -- gradients -------------------------------------------------------------------------------------------------------


def test_mask_gradients_before_clipping():
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(STATIC, net, optimizer)
    loss_fn(net(make_batches(1)[0][0]), make_batches(1)[0][1]).backward()
    active = math.sqrt(
        sum(
            float((p.grad * m).square().sum()) for p, m in zip(net.parameters(), sparsifier.masks.values(), strict=True)
        )
    )
    dense = math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters()))
    sparsifier.mask_gradients()
    norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), 1e9))
    assert norm == pytest.approx(active)
    assert norm < 0.9 * dense


def test_a_bad_gradient_at_a_pruned_weight_harms_nothing_between_changes():
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(STATIC, net, optimizer)
    x, y = make_batches(1)[0]
    loss_fn(net(x), y).backward()
    net[0].weight.grad[~sparsifier.masks["0.weight"]] = float("nan")
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())
    assert all(s.isfinite().all() for p in net.parameters() for s in shaped_states(optimizer, p))


def test_sparse_gradients_are_refused():
    net = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach(STATIC, net, optimizer, include="Embedding")
    net(torch.randint(0, 10, (3, 2))).sum().backward()
    with pytest.raises(RuntimeError, match="gradient of '0.weight' is sparse"):
        optimizer.step()


def test_unpruned_sparse_embedding_gradients_pass():
    net = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = attach(SET, net, optimizer, delta_t=1)
    net(torch.randint(0, 10, (3, 2))).sum().backward()
    optimizer.step()
    assert sparsifier.updates == 1
