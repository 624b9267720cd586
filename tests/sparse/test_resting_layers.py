"""A layer without a gradient stays as it is, and a network without a free place is trained as a dense one."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam import sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import attach, copy_masks, generator, loss_fn, make_batches, make_net, one_step, rows, sgd


@rows("dynamic")
def test_a_frozen_layer_is_not_exchanged(info):
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(info, net, optimizer)
    batches = make_batches(30)
    for batch in batches[:16]:
        one_step(net, optimizer, batch)
    net[0].weight.requires_grad_(False)
    weight, before = net[0].weight.detach().clone(), copy_masks(sparsifier)
    for batch in batches[16:]:
        one_step(net, optimizer, batch)
    assert torch.equal(net[0].weight, weight) and torch.equal(sparsifier.masks["0.weight"], before["0.weight"])
    others = any(not torch.equal(sparsifier.masks[name], mask) for name, mask in before.items())
    assert others == (info.name not in ("gmp", "ac-dc", "str"))  # whose last change is over
    sparsifier.verify()


def test_what_deepr_has_at_zero_stays_where_a_layer_rests():
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = sparsify(net, optimizer, method="deepr", sparsity=0.5, total_steps=9, generator=generator())
    one_step(nn.Sequential(nn.Linear(6, 4), net, nn.Linear(2, 3)), optimizer, make_batches(1)[0])
    with torch.no_grad():
        net[0].weight.zero_()
    before = copy_masks(sparsifier)
    net[0].weight.grad = None
    net[1].weight.grad = torch.ones(2, 3)
    optimizer.step()
    assert torch.equal(sparsifier.masks["0.weight"], before["0.weight"])


@pytest.mark.parametrize("method", ["rigl", "set", "snfs"])
def test_without_a_pruned_weight_nothing_is_exchanged(method):
    found = []
    for sparse in (False, True):
        net = make_net()
        optimizer = sgd(net)
        if sparse:
            sparsifier = sparsify(net, optimizer, method=method, sparsity=0.0, total_steps=40, delta_t=2)
        for batch in make_batches(6):
            one_step(net, optimizer, batch)
        found.append([p.detach().clone() for p in net.parameters()])
    assert sparsifier.updates == 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_adam_that_divides_zero_by_zero_is_refused():
    net = make_net()
    with pytest.raises(ValueError, match="eps above 0"):
        sparsify(net, torch.optim.Adam(net.parameters(), eps=0.0), method="static", sparsity=0.5)


def test_the_momentum_of_snfs_does_not_see_a_step_that_a_scaler_skips():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
    sparsifier = attach_snfs(net, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for x, y in make_batches(3):
        optimizer.zero_grad()
        scaler.scale(loss_fn(net(x), y)).backward()
        before = {name: m.clone() for name, m in sparsifier.momentum.items()}
        weights = [p.detach().clone() for p in net.parameters()]
        if before:
            net[2].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if before:
            assert all(torch.equal(m, before[name]) for name, m in sparsifier.momentum.items())
            assert all(torch.equal(p, w) for p, w in zip(net.parameters(), weights, strict=True))
    assert before and all(m.any() for m in before.values())


def attach_snfs(net, optimizer):
    return sparsify(net, optimizer, method="snfs", sparsity=0.5, total_steps=40, delta_t=20)
