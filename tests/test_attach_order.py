"""Sharpness and sparsity on one optimizer: the order of attaching is without effect, and e lives on the mask."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2sam import S2SAM, SAM
from s2sam.registry import find, list_methods

sys.path.insert(0, str(Path(__file__).parent / "sparse"))
from sparse_support import MOVING, attach, rows

RHO = 0.1
ORDERS = (("sparse", "sharp"), ("sharp", "sparse"))
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}
every_method = rows()


def build(order, info, optimizer="sgd", sharpness=S2SAM, **kw):
    """Changes of the topology are due in the steps 3, 6, 9, ..."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * 0.4)
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    made = {}
    for what in order:
        if what == "sparse":
            made[what] = attach(info, net, optimizer)
        else:
            made[what] = sharpness(optimizer, model=net, rho=RHO, **kw)
    return net, optimizer, made["sparse"], made["sharp"]


def batches(n):
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 6, generator=g).double(), torch.randint(0, 3, (16,), generator=g)) for _ in range(n)]


def step(net, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()


@every_method
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_either_order_gives_the_same_run_bit_for_bit(info, optimizer, direction):
    ends = []
    for order in ORDERS:
        net, base, sparsifier, _ = build(order, info, optimizer, direction=direction)
        updates = sparsifier.updates
        for x, y in batches(10):
            step(net, base, x, y)
        assert sparsifier.updates - updates == (3 if info.kind in MOVING else 0)
        sparsifier.verify()
        ends.append([*(p.detach() for p in net.parameters()), *sparsifier.masks.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@every_method
@pytest.mark.parametrize("order", ORDERS)
def test_the_displacement_lives_on_the_current_mask_and_is_as_long_as_promised(info, order):
    net, optimizer, sparsifier, sam = build(order, info, stats_every=1)
    for t, (x, y) in enumerate(batches(14)):
        clean = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        moved = {name: p.detach() - clean[name] for name, p in net.named_parameters()}
        length = sum(float(e.square().sum()) for e in moved.values()) ** 0.5
        assert length == pytest.approx(RHO if t else 0.0, rel=1e-9)
        for name, mask in sparsifier.masks.items():
            assert net.get_parameter(name)[~mask].abs().sum() == 0, "a pruned weight is 0 in x = w + e as well"
            assert t == 0 or moved[name][mask].abs().sum() > 0
        loss.backward()
        optimizer.step()
    assert sparsifier.sparsity() == pytest.approx(sparsifier.target_sparsity(14), abs=0.005)


@pytest.mark.parametrize("order", ORDERS)
def test_a_topology_change_happens_at_w_not_at_x(order):
    net, optimizer, sparsifier, _ = build(order, find(list_methods(), "rigl", "method"))
    for x, y in batches(2):
        step(net, optimizer, x, y)
    clean = {name: p.detach().clone() for name, p in net.named_parameters()}
    old = {name: mask.clone() for name, mask in sparsifier.masks.items()}
    step(net, optimizer, *batches(3)[2])
    assert sparsifier.updates == 1
    for name, p in net.named_parameters():
        both = old[name] & sparsifier.masks[name] if name in old else torch.ones_like(p, dtype=torch.bool)
        assert torch.equal(p.detach(), clean[name] * both)
    for name, mask in sparsifier.masks.items():
        kept = clean[name].abs()[old[name] & mask]
        dropped = clean[name].abs()[old[name] & ~mask]
        regrown_aside = int((mask & ~old[name]).sum())
        assert len(dropped) == regrown_aside > 0
        assert dropped.max() <= kept.sort(descending=True).values[len(kept) // 2]


@pytest.mark.parametrize("method", ["set", "rigl"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_skipped_step_keeps_masks_weights_and_direction(method, order):
    net, optimizer, sparsifier, _ = build(order, find(list_methods(), method, "method"))
    for x, y in batches(2):
        step(net, optimizer, x, y)
    weights = [p.detach().clone() for p in net.parameters()]
    masks = [m.clone() for m in sparsifier.masks.values()]
    x, y = batches(3)[2]
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    mask = sparsifier.masks["0.weight"]
    net[0].weight.grad.view(-1)[(~mask).flatten().nonzero()[0]] = float("inf")
    optimizer.step()
    assert sparsifier.updates == 0
    assert all(torch.equal(a, b) for a, b in zip(masks, sparsifier.masks.values(), strict=True))
    assert all(torch.equal(a, p) for a, p in zip(weights, net.parameters(), strict=True))
    for x, y in batches(6)[3:]:
        step(net, optimizer, x, y)
    assert sparsifier.updates == 1


@every_method
def test_two_step_sam_in_either_order(info):
    ends = []
    for order in ORDERS:
        net, optimizer, sparsifier, _ = build(order, info, sharpness=SAM)
        updates = sparsifier.updates
        for x, y in batches(10):

            def evaluate(x=x, y=y, net=net, sparsifier=sparsifier):
                for name, mask in sparsifier.masks.items():
                    assert net.get_parameter(name)[~mask].abs().sum() == 0
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                return loss

            optimizer.step(evaluate)
        sparsifier.verify()
        assert sparsifier.updates - updates == (3 if info.kind in MOVING else 0)
        ends.append([*(p.detach() for p in net.parameters()), *sparsifier.masks.values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
