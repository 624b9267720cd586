"""What scales and scopes promise: the form of e, who takes part, what it costs."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sam_common import (
    counted,
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

from s2sam import S2SAM
from s2sam.sam.directions import DIRECTIONS
from s2sam.sam.scales import filterwise
from s2sam.sam.scope import is_norm_layer

BUFFER, EMA = "s2sam_buffer", "s2sam_ema"


# scale="step"


@pytest.mark.parametrize("mu", [0.5, 0.9])
def test_minus_momentum_by_steps_is_nesterov(mu):
    """x_t = w_t - lr mu m_t; torch's Nesterov keeps x_t as its weights, starting from x_0 = w_0."""
    net, published = make_net(), make_net()
    ours = torch.optim.SGD(net.parameters(), lr=0.1, momentum=mu)
    S2SAM(ours, model=net, rho=mu, direction="momentum", sign=-1, scale="step")
    torchs = torch.optim.SGD(published.parameters(), lr=0.1, momentum=mu, nesterov=True)
    for step, (x, y) in enumerate(make_data(60)):
        w = snapshot(net)
        m = [ours.state[p]["momentum_buffer"].clone() if step else torch.zeros_like(p) for p in net.parameters()]
        F.cross_entropy(net(x), y).backward()  # the parameters hold x now
        point = [a - 0.1 * mu * b for a, b in zip(w, m, strict=True)]
        assert distance(net.parameters(), point) < 1e-14
        assert distance(net.parameters(), published.parameters()) < 1e-12
        ours.step()
        ours.zero_grad()
        take_step(published, torchs, (x, y))
    assert distance(published.parameters(), snapshot(make_net())) > 0.1
    assert distance(net.parameters(), published.parameters()) > 1e-6  # w is not x


def test_step_scale_uses_the_learning_rate_of_the_coming_window_and_of_each_group():
    net = make_net()
    first, *rest = net.parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.4}, {"params": rest}], lr=0.1)
    sam = S2SAM(optimizer, model=net, rho=2.0, scale="step")
    take_step(net, optimizer, make_data(1)[0])
    g = [optimizer.state[p][BUFFER].clone() for p in net.parameters()]
    optimizer.param_groups[1]["lr"] = 0.05  # a scheduler, after the step
    e = displacement(net, sam)
    assert distance(e, [2 * 0.4 * g[0], *(2 * 0.05 * v for v in g[1:])]) < 1e-14
    optimizer.param_groups[1]["lr"] = 0.0
    e = displacement(net, sam)
    assert total(e[1:]) == 0 and total(e) == pytest.approx(0.8 * total(g[:1]))


# scale="filter"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_each_filter_is_as_long_as_its_weights_say(dtype):
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 3)).to(dtype)
    with torch.no_grad():
        net[0].weight[1] = 0.0  # a dead filter
        net[1].bias.fill_(0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    sam = S2SAM(optimizer, model=net, rho=0.2, scale="filter")
    g = torch.Generator().manual_seed(0)
    w = snapshot(net)
    for p in net.parameters():
        p.grad = (torch.randn(p.shape, generator=g) * 1e-3).to(dtype)
    net[0].weight.grad[2] = 0.0  # no direction
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    e = displacement(net, sam)
    assert same(net.parameters(), w)
    rel = 1e-9 if dtype == torch.float64 else 0.05
    for p, v, q in zip(net.parameters(), e, w, strict=True):
        if p.dim() < 2:
            assert float(v.abs().max()) == 0 and BUFFER not in optimizer.state[p]
            continue
        for f in range(p.shape[0]):
            dead = p is net[0].weight and f in (1, 2)
            assert total([v[f]]) == pytest.approx(0.0 if dead else 0.2 * total([q[f]]), rel=rel), f
    alive = [w[0][[0, 3, 4]], w[4]]
    assert total(e) == pytest.approx(0.2 * total(alive), rel=rel)


@settings(max_examples=40)
@given(data=st.data(), shape=st.sampled_from([(3, 4), (1, 5), (4, 1), (2, 3, 2, 2), (3,), ()]))
def test_filterwise_is_the_loop_over_filters(data, shape):
    def draw():
        n = int(torch.tensor(shape).prod()) if shape else 1
        values = st.sampled_from([0.0, 0.0, 1.0, -2.5, 1e-12, 1e12])
        return torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)), dtype=torch.float64).reshape(shape)

    d, w = draw(), draw()
    expected = torch.zeros(shape, dtype=torch.float64)
    for f in range(shape[0] if len(shape) > 1 else 0):
        if float(d[f].norm()) > 0:
            expected[f] = w[f].norm() * d[f] / d[f].norm()
    assert torch.allclose(filterwise([d], [w])[0], expected, rtol=1e-12, atol=0)


# scope


class ScaledNorm(nn.Module):
    """A normalisation layer of one's own, known by its name alone."""

    def __init__(self, n):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(n))

    def forward(self, x):
        return self.gain * x / x.norm(dim=1, keepdim=True)


class Normal(nn.Linear):
    """No normalisation layer."""


def test_what_counts_as_a_normalisation_layer():
    yes = [nn.BatchNorm1d(2), nn.SyncBatchNorm(2), nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2)]
    yes += [nn.RMSNorm(2), ScaledNorm(2), type("LayerNorm2d", (nn.Module,), {})()]
    yes += [type("BatchNormAct2d", (nn.BatchNorm2d,), {})(2)]
    no = [nn.Linear(2, 2), Normal(2, 2), nn.Conv2d(1, 1, 1), nn.Embedding(2, 2), type("NormFree", (nn.Module,), {})()]
    assert all(map(is_norm_layer, yes)) and not any(map(is_norm_layer, no))


def mixed():
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5), ScaledNorm(5), Normal(5, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return net.double()


INSIDE = {"all": range(9), "weights": (0, 4, 7), "norm": (2, 3, 6)}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scope", INSIDE)
def test_what_is_out_of_scope_has_no_buffer_no_displacement_and_is_not_in_the_norm(scope, direction):
    net = mixed()
    optimizer = sgd(net.parameters())
    sam = S2SAM(optimizer, model=net, rho=0.2, scope=scope, direction=direction, scale="relative")
    for batch in make_data(3):
        take_step(net, optimizer, batch)
    e, w = displacement(net, sam), snapshot(net)
    for i, (p, v) in enumerate(zip(net.parameters(), e, strict=True)):
        assert (float(v.abs().max()) > 0) == (i in INSIDE[scope] and not (direction == "gradient" and total([v]) == 0))
        assert (BUFFER in optimizer.state[p]) == (i in INSIDE[scope])
    assert total(e) == pytest.approx(0.2 * total([w[i] for i in INSIDE[scope]]), rel=1e-9)


def test_out_of_scope_is_out_of_the_guard_and_new_parameters_are_sorted_in():
    net = mixed()
    head, rest = net[5], nn.ModuleList(net[:5])
    optimizer = sgd(rest.parameters())
    sam = S2SAM(optimizer, model=net, scope="norm", rho=0.2)
    for batch in make_data(2):
        take_step(net, optimizer, batch)
    optimizer.zero_grad()
    rest[0].weight.grad = torch.ones_like(rest[0].weight)  # taken who knows where
    optimizer.step()
    rest[1].weight.grad = torch.ones_like(rest[1].weight)
    with pytest.raises(RuntimeError, match="clean weights"):
        optimizer.step()
    optimizer.zero_grad()
    net.append(nn.LayerNorm(3).double())
    optimizer.add_param_group({"params": [*head.parameters(), *net[6].parameters()]})
    for batch in make_data(2):
        take_step(net, optimizer, batch)
    assert not any(BUFFER in optimizer.state[p] for p in head.parameters())
    assert all(BUFFER in optimizer.state[p] for p in net[6].parameters())
    assert total(displacement(net, sam)) == pytest.approx(0.2)


def test_a_checkpoint_of_a_wider_scope_leaves_no_buffers_outside():
    net, optimizer = mixed(), None
    optimizer = sgd(net.parameters())
    S2SAM(optimizer, model=net, direction="ema")
    for batch in make_data(2):
        take_step(net, optimizer, batch)
    fresh = mixed()
    narrow = sgd(fresh.parameters())
    S2SAM(narrow, model=fresh, direction="ema", scope="norm")
    narrow.load_state_dict(optimizer.state_dict())
    kept = [i for i, p in enumerate(fresh.parameters()) if {BUFFER, EMA} & set(narrow.state[p])]
    assert kept == list(INSIDE["norm"])
    assert all("momentum_buffer" in narrow.state[p] for p in fresh.parameters())


@pytest.mark.parametrize("kind", ["default", "fused"])
def test_norm_scope_costs_next_to_nothing(kind):
    def build():
        net = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(20)))
        return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=kind == "fused" or None)

    base, n = counted(*build(), None), sum(p.numel() for p in build()[0].parameters())
    costs = {}
    for scope, nonfinite in itertools.product(("all", "norm"), ("auto", "ignore")):
        net, optimizer = build()
        count = counted(net, optimizer, S2SAM(optimizer, model=net, scope=scope, nonfinite=nonfinite))
        costs[scope, nonfinite] = count
    added = {key: (count.bytes - base.bytes) / n for key, count in costs.items()}
    assert added["all", "ignore"] > 40
    assert added["norm", "ignore"] < 2.0  # 3 % of the parameters, and the norms of 40 tensors
    assert added["norm", "auto"] < 6.0  # and one look at all gradients
    assert costs["norm", "auto"].calls <= costs["all", "auto"].calls
    assert costs["norm", "auto"].syncs == (0 if kind == "fused" else 1)


COSTS = [
    ({"direction": "ema"}, 56, 13),
    ({"direction": "random"}, 108, 23),  # one draw and two views for each shape
    ({"scale": "step"}, 48, 9),  # no norm
    ({"scale": "filter"}, 80, 17),  # nine calls for each shape
]


@pytest.mark.parametrize(("options", "moved_bytes", "calls"), COSTS, ids=[str(i) for i in range(len(COSTS))])
def test_cost_of_the_options(options, moved_bytes, calls):
    def measure(attach):
        net = nn.ParameterList([nn.Parameter(torch.ones(4, 1000)) for _ in range(100)])
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=True)
        return counted(net, optimizer, S2SAM(optimizer, **options) if attach else None)

    ours, base = measure(True), measure(False)
    assert (ours.bytes - base.bytes) / 400_000 == pytest.approx(moved_bytes, abs=0.1)
    assert ours.calls - base.calls <= calls
    assert ours.syncs == 1


@pytest.mark.parametrize("scale", ["step", "filter"])
def test_without_a_common_norm_a_skipped_optimizer_keeps_its_x_bit_for_bit(scale):
    """Its neighbour's new direction is none of its business; under "norm" it would share the radius anew."""
    net, other = make_net(torch.float32), make_net(torch.float32, seed=1)
    optimizers = [sgd(net.parameters()), sgd(other.parameters())]
    sam = S2SAM(optimizers, model=[net, other], rho=0.2, scale=scale)
    xs = []
    for step, (x, y) in enumerate(make_data(5, torch.float32)):
        loss = F.cross_entropy(net(x * float("nan") if step == 3 else x), y) + F.cross_entropy(other(x), y)
        loss.backward()
        xs.append((snapshot(net), snapshot(other)))
        for o in optimizers:
            o.step()
            o.zero_grad()
    assert sam.stats["skipped"] == 1
    assert same(xs[3][0], xs[4][0]) and not same(xs[3][1], xs[4][1])
