"""SRigL by hand: equal fan-ins, what each neuron keeps and grows, which neurons go, and that none comes back."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2sam import S2SAM, sparsify
from s2sam.sparse.methods.srigl import constant, fan_ins, per_row

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import generator, golden, make_batches, make_net, one_step, shaped_states, step_by

# three neurons with two inputs each
MASK = [1, 1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 1]
WEIGHTS = [0.9, 0.2, 0, 0, 0, -0.8, 0.7, 0, -0.1, 0, 0, 0.3]
HALF = {"delta_t": 1, "total_steps": 10**6, "t_end": 1.0, "drop_fraction": 0.5}  # 3 of 6


def rows(mask):
    return mask.flatten(1).sum(1).tolist()


def active(srigl, name="weight"):
    return srigl.masks[name].flatten().nonzero().flatten().tolist()


def test_golden_exchange_without_ablation():
    layer, optimizer, srigl = golden(MASK, WEIGHTS, "srigl", **HALF, gamma_sal=0.0)
    before = layer.weight.detach().clone()
    #                          kept: .9        kept: -.8 and .7    kept: none
    step_by(layer, optimizer, [9, 0.1, 0, 0.3, 9, 9, 9, 9, 0.4, 0.1, 0.5, 0.2])
    # row 0 grows 3; row 1 has its two; row 2 grows 10 and takes -.1 back, which its gradient .4 is for
    assert active(srigl) == [0, 3, 5, 6, 8, 10]
    assert layer.weight.detach().flatten().tolist() == pytest.approx([0.9, 0, 0, 0, 0, -0.8, 0.7, 0, -0.1, 0, 0, 0])
    assert torch.equal(layer.weight.detach(), before * srigl.masks["weight"]), "in place of the step"
    assert srigl.last_update.dropped == srigl.last_update.grown == {"weight": 2}
    assert layer.weight.grad.flatten()[[3, 10]].abs().sum() == 0
    assert srigl.target_sparsity(1) == srigl.sparsity() == 0.5


def pair(**options):
    """Layers "a", whose neurons may go, and "b", whose may not, as in :func:`golden`."""
    net = nn.ModuleDict({name: nn.Linear(4, 3, bias=False) for name in ("a", "b")})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    options = {**HALF, "distribution": "uniform"} | options
    srigl = sparsify(net, optimizer, method="srigl", sparsity=0.5, generator=generator(), **options)
    with torch.no_grad():
        for name in ("a", "b"):
            srigl.masks[f"{name}.weight"].copy_(torch.tensor(MASK).view(3, 4))
            net[name].weight.copy_(torch.tensor(WEIGHTS).view(3, 4))
    return net, optimizer, srigl


def test_golden_ablation():
    net, optimizer, srigl = pair(gamma_sal=1.0)
    grad = [9.0, 0.1, 0, 0.3, 0, 9, 9, 0, 0.4, 0.1, 0.5, 0.2]
    step_by(net, optimizer, grad, grad)
    # salient: .9 -.8 .7 by size, 0 5 6 by gradient: 1, 2 and 0 of them in the rows of a, and each row needs 2;
    # ceil(6 / 4) = 2 rows stay, so the first one does; they share the six weights, three each
    assert rows(srigl.masks["a.weight"]) == [3, 3, 0]
    assert active(srigl, "a.weight") == [0, 1, 3, 4, 5, 6]
    assert rows(srigl.masks["b.weight"]) == [2, 2, 2], "the last layer keeps its neurons"
    assert srigl.neurons() == {"a.weight": 2, "b.weight": 3}
    step_by(net, optimizer, [0.0] * 8 + [99.0] * 4)
    assert rows(srigl.masks["a.weight"]) == [3, 3, 0], "a neuron that has gone does not come back"


def test_layers_named_keep_their_neurons():
    net, optimizer, srigl = pair(gamma_sal=1.0, no_ablation=["a"])
    grad = [9.0, 0.1, 0, 0.3, 0, 9, 9, 0, 0.4, 0.1, 0.5, 0.2]
    step_by(net, optimizer, grad, grad)
    assert srigl.neurons() == {"a.weight": 3, "b.weight": 2}


def test_a_weight_that_is_0_is_not_salient():
    for last, left in ((0.3, 3), (0.0, 2)):
        net, optimizer, srigl = pair(gamma_sal=0.5, drop_fraction=0.2)  # 5 of 6 by size, 1 by gradient
        with torch.no_grad():
            net["a"].weight[2] = torch.tensor([last, 0.0, 0.0, last])
            net["a"].weight[1].mul_(srigl.masks["a.weight"][1])
        step_by(net, optimizer, [9.0])
        assert srigl.neurons()["a.weight"] == left


def test_the_gradients_of_neurons_that_have_gone_do_not_matter():
    found = []
    for value in (0.0, 50.0):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
        srigl = sparsify(net, optimizer, method="srigl", sparsity=0.8, generator=generator(), total_steps=40, delta_t=2,
                         drop_fraction=0.8, gamma_sal=0.9)  # fmt: skip
        for batch in make_batches(9):
            one_step(net, optimizer, batch)
        gone = {name: ~mask.flatten(1).any(1) for name, mask in srigl.masks.items()}
        for i, (name, p) in enumerate(net.named_parameters()):
            p.grad = torch.randn(p.shape, generator=generator(i))
            p.grad[gone[name]] = value
        optimizer.step()
        found.append(torch.cat([mask.flatten() for mask in srigl.masks.values()]))
    assert srigl.updates == 5 and int(gone["2.weight"].sum()) > 0
    assert torch.equal(*found)


@settings(max_examples=25, deadline=None)
@given(
    sparsity=st.floats(0.0, 0.95), gamma=st.sampled_from([0.0, 0.3, 0.9]), seed=st.integers(0, 99),
    fraction=st.floats(0.05, 1.0), distribution=st.sampled_from(["erk", "uniform", "global", "uniform-first-dense"]),
)  # fmt: skip
def test_every_active_neuron_has_as_many_inputs_at_every_step(sparsity, gamma, seed, fraction, distribution):
    net = make_net(seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    srigl = sparsify(
        net, optimizer, method="srigl", sparsity=sparsity, generator=generator(seed), total_steps=20, delta_t=2,
        drop_fraction=fraction, gamma_sal=gamma, distribution=distribution,
    )  # fmt: skip
    alive, updates = {}, 0
    for batch in make_batches(12, seed):
        kept = dict(srigl.parts[0].kept)
        one_step(net, optimizer, batch)
        for name, mask in srigl.masks.items():
            inputs = rows(mask)
            assert len({n for n in inputs if n}) == 1
            assert sum(inputs) == srigl.parts[0].kept[name] > 0
            now = {i for i, n in enumerate(inputs) if n}
            assert now <= alive.get(name, now), "no neuron comes back"
            if gamma == 0.0 or name == "4.weight":
                assert len(now) == len(alive.get(name, now))
            alive[name] = now
            assert len(now) >= -(-srigl.aim[name] // srigl.fan[name])
            weight = net.get_parameter(name)
            assert weight[~mask].abs().sum() == 0
            assert all(s[~mask].abs().sum() == 0 for s in shaped_states(optimizer, weight))
        if srigl.updates == updates or gamma == 0.0:
            assert srigl.parts[0].kept == kept
        updates = srigl.updates
    assert srigl.sparsity() == pytest.approx(srigl.target_sparsity(12))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rounding_is_left_to_the_layer_with_the_fewest_neurons(data):
    names = [f"l{i}" for i in range(data.draw(st.integers(1, 6)))]
    neurons = {n: data.draw(st.integers(1, 400)) for n in names}
    fan = {n: data.draw(st.integers(400, 2000)) for n in names}
    aim = {n: data.draw(st.integers(neurons[n] * 20, neurons[n] * (fan[n] - 320))) for n in names}
    found = fan_ins(aim, neurons, fan)
    total = sum(found[n] * neurons[n] for n in names)
    few = min(neurons.values())
    if all(1 < found[n] < fan[n] for n in names):
        assert abs(total - sum(aim.values())) <= few / 2
    for n in names:
        assert 1 <= found[n] <= fan[n]


def test_a_budget_below_one_weight_a_neuron_starts_with_fewer_neurons():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    srigl = sparsify(net, optimizer, method="srigl", sparsity=0.95, total_steps=10, generator=generator())
    assert srigl.neurons() == {"0.weight": 4, "2.weight": 4, "4.weight": 3}
    assert sum(srigl.parts[0].kept.values()) == 11 == round(0.05 * 222)


def test_a_layer_that_is_dense_stays_dense():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    srigl = sparsify(net, optimizer, method="srigl", sparsity=0.7, distribution="uniform-first-dense", total_steps=20,
                     delta_t=1, generator=generator())  # fmt: skip
    for batch in make_batches(8):
        one_step(net, optimizer, batch)
    assert srigl.updates == 8
    assert srigl.density()["0.weight"] == 1.0


def test_random_inputs_are_spread():
    layer = nn.Linear(200, 50)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    srigl = sparsify(layer, optimizer, method="srigl", sparsity=0.9, total_steps=10, generator=generator())
    mask = srigl.masks["weight"]
    assert rows(mask) == [20] * 50
    assert 0 < int(mask.sum(0).max()) < 15 and int((mask.sum(0) > 0).sum()) > 180


def test_per_row_is_exact_where_scores_tie():
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 2.0], [-torch.inf, 3.0, -torch.inf, 3.0]])
    assert per_row(scores, 2).int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    none = constant(scores, scores, torch.tensor([False, True, False]), 3, 1)
    assert none.int().tolist() == [[0] * 4, [0, 1, 1, 1], [0] * 4]


def test_a_layer_without_a_gradient_stays():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    srigl = sparsify(net, optimizer, method="srigl", sparsity=0.7, total_steps=20, delta_t=1, generator=generator())
    before = {name: mask.clone() for name, mask in srigl.masks.items()}
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator(5))
    net[0].weight.grad = None
    optimizer.step()
    assert torch.equal(before["0.weight"], srigl.masks["0.weight"])
    assert not torch.equal(before["2.weight"], srigl.masks["2.weight"])


def test_convolutions_have_filters_and_s2sam_stays_on_the_mask():
    net = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=2), nn.Flatten(), nn.Linear(32, 5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    srigl = sparsify(net, optimizer, method="srigl", sparsity=0.9, total_steps=20, delta_t=2, generator=generator())
    sam = S2SAM(optimizer, model=net, rho=0.05)
    g, displaced = generator(1), 0
    for _ in range(8):
        optimizer.zero_grad()
        out = net(torch.randn(8, 4, 6, 6, generator=g))
        displaced += sam.is_displaced
        for name, mask in srigl.masks.items():
            assert net.get_parameter(name)[~mask].abs().sum() == 0
        out.square().sum().backward()
        optimizer.step()
    assert displaced == 7 and srigl.updates == 4
    for mask in srigl.masks.values():
        assert len({n for n in rows(mask) if n}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "give total_steps"),
        ({"t_end": None}, "needs a t_end"),
        ({"gamma_sal": 2}, "gamma_sal must be"),
        ({"drop_fraction": -1}, "drop_fraction must be"),
        ({"delta_t": 0}, "delta_t must be"),
        ({"no_ablation": "head"}, "no_ablation must be a list"),
        ({"no_ablation": ["wieght"]}, "unknown layer 'wieght'; did you mean 'weight'"),
        ({"regrow_dropped": True}, "unknown option of method 'srigl'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        golden(MASK, WEIGHTS, "srigl", **{"total_steps": 10} | options)


def test_transposed_convolutions_are_refused():
    net = nn.Sequential(nn.ConvTranspose2d(2, 3, 3))
    with pytest.raises(ValueError, match="leave it dense with exclude='0.weight'"):
        sparsify(net, torch.optim.SGD(net.parameters(), lr=0.1), method="srigl", sparsity=0.5, total_steps=10,
                 include="0.weight")  # fmt: skip
