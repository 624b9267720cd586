"""LT by hand: what each level keeps, that rewinding is exact, and that nothing learned outlives a level."""

import io
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2sam import S2SAM, sparsify
from s2sam.sparse.methods.lt import level_sparsities

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import OPTIMIZERS, copy_masks, equal_masks, generator, make_batches, make_net, one_step


def conv_net():
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    g = generator()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    return net


def train(net, optimizer, n=3, seed=1):
    """A training: n steps on images or on vectors."""
    for x, y in make_batches(n, seed):
        if not isinstance(net[0], nn.Linear):
            x = x.repeat(1, 6)[:, :32].view(-1, 2, 4, 4)
        one_step(net, optimizer, (x, y))


def make(net, **kw):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    return optimizer, sparsify(net, optimizer, **{"method": "lt", "sparsity": 0.9, "generator": generator()} | kw)


def tensors(net):
    return {name: t.clone() for name, t in net.state_dict().items()}


# -- the plan --------------------------------------------------------------------------------------------------------


def test_eleven_levels_to_90_percent():
    found = level_sparsities(0.9, 0.2)
    assert len(found) - 1 == 11
    assert found[:4] == pytest.approx([0, 0.2, 0.36, 0.488]) and found[-1] == 0.9
    assert level_sparsities(0.2, 0.2) == [0.0, 0.2], "no second level for a rounding error"
    assert level_sparsities(0.0, 0.2) == [0.0]


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 0.95), st.floats(0.05, 0.9), st.sampled_from(["auto", "uniform", "erk"]))
def test_counts_are_exact_and_masks_nested_whatever_the_settings(sparsity, rate, distribution):
    net = make_net()
    _, lt = make(net, sparsity=sparsity, rate=rate, distribution=distribution)
    masks = [copy_masks(lt)]
    while lt.next_level():
        masks.append(copy_masks(lt))
    assert lt.level == lt.levels == len(masks) - 1
    for k, found in enumerate(masks):
        meant = sparsity if k == lt.levels else 1 - (1 - rate) ** k
        assert sum(int(m.sum()) for m in found.values()) == round((1 - meant) * 222)
    for a, b in pairwise(masks):
        assert not any((b[name] & ~a[name]).any() for name in a)
    assert lt.target_sparsity(0) == sparsity


# -- one level -------------------------------------------------------------------------------------------------------


def test_the_smallest_trained_weights_go_and_the_others_are_rewound():
    layer = nn.Linear(5, 2, bias=False)
    first = torch.tensor([[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    trained = torch.tensor([[9.0, 1, 8, 2, -7], [3, 6, -4, 5, 5]])
    with torch.no_grad():
        layer.weight.copy_(first)
    _, lt = make(layer, sparsity=0.5, rate=0.2)
    assert (lt.level, lt.levels, lt.sparsity()) == (0, 4, 0.0)
    with torch.no_grad():
        layer.weight.copy_(trained)
    assert lt.next_level()
    # round(0.8 * 10) = 8 stay: 1 and 2 go
    assert lt.masks["weight"].int().tolist() == [[1, 0, 1, 0, 1], [1] * 5]
    assert layer.weight.tolist() == [[1, 0, 3, 0, 5], [6, 7, 8, 9, 10]]
    assert lt.last_update.dropped == {"weight": 2} and lt.last_update.grown == {"weight": 0}
    with torch.no_grad():
        layer.weight.copy_(trained.where(lt.masks["weight"], torch.tensor(100.0)))
    assert lt.next_level()  # a pruned weight stays pruned, whatever its value: 6 stay, 3 and -4 go
    assert layer.weight.tolist() == [[1, 0, 3, 0, 5], [0, 7, 0, 9, 10]]


def test_layers_are_compared_with_each_other_unless_a_distribution_is_given():
    kept = {}
    for distribution in ("auto", "uniform"):
        net = make_net()
        with torch.no_grad():
            net[4].weight.mul_(1e-3)
        _, lt = make(net, sparsity=0.5, rate=0.5, distribution=distribution, min_per_filter=0)
        assert lt.next_level() and not lt.next_level()
        kept[distribution] = {name: int(m.sum()) for name, m in lt.masks.items()}
    assert kept["auto"]["4.weight"] == 1
    assert kept["uniform"] == {"0.weight": 36, "2.weight": 60, "4.weight": 15}


@pytest.mark.parametrize("optimizer", ["sgd", "sgd-fused", "adamw", "nadam", "adafactor"])
def test_nothing_learned_outlives_a_level(optimizer):
    net = conv_net()
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    lt = sparsify(net, optimizer, method="lt", sparsity=0.7, rate=0.4)
    start = tensors(net)
    for level in range(1, 4):
        train(net, optimizer)
        assert not torch.equal(net[1].running_mean, start["1.running_mean"])
        assert len(optimizer.state) == 6
        net[1].weight.grad = torch.ones(4)
        assert lt.next_level() == (level < 4)
        for name, tensor in net.state_dict().items():
            mask = lt.masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
            assert torch.equal(tensor[mask], start[name][mask]), f"{name} is not what it was"
            assert tensor[~mask].abs().sum() == 0
        assert not optimizer.state
        assert all(p.grad is None for p in net.parameters())
        assert int(net[1].num_batches_tracked) == 0
    assert lt.sparsity() == pytest.approx(0.7, abs=1 / 120)
    lt.verify()
    assert not lt.next_level()


def test_a_level_trains_as_the_bare_masked_network_does():
    net = conv_net()
    optimizer, lt = make(net, sparsity=0.36)
    for _ in range(2):
        train(net, optimizer, 4)
        lt.next_level()
    train(net, optimizer, 4)
    alone = conv_net()
    with torch.no_grad():
        for name, p in alone.named_parameters():
            p.mul_(lt.masks.get(name, 1))
    bare = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for x, y in make_batches(4):
        bare.zero_grad()
        nn.functional.cross_entropy(alone(x.repeat(1, 6)[:, :32].view(-1, 2, 4, 4)), y).backward()
        for name, p in alone.named_parameters():
            p.grad.mul_(lt.masks.get(name, 1))
        bare.step()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), alone.state_dict().values(), strict=True))


def test_late_rewinding_goes_back_to_step_k():
    net = conv_net()
    optimizer, lt = make(net, rewind_step=2)
    with pytest.raises(RuntimeError, match="before step rewind_step=2; train at least as long"):
        lt.next_level()
    train(net, optimizer, 1)
    train(net, optimizer, 1, seed=5)
    at_two = tensors(net)
    train(net, optimizer, 3)
    for _ in range(2):
        assert lt.next_level()
        for name, tensor in net.state_dict().items():
            mask = lt.masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
            assert torch.equal(tensor[mask], at_two[name][mask])
        train(net, optimizer, 2)
    assert int(at_two["1.num_batches_tracked"]) == 2


# -- with S2SAM ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
@pytest.mark.parametrize("sam_first", [False, True])
def test_the_first_step_of_a_level_is_plain(direction, sam_first):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    if sam_first:
        sam = S2SAM(optimizer, model=net, rho=0.1, direction=direction)
    lt = sparsify(net, optimizer, method="lt", sparsity=0.36)
    if not sam_first:
        sam = S2SAM(optimizer, model=net, rho=0.1, direction=direction)
    start, displaced = tensors(net), []
    net[0].register_forward_pre_hook(lambda *_: displaced.append(sam.is_displaced))
    for level in range(3):
        train(net, optimizer, 4)
        assert displaced == [False, True, True, True], f"at level {level}"
        displaced.clear()
        more = lt.next_level()
        assert more == (level < 2)
        if more:
            assert all(
                torch.equal(w[m], start[n][m])
                for (n, w), m in zip(net.named_parameters(), lt.masks.values(), strict=True)
            )


def test_an_open_window_is_closed_first():
    """A step that a scaler skipped leaves the weights displaced; the level ends at the clean ones all the same."""
    net = make_net()
    optimizer, lt = make(net)
    sam = S2SAM(optimizer, model=net, rho=5.0)
    train(net, optimizer, 3)
    clean = {name: w.detach().clone() for name, w in net.named_parameters()}
    start = lt.state_dict()["extra"]["snapshot"]
    net(make_batches(1)[0][0])
    assert sam.is_displaced
    assert lt.next_level()
    assert not sam.is_displaced
    sizes = torch.cat([clean[name].abs().flatten() for name in lt.masks])
    kept = torch.cat([m.flatten() for m in lt.masks.values()])
    assert sizes[kept].min() >= sizes[~kept].max(), "the weights compared are w, not w + e"
    sam.restore()
    assert all(torch.equal(w[lt.masks[n]], start[n][lt.masks[n]]) for n, w in net.named_parameters())


def test_a_direction_that_a_skipped_step_has_kept_is_forgotten_too():
    """An overflow at the end of a level leaves x in the buffers; one at the start of the next finds none there."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
    lt, sam = sparsify(net, optimizer, method="lt", sparsity=0.36), S2SAM(optimizer, model=net, rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    batches = make_batches(6)

    def step(batch, overflow=False):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(net(batch[0]), batch[1])).backward()
        if overflow:
            net[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        sam.restore()

    for batch, overflow in zip(batches[:3], (False, False, True), strict=True):
        step(batch, overflow)
    assert lt.next_level()
    start, displaced = tensors(net), []
    net[0].register_forward_pre_hook(lambda *_: displaced.append(sam.is_displaced))
    step(batches[3], overflow=True)
    assert all(torch.equal(t, start[name]) for name, t in net.state_dict().items())
    step(batches[4])
    assert displaced == [False, False]
    step(batches[5])
    assert displaced[-1]
    assert max(float((w - start[name]).detach().abs().max()) for name, w in net.named_parameters()) < 1


def test_param_groups_stay():
    net = make_net()
    groups = [{"params": [net[0].weight], "lr": 0.3}, {"params": [net[2].weight, net[4].weight], "weight_decay": 0.5}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    lt = sparsify(net, optimizer, method="lt", sparsity=0.36)
    train(net, optimizer)
    lt.next_level()
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        (0.3, 0, 1),
        (0.1, 0.5, 2),
    ]
    assert optimizer.param_groups[1]["params"][0] is net[2].weight


# -- states and copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rewind_step", [0, 2, 6])
def test_level_and_snapshot_are_saved(rewind_step):
    """Saved after 4 steps of level 0 (the snapshot of step 6 is still to come), or in the middle of level 1."""
    ends = []
    for resume in (False, True):
        net = make_net()
        optimizer, lt = make(net, sparsity=0.5, rewind_step=rewind_step)
        train(net, optimizer, 4)
        if rewind_step < 4:
            lt.next_level()
            train(net, optimizer, 2)
        if resume:
            file = io.BytesIO()
            torch.save([net.state_dict(), optimizer.state_dict(), lt.state_dict()], file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            net = make_net(seed=7)
            optimizer, lt = make(net, sparsity=0.5, rewind_step=rewind_step, init=False)
            for part, state in zip((net, optimizer, lt), saved, strict=True):
                part.load_state_dict(state)
        train(net, optimizer, 3, seed=4)
        while lt.next_level():
            train(net, optimizer, 2)
        ends.append((copy_masks(lt), tensors(net), lt.level, lt.step))
    (masks, weights, level, step), again = ends
    assert equal_masks(masks, again[0]) and again[2:] == (level, step) == (4, step)
    assert all(torch.equal(weights[name], again[1][name]) for name in weights)


def test_a_state_of_another_model_or_plan_is_refused():
    _, lt = make(make_net())
    state = lt.state_dict()
    with pytest.raises(ValueError, match="level 40 of another plan"):
        lt.load_state_dict({**state, "extra": {**state["extra"], "level": 40}})
    with pytest.raises(ValueError, match="snapshot in this state belongs to another model"):
        lt.load_state_dict({**state, "extra": {"level": 1, "snapshot": {"0.weight": torch.zeros(2)}}})
    assert lt.level == 0


def test_the_snapshot_is_a_copy_on_the_cpu():
    net = make_net()
    optimizer, lt = make(net)
    snapshot = lt.state_dict()["extra"]["snapshot"]
    live = {t.data_ptr() for t in net.state_dict().values()}
    assert all(t.device.type == "cpu" and t.data_ptr() not in live for t in snapshot.values())
    assert snapshot.keys() == net.state_dict().keys()


def test_freeze_ends_the_levels_and_remove_takes_every_hook_away():
    net = make_net()
    optimizer, lt = make(net)
    train(net, optimizer)
    lt.next_level()
    lt.freeze()
    assert not lt.next_level() and lt.level == 1
    lt.remove()
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks


def test_several_optimizers_are_all_reset():
    net = conv_net()
    optimizers = [
        torch.optim.SGD([net[0].weight], lr=0.1, momentum=0.9),
        torch.optim.AdamW([net[4].weight], lr=0.01),
        torch.optim.SGD([*net[1].parameters(), net[0].bias, net[4].bias], lr=0.1, momentum=0.9),
    ]
    lt = sparsify(net, optimizers, method="lt", sparsity=0.36)
    start = tensors(net)
    for x, y in make_batches(3):
        nn.functional.cross_entropy(net(x.repeat(1, 6)[:, :32].view(-1, 2, 4, 4)), y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert lt.next_level()
    assert not any(optimizer.state for optimizer in optimizers)
    assert torch.equal(net[1].weight, start["1.weight"])
    assert sum(int(m.sum()) for m in lt.masks.values()) == round(0.8 * 120)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate must be above 0 and below 1"),
        ({"rate": 1}, "rate must be above 0 and below 1"),
        ({"rewind_step": -1}, "rewind_step must be a whole number"),
        ({"rewind_step": 1.5}, "rewind_step must be a whole number"),
        ({"rewind_step": "a"}, "rewind_step must be a whole number of at least 0, got 'a'"),
        ({"rewind_step": None}, "rewind_step must be a whole number"),
        ({"rewind_step": 8, "total_steps": 8}, "rewind_step 8 is not inside the first training, which has 8 steps"),
        ({"rate": "a fifth"}, "rate must be a finite number"),
        ({"sparsity": 0.999}, "not feasible"),
        ({"sparsity": 1.0}, "not feasible"),
        ({"rewind": 5}, "did you mean 'rewind_step'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(make_net(), **options)
