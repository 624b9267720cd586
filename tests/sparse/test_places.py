"""A sparsifier whose model holds other weights says so; weights that have only moved are found; each has one mask."""

import gc
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from s2sam import sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import generator, make_batches, make_net, one_step, sgd

GONE = "the model no longer holds"


def make(net=None, **kw):
    net = make_net() if net is None else net
    optimizer = sgd(net)
    return net, optimizer, sparsify(net, optimizer, method="static", sparsity=0.5, generator=generator(), **kw)


@pytest.fixture
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def new_layer(net):
    net[2] = nn.Linear(12, 10, bias=False)


def new_parameter(net):
    net[2].weight = nn.Parameter(net[2].weight.detach().clone())


def weight_norm(net):
    parametrizations.weight_norm(net[2])


def overwritten(net):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        net.double().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("replace", [new_layer, new_parameter, weight_norm, overwritten])
def test_weights_that_the_model_no_longer_holds_are_told_by_every_measure_and_the_next_step(replace):
    net, optimizer, sparsifier = make()
    one_step(net, optimizer, make_batches(1)[0])
    replace(net)
    lost = 3 if replace is overwritten else 1
    name = "0.weight" if replace is overwritten else "2.weight"
    message = re.escape(f"{GONE} {lost} of the 3 weights that this sparsifier masks, for instance '{name}'")
    for use in (sparsifier.sparsity, sparsifier.report, sparsifier.verify, sparsifier.apply):
        with pytest.raises(RuntimeError, match=message):
            use()
    with pytest.raises(RuntimeError, match=message + r".*sparsify\(\.\.\., init=False\)"):
        one_step(net, optimizer, make_batches(1)[0])


def test_the_way_out_of_replaced_weights_keeps_the_masks():
    net, optimizer, sparsifier = make()
    new_parameter(net)
    state, old = sparsifier.state_dict(), {name: mask.clone() for name, mask in sparsifier.masks.items()}
    sparsifier.remove()
    optimizer = sgd(net)
    sparsifier = sparsify(net, optimizer, method="static", sparsity=0.5, init=False)
    sparsifier.load_state_dict(state)
    one_step(net, optimizer, make_batches(1)[0])
    assert all(torch.equal(old[name], mask) for name, mask in sparsifier.masks.items())


def test_weights_that_were_cut_into_shards_in_place_are_told():
    net, optimizer, sparsifier = make()
    net[2].weight.data = net[2].weight.data[:5].clone()  # as FSDP1 does with use_orig_params=True
    for use in (sparsifier.sparsity, sparsifier.verify, optimizer.step):
        with pytest.raises(RuntimeError, match=f"{GONE} 1 of the 3 weights.*'2.weight'.*FSDP"):
            use()


@pytest.mark.filterwarnings("ignore")
def test_fully_shard_after_sparsify_is_told(alone):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net, _, sparsifier = make()
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match=f"{GONE} 3 of the 3 weights.*fully_shard"):
        sparsifier.sparsity()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("originals", [False, True])
def test_fsdp1_is_refused_in_one_sentence(alone, originals):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(make_net(), use_orig_params=originals, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="FullyShardedDataParallel.*DistributedDataParallel instead"):
        make(net)


class Double(nn.Module):
    def forward(self, w):
        return 2 * w


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def parametrized(net):
    parametrize.register_parametrization(net[2], "weight", Double())


def pruned_elsewhere(net):
    prune.custom_from_mask(net[2], "weight", torch.ones_like(net[2].weight))


def wrapped(net):
    net[2] = Wrapper(net[2])


def swapped(net):
    torch.utils.swap_tensors(net[2].weight, nn.Parameter(net[2].weight.detach().clone()))


def converted(net):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("move", [parametrized, pruned_elsewhere, wrapped, swapped, converted])
def test_weights_that_have_only_moved_stay_sparse(move):
    net, optimizer, sparsifier = make()
    one_step(net, optimizer, make_batches(1)[0])
    move(net)
    before = [w.detach().clone() for w in sparsifier.weights.values()]
    one_step(net, optimizer, make_batches(2)[1])
    assert not any(torch.equal(a, b) for a, b in zip(before, sparsifier.weights.values(), strict=True))
    sparsifier.verify()
    assert sparsifier.sparsity() == 0.5


def test_a_weight_in_two_optimizers_is_refused():
    net = make_net()
    with pytest.raises(ValueError, match=r"'0\.weight' is in two of the optimizers.*one optimizer"):
        sparsify(net, [sgd(net), torch.optim.AdamW(net.parameters())], method="static", sparsity=0.5)
    assert not int(sum((p == 0).sum() for p in net.parameters()))


def test_a_second_sparsifier_on_another_optimizer_is_refused_until_the_first_is_removed():
    net, _, sparsifier = make()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"sparse already; call .remove\(\) on their sparsifier"):
        sparsify(net, sgd(net), method="static", sparsity=0.5, init=False)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    sparsifier.remove()
    sparsify(net, sgd(net), method="static", sparsity=0.5, init=False)


def test_a_sparsifier_whose_optimizer_is_gone_is_not_in_the_way():
    net, optimizer, sparsifier = make()
    gc.disable()
    try:
        del optimizer, sparsifier
        sparsify(net, sgd(net), method="static", sparsity=0.5, init=False)
    finally:
        gc.enable()


# -- zeros among the active weights ----------------------------------------------------------------------------------


def zero_most(net, sparsifier, share):
    with torch.no_grad():
        for name, mask in sparsifier.masks.items():
            active = mask.flatten().nonzero().flatten()
            net.get_parameter(name).view(-1)[active[: int(share * len(active) + 0.5)]] = 0


def test_active_weights_that_something_else_zeroed_are_told():
    net, optimizer, sparsifier = make()
    zero_most(net, sparsifier, 0.45)
    sparsifier.verify()
    sparsifier.sparsity()
    zero_most(net, sparsifier, 0.55)
    with pytest.raises(RuntimeError, match="weights that were active at all times are exactly 0.*init='adopt'"):
        sparsifier.verify()
    with pytest.warns(UserWarning, match="weights that were active at all times are exactly 0"):
        assert sparsifier.sparsity() == 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sparsifier.sparsity() == 0.5, "it is told once"
    rows = {row.name: row for row in sparsifier.report()}
    assert sum(row.kept for row in rows.values()) == 111
    assert all(row.nonzero == int((net.get_parameter(name) != 0).sum()) for name, row in rows.items())
    assert "nonzero" in str(sparsifier.report()).splitlines()[0]


def test_grown_weights_and_zero_initialised_layers_are_no_alarm():
    net = make_net()
    with torch.no_grad():
        net[0].weight.zero_()
    optimizer = sgd(net)
    sparsifier = sparsify(
        net, optimizer, method="set", sparsity=0.5, delta_t=1, drop_fraction=0.9, exclude="4", generator=generator()
    )
    sparsifier.verify()
    for batch in make_batches(6):
        one_step(net, optimizer, batch)
        sparsifier.verify()
        sparsifier.sparsity()
    again = make_net()
    other = sparsify(again, sgd(again), method="set", sparsity=0.5, exclude="4", init=False)
    again.load_state_dict(net.state_dict())
    other.load_state_dict(sparsifier.state_dict())
    other.verify()
