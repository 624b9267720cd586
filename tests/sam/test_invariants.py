"""Invariants 1, 2 and 5 of the design: rho = 0, exact restore, radius, storages."""

import pytest
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, WITHOUT_MOMENTUM, distance, make_data, make_net, same, snapshot, total

from s2sam import S2SAM


def train(factory, steps, *, attach=None, dtype=torch.float32, set_to_none=True, on_forward=None, data=None):
    """Train the net; returns its final weights, the optimizer, and what `on_forward` saw."""
    net = make_net(dtype)
    optimizer = factory(net.parameters())
    sam = attach(optimizer, net) if attach else None
    seen = []
    if on_forward:
        net[0].register_forward_hook(lambda *_: seen.append(on_forward(net)))
    for x, y in data or make_data(steps, dtype):
        before = snapshot(net)
        F.cross_entropy(net(x), y).backward()
        if on_forward and seen:
            seen[-1] = [a - b for a, b in zip(seen[-1], before, strict=True)]
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return snapshot(net), optimizer, seen, sam


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_rho_zero_is_bit_equal_to_the_base_optimizer(name, direction):
    if direction == "momentum" and name in WITHOUT_MOMENTUM:
        pytest.skip("this optimizer has no momentum buffer")
    plain, base, _, _ = train(FACTORIES[name], 25)
    ours, optimizer, _, _ = train(
        FACTORIES[name], 25, attach=lambda o, m: S2SAM(o, model=m, rho=0.0, direction=direction)
    )
    assert same(plain, ours)
    for a, b in zip(base.state_dict()["state"].values(), optimizer.state_dict()["state"].values(), strict=False):
        assert set(b) - set(a) == {"s2sam_buffer"}
        for key, value in a.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[key])), key


@pytest.mark.parametrize("name", ["sgd", "sgd-fused", "adamw"])
def test_a_positive_rho_changes_the_trajectory(name):
    plain, *_ = train(FACTORIES[name], 25)
    ours, *_ = train(FACTORIES[name], 25, attach=lambda o, m: S2SAM(o, model=m, rho=0.05))
    assert distance(plain, ours) > 1e-4


@pytest.mark.parametrize("name", FACTORIES)
def test_set_to_none_and_zeros_give_the_same_trajectory_bit_for_bit(name):
    runs = [
        train(FACTORIES[name], 25, set_to_none=flag, attach=lambda o, m: S2SAM(o, model=m, rho=0.05))[0]
        for flag in (True, False)
    ]
    assert same(*runs)


@pytest.mark.parametrize("scale", ["norm", "relative"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["sgd", "sgd-fused", "adamw", "adafactor"])
def test_every_step_after_the_first_has_the_promised_radius(name, sign, scale):
    rho = 0.05
    weights = []

    def look(net):
        weights.append(None)
        return snapshot(net)

    def attach(optimizer, net):
        return S2SAM(optimizer, model=net, rho=rho, sign=sign, scale=scale, stats_every=1)

    _, _, moves, sam = train(FACTORIES[name], 12, on_forward=look, attach=attach)
    norms = [total(move) for move in moves]
    assert norms[0] == 0.0
    if scale == "norm":
        assert norms[1:] == pytest.approx([rho] * 11, rel=1e-3)
        assert sam.stats["displacement"] == pytest.approx(norms[-1], rel=1e-5)
    else:
        assert min(norms[1:]) > 0 and sam.stats["displacement"] == pytest.approx(norms[-1], rel=1e-5)


def test_relative_scale_is_rho_times_the_norm_of_the_weights():
    net = make_net()
    optimizer = FACTORIES["sgd"](net.parameters())
    S2SAM(optimizer, model=net, rho=0.1, scale="relative")
    for x, y in make_data(6):
        w = snapshot(net)
        F.cross_entropy(net(x), y).backward()
        move = total([a - b for a, b in zip(net.parameters(), w, strict=True)])
        optimizer.step()
        optimizer.zero_grad()
    assert move == pytest.approx(0.1 * total(w), rel=1e-9)


def test_asam_hand_value():
    """w = (3, 4), d = (1, 2): e = rho w^2 d / || |w| d || = rho (9, 32) / sqrt(73)."""
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.0)
    sam = S2SAM(optimizer, rho=0.5, scale="asam")
    w.grad = torch.tensor([1.0, 2.0], dtype=torch.float64)
    optimizer.step()
    with sam.displaced():
        e = w.detach() - torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert torch.allclose(e, 0.5 * torch.tensor([9.0, 32.0], dtype=torch.float64) / 73**0.5, rtol=1e-14, atol=0)


def test_asam_is_invariant_to_rescaling_between_layers():
    """f(w1, w2) = w1 w2 is unchanged by (a w1, w2 / a); so is ASAM's displaced function value."""
    values = []
    for a in (1.0, 7.0):
        w = [torch.nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (0.8 * a, 1.5 / a)]
        optimizer = torch.optim.SGD(w, lr=0.0)
        sam = S2SAM(optimizer, rho=0.3, scale="asam")
        (w[0] * w[1]).sum().backward()
        optimizer.step()
        with sam.displaced():
            values.append((w[0] * w[1]).item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert values[0] != pytest.approx(1.2, rel=1e-3)


def test_hand_calculation_on_a_quadratic():
    """L = x^2 / 2, w0 = 3, lr 0.1, rho 1: g = 3; x1 = 2.7 + 1, g = 3.7; w2 = 2.33; x2 = 3.33, w3 = 1.997."""
    net = torch.nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        net.weight.fill_(3.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    S2SAM(optimizer, model=net, rho=1.0)
    one = torch.ones(1, 1, dtype=torch.float64)
    path = []
    for _ in range(3):
        (net(one) ** 2 / 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        path.append(net.weight.item())
    assert path == pytest.approx([2.7, 2.33, 1.997], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["norm", "asam"])
def test_restore_is_bit_exact(dtype, scale):
    net = make_net(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sam = S2SAM(optimizer, model=net, rho=3.0, scale=scale)
    bits = torch.int16 if dtype != torch.float32 else torch.int32
    for x, y in make_data(10, dtype):
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            net[0].weight[0, 0] = -0.0
            net[0].weight[0, 1] = 6e-8 if dtype != torch.float32 else 1e-42  # a denormal
        w = [p.view(bits) for p in snapshot(net)]
        with sam.displaced():  # ends by a swap
            assert not same([p.detach().view(bits) for p in net.parameters()], w)
        assert same([p.detach().view(bits) for p in net.parameters()], w)
        sam.displace()
        optimizer.zero_grad()
        optimizer.step()  # no gradients: nothing but the copy back
        assert same([p.detach().view(bits) for p in net.parameters()], w)


def test_bfloat16_reports_the_projection_on_the_intended_direction():
    net = make_net(torch.bfloat16)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    sam = S2SAM(optimizer, model=net, rho=0.01, stats_every=1)
    for x, y in make_data(5, torch.bfloat16):
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sam.stats["projection"] == pytest.approx(0.01, rel=0.2)
    assert sam.stats["displacement"] >= sam.stats["projection"]


def test_groups_with_rho_zero_are_not_in_the_norm_and_do_not_move():
    net = make_net()
    first, *rest = net.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "rho": 0.0}, {"params": rest}], lr=0.1)
    S2SAM(optimizer, model=net, rho=0.05)
    assert [g["rho"] for g in optimizer.param_groups] == [0.0, 0.05]
    for x, y in make_data(4):
        w = snapshot(net)
        F.cross_entropy(net(x), y).backward()
        moves = [p.detach() - q for p, q in zip(net.parameters(), w, strict=True)]
        optimizer.step()
        optimizer.zero_grad()
    assert float(moves[0].abs().max()) == 0.0
    assert total(moves[1:]) == pytest.approx(0.05, rel=1e-9)


def test_per_group_rho_shares_one_norm():
    net = make_net()
    first, *rest = net.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "rho": 0.2}, {"params": rest}], lr=0.1)
    S2SAM(optimizer, model=net, rho=0.05)
    g = None
    for x, y in make_data(4):
        w = snapshot(net)
        F.cross_entropy(net(x), y).backward()
        moves = [p.detach() - q for p, q in zip(net.parameters(), w, strict=True)]
        if g is not None:
            norm = total(g)
            assert torch.allclose(moves[0], 0.2 * g[0] / norm, atol=1e-15)
            assert torch.allclose(moves[1], 0.05 * g[1] / norm, atol=1e-15)
        g = [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        optimizer.zero_grad()


def test_rho_schedule_multiplies_and_counts_steps():
    net = make_net()
    optimizer = torch.optim.SGD([{"params": net.parameters(), "rho": 0.1}], lr=0.1)
    sam = S2SAM(optimizer, model=net, rho=lambda step: 0.0 if step < 3 else step / 10, stats_every=1)
    norms = []
    for x, y in make_data(6):
        w = snapshot(net)
        F.cross_entropy(net(x), y).backward()
        norms.append(total([p - q for p, q in zip(net.parameters(), w, strict=True)]))
        optimizer.step()
        optimizer.zero_grad()
    assert norms == pytest.approx([0, 0, 0, 0.03, 0.04, 0.05], rel=1e-9)
    assert sam.stats["displacement"] == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["sgd", "adamw-fused"])
def test_storages_of_weights_and_buffers_stay_put(name):
    net = make_net()
    optimizer = FACTORIES[name](net.parameters())
    S2SAM(optimizer, model=net, rho=0.05)
    pointers = set()
    for x, y in make_data(8):
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.numel() > 1]
        pointers.add(tuple(t.data_ptr() for t in [*net.parameters(), *state]))
    assert len(pointers) == 1
    base = {"sgd": 1, "adamw-fused": 2}[name]
    assert len(state) == (base + 1) * 3  # one persistent buffer per parameter


def test_large_tensors_are_moved_in_pieces(monkeypatch):
    from s2sam.sam import displacement

    monkeypatch.setattr(displacement, "SCRATCH_BYTES", 64)
    ours, *_ = train(FACTORIES["sgd"], 10, attach=lambda o, m: S2SAM(o, model=m, rho=0.05, scale="asam"))
    monkeypatch.undo()
    whole, *_ = train(FACTORIES["sgd"], 10, attach=lambda o, m: S2SAM(o, model=m, rho=0.05, scale="asam"))
    assert distance(ours, whole) < 1e-6
    a = torch.arange(40.0).view(10, 4)
    monkeypatch.setattr(displacement, "SCRATCH_BYTES", 64)
    runs = list(displacement.pieces([a, a[:1]], [a + 1, a[:1]]))
    assert all(sum(t.numel() * 4 for t in run[0]) <= 64 for run in runs)
    assert sorted(torch.cat([t.flatten() for run in runs for t in run[0]]).tolist()) == sorted([*range(40), 0, 1, 2, 3])
