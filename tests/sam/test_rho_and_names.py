"""Schedules of rho, the paper's variant by name, and what cannot be."""

import gc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sam_common import (
    attached,
    counted,
    make_data,
    make_net,
    moved,
    same,
    sgd,
    snapshot,
    take_step,
)
from torch import nn

from s2sam import S2SAM, SAM, sparsify
from s2sam.sam.directions import DIRECTIONS
from s2sam.sam.rho import clean_growth, late, like_lr, rising

X = make_data(1)[0][0]


def lengths(net, optimizer, steps, after):
    """||x - w|| in each of some training steps; `after` is called when one is done."""
    found = []
    for x, y in make_data(steps):
        w = snapshot(net)
        F.cross_entropy(net(x), y).backward()
        found.append(moved(net, w))
        optimizer.step()
        optimizer.zero_grad()
        after()
    return found


# rho as a function


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_late_is_the_base_optimizer_bit_for_bit_until_it_starts(direction):
    net, plain = make_net(torch.float32), make_net(torch.float32)
    optimizer, base = sgd(net.parameters()), sgd(plain.parameters())
    S2SAM(optimizer, model=net, direction=direction, rho=late(12, 0.5))
    for step, (x, y) in enumerate(make_data(12, torch.float32)):
        take_step(plain, base, (x, y))
        w = snapshot(net)
        F.cross_entropy(net(x), y).backward()
        assert moved(net, w) == pytest.approx(1.0 if step >= 6 else 0.0, rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
        assert same(net.parameters(), plain.parameters()) == (step < 6)


def test_before_late_starts_nothing_but_the_direction_is_kept():
    net = nn.ParameterList([nn.Parameter(torch.ones(1000)) for _ in range(50)])
    plain = nn.ParameterList([nn.Parameter(torch.ones(1000)) for _ in range(50)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sam = S2SAM(optimizer, rho=late(100), nonfinite="ignore")
    base = counted(plain, torch.optim.SGD(plain.parameters(), lr=0.1), None)
    assert counted(net, optimizer, sam).by_name - base.by_name == {"_foreach_copy_": 1}


def test_the_radius_is_the_product_with_the_groups_rho():
    net = make_net()
    optimizer = torch.optim.SGD([{"params": net.parameters(), "rho": 0.2}], lr=0.4)
    factors = {"rising": rising(8, power=2.0), "lr": like_lr(optimizer)}
    S2SAM(optimizer, model=net, rho=lambda t: factors["rising"](t) * factors["lr"](t))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, total_iters=6)
    radii = lengths(net, optimizer, 6, schedule.step)
    assert radii == pytest.approx([0.2 * (t / 8) ** 2 * (1 - 0.125 * t) for t in range(6)], rel=1e-9)


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_growth_is_chosen_by_the_gradient_at_the_clean_weights(method):
    net = make_net()
    optimizer = sgd(net.parameters())
    sparsifier = sparsify(net, optimizer, method=method, sparsity=0.5, total_steps=100, delta_t=3, include=[""])
    S2SAM(optimizer, model=net, rho=clean_growth(sparsifier, rho=late(100, 0.02, rho=0.2)))
    kept = []
    found = lengths(net, optimizer, 9, lambda: kept.append([mask.clone() for mask in sparsifier.masks.values()]))
    by_gradient = method == "rigl"  # the others change their masks after a step that moves the weights
    want = [0.0 if t < 2 or (by_gradient and (t + 1) % 3 == 0) else 0.2 for t in range(9)]
    assert found == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert not all(torch.equal(a, b) for a, b in zip(kept[1], kept[8], strict=True))  # the topology did change


@given(total_steps=st.integers(1, 10**5), start=st.floats(0, 1), power=st.floats(0.1, 4), step=st.integers(0, 10**5))
def test_schedules_stay_between_0_and_1_and_never_fall(total_steps, start, power, step):
    for f in (late(total_steps, start), rising(total_steps, power)):
        assert 0 <= f(step) <= f(step + 1) <= 1
        assert f(total_steps) == 1
    assert late(total_steps, start)(step) == (step >= start * total_steps)


def test_like_lr_counts_from_the_learning_rate_that_the_scheduler_started_from():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    factor = like_lr(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (t + 1) / 4)  # a warm-up: 0.025 to begin with
    assert factor(0) == pytest.approx(0.25) and like_lr(optimizer)(0) == pytest.approx(0.25)
    optimizer.step()
    schedule.step()
    assert factor(0) == pytest.approx(0.5)
    del schedule
    for group in (optimizer.param_groups,):
        group.clear()
    del optimizer
    gc.collect()
    with pytest.raises(ValueError, match="is gone; keep a reference"):
        factor(1)


# by name


def test_the_paper_by_name():
    net, twin = make_net(), make_net()
    optimizers = [sgd(net.parameters()), sgd(twin.parameters())]
    S2SAM.paper(optimizers[0], model=net, rho=0.1, stats_every=1)
    S2SAM(optimizers[1], model=twin, rho=0.1, direction="gradient", sign=1, scale="norm", scope="all")
    for batch in make_data(4):
        for n, o in zip((net, twin), optimizers, strict=True):
            take_step(n, o, batch)
    assert same(net.parameters(), twin.parameters())
    S2SAM.paper(sgd(make_net().parameters()), direction="gradient", sign=1)


BAD = [
    ({"ema_beta": 1.0}, ValueError, "ema_beta must be below 1"),
    ({"ema_beta": -0.1}, ValueError, "ema_beta must be"),
    ({"ema_beta": float("nan")}, ValueError, "ema_beta must be"),
    ({"generator": torch.Generator()}, ValueError, "generator must be .* direction='random' only"),
    ({"direction": "random", "generator": 5}, ValueError, "generator must be a torch.Generator"),
    ({"scope": "bias"}, ValueError, "scope must be one of 'all', 'weights', 'norm'"),
    ({"scope": "norm", "model": None}, ValueError, "scope='norm' needs model"),
    ({"scope": "norm"}, ValueError, "no normalisation layer with parameters; use scope='all'"),
    ({"scope": "norm", "scale": "filter"}, ValueError, "scope='norm' has none"),
    ({"scale": "filters"}, ValueError, "scale must be one of .*'filter'"),
    ({"direction": "noise"}, ValueError, "direction must be one of .*'random'"),
]


@pytest.mark.parametrize(("options", "error", "sentence"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_cannot_be_is_refused_and_leaves_nothing(options, error, sentence):
    net = make_net()
    optimizer = sgd(net.parameters())
    groups = [set(g) for g in optimizer.param_groups]
    with pytest.raises(error, match=sentence) as caught:
        S2SAM(optimizer, **{"model": net} | options)
    assert "\n" not in str(caught.value)
    assert [set(g) for g in optimizer.param_groups] == groups and not vars(optimizer).get("_s2sam_step_hooks")
    S2SAM(optimizer, model=net)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda o: S2SAM.paper(o, sign=-1), "S2SAM.paper means sign=1; for sign=-1 call S2SAM itself"),
        (lambda o: S2SAM.paper(o, direction="ema"), "direction='gradient'"),
        (lambda o: S2SAM.paper(o, scope="norm"), "scope='all'"),
        (lambda o: S2SAM.paper(o, ema_beta=0.9), "no use for ema_beta"),
        (lambda o: S2SAM.paper(o, rho=late(5)), "constant rho"),
        (lambda o: SAM(o, scale="filtr"), "for SAM, got 'filtr'"),
        (lambda o: SAM(o, scale="step"), "for SAM, got 'step'"),
        (lambda o: late(0), "total_steps must be a whole number"),
        (lambda o: late(5, 1.5), "start must be a finite number between 0 and 1"),
        (lambda o: rising(5, 0.0), "power must be above 0"),
        (lambda o: rising(2.5), "total_steps must be a whole number"),
        (lambda o: like_lr(torch.optim.SGD([torch.zeros(1)], lr=0.0)), "learning rate above 0"),
        (
            lambda o: S2SAM(torch.optim.SGD([torch.zeros(3)], lr=0.1), scope="weights"),
            "no parameter with at least 2 dim",
        ),
        (lambda o: S2SAM(NoRate([torch.zeros(3)], {}), scale="step"), "needs 'lr' in every param_group"),
    ],
)
def test_one_sentence_for_what_cannot_be(make, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        make(sgd(make_net().parameters()))
    assert "\n" not in str(caught.value)


class NoRate(torch.optim.Optimizer):
    """An optimizer without a learning rate."""

    def step(self, closure=None):
        return None


@pytest.mark.parametrize("value", [float("nan"), -0.5, float("inf"), None, "big", torch.ones(2)])
def test_a_schedule_that_returns_nonsense_names_the_step(value):
    net, optimizer, sam = attached(warm=3, rho=lambda t: value if t == 3 else 0.1)
    w = snapshot(net)
    with pytest.raises(ValueError, match=r"rho\(3\) must be a finite number >= 0, got"):
        net(X)
    assert same(net.parameters(), w) and not sam.is_displaced


# steps that a GradScaler skips


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("restored", [False, True])
def test_a_schedule_keeps_to_the_time_of_the_run_through_missed_steps(fused, restored):
    net, radii = make_net(torch.float32), []
    optimizer = sgd(net.parameters(), fused=fused)
    sam = S2SAM(optimizer, model=net, rho=rising(10))
    scaler = torch.amp.GradScaler(device="cpu", init_scale=4.0)
    for step, (x, y) in enumerate(make_data(10, torch.float32)):
        assert sam.step == step
        with sam.clean():
            w = snapshot(net)
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        radii.append(moved(net, w))
        if step in (0, 3, 4, 8):
            next(net.parameters()).grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if sam.step == step:
            assert not fused and step in (0, 3, 4, 8)
            sam.missed_step()
        if restored:
            sam.restore()
        optimizer.zero_grad()
    expected = [0.0, 0.0] + [t / 10 for t in range(2, 10)]  # step 0 is skipped, so step 1 has no direction
    if not restored and not fused:  # an open window stays where it is
        expected[4], expected[5], expected[9] = expected[3], expected[3], expected[8]
    assert radii == pytest.approx(expected, rel=1e-4)
    assert sam.stats["skipped"] == 4


def test_a_missed_step_is_that_of_one_optimizer_and_asks_for_new_gradients():
    net = make_net()
    halves = [torch.optim.SGD([p], lr=0.1) for p in net.parameters()]
    sam = S2SAM(halves, model=net)
    batches = make_data(3)
    F.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
    for half in halves:
        half.step()
    sam.missed_step(halves[1])
    assert [half.param_groups[0]["s2sam_step"] for half in halves] == [1, 2, 1]
    sam.missed_step()
    assert [half.param_groups[0]["s2sam_step"] for half in halves] == [2, 3, 2]
    with pytest.raises(ValueError, match="one of the optimizers that S2SAM was given"):
        sam.missed_step(torch.optim.SGD(make_net().parameters(), lr=0.1))

    net(batches[1][0])  # the window of a step that is then missed does not excuse clean gradients in the next one
    sam.missed_step()
    sam.restore()
    net.eval()
    F.cross_entropy(net(batches[2][0]), batches[2][1]).backward()
    with pytest.raises(RuntimeError, match="clean weights"):
        halves[0].step()
