"""apply_to(): averages and copies of the network become as sparse as it is, and nothing else is touched."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from s2sam import sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import attach, generator, make_batches, make_net, one_step, rows, sgd


def zeros(model):
    return sum(int((p == 0).sum()) for p in model.parameters())


def averaged(net):
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))


@rows()
def test_an_average_is_as_sparse_as_the_network_it_follows(info):
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(info, net, optimizer)
    ema = averaged(net)
    for batch in make_batches(16):
        one_step(net, optimizer, batch)
        ema.update_parameters(net)
    before = {name: p.detach().clone() for name, p in ema.module.named_parameters()}
    if info.name == "rigl":
        assert zeros(ema) < 0.9 * sum(int((~m).sum()) for m in sparsifier.masks.values()), "it remembers dropped ones"
    live = [p.detach().clone() for p in net.parameters()]
    assert sparsifier.apply_to(ema) is ema
    for name, mask in sparsifier.masks.items():
        assert torch.equal(ema.module.get_parameter(name), before[name] * mask)
    assert int(ema.n_averaged) == 16
    assert all(torch.equal(a, b) for a, b in zip(live, net.parameters(), strict=True))


class Shadow(nn.Module):
    """An average as timm's ModelEma keeps it."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped_in_ddp(net):
    return averaged(nn.parallel.DistributedDataParallel(copy.deepcopy(net)))


@pytest.mark.parametrize(
    "wrap", [copy.deepcopy, Shadow, wrapped_in_ddp, lambda net: averaged(torch.compile(copy.deepcopy(net)))]
)
def test_wrappers_are_taken_off_and_buffers_stay(alone, wrap):
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    dense = copy.deepcopy(net)
    sparsifier = sparsify(net, sgd(net), method="static", sparsity=0.5, generator=generator())
    dense[1].running_mean.fill_(0.25)
    other = sparsifier.apply_to(wrap(dense))
    parameters = {name.split("module.")[-1].replace("_orig_mod.", ""): p for name, p in other.named_parameters()}
    for name, mask in sparsifier.masks.items():
        assert torch.equal(parameters[name], dense.get_parameter(name) * mask)
    assert torch.equal(parameters["0.bias"], dense[0].bias)
    assert all((b == 0.25).all() for name, b in other.named_buffers() if name.endswith("running_mean"))


def test_a_part_that_was_compiled_after_the_copy_is_found():
    net = make_net()
    ema = copy.deepcopy(net)
    net[0] = torch.compile(net[0])
    sparsifier = sparsify(net, sgd(net), method="static", sparsity=0.5, generator=generator())
    assert zeros(sparsifier.apply_to(ema)) == 111


def test_channels_that_are_pruned_take_biases_and_batchnorm_along():
    pytest.importorskip("torch_pruning")
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    dense = copy.deepcopy(net)
    with torch.no_grad():
        dense[1].bias.fill_(0.5)
    sparsifier = sparsify(
        net, sgd(net), method="chex", sparsity=0.5, total_steps=20, input_shape=(6,), generator=generator(), regrow=0.0
    )
    gone = ~sparsifier.keep[next(iter(sparsifier.keep))]
    assert int(gone.sum()) == 4
    sparsifier.apply_to(dense)
    for dead in (dense[0].weight[gone], dense[0].bias[gone], dense[1].weight[gone], dense[1].bias[gone]):
        assert not dead.any()
    assert (dense[1].bias[~gone] == 0.5).all()


def other_shape(net):
    wrong = make_net(1)
    wrong[4] = nn.Linear(10, 4, bias=False)
    return wrong


def half_shared(net):
    mixed = make_net(1)
    mixed[4].weight = nn.Parameter(net[4].weight.detach())
    return mixed


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (other_shape, r"'4\.weight' has shape \(4, 10\) in this model and \(3, 10\) in the one that is trained"),
        (lambda net: nn.Linear(6, 12), r"this Linear has no parameter '0\.weight'; give a copy"),
        (lambda net: net, r"'0\.weight' of this model is the weight that is trained.*sparsifier\.apply\(\)"),
        (lambda net: nn.DataParallel(net), "is the weight that is trained, not a copy"),
        (half_shared, r"'4\.weight' of this model is the weight that is trained"),
    ],
)
def test_other_models_are_refused_and_nothing_is_changed(other, message):
    net = make_net()
    sparsifier = sparsify(net, sgd(net), method="static", sparsity=0.5, generator=generator())
    given = other(net)
    before = copy.deepcopy(given.state_dict())
    with pytest.raises(ValueError, match=message):
        sparsifier.apply_to(given)
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


def test_there_must_be_masks():
    net = make_net()
    sparsifier = sparsify(net, sgd(net), method="static", sparsity=0.5, init=False)
    with pytest.raises(RuntimeError, match="init=False: load the masks"):
        sparsifier.apply_to(make_net(1))
