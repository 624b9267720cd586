"""sparsify(): every sentence it refuses with, that a refused call leaves no trace, and its defaults."""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam import Sparsifier, sparsify
from s2sam.hooks import step_hooks

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import (
    OPTIMIZERS,
    equal_masks,
    generator,
    golden,
    make_batches,
    make_net,
    one_step,
    set_masks,
    shaped_states,
)


def sgd(net, **kw):
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1, "momentum": 0.9} | kw)


def call(net=None, optimizer=None, **kw):
    net = make_net() if net is None else net
    return sparsify(net, sgd(net) if optimizer is None else optimizer, **{"method": "static", "sparsity": 0.5} | kw)


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"method": "rigel"}, "unknown method 'rigel'; did you mean 'rigl'"),
        ({"sparsity": 1.0}, "largest feasible sparsity is 0.986486"),
        ({"sparsity": 1.5}, "sparsity must be between 0 and 1"),
        ({"distribution": "erq"}, "unknown distribution 'erq'; did you mean 'er'"),
        ({"distribution": "globl"}, "did you mean 'global'"),
        ({"exclude": "Linear"}, "no prunable weight"),
        ({"include": "9.weight"}, "unknown name or module class in include: '9.weight'"),
        ({"delta_t": 3}, "unknown option of method 'static': 'delta_t'"),
        ({"total_steps": 1.5}, "total_steps must be a whole number"),
        ({"total_steps": "many"}, "total_steps must be a whole number"),
        ({"sparsity": "90%"}, "sparsity must be between 0 and 1"),
        ({"distribution": 5}, "distribution must be a name or a map"),
        ({"distribution": {"0": "half"}}, "the sparsity of '0' must be at least 0"),
        ({"generator": 7}, "generator must be a CPU"),
        ({"optimizer": []}, "give one optimizer"),
    ],
)
def test_bad_arguments(kw, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**kw)


def test_bad_optimizers_and_models():
    net = make_net()
    with pytest.raises(ValueError, match="shares no parameter with the model"):
        call(net, sgd(make_net()))
    with pytest.raises(ValueError, match="trains no prunable weight"):
        full = nn.Linear(3, 4)
        call(full, torch.optim.SGD([full.bias], lr=0.1))
    with pytest.raises(ValueError, match="LBFGS"):
        call(net, torch.optim.LBFGS(net.parameters()))
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        call(net, [3])
    with pytest.raises(ValueError, match="already; call .remove"):
        optimizer = sgd(net)
        call(net, optimizer)
        call(net, optimizer)


def test_a_refused_call_changes_no_weight_and_hooks_nothing():
    net = make_net()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = sgd(net)
    for kw in ({"sparsity": 1.0}, {"method": "rigl"}, {"distribution": "x"}):
        with pytest.raises(ValueError, match="."):
            call(net, optimizer, **kw)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert not step_hooks(optimizer).gradient_masks


def test_batches_that_a_method_does_not_use_are_named():
    with pytest.warns(UserWarning, match="method 'static' does not use batches"):
        call(batches=[])


@pytest.mark.parametrize(
    ("kw", "told"),
    [
        ({"method": "rigl-itop", "total_steps": 750}, "delta_t=4000 changes no mask on its way through 750 steps"),
        ({"method": "rigl", "total_steps": 100, "delta_t": 100}, "for instance 4"),  # never in the last
        ({"method": "rigl", "total_steps": 100, "delta_t": 80}, "delta_t=80"),  # beyond t_end
        ({"method": "gmp", "total_steps": 10, "delta_t": 20}, "delta_t=20"),  # prunes at one blow
        ({"method": "rigl", "total_steps": 100, "delta_t": 37}, None),
        ({"method": "rigl", "total_steps": 100, "delta_t": 100, "init": False}, None),  # a resumed one was told
        ({"method": "set"}, None),
        ({"method": "rigl", "total_steps": 100, "sparsity": 0.0}, None),  # there is nothing to exchange
        ({"method": "static", "total_steps": 10}, None),
        ({"method": "ac-dc", "total_steps": 10}, None),
    ],
)
def test_a_delta_t_beyond_the_training_is_told(kw, told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(**kw)
    assert len(caught) == (told is not None)
    assert all(told in str(w.message) for w in caught)


def test_a_method_of_your_own_is_a_class():
    class FirstOnes(Sparsifier):
        method = "first-ones"

        def initial_scores(self, model):
            return {
                name: -torch.arange(w.numel(), dtype=torch.float32).view(w.shape) for name, w in self.weights.items()
            }

    sparsifier = call(method=FirstOnes, distribution="uniform")
    assert sparsifier.masks["4.weight"].flatten().tolist() == [True] * 15 + [False] * 15


def test_the_default_generator_is_seeded_from_torch_and_leaves_it_alone():
    net = make_net()
    torch.random.default_generator.manual_seed(7)
    state = torch.random.get_rng_state()
    first = call(net).masks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert equal_masks(first, call().masks)
    assert equal_masks(first, call(generator=generator(7)).masks)
    assert not equal_masks(first, call(generator=generator(8)).masks)


def test_hand_written_masks_reach_the_sparsifier():
    layer, _, sparsifier = golden([1] * 6 + [0] * 6, [1.0] * 12, "static")
    set_masks(sparsifier, {"weight": torch.eye(3, 4).bool()})
    assert int((layer.weight != 0).sum()) == 2, "the third was pruned before"
    assert sparsifier.parts[0].kept == {"weight": 3}


def test_every_optimizer_of_the_battery_has_state_to_mask():
    shaped = {}
    for name, make in OPTIMIZERS.items():
        net = make_net()
        optimizer = make(net.parameters())
        one_step(net, optimizer, make_batches(1)[0])
        shaped[name] = len(shaped_states(optimizer, net[0].weight))
    assert shaped == {"sgd": 1, "nesterov": 1, "sgd-fused": 1, "adamw": 3, "nadam": 2, "adafactor": 0, "muon": 1}
