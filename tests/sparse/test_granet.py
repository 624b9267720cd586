"""GraNet by hand: prune over all layers, then exchange within each by the gradient; the density of every grid point."""

import sys
from pathlib import Path

import pytest
import torch

from s2sam import sparsify
from s2sam.sparse.schedules import Cubic

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import copy_masks, generator, golden, golden_pair, make_batches, make_net, one_step, step_by

# 12 weights, 8 active. |w| of the active: .1 .2 .3 .4 .5 .6 .7 .8
MASK = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
WEIGHTS = [0.5, -0.1, 0.3, -0.7, 0.2, -0.4, 0.8, -0.6, 0, 0, 0, 0]
# pruning ends at step 2 of 10; after step 1 round(12 * .5208) = 6 are left, and f_1 = .488: 2 of 6 are exchanged
OPTIONS = {"total_steps": 10, "delta_t": 1, "initial_sparsity": 1 / 3, "t_end": 0.2}


def active(granet, name="weight"):
    return granet.masks[name].flatten().nonzero().flatten().tolist()


def test_golden_prune_and_exchange():
    layer, optimizer, granet = golden(MASK, WEIGHTS, "granet", **OPTIONS)
    step_by(layer, optimizer, [0.0] * 8 + [0.1, 3.0, -2.0, 0.5])
    assert active(granet) == [0, 3, 6, 7, 9, 10]  # .1 and .2 pruned, .3 and .4 exchanged for 9 and 10
    assert layer.weight.flatten().tolist() == pytest.approx([0.5, 0, 0, -0.7, 0, 0, 0.8, -0.6, 0, 0, 0, 0])
    assert granet.last_update.dropped == {"weight": 4}
    assert granet.last_update.grown == {"weight": 2}
    assert layer.weight.grad.flatten().abs().sum() == 0


def test_what_was_dropped_may_come_back_and_keeps_its_value():
    layer, optimizer, granet = golden(MASK, WEIGHTS, "granet", **OPTIONS)
    step_by(layer, optimizer, [0, 0, 0.2, 0, 0, 0, 0, 0, 0.1, 0.3, 0, 0])
    assert active(granet) == [0, 2, 3, 6, 7, 9]
    assert float(layer.weight.detach()[0, 2]) == pytest.approx(0.2)


def test_pruning_is_over_all_layers_and_the_exchange_within_each():
    weights = {"a": [1.0 + i for i in range(12)], "b": [0.01 * (1 + i) for i in range(12)]}
    net, optimizer, granet = golden_pair(
        {"a": [1] * 12, "b": [1] * 12}, weights, "granet", **{**OPTIONS, "initial_sparsity": 0.0, "drop_fraction": 0.3}
    )
    step_by(net, optimizer)
    # s_1 = .4375: 10 of 24 are pruned, all of them b's smallest; then floor(f n) with f = .293: 3 of 12, 0 of 2
    assert granet.parts[0].kept == {"a.weight": 12, "b.weight": 2}
    assert active(granet, "b.weight") == [10, 11]
    assert active(granet, "a.weight") == list(range(12))


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_density_at_every_step(start):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    granet = sparsify(
        net, optimizer, method="granet", sparsity=0.9, total_steps=40, delta_t=4, t_end=0.6, initial_sparsity=start,
        drop_end=0.4, generator=generator(), min_per_filter=0,
    )  # fmt: skip
    curve, path, first = Cubic(start, 0.9, 0, 24), [], copy_masks(granet)
    assert sum(int(m.sum()) for m in first.values()) == round((1 - start) * 222)
    for t, batch in enumerate(make_batches(40), 1):
        before, kept = copy_masks(granet), dict(granet.parts[0].kept)
        one_step(net, optimizer, batch)
        grid = min(t - t % 4, 24)
        assert sum(int(m.sum()) for m in granet.masks.values()) == round((1 - curve(grid)) * 222)
        if t % 4:
            assert all(torch.equal(mask, before[name]) for name, mask in granet.masks.items())
        elif t > 24:
            assert granet.parts[0].kept == kept, "an exchange keeps every layer's number"
            path.append(sum(granet.last_update.grown.values()))
    assert granet.sparsity() == pytest.approx(200 / 222)
    assert len(path) == 4 and sum(path) > 0, "the exchange goes on after pruning"
    assert granet.survival() < 0.5


def test_the_mask_at_the_start_is_random_and_spread():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    granet = sparsify(net, optimizer, method="granet", sparsity=0.9, total_steps=40, generator=generator())
    smallest = min(float(p.detach().abs()[p != 0].min()) for p in net.parameters())
    assert smallest < 0.02, "not the largest"
    assert granet.density()["4.weight"] > granet.density()["2.weight"]


def test_a_prune_that_bad_gradients_held_up_is_made_up_for_without_an_exchange():
    options = {**OPTIONS, "delta_t": 2, "t_end": 0.4}  # 6 at step 2
    layer, optimizer, granet = golden(MASK, WEIGHTS, "granet", **options)
    zero = [0.0] * 12
    step_by(layer, optimizer, zero)
    step_by(layer, optimizer, [0.0] * 11 + [torch.nan])
    assert granet.updates == 0
    step_by(layer, optimizer, [0.0] * 11 + [1.0])
    assert active(granet) == [0, 2, 3, 5, 6, 7], "off the grid: pruned, nothing grown"
    assert granet.last_update.grown == {"weight": 0}


def test_catch_up_prunes_and_looks_at_no_old_gradient():
    layer, optimizer, granet = golden(MASK, WEIGHTS, "granet", **{**OPTIONS, "total_steps": 4, "t_end": 0.25})
    layer.weight.grad = torch.full((3, 4), torch.inf)
    granet.mask_gradients()
    granet.missed_step()
    assert granet.catch_up()
    assert active(granet) == [0, 2, 3, 5, 6, 7]
    granet.verify()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "give total_steps"),
        ({"initial_sparsity": 0.8}, "is above the sparsity to reach"),
        ({"distribution": "uniform-first-dense"}, "unknown start of method 'granet'"),
        ({"distribution": {"weight": 0.5}}, "unknown start of method 'granet'"),
        ({"drop_fraction": 2}, "drop_fraction must be"),
        ({"drop_end": -1}, "drop_end must be"),
        ({"delta_t": 0}, "delta_t must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        golden(MASK, WEIGHTS, "granet", **{**OPTIONS, **options})


def test_one_optimizer_only():
    net = make_net()
    both = [torch.optim.SGD([net[0].weight], lr=0.1), torch.optim.SGD([net[2].weight, net[4].weight], lr=0.1)]
    with pytest.raises(ValueError, match="one optimizer with several param_groups"):
        sparsify(net, both, method="granet", sparsity=0.9, total_steps=10)
