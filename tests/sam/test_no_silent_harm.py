"""Mixed gradients, other optimizers, keys of param_groups, tiny gradients: what would else go wrong without a word."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, attached, make_data, make_net, moved, same, snapshot, take_step
from torch import nn

from _counters import OpCounter
from s2sam import S2SAM, SAM, sparsify
from s2sam.hooks import rho_key
from s2sam.sam.rho import late, rising

RHO = 0.3


# -------------------------------------------------------------------------------------------------- mixed accumulations


class Outer(nn.Module):
    """What Lightning calls `self`: its training_step calls `self.net`, not itself."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def outer(on_clean_grad="raise"):
    module = Outer(make_net())
    optimizer = FACTORIES["sgd"](module.parameters())
    sam = S2SAM(optimizer, model=module, rho=RHO, on_clean_grad=on_clean_grad)
    for batch in make_data(2):
        take_step(module, optimizer, batch)
    return module, optimizer, sam


def backward(forward, batch):
    F.cross_entropy(forward(batch[0]), batch[1]).backward()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_micro_batch_through_a_sub_module_and_the_next_through_the_model_are_refused_once(in_place):
    module, optimizer, sam = outer()
    one, two, three = make_data(3, seed=5)
    w = snapshot(module)
    backward(module.net, one)
    with pytest.raises(RuntimeError, match="taken at the clean weights are there already") as error:
        module(two[0])
    assert "zero_grad()" in str(error.value) and "sam.displace()" in str(error.value)
    assert same(module.parameters(), w) and not sam.is_displaced
    optimizer.zero_grad(set_to_none=not in_place)
    backward(module, three)  # nothing is left of it
    assert moved(module, w) == pytest.approx(RHO, rel=1e-9)
    optimizer.step()


def test_it_warns_or_is_silent_if_told_so():
    module, _, _ = outer("warn")
    backward(module.net, make_data(1)[0])
    with pytest.warns(UserWarning, match="taken at the clean weights are there already"):
        module(make_data(1)[0][0])
    module, _, _ = outer("ignore")
    backward(module.net, make_data(1)[0])
    module(make_data(1)[0][0])


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_one_gradient_of_one_layer_is_enough(layer):
    module, _, _ = outer()
    module.net[layer].weight.square().sum().backward()
    with pytest.raises(RuntimeError, match="taken at the clean weights are there already"):
        module(make_data(1)[0][0])


LOOPS = {
    "zero before the forward": lambda module, optimizer, batch: (
        optimizer.zero_grad(), backward(module, batch), optimizer.step()),
    "zero between forward and backward": lambda module, optimizer, batch: (
        (loss := F.cross_entropy(module(batch[0]), batch[1])), optimizer.zero_grad(), loss.backward(),
        optimizer.step()),
    "zero in place before the forward": lambda module, optimizer, batch: (
        optimizer.zero_grad(set_to_none=False), backward(module, batch), optimizer.step()),
    "zero in place between": lambda module, optimizer, batch: (
        (loss := F.cross_entropy(module(batch[0]), batch[1])), optimizer.zero_grad(set_to_none=False), loss.backward(),
        optimizer.step()),
    "never": lambda module, optimizer, batch: (backward(module, batch), optimizer.step()),
    "a closure that clears": lambda module, optimizer, batch: optimizer.step(
        lambda: (optimizer.zero_grad(), backward(module, batch), torch.zeros(()))[-1]),
}  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS)
def test_ordinary_loops_are_left_alone_and_read_nothing_from_the_device(loop):
    module, optimizer, sam = outer()
    sam.nonfinite = "ignore"  # the one number that the plain optimizer's step reads
    for number, batch in enumerate(make_data(6, seed=5)):
        with OpCounter() as count:
            LOOPS[loop](module, optimizer, batch)
        if number > 1:  # the first steps find out how the loop clears its gradients
            assert count.by_name["_local_scalar_dense"] == 0
    assert sam.step == 8


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_is_told_of_a_mixed_step(loop):
    module, optimizer, _ = outer()
    batches = make_data(9, seed=5)
    for batch in batches[:4]:
        LOOPS[loop](module, optimizer, batch)
    optimizer.zero_grad(set_to_none="in place" not in loop)
    backward(module.net, batches[4])
    with pytest.raises(RuntimeError, match="taken at the clean weights are there already"):
        module(batches[5][0])


# ----------------------------------------------------------------------------------------------------- other optimizers


@pytest.mark.parametrize("kind", [S2SAM, SAM])
def test_another_optimizer_on_the_same_weights_is_stopped_before_it_moves_them(kind):
    net = make_net()
    optimizer = FACTORIES["sgd"](net.parameters())
    attached_ = kind(optimizer, rho=RHO)
    other = torch.optim.AdamW(net.parameters())
    w = snapshot(net)
    F.cross_entropy(net(make_data(1)[0][0]), make_data(1)[0][1]).backward()
    for _ in range(2):  # the second time, too
        with pytest.raises(RuntimeError, match=f"{kind.__name__} looks after through another optimizer"):
            other.step()
    assert same(net.parameters(), w)
    attached_.remove()
    other.step()
    assert not same(net.parameters(), w)


def test_another_optimizer_on_masked_weights_is_stopped_and_one_on_the_others_is_not():
    net = make_net(bias=True)
    optimizer = FACTORIES["sgd"](net.parameters())
    sparsifier = sparsify(net, optimizer, method="static", sparsity=0.5)
    x, y = make_data(1)[0]
    F.cross_entropy(net(x), y).backward()
    biases = torch.optim.SGD([p for p in net.parameters() if p.dim() == 1], lr=0.1)
    w = snapshot(net)
    biases.step()  # nobody prunes them
    assert not same(net.parameters(), w)
    other, w = torch.optim.AdamW(net.parameters()), snapshot(net)
    with pytest.raises(RuntimeError, match="a sparsifier looks after through another optimizer"):
        other.step()
    assert same(net.parameters(), w)
    sparsifier.remove()
    other.step()
    assert not same(net.parameters(), w)


def test_who_was_harmless_is_looked_at_again_when_more_weights_are_looked_after():
    """The biases are nobody's until S2SAM is attached to an optimizer that a sparsifier has hooked already."""
    net = make_net(bias=True)
    optimizer = FACTORIES["sgd"](net.parameters())
    sparsify(net, optimizer, method="static", sparsity=0.5)
    biases = torch.optim.SGD([p for p in net.parameters() if p.dim() == 1], lr=0.1)
    x, y = make_data(1)[0]
    F.cross_entropy(net(x), y).backward()
    biases.step()
    S2SAM(optimizer, model=net, rho=RHO)
    w = snapshot(net)
    with pytest.raises(RuntimeError, match="S2SAM looks after through another optimizer"):
        biases.step()
    assert same(net.parameters(), w)


def test_an_optimizer_of_other_weights_is_left_alone():
    net, _, _ = attached()
    strange = make_net(seed=3)
    other = torch.optim.SGD(strange.parameters(), lr=0.1)
    strange(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    w = snapshot(strange)
    other.step()
    assert not same(strange.parameters(), w)
    other.add_param_group({"params": list(net.parameters())})  # now it is one of the same weights
    with pytest.raises(RuntimeError, match="looks after"):
        other.step()


def test_an_optimizer_that_wraps_the_one_attached_to_may_step():
    class Lookahead(torch.optim.Optimizer):
        """Calls the inner step, as optimizers of this kind do."""

        def __init__(self, inner):
            self.inner = inner
            super().__init__([p for group in inner.param_groups for p in group["params"]], {})

        def step(self, closure=None):
            return self.inner.step(closure)

    net, optimizer, sam = attached()
    outer_optimizer = Lookahead(optimizer)
    take_step(net, outer_optimizer, make_data(1)[0])
    assert sam.step == 4


def test_what_nobody_holds_any_longer_stops_nobody():
    net, optimizer, sam = attached()
    sam.restore()
    gone = weakref.ref(optimizer)
    del optimizer, sam
    gc.disable()  # so that the old optimizer is still there, in a circle with its hooks
    try:
        new = torch.optim.AdamW(net.parameters())
        sam = S2SAM(new, model=net, rho=RHO)
        take_step(net, new, make_data(1)[0])
    finally:
        gc.enable()
    assert gone() is None and sam.step == 1


# ------------------------------------------------------------------------------------------------- keys of param_groups


def adadelta(net):
    return torch.optim.Adadelta(net.parameters(), lr=0.5, rho=0.8)


class Mine(torch.optim.SGD):
    """An optimizer with a rho of its own that its signature does not show."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.defaults["rho"] = 7.0
        for group in self.param_groups:
            group["rho"] = 7.0


OWN = {"Adadelta": (adadelta, 0.8), "Mine": (lambda net: Mine(net.parameters(), lr=0.1), 7.0)}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", [S2SAM, SAM])
def test_rho_of_the_optimizer_itself_is_not_touched(name, kind):
    make, own = OWN[name]
    net = make_net()
    optimizer = make(net)
    before = copy.deepcopy(optimizer.param_groups[0] | {"params": None}), dict(optimizer.defaults)
    one = kind(optimizer, rho=RHO)
    assert optimizer.param_groups[0]["rho"] == own and optimizer.param_groups[0]["sam_rho"] == RHO
    twin = pickle.loads(pickle.dumps(optimizer))
    assert rho_key(twin) == "sam_rho"
    one.remove()
    assert (optimizer.param_groups[0] | {"params": None}, optimizer.defaults) == before


@pytest.mark.parametrize("name", OWN)
def test_rho_zero_is_the_base_optimizer_and_a_radius_displaces(name):
    make, _ = OWN[name]
    weights = []
    for options in (None, {"rho": 0.0}, {"rho": RHO}):
        net = make_net()
        optimizer = make(net)
        sam = None if options is None else S2SAM(optimizer, model=net, **options)
        for batch in make_data(5):
            w = snapshot(net)
            F.cross_entropy(net(batch[0]), batch[1]).backward()
            far = moved(net, w)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(snapshot(net))
        assert sam is None or far == pytest.approx(options["rho"], rel=1e-9)
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def test_a_checkpoint_with_the_own_key_goes_on_bit_for_bit_and_an_older_one_loads():
    net = make_net()
    optimizer = adadelta(net)
    S2SAM(optimizer, model=net, rho=RHO)
    for batch in make_data(3):
        take_step(net, optimizer, batch)
    saved, model = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    for batch in make_data(3, seed=4):
        take_step(net, optimizer, batch)
    again = make_net()
    again.load_state_dict(model)
    resumed = adadelta(again)
    S2SAM(resumed, model=again, rho=0.1)
    resumed.load_state_dict(saved)
    for batch in make_data(3, seed=4):
        take_step(again, resumed, batch)
    assert same(again.parameters(), net.parameters())
    for group in saved["param_groups"]:
        group.pop("sam_rho")  # as written when the radius was still in "rho"
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["sam_rho"] == RHO  # that of the last load


def test_a_group_added_later_has_the_radius_and_nothing_else_of_ours():
    net, optimizer, _ = attached()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.float64))]})
    take_step(net, optimizer, make_data(1)[0])
    assert optimizer.param_groups[1]["rho"] == RHO
    assert not [key for key in optimizer.param_groups[1] if "s2sam" in key]


def test_sam_takes_a_checkpoint_of_the_plain_optimizer():
    net = make_net()
    optimizer = FACTORIES["sgd"](net.parameters())
    plain = copy.deepcopy(optimizer.state_dict())
    SAM(optimizer, rho=RHO)
    optimizer.load_state_dict(plain)

    def closure():
        loss = F.cross_entropy(net(make_data(1)[0][0]), make_data(1)[0][1])
        loss.backward()
        return loss

    assert optimizer.step(closure).isfinite()


# ------------------------------------------------------------------------------------------------------- tiny gradients


@pytest.mark.parametrize(("size", "promised"), [(1e-3, True), (1e-16, True), (1e-25, False), (0.0, False)])
def test_the_radius_is_kept_down_to_gradient_norms_of_1e_18(size, promised):
    """Below that the squares of fp32 numbers underflow: e is shorter than rho, in the same direction, never NaN."""
    w = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([w], lr=0.0)
    sam = S2SAM(optimizer, rho=RHO)
    w.grad = torch.full((4,), size)
    optimizer.step()
    optimizer.zero_grad()
    with sam.displaced():
        e = w.detach() - 1
    if promised:
        assert float(e.norm()) == pytest.approx(RHO, rel=1e-3)
    assert bool(e.isfinite().all()) and float(e.norm()) <= RHO * 1.001 and bool((e >= 0).all())


# --------------------------------------------------------------------------------------------------------------- pickle


@pytest.mark.parametrize("schedule", [late(100, rho=0.1), rising(100, rho=0.1)])
def test_schedules_can_be_pickled(schedule):
    twin = pickle.loads(pickle.dumps(schedule))
    assert [twin(t) for t in range(0, 120, 20)] == [schedule(t) for t in range(0, 120, 20)]
