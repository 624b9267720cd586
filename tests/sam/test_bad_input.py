"""Arguments and optimizers that cannot work are refused in one sentence, and leave nothing behind."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from sam_common import make_data, make_net, same, snapshot
from torch import nn
from torch.optim import Optimizer

from s2sam import S2SAM, SAM


class Lookahead(Optimizer):
    """A wrapper as in timm: it imitates an optimizer but never calls Optimizer.__init__."""

    def __init__(self, base, imitate_hooks):
        self.base, self.param_groups, self.state, self.defaults = base, base.param_groups, base.state, base.defaults
        if imitate_hooks:
            self._optimizer_step_pre_hooks = OrderedDict()
            self._optimizer_step_post_hooks = OrderedDict()

    @torch.no_grad()
    def step(self, closure=None):
        return self.base.step(closure)


class Twice(torch.optim.SGD):
    """Calls its closure twice, as line searches do."""

    def step(self, closure=None):
        if closure is None:
            return None
        with torch.enable_grad():
            closure()
            return closure()


def sgd(net, **kw):
    return torch.optim.SGD(net.parameters(), lr=0.1, **kw)


def traces(net, *optimizers):
    """Everything that attaching could leave on a model or an optimizer."""
    hooks = [
        len(getattr(m, name))
        for m in net.modules()
        for name in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
    ]
    groups = [sorted(g) for o in optimizers for g in [o.defaults, *o.param_groups]]
    own = [
        len(getattr(o, name, ()))
        for o in optimizers
        for name in (
            "_optimizer_step_pre_hooks",
            "_optimizer_step_post_hooks",
            "_optimizer_state_dict_post_hooks",
            "_optimizer_load_state_dict_pre_hooks",
            "_optimizer_load_state_dict_post_hooks",
        )
    ]
    return hooks, groups, own


NAN, INF = float("nan"), float("inf")

OPTIONS = [
    ({"rho": -0.1}, ValueError, "rho must be a finite number >= 0, got -0.1"),
    ({"rho": NAN}, ValueError, "rho must be .* got nan"),
    ({"rho": INF}, ValueError, "rho must be .* got inf"),
    ({"rho": "large"}, (TypeError, ValueError), "rho"),
    ({"rho": None}, (TypeError, ValueError), "rho"),
    ({"direction": "gradients"}, ValueError, "direction must be one of 'gradient'.*'gradients'"),
    ({"direction": None}, ValueError, "direction must be one of"),
    ({"scale": "l2"}, ValueError, "scale must be one of 'norm'"),
    ({"sign": 0}, ValueError, "sign must be one of 1, -1, got 0"),
    ({"sign": "+"}, ValueError, "sign must be one of"),
    ({"nonfinite": "raise"}, ValueError, "nonfinite must be one of 'auto'"),
    ({"on_clean_grad": "error"}, ValueError, "on_clean_grad must be one of 'raise'"),
    ({"stats_every": -1}, ValueError, "stats_every must be"),
    ({"direction": "momentum"}, ValueError, "needs an optimizer with momentum"),
    ({"model": nn.Linear(2, 2)}, ValueError, "shares no parameter with the model"),
    ({"model": [nn.Linear(2, 2)]}, ValueError, "shares no parameter with the model"),
    ({"model": "resnet"}, TypeError, "[Mm]odule"),
    ({"model": 5}, TypeError, "[Mm]odule"),
    ({"model": [make_net(), None]}, TypeError, "[Mm]odule"),
    ({"unknown": 1}, TypeError, "unknown"),
]


@pytest.mark.parametrize(("options", "error", "match"), OPTIONS, ids=[str(i) for i in range(len(OPTIONS))])
def test_a_bad_option_is_refused_and_nothing_is_left_attached(options, error, match):
    net = make_net()
    optimizer = sgd(net)
    before = traces(net, optimizer)
    with pytest.raises(error, match=match) as caught:
        S2SAM(optimizer, **{"model": net} | options)
    assert "\n" not in str(caught.value)
    assert traces(net, optimizer) == before
    S2SAM(optimizer, model=net)  # and now it can be done properly


def test_positional_rho_is_refused():
    net = make_net()
    with pytest.raises(TypeError, match="positional"):
        S2SAM(sgd(net), 0.05)


@pytest.mark.parametrize("method", [S2SAM, SAM])
@pytest.mark.parametrize("value", [-1.0, NAN, INF])
def test_a_bad_rho_of_a_group_is_refused(method, value):
    net = make_net()
    optimizer = torch.optim.SGD([{"params": net.parameters(), "rho": value}], lr=0.1)
    before = traces(net, optimizer)
    with pytest.raises(ValueError, match="rho must be"):
        method(optimizer)
    assert traces(net, optimizer) == before


@pytest.mark.parametrize("value", [-0.5, NAN, INF])
def test_a_schedule_that_returns_nonsense_is_refused_when_it_does(value):
    net = make_net()
    optimizer = sgd(net)
    sam = S2SAM(optimizer, model=net, rho=lambda step: value if step == 2 else 0.1)
    data = make_data(3)
    for x, y in data[:2]:
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    w = snapshot(net)
    with pytest.raises(ValueError, match=r"rho\(2\) must be a finite number >= 0, got"):
        net(data[2][0])
    assert same(net.parameters(), w)
    with torch.no_grad():
        assert net(data[2][0]).isfinite().all()
    assert sam.is_displaced is False


@pytest.mark.parametrize("value", [-0.5, NAN])
def test_a_rho_changed_to_nonsense_later_is_refused(value):
    net = make_net()
    optimizer = sgd(net)
    S2SAM(optimizer, model=net)
    optimizer.param_groups[0]["rho"] = value
    with pytest.raises(ValueError, match="rho must be"):
        net(make_data(1)[0][0])


@pytest.mark.parametrize("first", [S2SAM, SAM])
@pytest.mark.parametrize("second", [S2SAM, SAM])
def test_two_sharpness_methods_on_one_optimizer(first, second):
    net = make_net()
    optimizer = sgd(net)
    attached = first(optimizer, rho=0.1)
    before = traces(net, optimizer)
    with pytest.raises(ValueError, match=f"already has a {first.__name__}; call its .remove") as error:
        second(optimizer, model=net)
    assert second.__name__ in str(error.value)
    assert traces(net, optimizer) == before
    attached.remove()
    second(optimizer, model=net)


def test_a_list_is_refused_as_a_whole():
    net, other = make_net(), make_net(seed=1)
    free, taken = sgd(net), sgd(other)
    S2SAM(taken)
    before = traces(net, free)
    with pytest.raises(ValueError, match="already has"):
        S2SAM([free, taken], model=[net, other])
    assert traces(net, free) == before
    for wrong in ([], [free, free]):
        with pytest.raises(ValueError, match="non-empty list of different ones"):
            S2SAM(wrong)


@pytest.mark.parametrize("imitate_hooks", [False, True])
@pytest.mark.parametrize("method", [S2SAM, SAM])
def test_lookahead_whose_hooks_never_fire(method, imitate_hooks):
    net = make_net()
    wrapper = Lookahead(sgd(net), imitate_hooks)
    with pytest.raises(ValueError, match="never fire.*attach to the optimizer it wraps"):
        method(wrapper)
    method(wrapper.base)


@pytest.mark.parametrize("method", [S2SAM, SAM])
def test_lbfgs(method):
    net = make_net()
    with pytest.raises(ValueError, match="LBFGS calls its closure many times.*use SGD"):
        method(torch.optim.LBFGS(net.parameters()))


@pytest.mark.parametrize("thing", ["sgd", 5, None, make_net(), [nn.Parameter(torch.ones(1))]])
@pytest.mark.parametrize("method", [S2SAM, SAM])
def test_no_optimizer_at_all(method, thing):
    with pytest.raises((TypeError, ValueError), match="torch.optim.Optimizer"):
        method(thing)


@pytest.mark.parametrize("method", [S2SAM, SAM])
def test_an_optimizer_that_calls_its_closure_twice(method):
    net = make_net()
    optimizer = Twice(net.parameters(), lr=0.1)
    method(optimizer)
    x, y = make_data(1)[0]
    w = snapshot(net)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        with pytest.raises(RuntimeError, match="Twice calls its closure more than once"):
            optimizer.step(closure)
        assert same(net.parameters(), w)


@pytest.mark.parametrize("how", ["refused", "removed"])
def test_an_optimizer_that_was_refused_or_released_works_as_before(how):
    net = make_net()
    optimizer = Twice(net.parameters(), lr=0.1)
    if how == "refused":
        with pytest.raises(ValueError, match="shares no parameter"):
            S2SAM(optimizer, model=nn.Linear(2, 2))
    else:
        S2SAM(optimizer, model=net).remove()
    calls = []
    optimizer.step(lambda: calls.append(1))
    assert calls == [1, 1]


def test_an_optimizer_that_never_calls_its_closure():
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            return None

    net = make_net()
    optimizer = Deaf(net.parameters(), lr=0.1)
    S2SAM(optimizer)
    with pytest.raises(RuntimeError, match="Deaf never called its closure; call step\\(\\) without one"):
        optimizer.step(lambda: None)


def test_sparse_gradients():
    net = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    S2SAM(optimizer, model=net)
    w = snapshot(net)
    net(torch.tensor([1, 2])).square().mean().backward()
    with pytest.raises(ValueError, match="sparse gradients are not supported.*sparse=False"):
        optimizer.step()
    assert same(net.parameters(), w)


def test_sam_without_a_closure_or_under_a_grad_scaler():
    net = make_net(torch.float32)
    optimizer = sgd(net)
    SAM(optimizer)
    scaler = torch.amp.GradScaler(device="cpu")
    x, y = make_data(1, torch.float32)[0]
    w = snapshot(net)
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    for step in (optimizer.step, lambda: scaler.step(optimizer)):
        with pytest.raises(RuntimeError, match=r"optimizer.step\(closure\).*GradScaler cannot.*bfloat16"):
            step()
    assert same(net.parameters(), w)


@pytest.mark.parametrize("scale", ["l2", None])
def test_sam_with_an_unknown_scale(scale):
    net = make_net()
    optimizer = sgd(net)
    before = traces(net, optimizer)
    with pytest.raises(ValueError, match="scale must be one of"):
        SAM(optimizer, scale=scale)
    with pytest.raises(ValueError, match="rho must be"):
        SAM(optimizer, rho=-1)
    assert traces(net, optimizer) == before


def test_momentum_in_some_groups_only():
    net = make_net()
    groups = [{"params": net[:2].parameters()}, {"params": net[2:].parameters(), "momentum": 0.0}]
    with pytest.raises(ValueError, match="needs an optimizer with momentum"):
        S2SAM(torch.optim.SGD(groups, lr=0.1, momentum=0.9), model=net, direction="momentum")


def test_a_group_without_momentum_added_later_gets_one_sentence():
    net = make_net()
    optimizer = sgd(net[:2], momentum=0.9)
    S2SAM(optimizer, model=net, direction="momentum")
    optimizer.add_param_group({"params": list(net[2:].parameters()), "momentum": 0.0})
    with pytest.raises(ValueError, match="momentum"):
        for x, y in make_data(2):
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
