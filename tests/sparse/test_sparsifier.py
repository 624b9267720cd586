"""Sparsifier: what it counts and reports, its life from attach to remove, and every sentence it refuses with."""

import copy
import gc
import io
import math
import pickle
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam import Sparsifier, sparsify
from s2sam.hooks import step_hooks
from s2sam.registry import find, list_methods

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import (
    OPTIMIZERS, attach, copy_masks, equal_masks, generator, golden, loss_fn, make_batches, make_net, one_step, set_masks, shaped_states,
)  # fmt: skip

RIGL = find(list_methods(), "rigl", "method")
SET = find(list_methods(), "set", "method")
STATIC = find(list_methods(), "static", "method")


def sgd(net, **kw):
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1, "momentum": 0.9} | kw)


# -- what it counts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["uniform", "uniform-first-dense", "uniform-first-last-dense", "er", "erk", {"0": 0.5}])
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


# -- its life -----------------------------------------------------------------------------------------------------------


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
    assert sparsifier.sparsity() < 0.1
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
    assert int((twin_net[0].weight == 0).sum()) == 0
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    assert sparsifier.parts[0].layers.fits({name: dict(averaged.module.named_parameters())[name] for name in sparsifier.masks})


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
    net = nn.ModuleDict({"a": nn.Linear(6, 8), "frozen": nn.Linear(8, 8), "unused": nn.Linear(4, 4), "other": nn.Linear(5, 5)})
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


# -- saving and loading -------------------------------------------------------------------------------------------------


def round_trip(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_state_is_plain_small_and_detached_from_the_live_masks():
    net = nn.Linear(256, 256, bias=False)
    optimizer = sgd(net)
    sparsifier = attach(RIGL, net, optimizer)
    state = round_trip(sparsifier.state_dict())
    assert state["masks"]["weight"].numel() == 256 * 256 // 8
    assert state["method"] == "rigl"
    saved = copy_masks(sparsifier)
    for _ in range(6):
        net(torch.randn(4, 256)).square().sum().backward()
        optimizer.step()
    assert not equal_masks(saved, sparsifier.masks)
    sparsifier.load_state_dict(state)
    assert equal_masks(saved, sparsifier.masks)
    assert sparsifier.step == 0


def test_init_false_touches_nothing_and_wants_masks_before_the_first_step():
    net = make_net()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = sgd(net)
    sparsifier = attach(RIGL, net, optimizer, init=False)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="load the masks with sparsifier.load_state_dict"):
        one_step(net, optimizer, make_batches(1)[0])
    with pytest.raises(RuntimeError, match="init=False"):
        sparsifier.state_dict()


def test_weights_that_do_not_fit_the_masks_are_refused_and_apply_is_the_way_out():
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(STATIC, net, optimizer)
    net.load_state_dict(make_net(5).state_dict())
    with pytest.raises(RuntimeError, match=r"masks do not fit the weights: 3 layers .*0\.weight.*sparsifier\.apply\(\)"):
        one_step(net, optimizer, make_batches(1)[0])
    sparsifier.apply()
    one_step(net, optimizer, make_batches(1)[0])
    one_step(net, optimizer, make_batches(1)[0])
    sparsifier.load_state_dict(attach(STATIC, twin := make_net(), sgd(twin), seed=9).state_dict())
    with pytest.raises(RuntimeError, match="masks do not fit"):
        one_step(net, optimizer, make_batches(1)[0])


def test_foreign_and_damaged_states_get_one_sentence():
    net = make_net()
    sparsifier = attach(RIGL, net, sgd(net))
    state = sparsifier.state_dict()
    before = copy_masks(sparsifier)
    other = nn.Linear(6, 12, bias=False)
    elsewhere = attach(RIGL, other, sgd(other)).state_dict()
    for bad, message in (
        ({}, "no sparsifier state"),
        ({"masks": 1}, "no sparsifier state"),
        (net.state_dict(), "no sparsifier state"),
        ({**state, "version": 99}, "has version 99; this s2sam reads version 1"),
        ({**state, "method": "set"}, "saved by method 'set', the sparsifier's is 'rigl'; resume with method='set'"),
        (elsewhere, "another set of weights"),
        ({**state, "shapes": {**state["shapes"], "0.weight": [1, 2]}}, "'0.weight' has shape [1, 2] in the state"),
        ({**state, "steps": [1, 2]}, "saved with 2 optimizers, there are 1"),
        ({**state, "masks": {}}, "damaged"),
        ({**state, "masks": {**state["masks"], "0.weight": torch.zeros(1, dtype=torch.uint8)}}, "no packed mask"),
        ({k: v for k, v in state.items() if k != "generator"}, "damaged: it has no 'generator'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            sparsifier.load_state_dict(bad)
        assert equal_masks(before, sparsifier.masks)


# -- gradients ----------------------------------------------------------------------------------------------------------


def test_mask_gradients_before_clipping():
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(STATIC, net, optimizer)
    loss_fn(net(make_batches(1)[0][0]), make_batches(1)[0][1]).backward()
    active = math.sqrt(sum(float((p.grad * m).square().sum()) for p, m in zip(net.parameters(), sparsifier.masks.values(), strict=True)))
    dense = math.sqrt(sum(float(p.grad.square().sum()) for p in net.parameters()))
    sparsifier.mask_gradients()
    norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), 1e9))
    assert norm == pytest.approx(active)
    assert norm < 0.9 * dense


def test_a_bad_gradient_at_a_pruned_weight_harms_nothing_between_changes():
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(STATIC, net, optimizer)
    x, y = make_batches(1)[0]
    loss_fn(net(x), y).backward()
    net[0].weight.grad[~sparsifier.masks["0.weight"]] = float("nan")
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())
    assert all(s.isfinite().all() for p in net.parameters() for s in shaped_states(optimizer, p))


def test_sparse_gradients_are_refused():
    net = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach(STATIC, net, optimizer, include="Embedding")
    net(torch.randint(0, 10, (3, 2))).sum().backward()
    with pytest.raises(RuntimeError, match="gradient of '0.weight' is sparse"):
        optimizer.step()


def test_unpruned_sparse_embedding_gradients_pass():
    net = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = attach(SET, net, optimizer, delta_t=1)
    net(torch.randint(0, 10, (3, 2))).sum().backward()
    optimizer.step()
    assert sparsifier.updates == 1


# -- refusals -----------------------------------------------------------------------------------------------------------


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


def test_a_method_of_your_own_is_a_class():
    class FirstOnes(Sparsifier):
        method = "first-ones"

        def initial_scores(self, model):
            return {name: -torch.arange(w.numel(), dtype=torch.float32).view(w.shape) for name, w in self.weights.items()}

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
