"""The two methods with one mask: random, and by magnitude per layer or over all."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam import sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import copy_masks, equal_masks, generator, make_batches, make_net, one_step


def test_magnitude_keeps_the_largest_of_each_layer():
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -9, 2, 3], [-8, 4, 0, 7], [5, 5, -5, 6]]))
    sparsifier = sparsify(layer, torch.optim.SGD(layer.parameters(), lr=0.1), method="magnitude", sparsity=0.5)
    # 9 8 7 6, then two of three equal |5|: the first two
    assert sparsifier.masks["weight"].int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1]]
    assert layer.weight.tolist() == [[0, -9, 0, 0], [-8, 0, 0, 7], [5, 5, 0, 6]]


def test_magnitude_over_all_layers_keeps_one_in_each():
    net = make_net()
    with torch.no_grad():
        net[4].weight.mul_(1e-3)
    sparsifier = sparsify(
        net, torch.optim.SGD(net.parameters(), lr=0.1), method="magnitude", sparsity=0.9, distribution="global"
    )
    kept = {name: int(m.sum()) for name, m in sparsifier.masks.items()}
    assert sum(kept.values()) == round(0.1 * (72 + 120 + 30))
    assert kept["4.weight"] == 1


def test_static_is_random_and_does_not_look_at_the_weights():
    masks = []
    for seed, scale in ((1, 1.0), (1, -3.0), (2, 1.0)):
        net = make_net()
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(scale)
        sparsifier = sparsify(
            net, torch.optim.SGD(net.parameters(), lr=0.1), method="static", sparsity=0.5, generator=generator(seed)
        )
        masks.append(copy_masks(sparsifier))
    assert equal_masks(masks[0], masks[1])
    assert not equal_masks(masks[0], masks[2])


@pytest.mark.parametrize("method", ["static", "magnitude"])
def test_the_mask_stays_for_good(method):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    sparsifier = sparsify(net, optimizer, method=method, sparsity=0.5)
    before = copy_masks(sparsifier)
    for batch in make_batches(120):
        one_step(net, optimizer, batch)
    assert equal_masks(before, sparsifier.masks)
    assert sparsifier.updates == 0
    assert (sparsifier.survival(), sparsifier.explored()) == (1.0, 0.5)
