"""SNIP: by hand, against finite differences of the gates, and the sum before the absolute value."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2sam import sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import copy_masks, equal_masks, loss_fn, make_batches, make_net, one_step


def attach(net, batches, *, sparsity=0.0, **kw):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return sparsify(net, optimizer, method="snip", sparsity=sparsity, batches=batches, **kw)


def scores_of(net, batches, **kw):
    return attach(net, batches, **kw).initial_scores(net)


def weighted_output(output, target):
    """Mean over the batch of target . output: its gradient for a Linear layer is the mean of target x input'."""
    return (output * target).sum(1).mean()


def linear(weights):
    layer = nn.Linear(len(weights[0]), len(weights), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights))
    return layer


def test_by_hand():
    layer = linear([[1.0, -2.0], [3.0, 0.5]])
    batch = (torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 2.0]]))
    # summed over both samples dL/dw = [[1 - 3, 2 - 0], [0 + 6, 0 + 0]] = [[-2, 2], [6, 0]]
    assert scores_of(layer, [batch], loss_fn=weighted_output)["weight"].tolist() == [[2, 4], [18, 0]]
    masks = attach(linear([[1.0, -2.0], [3.0, 0.5]]), [batch], sparsity=0.5, loss_fn=weighted_output).masks
    assert masks["weight"].tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("cut", ["one batch", "two batches"])
def test_gradients_are_summed_before_the_absolute_value(cut):
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    t = torch.tensor([[5.0], [-5.0]])  # at the first input the samples cancel, in absolute values they would not
    batches = [(x, t)] if cut == "one batch" else [(x[:1], t[:1]), (x[1:], t[1:])]
    assert scores_of(linear([[9.0, 1.0]]), batches, loss_fn=weighted_output)["weight"].tolist() == [[0, 5]]


def test_finite_differences_of_the_gates():
    """s = |dL/dc| at c = 1, where every weight of the network is c w."""
    net = make_net().double()
    batches = [(x.double(), y) for x, y in make_batches(2)]
    found = scores_of(net, batches)
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])

    def loss(name, i, c):
        gated = {n: p.detach().clone() for n, p in net.named_parameters()}
        gated[name].view(-1)[i] *= c
        return F.cross_entropy(torch.func.functional_call(net, gated, (x,)), y, reduction="sum")

    for name, p in net.named_parameters():
        slope = [abs((loss(name, i, 1 + 1e-5) - loss(name, i, 1 - 1e-5)).item()) / 2e-5 for i in range(p.numel())]
        assert torch.allclose(found[name].flatten(), torch.tensor(slope).double(), rtol=1e-6, atol=1e-8)
        assert found[name].max() > 0.1


def test_the_count_over_all_layers_is_exact():
    for sparsity in (0.1, 0.5, 0.9, 0.98):
        masks = attach(make_net(), make_batches(1), sparsity=sparsity).masks
        assert sum(int(m.sum()) for m in masks.values()) == round((1 - sparsity) * 222)


def test_the_choice_is_by_score_over_all_layers():
    scores = scores_of(make_net(), make_batches(2))
    masks = attach(make_net(), make_batches(2), sparsity=0.7).masks
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    lost = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    assert kept.min() >= lost.max()
    assert len(kept) == 67


def test_weights_that_the_loss_does_not_feel_go_first():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.unused = make_net(), nn.Linear(5, 5, bias=False)

        def forward(self, x):
            return self.net(x)

    masks = attach(Branch(), make_batches(2), sparsity=0.3).masks
    assert int(masks["unused.weight"].sum()) == 1, "every layer keeps one"


def test_tied_weights_are_scored_once_by_both_uses():
    first, last = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    last.weight = first.weight
    net = nn.Sequential(first, nn.Tanh(), last)
    x, y = torch.randn(6, 4), torch.randint(0, 4, (6,))
    scores = scores_of(net, [(x, y)])
    assert list(scores) == ["0.weight"]
    loss_fn(net(x), y).backward()
    assert torch.allclose(scores["0.weight"], (first.weight * first.weight.grad * 6).abs(), rtol=1e-5)


def test_the_mask_stays_for_good():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    sparsifier = sparsify(net, optimizer, method="snip", sparsity=0.5, batches=make_batches(2))
    before = copy_masks(sparsifier)
    for batch in make_batches(60):
        one_step(net, optimizer, batch)
    assert equal_masks(before, sparsifier.masks)
    assert sparsifier.updates == 0
