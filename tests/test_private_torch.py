"""Canaries: each thing that torch keeps to itself still is what src/s2sam/private_torch.py takes it for."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from s2sam.private_torch import (
    computing,
    fsdp_forget_gathered,
    fsdp_gathered,
    fsdp_groups,
    fsdp_in_forward,
    in_ddp_join,
    is_fsdp1_parameter,
    is_in_backward,
    is_in_functional_call,
    is_tracing,
    is_transforming,
    root_mesh,
)

SEEN = []  # not on the module: torch.export puts back what a forward changes there


class Probe(nn.Module):
    """Writes down what it sees in its forward, and changes a tensor of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.count = [torch.zeros(3)]

    def forward(self, x):
        SEEN.append((is_tracing(), is_transforming(), is_in_functional_call()))
        with computing(), torch.no_grad():
            torch._foreach_add_(self.count, 1.0)
        return x * self.weight


def fake(probe, x):
    with FakeTensorMode(allow_non_fake_inputs=True):
        probe(torch.ones(3))


def watched(probe, x):
    with FlopCounterMode(display=False):
        probe(x)


SITUATIONS = {
    "plain": (lambda probe, x: probe(x), (False, False, False)),
    "export": (lambda probe, x: torch.export.export(probe, (x,)), (True, False, False)),
    "jit.trace": (lambda probe, x: torch.jit.trace(probe, x, check_trace=False), (True, False, False)),
    "make_fx": (lambda probe, x: make_fx(lambda y: probe(y))(x), (True, False, False)),
    "fake": (fake, (True, False, False)),
    "flop counter": (watched, (False, False, False)),
    "vmap": (lambda probe, x: torch.func.vmap(probe)(x[None]), (False, True, False)),
    "grad": (lambda probe, x: torch.func.grad(lambda y: probe(y).sum())(x), (False, True, False)),
    "functional_call": (
        lambda probe, x: torch.func.functional_call(probe, {"weight": torch.ones(3)}, (x,)), (False, False, True)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SITUATIONS)
def test_what_a_forward_can_tell_and_do(name):
    act, expected = SITUATIONS[name]
    probe = Probe()
    SEEN.clear()
    act(probe, torch.ones(3))
    assert SEEN[0] == expected
    assert torch.equal(probe.count[0], torch.full((3,), float(len(SEEN))))  # real numbers have been added, each time


def test_a_backward_is_known_from_inside():
    seen = []
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(is_in_backward()))
    y.sum().backward()
    assert seen == [True] and not is_in_backward()


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_ddp_forward_knows_whether_join_is_on(alone):
    seen = []
    model = nn.Linear(2, 2)
    model.register_forward_pre_hook(lambda *_: seen.append(in_ddp_join()))
    ddp = nn.parallel.DistributedDataParallel(model)
    x = torch.ones(1, 2)
    model(x)
    ddp(x)
    with ddp.join():
        ddp(x).sum().backward()
    with ddp.join(enable=False):
        ddp(x)
    ddp(x)
    assert seen == [False, False, True, False, False]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("originals", [False, True])
def test_parameters_of_fsdp1_are_known(alone, originals):
    from torch.distributed.fsdp import FullyShardedDataParallel

    plain = nn.Linear(2, 2)
    assert not any(is_fsdp1_parameter(p) for p in plain.parameters())
    model = FullyShardedDataParallel(nn.Linear(2, 2), use_orig_params=originals, device_id=torch.device("cpu"))
    assert all(is_fsdp1_parameter(p) for p in model.parameters())


@pytest.fixture
def sharded(alone):
    """A model under FSDP2 whose first layer is gathered by itself, and its sharded parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, list(net.parameters())


def test_fsdp_groups_are_found_by_their_sharded_parameters(sharded):
    net, parameters = sharded
    assert len(fsdp_groups(parameters)) == 2
    (root,) = fsdp_groups(parameters[2:])
    assert [id(part.sharded_param) for part in root.fsdp_params] == [id(p) for p in parameters[2:]]
    assert fsdp_groups([nn.Parameter(torch.ones(2))]) == []
    assert fsdp_groups(iter(net.parameters()))


def test_gathered_weights_can_be_dropped(sharded):
    net, parameters = sharded
    (root,) = fsdp_groups(parameters[2:])
    x = torch.ones(1, 3)
    with torch.no_grad():
        first = net(x)
    assert [id(p) for p in fsdp_gathered(root)] == [id(p) for p in net[1].parameters()]  # still gathered
    fsdp_forget_gathered(root)
    assert [id(p) for p in net.parameters()] == [id(p) for p in parameters]
    with torch.no_grad():
        parameters[3].to_local().add_(1)
        assert torch.allclose(net(x), first + 1)


def test_a_prefetch_of_weights_can_be_dropped(sharded):
    net, parameters = sharded
    x = torch.ones(1, 3)
    with torch.no_grad():
        first = net(x)
        net.reshard()
        net.unshard(async_op=True)
        for group in fsdp_groups(parameters):
            fsdp_forget_gathered(group)
        parameters[3].to_local().add_(1)
        assert torch.allclose(net(x), first + 1)


def test_a_forward_under_way_is_seen(sharded):
    net, parameters = sharded
    (root,) = fsdp_groups(parameters[2:])
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(fsdp_in_forward(root)))
    net(torch.ones(1, 3))
    assert seen == [True]
    assert not fsdp_in_forward(root)


def test_the_mesh_that_a_mesh_is_a_slice_of(alone):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    assert root_mesh(mesh["b"]) == mesh
    assert root_mesh(mesh) == mesh
