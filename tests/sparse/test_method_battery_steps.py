"""The battery goes on: single steps of every method; a layer without a gradient, the last one, a displaced one."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from s2sam import S2SAM
from s2sam.sparse.drop_grow import DropGrow

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import (
    MOVING,
    OPTIMIZERS,
    attach,
    copy_masks,
    equal_masks,
    loss_fn,
    make_batches,
    make_net,
    one_step,
    rows,
    sgd,
    shaped_states,
)  # fmt: skip

every_method, dynamic = rows(), rows(*MOVING)


@every_method
def test_a_layer_without_a_gradient_rests(info):
    """As in torch's optimizers: no decay, no momentum, no noise, be it in the network or in what the method keeps."""
    net = make_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    sparsifier = attach(info, net, optimizer)
    updates, (first, second) = sparsifier.updates, make_batches(2)
    one_step(net, optimizer, first)
    before = copy.deepcopy([net[0].weight, net[2].weight, of_layer(sparsifier, "2.weight")])
    optimizer.zero_grad()
    loss_fn(net(second[0]), second[1]).backward()
    net[2].weight.grad = None
    optimizer.step()
    assert sparsifier.updates == updates, "no change is due here"
    assert not torch.equal(net[0].weight, before[0])
    assert torch.equal(net[2].weight, before[1])
    kept = of_layer(sparsifier, "2.weight")
    assert all(torch.equal(a, b) for a, b in zip(kept, before[2], strict=True))


def of_layer(sparsifier, name):
    """What the method keeps of a layer."""
    return [value[name] for value in sparsifier.extra_state().values() if isinstance(value, dict) and name in value]


@dynamic
def test_the_last_step_changes_no_topology(info):
    """A network whose topology changes there is never trained with it. Pruning that ends earlier is not concerned."""
    net = make_net()
    optimizer = sgd(net)
    to_the_end = {"t_end": 1.0} if issubclass(info.load(), DropGrow) and "t_end" in info.defaults else {}
    to_the_end |= {"stretch": (0.0,)} if info.name == "dsr" else {}  # every 6 steps
    to_the_end |= {"drop_end": 0.3} if "drop_end" in info.defaults else {}
    sparsifier = attach(info, net, optimizer, total_steps=12, **to_the_end)
    changes = []
    for batch in make_batches(12):
        updates, masks, weights = sparsifier.updates, copy_masks(sparsifier), copy.deepcopy(net)
        one_step(net, optimizer, batch)
        changes.append(sparsifier.updates - updates)
    assert sum(changes) > 0
    assert changes[-1] == 0
    assert equal_masks(masks, sparsifier.masks)
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), weights.parameters(), strict=True))
    assert sum(int(m.sum()) for m in masks.values()) == round((1 - sparsifier.target_sparsity(12)) * 222)
    assert not sparsifier.catch_up()


@every_method
@pytest.mark.parametrize("direction", ["gradient", "momentum", "random"])
def test_s2sam_displaces_the_network_alone_and_restores_it_bit_by_bit(info, direction):
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(info, net, optimizer)
    sam = S2SAM(optimizer, model=net, rho=0.05, direction=direction, stats_every=1)
    displaced, updates = 0, sparsifier.updates
    for x, y in make_batches(8):
        clean = [p.detach().clone() for p in net.parameters()]
        optimizer.zero_grad()
        loss = loss_fn(net(x), y)
        for name, mask in sparsifier.masks.items():
            assert net.get_parameter(name)[~mask].abs().sum() == 0
        with sam.clean():
            assert all(torch.equal(p, q) for p, q in zip(net.parameters(), clean, strict=True))
        loss.backward()
        optimizer.step()
        displaced += sam.stats["displacement"] > 0.04
        for name, mask in sparsifier.masks.items():
            states = shaped_states(optimizer, net.get_parameter(name))
            assert info.dense_state or (states and all(s[~mask].abs().sum() == 0 for s in states))
    assert displaced >= 5
    assert (sparsifier.updates - updates == 2) == (info.kind in MOVING)
