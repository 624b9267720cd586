"""CHEX by hand: who is pruned, who may come back and with what; the plan; resume; S2SAM on the active channels."""

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
from sparse_support import generator

from s2sam import S2SAM, SAM, sparsify
from s2sam.export.slim import slim
from s2sam.sparse.leverage import leverage


def make(net, x, *, sparsity=0.5, total_steps=40, seed=0, optimizer=None, **options):
    o = optimizer or torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    options = {"delta_t": 4, **options}
    batches = None if "input_shape" in options else [(x, None)]
    s = sparsify(
        net, o, method="chex", sparsity=sparsity, total_steps=total_steps, batches=batches, generator=generator(seed),
        **options,
    )  # fmt: skip
    return o, s


def one_step(net, o, x, seed):
    g = generator(seed)
    o.zero_grad()
    loss = F.cross_entropy(
        net(x + 0.1 * torch.randn(x.shape, generator=g)), torch.randint(0, 3, (len(x),), generator=g)
    )
    loss.backward()
    o.step()


def alive(s, name):
    return s.keep[name].nonzero().flatten().tolist()


class Two(nn.Module):
    """One group of 4 channels with 5 entries each, behind BatchNorm."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(F.relu(self.bn(self.a(x))))


def two(**options):
    net = Two()
    with torch.no_grad():
        net.a.weight.copy_(torch.tensor([[16.0, 0, 0, 0, 0], [12, 0, 0, 0, 0], [0, 8, 0, 0, 0], [0, 0, 2, 0, 0]]))
    o = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    _, s = make(net, torch.zeros(2, 5), total_steps=10, optimizer=o, delta_t=1, t_end=0.4, init="anew", **options)
    return net, o, s


def test_golden_start_prunes_by_l1_and_a_change_by_leverage():
    net, o, s = two(regrow=0.25)
    assert (s.grid, s.shares[0], s.shares[-1]) == ([1, 2, 3, 4], 0.25, 0.5)
    assert alive(s, "a") == [0, 1, 2]  # L1 16, 12, 8 of (16, 12, 8, 2)
    assert net.bn.weight.tolist() == [1, 1, 1, 0] and not net.a.weight[3].any() and not net.b.weight[:, 3].any()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    o.step()
    # 2 are kept: V_2 of the first singular vectors spans (0, 1) and 2: leverage .8, .6, 1. Then S - delta_1 = .2866:
    # 4 - round(1.146) = 3 are alive, one comes back: 1, with nothing missing, or 3, of which 2 is missing
    score = leverage(torch.tensor([[16.0, 0, 0, 0, 0], [12, 0, 0, 0, 0], [0, 8, 0, 0, 0], [0, 0, 0, 0, 0]]), 2)
    assert score.tolist() == pytest.approx([0.8, 0.6, 1.0, 0.0])
    assert s.shares[1] == pytest.approx(0.5 - 0.25 * (1 + math.cos(math.pi / 4)) / 2)
    assert {0, 2} < set(alive(s, "a")) and len(alive(s, "a")) == 3


def test_golden_draw_follows_what_is_missing():
    """p(3) / p(1) = e^2: over many generators channel 3 comes back in 88 % of the cases, within what chance allows."""
    net, o, s = two(regrow=0.25)
    state, weights = copy.deepcopy(s.state_dict()), copy.deepcopy(net.state_dict())
    back = 0
    for seed in range(150):
        net.load_state_dict(weights)
        s.load_state_dict(copy.deepcopy(state))
        s.generator.manual_seed(seed)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        o.step()
        back += 3 in alive(s, "a")
    assert back / 150 == pytest.approx(math.exp(2) / (1 + math.exp(2)), abs=0.1)


def test_what_comes_back_is_what_it_was_when_last_used():
    """Bit for bit: weights that make it and read it, gamma, beta, running statistics; momentum starts at 0."""
    net, x = build("resnet8")
    o, s = make(net, x, regrow=0.4, t_end=0.9)
    seen = {name: v.detach().clone() for name, v in s.tensors().items()}  # before pruning is what build() made
    first = copy.deepcopy(dict(build("resnet8")[0].named_parameters()))
    last = {name: first.get(name, v).detach().clone() for name, v in seen.items()}
    came_back = 0
    for t in range(1, 41):
        before = {name: k.clone() for name, k in s.keep.items()}
        pre = {name: v.detach().clone() for name, v in s.tensors().items()}
        lr = o.param_groups[0]["lr"]
        if t % 4 == 0:
            o.param_groups[0]["lr"] = 0.0  # so that the step itself moves nothing, and what changes is the topology
        one_step(net, o, x, t)
        o.param_groups[0]["lr"] = lr
        if t % 4 or t > 36:
            continue
        for group in s.channels.groups:
            returned = s.keep[group.name] & ~before[group.name]
            gone = before[group.name] & ~s.keep[group.name]
            came_back += int(returned.sum())
            for m in group.of("out", "scale", "shift", "statistic"):
                now, rows = s.tensors()[m.name].detach(), m.alive(returned) & (m.owner >= 0)
                if m.role == "out":  # columns of channels that are pruned stay 0
                    mask = s.masks[m.name] if m.name in s.masks else torch.ones_like(now, dtype=torch.bool)
                    assert torch.equal(now[rows], (last[m.name] * mask)[rows])
                else:
                    assert torch.equal(now[rows], last[m.name][rows])
                buffer = (
                    o.state.get(net.get_parameter(m.name), {}).get("momentum_buffer") if m.role != "statistic" else None
                )
                if buffer is not None:
                    assert not buffer[rows].any() and not buffer[m.alive(gone) & (m.owner >= 0)].any()
        for name, v in pre.items():  # what was in use at this change is what counts from now on
            used = s_masks(s, before, name, v)
            source = s.tensors()[name].detach() if name.endswith(("mean", "var")) else v
            last[name] = torch.where(used, source, last[name])
    assert came_back > 10


def s_masks(s, keep, name, tensor):
    from s2sam.sparse.channels import masks_of

    return masks_of(s.channels.groups, keep, {name: tensor})[name]


@pytest.mark.parametrize("name", ["resnet8", "mixed", "dense", "mlp"])
def test_the_plan_is_met_at_every_change(name):
    net, x = build(name)
    o, s = make(net, x, min_channels=2, sparsity=0.4)
    counts, total = [], s.channels.total
    for t in range(1, 41):
        before = {k: v.clone() for k, v in s.keep.items()}
        one_step(net, o, x, t)
        if (t % 4 == 0 and t <= 28) or t == 29:
            assert sum(s.alive().values()) == s.channels_allowed(t)
            counts.append(sum(s.alive().values()))
        else:
            assert all(torch.equal(before[k], v) for k, v in s.keep.items())
        assert min(s.alive().values()) >= 2
        for group in s.channels.groups:  # exactly 0, all of it
            dead = ~s.keep[group.name]
            for m in group.of("out", "scale", "shift", "in", "slope"):
                value = s.tensors()[m.name].detach().movedim(m.dim, 0)
                rows = ~m.alive(~dead)
                assert not value[rows].any()
                state = o.state[net.get_parameter(m.name)]["momentum_buffer"].movedim(m.dim, 0)
                assert not state[rows].any()
        s.verify()
    assert counts == sorted(counts, reverse=True) and len(s.grid) == s.updates == 8
    alone = [g for g in s.channels.groups if not g.of("scale")]
    assert s.channel_sparsity() == pytest.approx(0.4, abs=(1 + len(alone)) / total)
    assert s.reserve == {}, "nothing dense is kept after the last change"
    out = net.eval()(x)
    assert torch.allclose(slim(net, s, x).model.eval()(x), out, atol=1e-5 * float(out.detach().abs().max()))


def test_the_shares_of_groups_follow_gamma():
    """Pooled over groups: the group with small gammas pays for all, until 52 - round(.3 * 52) = 36 are left."""
    net, x = build("mlp")
    o = torch.optim.SGD(net.parameters(), lr=0.0)
    _, s = make(net, x, regrow=0.2, sparsity=0.3, delta_t=1, total_steps=10, optimizer=o)
    assert s.alive() == {"body.fc1": 23, "body.fc2": 23}
    with torch.no_grad():
        net.body.bn1.weight.mul_(0.01)
    for t in range(8):
        one_step(net, o, x, t)
    assert s.alive() == {"body.fc1": 13, "body.fc2": 23}


def test_resume_is_bit_equal():
    runs = []
    for stop in (None, 18):
        net, x = build("resnet8")
        o, s = make(net, x)
        for t in range(1, 41):
            if t == stop:
                saved = copy.deepcopy((net.state_dict(), o.state_dict(), s.state_dict()))
                net, x = build("resnet8", seed=7)
                x = build("resnet8")[1]
                o = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
                _, s = make(net, x, optimizer=o, seed=9, init=False)
                for part, state in zip((net, o, s), saved, strict=True):
                    part.load_state_dict(state)
            one_step(net, o, x, t)
        runs.append((net.state_dict(), s.keep, o.state_dict()["state"]))
    (a, b, c), (d, e, f) = runs
    assert all(torch.equal(v, d[k]) for k, v in a.items()) and all(torch.equal(v, e[k]) for k, v in b.items())
    assert all(torch.equal(v["momentum_buffer"], f[k]["momentum_buffer"]) for k, v in c.items())


@pytest.mark.parametrize("direction", ["gradient", "random"])
def test_s2sam_displaces_active_channels_alone(direction):
    net, x = build("resnet8")
    o, s = make(net, x)
    sam = S2SAM(o, model=net, rho=0.5, direction=direction, stats_every=1)
    for t in range(1, 31):
        clean = [p.detach().clone() for p in net.parameters()]
        with sam.displaced():
            moved = [(p.detach() - c).abs() for p, c in zip(net.parameters(), clean, strict=True)]
            masks = s_all_masks(s, net)
            assert all(not m[~mask].any() for m, mask in zip(moved, masks, strict=True))
            if t > 1:
                assert sum(float(m.square().sum()) for m in moved) ** 0.5 == pytest.approx(0.5, rel=1e-3)
        one_step(net, o, x, t)
    assert sam.stats["displacement"] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("sharpness", [S2SAM, SAM])
def test_a_frozen_or_twice_stepped_run_displaces_active_channels_alone(sharpness):
    net = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 5))  # its reader is no prunable weight
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 6, generator=g), torch.randint(0, 5, (16,), generator=g)
    o, s = make(net, x, exclude="2", delta_t=2)
    sam = sharpness(o, model=net, rho=0.5)
    seen = []

    def loss():
        o.zero_grad()
        value = F.cross_entropy(net(x), y)
        seen.append([p.detach().clone() for p in net.parameters()])
        value.backward()
        return value

    for t in range(6):
        if t == 3:
            s.freeze()
        before = [p.detach().clone() for p in net.parameters()]
        masks = [mask.clone() for mask in s_all_masks(s, net)]
        seen.clear()
        o.step(loss) if sharpness is SAM else (loss(), o.step())
        moved = max(float((p - b).norm()) for p, b in zip(seen[-1], before, strict=True))
        assert (moved > 0.1) == (t > 0 or sharpness is SAM)
        assert all(not p[~mask].any() for p, mask in zip(seen[-1], masks, strict=True))
    assert s.channel_sparsity() > 0.2
    sam.remove()


def s_all_masks(s, net):
    from s2sam.sparse.channels import masks_of

    return list(masks_of(s.channels.groups, s.keep, dict(net.named_parameters())).values())


def test_what_a_state_of_other_channels_or_loaded_weights_do():
    net, x = build("mlp")
    o, s = make(net, x)
    state = s.state_dict()
    with pytest.raises(ValueError, match="other groups of channels"):
        s.load_extra_state({**state["extra"], "sizes": {}})
    with torch.no_grad():
        net.body.bn1.bias.fill_(1.0)
    with pytest.raises(RuntimeError, match="is not 0 where its channel is pruned"):
        s.verify()
    s.apply()
    s.verify()


class Drifting(torch.optim.SGD):
    """Moves every parameter, whatever its gradient."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(0.01)
                self.state[p]["momentum_buffer"].add_(0.01)


def test_an_optimizer_that_moves_everything_moves_no_pruned_channel():
    net, x = build("mixed")
    o, s = make(net, x, optimizer=Drifting(net.parameters(), lr=0.05, momentum=0.9))
    for t in range(1, 4):
        one_step(net, o, x, t)
        s.verify()
        for _, riders in s.riders:
            for name, mask in riders.masks.items():
                assert not o.state[net.get_parameter(name)]["momentum_buffer"][~mask].any()
    assert sum(int((~m).sum()) for _, riders in s.riders for m in riders.masks.values()) > 10


def test_an_excluded_layer_keeps_its_channels():
    net, x = build("mlp")
    _, s = make(net, x, exclude="body.fc1")
    assert [g.name for g in s.channels.groups] == ["body.fc2"]
    assert s.channels.dense["body.fc1"] == "'body.fc1.weight': excluded by name or class"
    with pytest.raises(ValueError, match="no channels to prune"):
        s.remove()
        make(net, x, exclude=["body.fc1", "body.fc2"])


def test_a_shape_is_as_good_as_a_batch():
    net, x = build("resnet8")
    _, one = make(net, x, input_shape=(3, 8, 8))
    _, two = make(build("resnet8")[0], x)
    assert one.alive() == two.alive() and all(torch.equal(v, two.keep[k]) for k, v in one.keep.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "give total_steps"),
        ({"batches": None}, "give batches=.*input_shape="),
        ({"t_end": 0.0}, "no step is left to change in"),
        ({"sparsity": 0.95, "min_channels": 5}, "lower one of them"),
        ({"distribution": "uniform"}, "leave distribution at 'auto'"),
        ({"delta_t": 0}, "delta_t must be"),
        ({"min_channels": 0}, "min_channels must be"),
        ({"input_shape": 3}, "input_shape must be a list"),
        ({"input_shape": (8.5,)}, "each number of input_shape must be a whole number"),
        ({"batches": 3}, "batches must be a list or a loader"),
        ({"regrow": 2}, "regrow must be"),
        ({"regrew": 0.2}, "unknown option of method 'chex': 'regrew'; did you mean 'regrow'"),
    ],
)
def test_bad_input(options, message):
    net, x = build("mlp")
    o = torch.optim.SGD(net.parameters(), lr=0.1)
    given = {"method": "chex", "sparsity": 0.5, "total_steps": 10, "batches": [(x, None)], **options}
    with pytest.raises(ValueError, match=message):
        sparsify(net, o, **given)


def test_one_optimizer_only():
    net, x = build("mlp")
    p = list(net.parameters())
    with pytest.raises(ValueError, match="one optimizer with several param_groups"):
        sparsify(
            net, [torch.optim.SGD(p[:4], lr=0.1), torch.optim.SGD(p[4:], lr=0.1)],
            method="chex", sparsity=0.5, total_steps=10, batches=[(x, None)],
        )  # fmt: skip


def test_batchnorm_in_an_optimizer_of_its_own_is_masked_too():
    net, x = build("mlp")
    weights = [p for p in net.parameters() if p.dim() > 1]
    others = [p for p in net.parameters() if p.dim() == 1]
    both = [torch.optim.SGD(weights, lr=0.05, momentum=0.9), torch.optim.SGD(others, lr=0.05, momentum=0.9)]
    s = sparsify(
        net, both, method="chex", sparsity=0.5, total_steps=8, delta_t=2, batches=[(x, None)], generator=generator()
    )
    for _ in range(8):
        F.cross_entropy(net(x), torch.zeros(len(x), dtype=torch.long)).backward()
        for o in both:
            o.step()
            o.zero_grad()
    s.verify()
    assert not both[1].state[net.body.bn1.bias]["momentum_buffer"][~s.keep["body.fc1"]].any()
