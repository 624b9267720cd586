"""Copies are inert, the original goes on, and nothing is kept alive."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from functools import partial

import pytest
import sam_common
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, make_data, make_net, moved, same, snapshot, take_step

from s2sam import S2SAM, SAM

RHO = 0.3
attached = partial(sam_common.attached, rho=RHO, warm=2)


def by_file(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "torch.save": by_file}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_the_model_trains_on_its_own_and_never_displaces(how):
    net, optimizer, _ = attached()
    w = snapshot(net)
    twin = COPIES[how](net)
    assert same(twin.parameters(), w)
    x, y = make_data(1)[0]
    v = snapshot(twin)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    F.cross_entropy(twin(x), y).backward()
    assert same(twin.parameters(), v)
    assert same(net.parameters(), w)  # nor does it displace the original
    plain.step()
    assert moved(twin, v) > 0
    twin.load_state_dict(twin.state_dict())
    twin.eval()(x)
    net(x)
    assert moved(net, w) == pytest.approx(RHO)  # the original still works
    v = snapshot(twin)
    twin.train()(x)
    assert same(twin.state_dict().values(), v)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("factory", ["sgd", "adamw-fused"])
def test_a_copy_of_model_and_optimizer_is_a_plain_pair(how, factory):
    net, optimizer, sam = attached(factory)
    twin, twin_optimizer = COPIES[how]((net, optimizer))
    assert twin_optimizer.param_groups[0]["params"][0] is next(twin.parameters())
    data = make_data(3)
    before = snapshot(net)
    for batch in data:
        w = snapshot(twin)
        loss = F.cross_entropy(twin(batch[0]), batch[1])
        assert same(twin.parameters(), w)
        loss.backward()
        twin_optimizer.step()
        twin_optimizer.zero_grad()
    assert same(net.parameters(), before)
    sam.remove()
    for batch in data:
        take_step(net, optimizer, batch)
    assert same(net.parameters(), twin.parameters())  # the copy was the base optimizer, no more


def test_s2sam_can_be_attached_to_a_copied_pair_and_continues_bit_equally():
    net, optimizer, _ = attached()
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    S2SAM(twin_optimizer, model=twin, rho=RHO)
    data = make_data(4)
    for batch in data:
        take_step(net, optimizer, batch)
        take_step(twin, twin_optimizer, batch)
    assert same(net.parameters(), twin.parameters())


def test_a_copied_optimizer_takes_the_rho_of_the_new_attachment():
    _, optimizer, _ = attached()
    twin = copy.deepcopy(optimizer)
    S2SAM(twin, rho=0.7)
    assert [g["rho"] for g in twin.param_groups] == [0.7]
    assert [g["rho"] for g in optimizer.param_groups] == [RHO]


def test_a_pickled_model_loads_where_the_library_was_never_attached(tmp_path):
    net, _, _ = attached()
    torch.save(net, tmp_path / "net.pt")
    code = """
import torch
net = torch.load("net.pt", weights_only=False)
w = [p.detach().clone() for p in net.parameters()]
net(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
assert all(torch.equal(p, q) for p, q in zip(net.parameters(), w))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)


def test_an_averaged_model_averages_the_clean_weights_and_is_inert():
    net, optimizer, _ = attached()
    average = torch.optim.swa_utils.AveragedModel(net)
    ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.0))
    weights = []
    for batch in make_data(3):
        take_step(net, optimizer, batch)
        average.update_parameters(net)
        ema.update_parameters(net)
        weights.append(snapshot(net))
    assert same(ema.module.parameters(), weights[-1])
    mean = [torch.stack(ws).mean(0) for ws in zip(*weights, strict=True)]
    assert all(torch.allclose(p, m, atol=1e-14) for p, m in zip(average.module.parameters(), mean, strict=True))
    v = snapshot(average)
    average.train()(make_data(1)[0][0])
    assert same(average.parameters(), v)
    assert same(net.parameters(), weights[-1])


@pytest.mark.parametrize("method", [S2SAM, SAM])
def test_nothing_keeps_the_optimizer_or_the_model_alive(method):
    net, other = make_net(), make_net(seed=1)
    optimizer = FACTORIES["sgd"](net.parameters())
    sam = method(optimizer, model=net)

    def closure(net, optimizer, x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    for batch in make_data(2):
        optimizer.step(partial(closure, net, optimizer, *batch))
    watched = [weakref.ref(thing) for thing in (net, optimizer, sam)]
    assert all(ref() is not None for ref in watched)
    del sam, optimizer, net
    gc.collect()
    assert [ref() for ref in watched] == [None] * 3
    other(make_data(1)[0][0])


def test_the_optimizer_keeps_the_method_alive_and_the_model_does_not():
    net = make_net()
    optimizer = FACTORIES["sgd"](net.parameters())
    sam = weakref.ref(S2SAM(optimizer, model=net, rho=RHO))
    gc.collect()
    assert sam() is not None
    data = make_data(3)
    for batch in data[:2]:
        take_step(net, optimizer, batch)
    w = snapshot(net)
    net(data[2][0])
    assert moved(net, w) == pytest.approx(RHO)
    sam().restore()
    del optimizer
    gc.collect()
    assert sam() is None
    net(data[2][0])  # its hooks do nothing now
    assert same(net.parameters(), w)
    assert same(net.state_dict().values(), w)


def test_the_model_may_go_first():
    net = make_net()
    weights = list(net.parameters())
    optimizer = FACTORIES["sgd"](weights)
    sam = S2SAM(optimizer, model=net, rho=RHO)
    watched = weakref.ref(net)
    del net
    gc.collect()
    assert watched() is None
    with sam.displaced():
        sum(p.square().sum() for p in weights).backward()
    before = [p.detach().clone() for p in weights]
    optimizer.step()
    assert not same(weights, before)


def test_remove_leaves_a_plain_pair():
    net, optimizer, sam = attached()
    twin, twin_optimizer, twin_sam = attached()
    w = snapshot(net)
    net(make_data(1)[0][0])
    sam.remove()
    sam.remove()
    assert same(net.parameters(), w)  # an open window is closed
    assert not any(k.startswith("s2sam") for s in optimizer.state.values() for k in s)
    assert "rho" not in optimizer.param_groups[0]
    assert "rho" not in optimizer.defaults
    assert not any("s2sam" in k for k in optimizer.state_dict()["param_groups"][0])
    twin_sam.remove()
    plain = FACTORIES["sgd"](twin.parameters())
    plain.load_state_dict(twin_optimizer.state_dict())
    for batch in make_data(3):
        v = snapshot(net)
        loss = F.cross_entropy(net(batch[0]), batch[1])
        assert same(net.parameters(), v)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        take_step(twin, plain, batch)
    assert same(net.parameters(), twin.parameters())
    S2SAM(optimizer, model=net)
