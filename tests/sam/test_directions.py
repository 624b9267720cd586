"""What each direction promises: the length of e, what it is made of, its memory."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sam_common import (
    FACTORIES,
    attached,
    displacement,
    distance,
    make_data,
    make_net,
    same,
    sgd,
    snapshot,
    take_step,
    total,
)
from torch import nn

from s2sam import S2SAM, sparsify
from s2sam.sam import directions
from s2sam.sam.directions import DIRECTIONS, DRAW_BYTES, draw_batches, noise_seed
from s2sam.sam.scales import SCALES

X = make_data(1)[0][0]
BUFFER, EMA = "s2sam_buffer", "s2sam_ema"


@pytest.mark.parametrize(("direction", "scale", "sign"), [*itertools.product(DIRECTIONS, SCALES, (1, -1))])
def test_length_and_measured_displacement_of_every_combination(direction, scale, sign):
    rho = 0.3
    net, optimizer, sam = attached(rho=rho, direction=direction, scale=scale, sign=sign, stats_every=1)
    w, state = snapshot(net), optimizer.state
    key = {"momentum": "momentum_buffer", "ema": EMA}.get(direction, BUFFER)
    d = [state[p][key].clone() for p in net.parameters()]
    net(X)
    e = [p.detach() - q for p, q in zip(net.parameters(), w, strict=True)]
    promised = {
        "norm": lambda: rho,
        "relative": lambda: rho * total(w),
        "step": lambda: rho * optimizer.param_groups[0]["lr"] * total(d),
        "filter": lambda: rho * total(w),
        "rms": lambda: rho * sum(int((v != 0).sum()) for v in w) ** 0.5,
        "asam": lambda: rho * total([v * v * u for v, u in zip(w, d, strict=True)])
        / total([v * u for v, u in zip(w, d, strict=True)]),
    }[scale]()  # fmt: skip
    assert total(e) == pytest.approx(promised, rel=1e-9)
    assert sam.stats["displacement"] == pytest.approx(promised, rel=1e-6)
    assert sam.stats["projection"] == pytest.approx(promised, rel=1e-6)
    assert sum(float((a * b).sum()) for a, b in zip(e, d, strict=True)) * sign > 0


def test_stats_say_so_when_nothing_is_displaced():
    net, optimizer, sam = attached(rho=lambda t: 0.1 * (t < 3), stats_every=1)
    assert sam.stats["displacement"] == pytest.approx(0.1)
    take_step(net, optimizer, make_data(1)[0])
    assert sam.stats["displacement"] == sam.stats["projection"] == 0.0
    assert "alignment" not in sam.stats


# direction="ema"


def test_ema_hand_value_and_memory():
    """beta 0.5: d = 1 * 0.5, then 0.5 * 0.5 + 4 * 0.5 = 2.25; without a gradient 1.125. lr 0, so w stays (3, 4)."""
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.0, momentum=0.9, weight_decay=0.1)
    sam = S2SAM(optimizer, rho=2.0, direction="ema", ema_beta=0.5, scale="step")
    seen = []
    for g in ([1.0, 0.0], [4.0, 0.0], None):
        w.grad = None if g is None else torch.tensor(g, dtype=torch.float64)
        sam.displace()
        optimizer.step()
        seen.append(optimizer.state[w][EMA].tolist())
    assert seen == [[0.5, 0.0], [2.25, 0.0], [1.125, 0.0]]
    assert set(optimizer.state[w]) == {"momentum_buffer", BUFFER, EMA}  # two buffers, no third
    sam.remove()
    assert set(optimizer.state[w]) == {"momentum_buffer"}


@pytest.mark.parametrize("name", ["sgd", "sgd-fused"])
def test_ema_is_the_mean_of_all_gradients_and_a_skipped_step_does_not_count(name):
    net, optimizer, _ = attached(name, warm=0, direction="ema", ema_beta=0.7)
    mean = [torch.zeros_like(p) for p in net.parameters()]
    for step, (x, y) in enumerate(make_data(8)):
        F.cross_entropy(net(x * float("nan") if step == 4 else x), y).backward()
        if step != 4:
            mean = [0.7 * m + 0.3 * p.grad for m, p in zip(mean, net.parameters(), strict=True)]
        optimizer.step()
        optimizer.zero_grad()
        assert distance([optimizer.state[p][EMA] for p in net.parameters()], mean) < 1e-15


@pytest.mark.parametrize("first", ["sparsify", "s2sam"])
@pytest.mark.parametrize("direction", ["ema", "random"])
@pytest.mark.parametrize("name", ["sgd", "sgd-fused", "adamw"])
def test_moving_masks_clear_the_new_buffers(name, direction, first):
    net = make_net()
    optimizer = FACTORIES[name](net.parameters())
    make = {"method": "rigl", "sparsity": 0.6, "total_steps": 100, "delta_t": 5}
    if first == "sparsify":
        sparsifier = sparsify(net, optimizer, **make)
    sam = S2SAM(optimizer, model=net, rho=0.1, direction=direction)
    if first == "s2sam":
        sparsifier = sparsify(net, optimizer, **make)
    before = {n: m.clone() for n, m in sparsifier.masks.items()}
    key = EMA if direction == "ema" else BUFFER
    for step, batch in enumerate(make_data(24)):
        take_step(net, optimizer, batch)
        for n, p in net.named_parameters():
            assert float(optimizer.state[p][key][~sparsifier.masks[n]].abs().sum()) == 0, step
        e = displacement(net, sam)
        assert total(e) == pytest.approx(0.1, rel=1e-9)
        assert all(float(v[~m].abs().sum()) == 0 for v, m in zip(e, sparsifier.masks.values(), strict=True))
    assert any(not torch.equal(before[n], m) for n, m in sparsifier.masks.items())


# direction="random"


def test_noise_is_standard_normal_new_in_every_step_and_of_no_direction():
    w = nn.Parameter(torch.full((4000,), 0.5))
    optimizer = torch.optim.SGD([w], lr=0.1)
    sam = S2SAM(optimizer, direction="random", generator=torch.Generator().manual_seed(1))
    seen = []
    for _ in range(3):
        sam.displace()
        w.grad = torch.ones(4000)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(optimizer.state[w][BUFFER].clone())
    for noise in seen:
        assert abs(float(noise.mean())) < 0.06 and abs(float(noise.std()) - 1) < 0.05
        assert abs(float((noise**4).mean()) - 3) < 0.6
    for a, b in itertools.combinations(seen, 2):
        assert abs(float(F.cosine_similarity(a, b, dim=0))) < 0.06


@given(
    seed=st.integers(0, 2**62),
    step=st.integers(0, 10**6),
    index=st.integers(0, 999),
    other=st.tuples(st.integers(0, 2**62), st.integers(0, 10**6), st.integers(0, 999)),
)
def test_every_draw_has_a_seed_of_its_own(seed, step, index, other):
    assert 0 <= noise_seed(seed, step, index) < 2**63
    assert (noise_seed(seed, step, index) == noise_seed(*other)) == ((seed, step, index) == other)


SIZES = [(), (3,), (3,), (2, 2), (0,), (DRAW_BYTES // 8,), (DRAW_BYTES // 8 + 1,), (DRAW_BYTES // 2,)]


@given(kinds=st.lists(st.tuples(st.sampled_from(SIZES), st.sampled_from([torch.float32, torch.bfloat16])), max_size=20))
def test_batches_of_draws_are_a_partition_into_equal_kinds_of_limited_size(kinds):
    members = {3 * i + 1: torch.empty(size, dtype=dtype, device="meta") for i, (size, dtype) in enumerate(kinds)}
    batches = draw_batches(members)
    assert sorted(i for batch in batches for shape in batch for i in shape) == list(members)
    for batch in batches:
        inside = [members[i] for shape in batch for i in shape]
        assert len({t.dtype for t in inside}) == 1
        assert all(len({members[i].shape for i in shape}) == 1 for shape in batch)
        assert len(inside) == 1 or sum(t.numel() * t.element_size() for t in inside) <= DRAW_BYTES
    assert len({batch[0][0] for batch in batches}) == len(batches)  # each has a seed of its own


def test_who_has_a_gradient_does_not_move_the_noise_of_the_others(monkeypatch):
    monkeypatch.setattr(directions, "DRAW_BYTES", 200)  # of 4 bytes each: (a, b, e), (c, d), and f by itself
    sizes = [(10,), (20,), (3, 4), (3, 5), (20,), (80,)]

    def noise(without=()):
        params = [nn.Parameter(torch.ones(size)) for size in sizes]
        optimizer = torch.optim.SGD(params, lr=0.0)
        S2SAM(optimizer, direction="random", generator=torch.Generator().manual_seed(2))
        for i, p in enumerate(params):
            p.grad = None if i in without else torch.ones_like(p)
        optimizer.step()
        return [optimizer.state[p].get(BUFFER) for p in params]

    whole = noise()
    assert abs(float(torch.cat([t.flatten() for t in whole]).std()) - 1) < 0.25
    assert len({float(t.flatten()[0]) for t in whole}) == len(sizes)
    for without in ({0}, {1, 3}, {4, 5}):
        for i, (a, b) in enumerate(zip(whole, noise(without), strict=True)):
            assert b is None if i in without else torch.equal(a, b)


def test_noise_lives_where_a_weight_or_a_gradient_does():
    w = nn.Parameter(torch.tensor([0.0, 0.0, 2.0, 2.0]))
    optimizer = torch.optim.SGD([w], lr=0.0)
    S2SAM(optimizer, direction="random")
    w.grad = torch.tensor([0.0, 1e-30, 0.0, 1.0])  # pruned, just regrown, stuck, ordinary
    optimizer.step()
    noise = optimizer.state[w][BUFFER]
    assert noise[0] == 0 and bool((noise[1:] != 0).all())
    w.grad = None
    optimizer.step()
    assert noise.tolist() == [0.0] * 4  # no gradient, no displacement: as with every direction


def test_noise_comes_from_the_generator_and_from_nothing_else():
    def train(seed=None, manual=0, other=0):
        torch.manual_seed(manual)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        net, optimizer, _ = attached(warm=0, direction="random", generator=generator)
        for batch in make_data(4):
            torch.rand(other)  # somebody else draws
            take_step(net, optimizer, batch)
        return snapshot(net)

    assert same(train(1), train(1, manual=5, other=3))
    assert not same(train(1), train(2))
    assert same(train(manual=5), train(manual=5, other=3))
    assert not same(train(manual=5), train(manual=6))
    state = torch.get_rng_state()
    train(1)
    torch.manual_seed(0)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(after, torch.get_rng_state()) and state.shape == after.shape


def test_two_optimizers_draw_different_noise_and_share_one_norm():
    net, other = make_net(), make_net()
    optimizers = [sgd(net.parameters()), sgd(other.parameters())]
    sam = S2SAM(optimizers, model=[net, other], rho=0.2, direction="random")
    x, y = make_data(1)[0]
    (F.cross_entropy(net(x), y) + F.cross_entropy(other(x), y)).backward()
    for o in optimizers:
        o.step()
    noise = [[o.state[p][BUFFER] for p in o.param_groups[0]["params"]] for o in optimizers]
    assert not same(*noise)
    both = [*net.parameters(), *other.parameters()]
    w = [p.detach().clone() for p in both]
    with sam.displaced():
        assert total([p - q for p, q in zip(both, w, strict=True)]) == pytest.approx(0.2, rel=1e-9)
