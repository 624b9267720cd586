"""Block RigL by hand: whole blocks go and come; which layers take part, how the budget is met, what is refused."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam import S2SAM, sparsify
from s2sam.sparse.geometry import is_blocks

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import generator, loss_fn, make_batches, make_net, one_step, set_masks, step_by

# blocks of two in a row; sums of |w| of the active: 1.0, .3, .9, .4
MASK = [1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]
WEIGHTS = [0.9, 0.1, 0.2, -0.1, 0, 0, -0.5, 0.4, 0, 0, 0.2, 0.2, 0, 0, 0, 0]


def layer_of(**options):
    layer = nn.Linear(8, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    # f_1 is .49 of 8 weights: 3, so one block of two
    options = {"total_steps": 1000, "delta_t": 1, "drop_fraction": 0.49, "block": (1, 2)} | options
    rigl = sparsify(layer, optimizer, method="block-rigl", sparsity=0.5, generator=generator(), **options)
    if len(rigl.options.block) == 2 and rigl.size == 2:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(WEIGHTS).view(2, 8))
        set_masks(rigl, {"weight": torch.tensor(MASK).bool().view(2, 8)})
    return layer, optimizer, rigl


def test_golden_exchange():
    layer, optimizer, rigl = layer_of()
    # the block 2, 3 (.3) goes; 4, 5 comes: 1 + 1 is more than 1.5 + 0, and the kept ones do not count
    step_by(layer, optimizer, [9, 9, 0, 0, 1, -1, 9, 9, 1.5, 0, 9, 9, 0.1, 0.1, 0, 1])
    assert rigl.masks["weight"].flatten().nonzero().flatten().tolist() == [0, 1, 4, 5, 6, 7, 10, 11]
    expected = [0.9, 0.1, 0, 0, 0, 0, -0.5, 0.4, 0, 0, 0.2, 0.2, 0, 0, 0, 0]
    assert layer.weight.detach().flatten().tolist() == pytest.approx(expected)
    assert rigl.last_update.dropped == rigl.last_update.grown == {"weight": 2}


@pytest.mark.parametrize("distribution", ["erk", "uniform", "global"])
@pytest.mark.parametrize("block", [(1, 2), (2,), (2, 2), (1, 1, 3, 3)])
def test_blocks_stay_whole_and_their_number_stays(block, distribution):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    rigl = sparsify(
        net, optimizer, method="block-rigl", sparsity=0.7, distribution=distribution, block=block, total_steps=100,
        delta_t=2, generator=generator(),
    )  # fmt: skip
    sam = S2SAM(optimizer, model=net, rho=0.1)
    tiled = {(1, 2): ["2", "4"], (2,): ["0", "2", "4"], (2, 2): ["2", "4"], (1, 1, 3, 3): ["0", "2"]}[block]
    assert list(rigl.masks) == [f"{i}.weight" for i in tiled]
    total, g = sum(m.numel() for m in rigl.masks.values()), generator(1)
    kept = {name: int(m.sum()) for name, m in rigl.masks.items()}
    assert abs(sum(kept.values()) - 0.3 * total) <= rigl.size / 2
    assert rigl.sparsity() == rigl.target_sparsity(1) == 1 - sum(kept.values()) / total
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_fn(net(torch.randn(4, 3, 6, 6, generator=g)), torch.randint(0, 4, (4,), generator=g))
        assert all(net.get_parameter(name)[~mask].abs().sum() == 0 for name, mask in rigl.masks.items())
        loss.backward()
        optimizer.step()
        assert {name: int(m.sum()) for name, m in rigl.masks.items()} == kept
        assert all(is_blocks(mask, block) for mask in rigl.masks.values())
    assert rigl.updates == 2 and sum(rigl.last_update.grown.values()) >= rigl.size
    sam.restore()


def test_layers_that_the_blocks_do_not_tile_stay_dense_with_a_reason():
    net = make_net()
    rigl = sparsify(
        net, torch.optim.SGD(net.parameters(), lr=0.1), method="block-rigl", sparsity=0.5, block=(4, 2), total_steps=10
    )
    reasons = {row.name: row.reason for row in rigl.report()}
    assert reasons["2.weight"] == "blocks of (4, 2) do not tile a weight of shape (10, 12)"
    assert list(rigl.masks) == ["0.weight"]


def test_blocks_of_one_are_rigl():
    runs = []
    for method, options in (("rigl", {}), ("block-rigl", {"block": [1]})):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        made = sparsify(
            net, optimizer, method=method, sparsity=0.7, total_steps=60, delta_t=2, generator=generator(), **options
        )
        for batch in make_batches(7):
            one_step(net, optimizer, batch)
        runs.append([*made.masks.values(), *net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": (3, 5)}, r"blocks of \(3, 5\) tile no prunable layer"),
        ({"block": ()}, "block must be a list"),
        ({"block": (1, 0)}, "block must be a whole number of at least 1, got 0"),
        ({"sign_split": True}, "have no sign; leave sign_split out"),
        ({"total_steps": None}, "give total_steps"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**options)
