"""Weights that do not fit the masks are never trained in silence, and a refused sparsify() leaves nothing behind."""

import copy

import pytest
import torch
from torch import nn

from s2sam import sparsify


def step(model, optimizer):
    model(torch.ones(3, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def make(method="static", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    dense = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, sparsify(model, optimizer, method=method, sparsity=0.7, **options), dense


@pytest.mark.parametrize("whole", [True, False], ids=["model", "sub-module"])
def test_dense_weights_loaded_between_steps_are_refused_at_the_next_one(whole):
    model, optimizer, sparsifier, dense = make()
    step(model, optimizer)
    if whole:
        model.load_state_dict(dense)
    else:
        model[0].load_state_dict({k.removeprefix("0."): v for k, v in dense.items() if k.startswith("0.")})
    with pytest.raises(RuntimeError, match=r"do not fit.*sparsifier\.apply\(\)"):
        step(model, optimizer)
    optimizer.zero_grad()
    sparsifier.apply()
    step(model, optimizer)
    assert sparsifier.sparsity() == pytest.approx(0.7, abs=0.01)


def test_weights_that_fit_go_on():
    model, optimizer, sparsifier, _ = make()
    step(model, optimizer)
    sparse = copy.deepcopy(model.state_dict())
    step(model, optimizer)
    model.load_state_dict(sparse)
    before = model[0].weight.detach().clone()
    step(model, optimizer)
    assert not torch.equal(model[0].weight, before)
    sparsifier.verify()


def test_after_remove_any_weights_may_be_loaded():
    model, optimizer, sparsifier, dense = make()
    sparsifier.remove()
    model.load_state_dict(dense)
    step(model, optimizer)
    assert int((model[0].weight == 0).sum()) == 0


@pytest.mark.parametrize("options", [{"sparsity": 0.9999}, {"sparsity": 0.5, "distribution": {"nothing": 0.5}}])
def test_a_refused_sparsify_leaves_nothing_on_the_optimizer(options):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"sparsity|nothing"):
        sparsify(model, optimizer, method="static", **options)
    assert not optimizer._optimizer_step_pre_hooks and not hasattr(optimizer, "_s2sam_step_hooks")
