"""Sparsifier: what it counts and reports, its life from attach to remove, several optimizers, odd models."""

import copy
import gc
import pickle
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam.hooks import step_hooks
from s2sam.registry import find, list_methods

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import attach, copy_masks, equal_masks, loss_fn, make_batches, make_net, one_step, shaped_states

RIGL = find(list_methods(), "rigl", "method")
SET = find(list_methods(), "set", "method")
STATIC = find(list_methods(), "static", "method")


def sgd(net, **kw):
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1, "momentum": 0.9} | kw)


# -- what it counts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distribution", ["uniform", "uniform-first-dense", "uniform-first-last-dense", "er", "erk", {"0": 0.5}]
)
def test_sparsity_is_measured_and_exact(distribution):
    net = make_net()
    sparsifier = attach(STATIC, net, sgd(net), distribution=distribution)
    zeros = sum(int((p == 0).sum()) for p in net.parameters())
    assert sparsifier.sparsity() == pytest.approx(zeros / 222)
    if "dense" not in distribution:
        assert zeros == round(0.7 * 222)
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    dense_again = int((~sparsifier.masks["0.weight"]).sum())
    assert sparsifier.sparsity() == pytest.approx((zeros - dense_again) / 222)


def test_power_scale_reaches_the_budget():
    net = make_net()
    sparsifier = attach(STATIC, net, sgd(net), power_scale=0.0, sparsity=0.5)
    assert list(sparsifier.density().values()) == [0.5, 0.5, 0.5]


def test_report_lists_every_parameter_with_reasons():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    net[3].weight.requires_grad_(False)
    report = attach(STATIC, net, sgd(net), sparsity=0.5, distribution="uniform").report()
    rows = {row.name: row for row in report}
    assert list(rows) == [name for name, _ in net.named_parameters()]
    assert (rows["0.weight"].layer, rows["0.weight"].shape, rows["0.weight"].kept) == ("Conv2d", (8, 3, 3, 3), 108)
    assert rows["0.weight"].prunable
    assert rows["0.weight"].sparsity == 0.5
    assert rows["1.weight"].reason == "normalisation (BatchNorm2d)"
    assert rows["3.weight"].reason == "frozen (requires_grad is False)"
    assert report.sparsity == 0.5
    assert report.total_sparsity == pytest.approx(108 / sum(p.numel() for p in net.parameters()))
    text = str(report)
    assert "8x3x3x3" in text
    assert "frozen" in text
    assert text.endswith("sparsity 0.5000 of the prunable weights, 0.3913 of all parameters")


def test_survival_and_exploration_by_hand():
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(SET, net, optimizer)
    first = copy_masks(sparsifier)
    union = copy_masks(sparsifier)
    rates = [sparsifier.explored()]
    assert rates[0] == pytest.approx(1 - 155 / 222)
    for batch in make_batches(12):
        one_step(net, optimizer, batch)
        for name, mask in sparsifier.masks.items():
            union[name] |= mask
        rates.append(sparsifier.explored())
        assert rates[-1] == pytest.approx(sum(int(m.sum()) for m in union.values()) / 222)
        alive = sum(int((first[name] & mask).sum()) for name, mask in sparsifier.masks.items())
        assert sparsifier.survival() == pytest.approx(alive / 67)
    assert rates == sorted(rates)
    assert rates[-1] > rates[0]
    assert sparsifier.updates == 4
    assert sparsifier.last_update.step == 12


# -- its life --------------------------------------------------------------------------------------------------------


def test_weights_and_existing_state_are_pruned_at_once():
    net = make_net()
    optimizer = sgd(net)
    one_step(net, optimizer, make_batches(1)[0])
    sparsifier = attach(STATIC, net, optimizer)
    for p, mask in zip(net.parameters(), sparsifier.masks.values(), strict=True):
        assert p[~mask].abs().sum() == 0
        assert all(s[~mask].abs().sum() == 0 and s[mask].abs().sum() > 0 for s in shaped_states(optimizer, p))


def test_freeze_stops_changes_and_keeps_masks_in_force():
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(RIGL, net, optimizer)
    for batch in make_batches(3):
        one_step(net, optimizer, batch)
    assert sparsifier.updates == 1
    sparsifier.freeze()
    masks, weights = copy_masks(sparsifier), [p.detach().clone() for p in net.parameters()]
    for batch in make_batches(6, seed=2):
        one_step(net, optimizer, batch)
    assert equal_masks(masks, sparsifier.masks)
    assert sparsifier.updates == 1
    assert all(not torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    sparsifier.verify()


def test_remove_leaves_the_weights_sparse_and_lets_them_go():
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(STATIC, net, optimizer)
    sparsifier.remove()
    sparsifier.remove()
    assert sparsifier.sparsity() == pytest.approx(155 / 222)
    assert step_hooks(optimizer).gradient_masks == []
    one_step(net, optimizer, make_batches(1)[0])
    assert sparsifier.sparsity() < 0.3, "only what no gradient reaches is still 0"
    attach(STATIC, net, optimizer)


def test_copies_and_pickles_of_model_and_optimizer_are_inert():
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(RIGL, net, optimizer)
    one_step(net, optimizer, make_batches(1)[0])
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in twin.modules())
    for made in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not made._optimizer_step_pre_hooks
        assert not made._optimizer_step_post_hooks
    twin_net, twin = copy.deepcopy((net, optimizer))
    before = sparsifier.step
    one_step(twin_net, twin, make_batches(1)[0])
    assert sparsifier.step == before
    assert int((twin_net[0].weight == 0).sum()) < int((net[0].weight == 0).sum()) / 2
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    assert sparsifier.parts[0].layers.fits(
        {name: dict(averaged.module.named_parameters())[name] for name in sparsifier.masks}
    )


def test_nothing_is_kept_alive():
    net = make_net()
    optimizer = sgd(net)
    gone = [weakref.ref(attach(RIGL, net, optimizer)), weakref.ref(net)]
    one_step(net, optimizer, make_batches(1)[0])
    assert gone[0]() is not None, "the optimizer keeps its sparsifier"
    del net, optimizer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_masks_keep_their_place_and_are_the_live_ones():
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(RIGL, net, optimizer)
    places = {name: m.data_ptr() for name, m in sparsifier.masks.items()}
    before = copy_masks(sparsifier)
    for batch in make_batches(9):
        one_step(net, optimizer, batch)
    assert {name: m.data_ptr() for name, m in sparsifier.masks.items()} == places
    assert not equal_masks(before, sparsifier.masks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_masks_follow_the_model_to_another_device():
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(RIGL, net, optimizer)
    net.to("cuda")
    for x, y in make_batches(7):
        one_step(net, optimizer, (x.cuda(), y.cuda()))
    assert {m.device.type for m in sparsifier.masks.values()} == {"cuda"}
    assert sparsifier.updates == 2
    assert 0 < sparsifier.survival() < 1
    sparsifier.verify()


def test_closure_form_equals_plain_form():
    runs = []
    for closure in (False, True):
        net = make_net()
        optimizer = sgd(net)
        sparsifier = attach(RIGL, net, optimizer)
        for batch in make_batches(9):
            if not closure:
                one_step(net, optimizer, batch)
                continue

            def evaluate(net=net, optimizer=optimizer, batch=batch):
                optimizer.zero_grad()
                loss = loss_fn(net(batch[0]), batch[1])
                loss.backward()
                return loss

            assert optimizer.step(evaluate).item() > 0
        runs.append((copy_masks(sparsifier), [p.detach().clone() for p in net.parameters()]))
    assert equal_masks(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_several_optimizers_each_with_its_own_weights():
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    muon = torch.optim.Muon([net[0].weight], lr=0.02)
    adam = torch.optim.AdamW([net[0].bias, *net[2].parameters()], lr=0.01)
    sparsifier = attach(RIGL, net, [muon, adam])
    assert list(sparsifier.masks) == ["0.weight", "2.weight"]
    assert sum(int(m.sum()) for m in sparsifier.masks.values()) == round(0.3 * 108)
    before = copy_masks(sparsifier)
    for x, y in make_batches(6):
        net.zero_grad()
        loss_fn(net(x), y).backward()
        muon.step()
        adam.step()
    assert sparsifier.step == 6
    assert sparsifier.updates == 4
    assert all(not torch.equal(before[name], m) for name, m in sparsifier.masks.items())
    sparsifier.verify()
    state = sparsifier.state_dict()
    assert state["steps"] == [6, 6]


def test_loss_head_outside_the_model_frozen_and_unused_weights_work():
    net = nn.ModuleDict(
        {"a": nn.Linear(6, 8), "frozen": nn.Linear(8, 8), "unused": nn.Linear(4, 4), "other": nn.Linear(5, 5)}
    )
    net["frozen"].requires_grad_(False)
    head = nn.Linear(8, 3)
    trained = [*net["a"].parameters(), *net["frozen"].parameters(), *net["unused"].parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    sparsifier = attach(RIGL, net, optimizer)
    assert list(sparsifier.masks) == ["a.weight", "unused.weight"]
    reasons = {row.name: row.reason for row in sparsifier.report()}
    assert reasons["frozen.weight"] == "frozen (requires_grad is False)"
    assert reasons["other.weight"] == "not in the optimizer"
    frozen, outside = net["frozen"].weight.clone(), head.weight.clone()
    for x, y in make_batches(7):
        optimizer.zero_grad()
        loss_fn(head(net["frozen"](net["a"](x))), y).backward()
        optimizer.step()
    assert torch.equal(frozen, net["frozen"].weight)
    assert not torch.equal(outside, head.weight)
    assert int((head.weight == 0).sum()) == 0
    sparsifier.verify()


def test_a_tied_weight_is_pruned_once():
    net = nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)})
    net["two"].weight = net["one"].weight
    sparsifier = attach(STATIC, net, sgd(net), sparsity=0.5)
    assert list(sparsifier.masks) == ["one.weight"]
    assert int((net["two"].weight == 0).sum()) == 32


def test_wrapped_models_give_the_same_names():
    net = make_net()
    compiled = torch.compile(net, backend="eager")
    optimizer = sgd(compiled)
    state = attach(STATIC, compiled, optimizer).state_dict()
    plain = make_net()
    attach(STATIC, plain, sgd(plain), init=False).load_state_dict(state)
