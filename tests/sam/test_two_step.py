"""SAM, the two-gradient baseline."""

import pytest
import torch
import torch.nn.functional as F
from sam_common import BATTERY, FACTORIES, distance, make_data, make_net, same, snapshot, total
from torch import nn
from torch.func import functional_call

from s2sam import SAM, sparsify


def closure_of(net, x, y, calls=None):
    def closure():
        if calls is not None:
            calls.append(snapshot(net))
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("scale", ["norm", "relative", "asam", "rms", "filter"])
@pytest.mark.parametrize("name", BATTERY)
def test_equals_an_explicit_two_gradient_step(name, scale):
    net, twin = make_net(), make_net()
    names = [n for n, _ in net.named_parameters()]
    optimizer = FACTORIES[name](net.parameters())
    SAM(optimizer, model=net, rho=0.05, scale=scale)
    w = [p.detach().clone().requires_grad_() for p in twin.parameters()]
    base = FACTORIES[name](w)

    def gradient(at, x, y):
        at = [t.detach().clone().requires_grad_() for t in at]
        loss = F.cross_entropy(functional_call(twin, dict(zip(names, at, strict=True)), (x,)), y)
        return loss, torch.autograd.grad(loss, at)

    for x, y in make_data(40):
        loss = optimizer.step(closure_of(net, x, y))
        first, g = gradient(w, x, y)
        g = list(g)
        if scale == "asam":
            n = total([a * b for a, b in zip(g, w, strict=True)])
            e = [0.05 * b.detach() ** 2 * a / n for a, b in zip(g, w, strict=True)]
        elif scale == "filter":
            lengths = [
                (b.detach().norm(dim=1, keepdim=True), a.norm(dim=1, keepdim=True)) for a, b in zip(g, w, strict=True)
            ]
            e = [0.05 * of_w / of_g * a for a, (of_w, of_g) in zip(g, lengths, strict=True)]
        else:
            size = {"relative": total(w), "rms": sum(int((b != 0).sum()) for b in w) ** 0.5}.get(scale, 1.0)
            e = [0.05 * size * a / total(g) for a in g]
        _, g = gradient([a + b for a, b in zip(w, e, strict=True)], x, y)
        for p, q in zip(w, g, strict=True):
            p.grad = q
        base.step()
        assert float(loss) == pytest.approx(float(first), abs=1e-12)  # the first loss is what is returned
        optimizer.zero_grad()
    assert distance(net.parameters(), w) < 1e-12
    assert distance(net.parameters(), make_net().parameters()) > 0.1


def test_calls_the_closure_exactly_twice_the_second_time_displaced_by_rho():
    net = make_net()
    optimizer = FACTORIES["sgd"](net.parameters())
    SAM(optimizer, model=net, rho=0.05)
    for x, y in make_data(3):
        calls = []
        optimizer.step(closure_of(net, x, y, calls))
        assert len(calls) == 2
        assert total([a - b for a, b in zip(*calls, strict=True)]) == pytest.approx(0.05, rel=1e-12)


def test_batch_norm_statistics_come_from_the_first_pass():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    optimizer = FACTORIES["sgd"](net.parameters())
    SAM(optimizer, model=net, rho=0.5)
    (x, y) = make_data(1)[0]
    mean = net[0](x).mean(0).detach()
    optimizer.step(closure_of(net, x, y))
    assert torch.allclose(net[1].running_mean, 0.1 * mean, atol=1e-12)
    assert int(net[1].num_batches_tracked) == 1


def test_masks_act_before_the_norm_and_the_displaced_network_stays_sparse():
    net = make_net()
    optimizer = FACTORIES["sgd"](net.parameters())
    sparsifier = sparsify(net, optimizer, method="static", sparsity=0.7, generator=torch.Generator().manual_seed(0))
    SAM(optimizer, model=net, rho=0.05)
    masks = list(sparsifier.masks.values())
    for x, y in make_data(5):
        calls = []
        optimizer.step(closure_of(net, x, y, calls))
        move = [b - a for a, b in zip(*calls, strict=True)]
        assert total(move) == pytest.approx(0.05, rel=1e-12)
        for points in (*calls, snapshot(net)):
            assert all(float(p[~m].abs().sum()) == 0 for p, m in zip(points, masks, strict=True))
        optimizer.zero_grad()


def test_weights_return_bit_exactly_when_the_second_pass_raises():
    net = make_net()
    optimizer = FACTORIES["sgd"](net.parameters())
    SAM(optimizer, model=net, rho=0.05)
    (x, y) = make_data(1)[0]
    before = snapshot(net)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            assert not same(net.parameters(), before)
            raise KeyboardInterrupt
        return closure_of(net, x, y)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert same(net.parameters(), before)


@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("name", BATTERY)
def test_a_non_finite_gradient_in_either_pass_changes_nothing(name, bad_pass):
    net = make_net()
    optimizer = FACTORIES[name](net.parameters())
    SAM(optimizer, model=net, rho=0.05)
    data = make_data(3)
    for x, y in data[:2]:
        optimizer.step(closure_of(net, x, y))
        optimizer.zero_grad()
    weights = snapshot(net)
    state = {(i, k): torch.as_tensor(v).clone() for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
    calls = []

    def closure():
        calls.append(1)
        x, y = data[2]
        return closure_of(net, x * (float("inf") if len(calls) == bad_pass else 1), y)()

    optimizer.step(closure)
    assert same(net.parameters(), weights)
    for i, s in enumerate(optimizer.state.values()):
        assert all(torch.equal(torch.as_tensor(v), state[i, k]) for k, v in s.items())


@pytest.mark.parametrize("method", [None, "rigl"])
def test_rho_zero_is_the_base_optimizer_in_one_pass(method):
    runs = []
    for attach in (False, True):
        net = make_net()
        optimizer = FACTORIES["adamw"](net.parameters())
        if method:
            g = torch.Generator().manual_seed(0)
            sparsify(net, optimizer, method=method, sparsity=0.7, total_steps=10, delta_t=2, generator=g)
        if attach:
            SAM(optimizer, model=net, rho=0.0)
        calls = []
        for x, y in make_data(10):
            optimizer.step(closure_of(net, x, y, calls))
            optimizer.zero_grad()
        assert len(calls) == 10
        runs.append(snapshot(net))
    assert same(*runs)


def test_step_without_closure_and_grad_scaler_are_refused_with_a_sentence():
    net = make_net(torch.float32)
    optimizer = FACTORIES["sgd-fused"](net.parameters())
    SAM(optimizer, model=net, rho=0.05)
    (x, y) = make_data(1, torch.float32)[0]
    before = snapshot(net)
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(RuntimeError, match=r"optimizer.step\(closure\)"):
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(optimizer)
    assert same(net.parameters(), before)


def test_bad_arguments_and_remove():
    net = make_net()
    optimizer = FACTORIES["sgd"](net.parameters())
    with pytest.raises(ValueError, match="scale"):
        SAM(optimizer, scale="norn")
    with pytest.raises(ValueError, match="rho"):
        SAM(optimizer, rho=-1)
    sam = SAM(optimizer)
    with pytest.raises(ValueError, match="already has a SAM"):
        SAM(optimizer)
    sam.remove()
    assert "rho" not in optimizer.param_groups[0]
    SAM(optimizer, rho=0.1)
    assert optimizer.param_groups[0]["rho"] == 0.1
