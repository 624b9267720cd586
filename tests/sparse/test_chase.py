"""Chase by hand: UMM, the soft bound, channels that go and whose weights grow elsewhere; the plan; resume."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch_pruning")
from channel_nets import build
from sparse_support import copy_masks, generator, set_masks

from s2sam import S2SAM, sparsify
from s2sam.export.slim import slim
from s2sam.sparse.schedules import CosineDrop, Cubic


def make(net, x, *, sparsity=0.9, total_steps=40, optimizer=None, seed=0, **options):
    o = optimizer or torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    options = {"delta_t": 4, "channel_delta_t": 4, "channel_offset": 2, **options}
    s = sparsify(
        net, o, method="chase", sparsity=sparsity, total_steps=total_steps, batches=[(x, None)],
        generator=generator(seed), **options,
    )  # fmt: skip
    return o, s


def one_step(net, o, x, seed):
    g = generator(seed)
    o.zero_grad()
    y = torch.randint(0, 3, (len(x),), generator=g)
    F.cross_entropy(net(x + 0.1 * torch.randn(x.shape, generator=g)), y).backward()
    o.step()


def two(mask_a, mask_b, **options):
    """Linear(3, 4), Linear(4, 2) without biases: 4 channels, 20 weights, of which the masks leave some."""
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    o = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    given = {"total_steps": 10, "delta_t": 1, "channel_delta_t": 1, "channel_offset": 0, "t_end": 0.4, **options}
    _, s = make(net, torch.zeros(2, 3), sparsity=0.6, optimizer=o, **given)
    masks = {"0.weight": torch.tensor(mask_a).bool(), "2.weight": torch.tensor(mask_b).bool()}
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.9, -0.8, 0], [0.7, 0, 0], [0, 0.5, 0.6], [0.3, 0, 0]]))
        net[2].weight.copy_(torch.tensor([[0.4, 0, -0.2, 0.0], [0, 0, 0, 0.1]]))
    set_masks(s, masks)
    return net, o, s


MASK_A, MASK_B = [[1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 0, 0]], [[1, 0, 1, 0], [0, 0, 0, 0]]  # 8 of 20


def step_by(net, o, a, b):
    net[0].weight.grad, net[2].weight.grad = torch.tensor(a), torch.tensor(b)
    o.step()


def test_golden_umm_is_the_mean_size_zeros_included():
    net, o, s = two(MASK_A, MASK_B)
    assert s.umm()["0"].tolist() == pytest.approx([1.7 / 3, 0.7 / 3, 1.1 / 3, 0.1])


def test_golden_a_channel_goes_and_its_weights_grow_where_the_gradient_is_largest():
    """r_1 = .5 (1 - .75^3) = .289: 4 - 1 = 3 channels. No soft bound: 8 weights before and after."""
    net, o, s = two(MASK_A, MASK_B, soft_bound=0.0, delta_t=100)
    assert (s.least_weights, s.grid, s.rates[1]) == (8, [1, 2, 3, 4], pytest.approx(0.5 * (1 - 0.75**3)))
    a = [[0.0, 0.0, 2.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.0], [9.0, 9.0, 9.0]]
    step_by(net, o, a, [[0.0, 0.2, 0.0, 9.0], [0.0, 0.0, 0.0, 9.0]])
    assert s.keep["0"].tolist() == [True, True, True, False]
    # channel 3 loses one active weight; one grows, at the largest |gradient| 2 of what is left
    assert s.masks["0.weight"].int().tolist() == [[1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]]
    assert s.masks["2.weight"].int().tolist() == [[1, 0, 1, 0], [0, 0, 0, 0]]
    assert net[0].weight[0].tolist() == pytest.approx([0.9, -0.8, 0.0])
    assert s.last_update.dropped == {"0.weight": 1, "2.weight": 0}
    assert s.last_update.grown == {"0.weight": 1, "2.weight": 0}


def test_golden_weights_are_pruned_to_the_target_and_grown_beyond_it():
    """f_1 = .2 (1 + cos(pi / 4)) / 2 = .1707: prune 10 to 8 over both layers, grow round(.1707 * 20) = 3."""
    mask_a = [[1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 0]]
    net, o, s = two(mask_a, [[1, 0, 1, 0], [0, 0, 0, 0]], soft_bound=0.2, channel_sparsity=0.0)
    with torch.no_grad():
        net[0].weight[3, 1] = 0.05
    a = [[0.0, 0.0, 0.3], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    step_by(net, o, a, [[0.0, 0.4, 0.0, 0.0], [0.5, 0.2, 0.1, 0.0]])
    # sizes .9 .8 .7 .5 .6 .3 .05 | .4 .2: 9 of them, .05 goes; then .5, .4, .3 grow
    assert s.masks["0.weight"].int().tolist() == [[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 0, 0]]
    assert s.masks["2.weight"].int().tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert s.target_sparsity(1) == pytest.approx(1 - 11 / 20)
    assert s.target_sparsity(4) == s.target_sparsity(10) == 0.6


@pytest.mark.parametrize("name", ["resnet8", "mixed", "dense", "mlp"])
def test_the_plan_is_met_at_every_step(name):
    """Exact numbers of weights throughout, of channels where they go; nothing is active in a pruned channel."""
    net, x = build(name)
    o, s = make(net, x, min_channels=2, drop_end=0.3)
    n, size, total = s.least_weights, s.size, s.channels.total
    assert n == size - round(0.9 * size)
    weights, curve = CosineDrop(0.05, 32), Cubic(0.0, 0.5, 0, 32)
    grid = [*range(2, 32, 4), 32]
    for t in range(1, 41):
        before, channels = copy_masks(s), {k: v.clone() for k, v in s.keep.items()}
        one_step(net, o, x, t)
        last = t - t % 4
        over = round(weights(last) * size) if last > 0 and t < 32 else 0
        assert sum(int(m.sum()) for m in s.masks.values()) == sum(s.parts[0].kept.values()) == n + over
        rate = max([curve(g) for g in grid if g <= t], default=0.0)
        floors = sum(max(2, math.ceil(g.size * (1 - rate) * 0.5 - 1e-9)) for g in s.channels.groups)
        assert sum(s.alive().values()) == max(total - round(rate * total), floors)
        assert all(not (v & ~channels[k]).any() for k, v in s.keep.items()), "no channel comes back"
        live = s.weight_masks()
        assert all(not (m & ~live[k]).any() for k, m in s.masks.items())
        assert min(s.parts[0].kept.values()) >= 1
        changed = any(not torch.equal(before[k], m) for k, m in s.masks.items())
        if t % 2:
            assert not changed
        if t > 32 and not t % 4:
            assert changed == (t < 40), "not in the last step"
            assert s.last_update.dropped == s.last_update.grown, "layer by layer"
        s.verify()
    assert s.sparsity() == pytest.approx(0.9, abs=0.5 / size)
    assert s.channel_sparsity() > 0.4 and s.alive() != {g.name: g.size for g in s.channels.groups}
    out = net.eval()(x)
    small = slim(net, s, x, o)
    assert torch.allclose(small.model.eval()(x), out, atol=1e-5 * float(out.detach().abs().max()))
    assert sum(int(m.sum()) for m in small.masks.values()) == n, "the weights that are active are all still there"


def test_channels_stay_where_the_weights_need_them():
    net, x = build("mlp")
    o, s = make(net, x, sparsity=0.5, soft_bound=0.1)
    for t in range(1, 41):
        one_step(net, o, x, t)
        assert sum(s.parts[0].kept.values()) == s.allowed(t)
    room = sum(int(m.sum()) for m in s.weight_masks().values())
    assert s.least_weights <= room < s.least_weights + 16 + 26, "as few channels as fit"
    assert 0 < s.channel_sparsity() < 0.5


def test_a_change_that_bad_gradients_held_up_is_made_up_for():
    net, o, s = two(MASK_A, MASK_B, soft_bound=0.05)
    bad = [[0.0, 0.0, torch.nan], *[[0.0] * 3] * 3]  # at a pruned weight
    step_by(net, o, bad, [[0.0] * 4] * 2)
    assert s.updates == 0 and s.behind(s.parts[0])
    zero = ([[0.0] * 3] * 4, [[0.0] * 4] * 2)
    step_by(net, o, *zero)
    assert s.updates == 1 and not s.behind(s.parts[0])
    assert sum(s.alive().values()) == 4 - round(s.channel_rate(2) * 4)
    s.missed_step()
    s.missed_step()
    assert s.catch_up() and sum(s.parts[0].kept.values()) == 8
    assert sum(s.alive().values()) == 2
    s.verify()


def test_resume_is_bit_equal():
    runs = []
    for stop in (None, 19):
        net, x = build("resnet8")
        o, s = make(net, x)
        for t in range(1, 37):
            if t == stop:
                saved = copy.deepcopy((net.state_dict(), o.state_dict(), s.state_dict()))
                net = build("resnet8", seed=7)[0]
                o = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
                _, s = make(net, x, optimizer=o, seed=9, init=False)
                for part, state in zip((net, o, s), saved, strict=True):
                    part.load_state_dict(state)
            one_step(net, o, x, t)
        runs.append((net.state_dict(), s.keep, s.masks))
    for a, b in zip(*runs, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def test_s2sam_displaces_active_weights_alone():
    net, x = build("mixed")
    o, s = make(net, x, sparsity=0.7)
    sam = S2SAM(o, model=net, rho=0.3)
    for t in range(1, 34):
        clean = {k: p.detach().clone() for k, p in net.named_parameters()}
        masks = {**s.masks, **{k: m for _, riders in s.riders for k, m in riders.masks.items()}}
        with sam.displaced():
            moved = {k: (p.detach() - clean[k]).abs() for k, p in net.named_parameters()}
        assert all(not moved[k][~m].any() for k, m in masks.items())
        if t > 1:
            assert sum(float(m.square().sum()) for m in moved.values()) ** 0.5 == pytest.approx(0.3, rel=1e-3)
        one_step(net, o, x, t)
    assert s.channel_sparsity() > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "give total_steps"),
        ({"t_start": 0.5, "t_end": 0.5}, "no step lies between"),
        ({"distribution": "uniform-first-dense"}, "unknown start of method 'chase'"),
        ({"channel_sparsity": 1.5}, "channel_sparsity must be"),
        ({"channel_delta_t": 0}, "channel_delta_t must be"),
        ({"channel_offset": -1}, "channel_offset must be"),
        ({"channel_sparsit": 0.5}, "did you mean 'channel_sparsity'"),
    ],
)
def test_bad_input(options, message):
    net, x = build("mlp")
    o = torch.optim.SGD(net.parameters(), lr=0.1)
    given = {"method": "chase", "sparsity": 0.9, "total_steps": 10, "batches": [(x, None)], **options}
    with pytest.raises(ValueError, match=message):
        sparsify(net, o, **given)
