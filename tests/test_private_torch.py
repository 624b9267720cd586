"""Canaries: what torch keeps private and this library uses is still there and still does what it did."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from s2sam import private_torch


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def sharded(one_rank):
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
    assert len(private_torch.fsdp_groups(parameters)) == 2
    (root,) = private_torch.fsdp_groups(parameters[2:])
    assert [id(part.sharded_param) for part in root.fsdp_params] == [id(p) for p in parameters[2:]]
    assert private_torch.fsdp_groups([nn.Parameter(torch.ones(2))]) == []
    assert private_torch.fsdp_groups(iter(net.parameters()))


def test_gathered_weights_can_be_dropped(sharded):
    net, parameters = sharded
    (root,) = private_torch.fsdp_groups(parameters[2:])
    x = torch.ones(1, 3)
    with torch.no_grad():
        first = net(x)
    assert [id(p) for p in private_torch.fsdp_gathered(root)] == [id(p) for p in net[1].parameters()]  # still gathered
    private_torch.fsdp_forget_gathered(root)
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
        for group in private_torch.fsdp_groups(parameters):
            private_torch.fsdp_forget_gathered(group)
        parameters[3].to_local().add_(1)
        assert torch.allclose(net(x), first + 1)


def test_a_forward_under_way_is_seen(sharded):
    net, parameters = sharded
    (root,) = private_torch.fsdp_groups(parameters[2:])
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(private_torch.fsdp_in_forward(root)))
    net(torch.ones(1, 3))
    assert seen == [True]
    assert not private_torch.fsdp_in_forward(root)


def test_the_mesh_that_a_mesh_is_a_slice_of(one_rank):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    assert private_torch.root_mesh(mesh["b"]) == mesh
    assert private_torch.root_mesh(mesh) == mesh


@pytest.mark.parametrize("original", [True, False])
def test_fsdp1_marks_its_parameters(one_rank, original):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(nn.Linear(3, 2), use_orig_params=original, device_id=torch.device("cpu"))
    assert all(getattr(p, private_torch.FSDP1_MARK, False) for p in net.parameters())
    assert not hasattr(nn.Linear(3, 2).weight, private_torch.FSDP1_MARK)
