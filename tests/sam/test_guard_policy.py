"""What the guard does besides raising, and for whom it speaks."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from sam_common import make_data, snapshot, total
from test_guard import RHO, Net, World, by_parts

from s2sam import S2SAM


def test_a_refused_step_can_be_repeated_properly():
    world = World().warm()
    twin = World().warm()
    next(twin.data)
    world.loss(by_parts(world)).backward()
    with pytest.raises(RuntimeError, match="clean weights"):
        world.optimizer.step()
    world.optimizer.zero_grad()
    for w in (world, twin):
        w.loss().backward()
        w.step()
    assert all(torch.equal(p, q) for p, q in zip(world.net.parameters(), twin.net.parameters(), strict=True))


def test_warn_warns_once_per_such_step_and_takes_it():
    world = World({"on_clean_grad": "warn"}).warm()
    world.loss(by_parts(world)).backward()
    w = snapshot(world.net)
    with pytest.warns(UserWarning, match="clean weights") as caught:
        world.optimizer.step()
    assert len(caught) == 1
    assert total([p - q for p, q in zip(world.net.parameters(), w, strict=True)]) > 0
    world.optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world.loss().backward()
        world.step()


def test_each_of_several_optimizers_is_guarded_on_its_own():
    net = Net()
    first = torch.optim.SGD(net.encoder.parameters(), lr=0.1)
    second = torch.optim.AdamW([*net.head.parameters(), *net.spare.parameters()], lr=0.01)
    S2SAM([first, second], model=net, rho=RHO)
    for x, y in make_data(3):
        F.cross_entropy(net(x), y).backward()
        first.step()
        second.step()  # its gradients are of the same displaced forward
        with pytest.raises(RuntimeError, match="plain AdamW"):
            second.step()
        net.zero_grad()


def test_a_group_with_rho_zero_is_not_guarded():
    net = Net()
    groups = [{"params": net.encoder.parameters(), "rho": 0.0}, {"params": net.head.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    S2SAM(optimizer, model=net, rho=RHO)
    x, y = make_data(1)[0]
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    net.encoder(x).square().mean().backward()
    optimizer.step()
    F.cross_entropy(net.head(torch.tanh(net.encoder(x))), y).backward()
    with pytest.raises(RuntimeError, match="clean weights"):
        optimizer.step()
