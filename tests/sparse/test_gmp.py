"""GMP by hand: the cubic at its edges, which weights go, that none comes back, and that the target is met exactly."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2sam import S2SAM, sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import copy_masks, generator, make_batches, make_net, one_step, shaped_states

WEIGHTS = [0.5, -0.1, 0.3, -0.7, 0.2, -0.4, 0.8, -0.6, 0.9, 1.0, -1.1, 0.1]


def make(model, *, lr=0.5, **kw):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    kw = {"method": "gmp", "sparsity": 0.5, "t_start": 0.0, "delta_t": 1, "generator": generator()} | kw
    return optimizer, sparsify(model, optimizer, **kw)


def layer():
    found = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        found.weight.copy_(torch.tensor(WEIGHTS).view(3, 4))
    return found


def take_step(net, optimizer, grad=None):
    net.weight.grad = torch.zeros(3, 4) if grad is None else grad
    optimizer.step()


def test_the_smallest_go_step_by_step():
    net = layer()
    optimizer, gmp = make(net, total_steps=4, t_end=0.5)
    assert net.weight.flatten().tolist() == pytest.approx(WEIGHTS), "dense at first"
    take_step(net, optimizer)
    # s_1 = 0.5 (1 - 0.5^3) = 0.4375: 6.75 -> 7 of 12 stay; -0.1 0.1 0.2 0.3 -0.4 go
    assert gmp.masks["weight"].int().flatten().tolist() == [1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0]
    assert gmp.sparsity() == pytest.approx(5 / 12)
    assert gmp.last_update.dropped == {"weight": 5} and gmp.last_update.grown == {"weight": 0}
    take_step(net, optimizer)
    assert gmp.masks["weight"].int().flatten().tolist() == [0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 0]
    assert net.weight.flatten().tolist() == pytest.approx([0, 0, 0, -0.7, 0, 0, 0.8, -0.6, 0.9, 1.0, -1.1, 0])
    take_step(net, optimizer)
    assert (gmp.updates, gmp.sparsity()) == (2, 0.5)


def test_the_change_follows_the_optimizer_step_and_ties_go_by_index():
    net = layer()
    optimizer, gmp = make(net, total_steps=4, t_end=0.25, sparsity=1 / 12)
    grad = torch.zeros(3, 4)
    grad[2, 1] = 2.0  # 1.0 - 0.5 * 2 = 0: now the smallest
    take_step(net, optimizer, grad)
    assert gmp.masks["weight"].int().flatten().tolist() == [1] * 9 + [0] + [1] * 2
    net = layer()
    optimizer, gmp = make(net, total_steps=4, t_end=0.25, sparsity=1 / 12)
    take_step(net, optimizer)  # of -0.1 and 0.1 the first stays
    assert gmp.masks["weight"].int().flatten().tolist() == [1] * 11 + [0]


def test_a_pruned_weight_never_comes_back_and_leaves_no_state():
    net = layer()
    optimizer, gmp = make(net, total_steps=20, t_end=0.5, delta_t=3, sparsity=0.75)
    masks = [copy_masks(gmp)["weight"]]
    g = generator(4)
    for _ in range(20):
        take_step(net, optimizer, torch.randn(3, 4, generator=g))
        masks.append(copy_masks(gmp)["weight"])
        assert not (masks[-1] & ~masks[-2]).any(), "masks are nested"
        assert net.weight[~masks[-1]].abs().sum() == 0
        assert all(s[~masks[-1]].abs().sum() == 0 for s in shaped_states(optimizer, net.weight))
        assert shaped_states(optimizer, net.weight)[0][masks[-1]].abs().min() > 0
    assert int(masks[-1].sum()) == 3


def test_of_weights_that_are_all_0_only_active_ones_are_kept():
    net = layer()
    optimizer, gmp = make(net, total_steps=4, t_end=0.5)
    take_step(net, optimizer)
    pruned = ~gmp.masks["weight"]
    with torch.no_grad():
        net.weight.zero_()
    take_step(net, optimizer)
    assert int(gmp.masks["weight"].sum()) == 6 and not gmp.masks["weight"][pruned].any()


def test_sparsity_at_every_edge():
    """T = 100, from 20 to 75 on a grid of 10: the first change at 30, the last at 75, which is off the grid."""
    net = make_net()
    optimizer, gmp = make(net, lr=0.01, total_steps=100, t_start=0.2, t_end=0.75, delta_t=10, sparsity=0.8)
    changes = {}
    for t, batch in enumerate(make_batches(100), 1):
        one_step(net, optimizer, batch)
        if gmp.updates > len(changes):
            changes[t] = sum(int(m.sum()) for m in gmp.masks.values())
    curve = {t: 0.8 - 0.8 * (1 - (t - 20) / 55) ** 3 for t in (30, 40, 50, 60, 70, 75)}
    assert changes == {t: round((1 - s) * 222) for t, s in curve.items()}
    assert (changes[70], changes[75]) == (45, 44)
    assert [gmp.target_sparsity(t) for t in (0, 20, 29, 75, 76, 100)] == [0, 0, 0, 0.8, 0.8, 0.8]
    assert gmp.target_sparsity(74) == gmp.target_sparsity(70) == pytest.approx(curve[70])


@settings(max_examples=60, deadline=None)
@given(
    total=st.integers(5, 300), delta=st.integers(1, 60), start=st.floats(0, 0.5), length=st.floats(0.25, 0.5),
    final=st.floats(0, 0.95), share=st.floats(0, 1), distribution=st.sampled_from(["uniform", "erk", "global"]),
)  # fmt: skip
def test_the_plan_is_exact_whatever_the_settings(total, delta, start, length, final, share, distribution):
    net = make_net()
    options = {"t_start": start, "t_end": start + length, "delta_t": delta, "initial_sparsity": share * final}
    _, gmp = make(net, total_steps=total, sparsity=final, distribution=distribution, **options)
    seen = [gmp.target_sparsity(t) for t in range(total + 1)]
    assert seen == sorted(seen)
    assert seen[0] == share * final and seen[-1] == final
    assert seen[gmp.end] == final
    assert sum(int(m.sum()) for m in gmp.masks.values()) == round((1 - share * final) * 222)
    for s, budget in zip(gmp.sparsities, gmp.plan, strict=True):
        assert (budget if distribution == "global" else sum(budget.values())) == round((1 - s) * 222)


def test_the_last_change_is_made_up_for_when_its_gradients_were_bad():
    net = layer()
    optimizer, gmp = make(net, total_steps=8, t_end=0.5, delta_t=4)
    for t in range(1, 7):
        grad = torch.zeros(3, 4)
        grad[0, 0] = torch.nan if t in (4, 5) else 0.0
        take_step(net, optimizer, grad)
        assert gmp.updates == (t >= 6)
    assert int(gmp.masks["weight"].sum()) == 6


def test_freeze_keeps_what_is_there():
    net = layer()
    optimizer, gmp = make(net, total_steps=4, t_end=0.5)
    take_step(net, optimizer)
    gmp.freeze()
    take_step(net, optimizer)
    assert int(gmp.masks["weight"].sum()) == 7


def test_over_all_layers_the_weak_layer_pays():
    net = make_net()
    with torch.no_grad():
        net[4].weight.mul_(1e-3)
    optimizer, gmp = make(net, lr=1e-4, total_steps=4, t_end=0.5, sparsity=0.8, distribution="global", min_per_filter=0)
    for batch in make_batches(2):
        one_step(net, optimizer, batch)
    kept = {name: int(m.sum()) for name, m in gmp.masks.items()}
    assert kept["4.weight"] == 1 and sum(kept.values()) == 44


def test_two_optimizers_each_on_their_own_steps():
    net = make_net()
    first = torch.optim.SGD([net[0].weight], lr=0.1)
    second = torch.optim.AdamW([net[2].weight, net[4].weight], lr=0.01)
    options = {"method": "gmp", "sparsity": 0.5, "total_steps": 4, "delta_t": 1, "t_start": 0.0, "t_end": 0.5}
    gmp = sparsify(net, [first, second], **options)
    for t, batch in enumerate(make_batches(4)):
        net.zero_grad()
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
        second.step()
        if t % 2:
            first.step()
    assert sum(int(m.sum()) for m in gmp.masks.values()) == 111
    gmp.remove()
    with pytest.raises(ValueError, match="needs all prunable weights in one optimizer"):
        sparsify(net, [first, second], distribution="global", **options)


def test_under_s2sam_pruned_weights_are_0_in_the_displaced_forward_too():
    net = make_net()
    optimizer, gmp = make(net, lr=0.05, total_steps=12, t_end=0.5, sparsity=0.8)
    sam = S2SAM(optimizer, model=net, rho=0.1)
    moved = []

    def look(module, args):
        moved.append(sam.is_displaced)
        for name, w in net.named_parameters():
            assert w[~gmp.masks[name]].abs().sum() == 0

    net[0].register_forward_pre_hook(look)
    for batch in make_batches(12):
        one_step(net, optimizer, batch)
    assert moved == [False] + [True] * 11
    assert gmp.sparsity() == pytest.approx(0.8, abs=1 / 222)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "give total_steps"),
        ({"initial_sparsity": 0.6}, "initial_sparsity 0.6 is above the sparsity to reach, 0.5"),
        ({"t_start": 0.5, "t_end": 0.5}, "has no step in it"),
        ({"t_end": 1.5}, "t_end must be"),
        ({"delta_t": 0}, "delta_t must be a whole number"),
        ({"t_stop": 0.5}, "did you mean 't_start'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(layer(), **({"total_steps": 10} | options))
