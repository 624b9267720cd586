"""Canaries: what torch keeps private and this library reads is still there and still means the same."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from s2sam import private_torch


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_ddp_forward_knows_whether_join_is_on(alone):
    seen = []
    model = nn.Linear(2, 2)
    model.register_forward_pre_hook(lambda *_: seen.append(private_torch.in_ddp_join()))
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
    assert not any(private_torch.is_fsdp1_parameter(p) for p in plain.parameters())
    model = FullyShardedDataParallel(nn.Linear(2, 2), use_orig_params=originals, device_id=torch.device("cpu"))
    assert all(private_torch.is_fsdp1_parameter(p) for p in model.parameters())
