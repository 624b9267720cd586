"""Defects of the published code, one regression test each, by name; the docstring says where each of them is."""

import copy
import warnings
from functools import partial

import pytest
import sam_common
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, distance, make_data, make_net, moved, same, snapshot, take_step, total
from torch import nn

from s2sam import S2SAM
from s2sam.hooks import Phase, step_hooks

RHO = 0.5
attached = partial(sam_common.attached, rho=RHO, warm=2)


def test_the_method_silently_being_plain_sgd_when_zero_grad_sets_none():
    """jjsrf/SSAM-NEURIPS2024:sam.py skips every parameter whose grad is None, which since torch 2.0 is every one."""
    net, optimizer, _ = attached(warm=0)
    radii = []
    for batch in make_data(6):
        w = snapshot(net)
        loss = F.cross_entropy(net(batch[0]), batch[1])
        radii.append(moved(net, w))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in net.parameters())
    assert radii == pytest.approx([0.0] + [RHO] * 5)
    plain = make_net()
    base = FACTORIES["sgd"](plain.parameters())
    for batch in make_data(6):
        take_step(plain, base, batch)
    assert distance(net.parameters(), plain.parameters()) > 1e-3


def test_a_stale_displacement_subtracted_again_when_gradients_go_from_zeros_to_none():
    """jjsrf/SSAM-NEURIPS2024:sam.py (second_step): with lr = 0 the weights walk off by rho a step."""
    net, optimizer, _ = attached()
    optimizer.param_groups[0]["lr"] = 0.0
    w = snapshot(net)
    for step, batch in enumerate(make_data(9)):
        take_step(net, optimizer, batch, set_to_none=step % 3 != 0)
        assert same(net.parameters(), w)


def test_the_adaptive_step_being_the_cube_of_the_gradient():
    """jjsrf/SSAM-NEURIPS2024:sam.py (adaptive): rho g^3 / || |w| g || where ASAM says rho w^2 g / || |w| g ||."""
    w = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.0)
    sam = S2SAM(optimizer, rho=RHO, scale="asam")
    w.grad = torch.tensor([3.0, 5.0], dtype=torch.float64)
    optimizer.step()
    with sam.displaced():
        e = w.detach() - torch.tensor([2.0, -1.0], dtype=torch.float64)
    assert e.tolist() == pytest.approx([RHO * 12 / 61**0.5, RHO * 5 / 61**0.5], rel=1e-12)  # not 27 and 125


def mask_after_attaching(net, optimizer):
    """Half of the first weight is pruned, by the phases a sparsifier uses."""
    mask = torch.arange(net[0].weight.numel()).view_as(net[0].weight) % 2 == 0
    weight = net[0].weight

    def mask_gradient(context):
        if weight.grad is not None:
            weight.grad.mul_(mask)

    def mask_weight(context):
        weight.mul_(mask)
        for value in optimizer.state.get(weight, {}).values():
            if torch.is_tensor(value) and value.shape == weight.shape:
                value.mul_(mask)

    with torch.no_grad():
        weight.mul_(mask)
    hooks = step_hooks(optimizer)
    hooks.register(Phase.MASK, mask_gradient)
    hooks.register(Phase.REMASK, mask_weight)
    return mask


@pytest.mark.parametrize("factory", ["sgd", "adamw"])
def test_pruned_weights_being_alive_in_the_forward_and_counted_in_the_norm(factory):
    """jjsrf/SSAM-NEURIPS2024:main_prune_train.py masks after the step: displacement and norm are dense."""
    net, optimizer, _ = attached(factory, warm=0)
    mask = mask_after_attaching(net, optimizer)
    radii = []
    for batch in make_data(5):
        w = snapshot(net)
        loss = F.cross_entropy(net(batch[0]), batch[1])
        assert float(net[0].weight[~mask].abs().max()) == 0.0
        radii.append(moved(net, w))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert float(net[0].weight[~mask].abs().max()) == 0.0
        assert float(optimizer.state[net[0].weight]["s2sam_buffer"][~mask].abs().max()) == 0.0
    assert radii[1:] == pytest.approx([RHO] * 4, rel=1e-12)


def test_gradients_being_gone_when_a_growth_criterion_reads_them_after_the_step():
    """jjsrf/SSAM-NEURIPS2024:main_prune_train.py updates masks after the gradients were cleared."""
    net, optimizer, _ = attached()
    seen = []
    step_hooks(optimizer).register(Phase.TOPOLOGY, lambda _: seen.append([p.grad.clone() for p in net.parameters()]))
    x, y = make_data(1)[0]
    F.cross_entropy(net(x), y).backward()
    g = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    assert same(seen[0], g)
    assert same([p.grad for p in net.parameters()], g)
    assert total(g) > 0


def test_a_crash_on_unused_and_frozen_parameters():
    """jjsrf/SSAM-NEURIPS2024:sam.py clones p.grad before it looks whether there is one."""
    net, optimizer, _ = attached(warm=0)
    net.unused = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer.add_param_group({"params": [net.unused]})
    net[0].requires_grad_(False)
    w = snapshot(net)
    for batch in make_data(3):
        take_step(net, optimizer, batch)
    change = {n: total([p - q]) for (n, p), q in zip(net.named_parameters(), w, strict=True)}
    assert change["unused"] == change["0.weight"] == 0.0
    assert min(change["2.weight"], change["4.weight"]) > 0


def test_a_checkpoint_without_the_momentum():
    """jjsrf/SSAM-NEURIPS2024:sam.py and davda54/sam#73: the inner optimizer's state is not saved."""
    net, optimizer, _ = attached()
    state = optimizer.state_dict()["state"]
    assert [set(s) for s in state.values()] == [{"momentum_buffer", "s2sam_buffer"}] * 3
    twin, twin_optimizer, _ = attached(warm=0)
    twin.load_state_dict(net.state_dict())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for batch in make_data(3):
        take_step(net, optimizer, batch)
        take_step(twin, twin_optimizer, batch)
    assert same(net.parameters(), twin.parameters())


def test_a_scheduler_that_no_longer_reaches_the_step_after_loading():
    """jjsrf/SSAM-NEURIPS2024:sam.py, davda54/sam#34, mosaicml/composer PR 3259, NVIDIA/apex#766: two sets of groups."""
    net, optimizer, _ = attached()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0 if epoch == 0 else 0.0)
    optimizer.load_state_dict(optimizer.state_dict())
    take_step(net, optimizer, make_data(1)[0])
    scheduler.step()
    w = snapshot(net)
    take_step(net, optimizer, make_data(1)[0])
    assert same(net.parameters(), w)  # lr is 0 in the step as well


def test_a_parameter_group_added_later_crashing():
    """jjsrf/SSAM-NEURIPS2024:sam.py: KeyError 'fused', because the inner defaults never reach the new group."""
    net = make_net()
    optimizer = torch.optim.AdamW(net[:2].parameters(), lr=0.01)
    S2SAM(optimizer, model=net, rho=RHO)
    take_step(net, optimizer, make_data(1)[0])
    optimizer.add_param_group({"params": list(net[2:].parameters()), "weight_decay": 0.0})
    net.zero_grad()
    w = snapshot(net)
    for batch in make_data(3):
        take_step(net, optimizer, batch)
    assert all(total([p - q]) > 0 for p, q in zip(net.parameters(), w, strict=True))
    assert set(optimizer.param_groups[0]) - {"s2sam_step", "s2sam_twins"} == set(optimizer.param_groups[1])
    assert optimizer.param_groups[1]["rho"] == RHO


@pytest.mark.parametrize("factory", ["sgd", "sgd-fused"])
def test_a_grad_scaler_asserting_that_there_is_no_closure(factory):
    """jjsrf/SSAM-NEURIPS2024:sam.py, davda54/sam#7: scaler.step(optimizer) raises."""
    net, optimizer, _ = attached(factory, torch.float32)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=8.0)
    w = snapshot(net)
    for x, y in make_data(3, torch.float32):
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert moved(net, w) > 1e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_batch_poisoning_the_training_for_ever(value):
    """jjsrf/SSAM-NEURIPS2024:sam.py and eight peers: the stored gradient is NaN, so is every later displacement."""
    net, optimizer, sam = attached()
    x, y = make_data(1)[0]
    w = snapshot(net)
    take_step(net, optimizer, (x * value, y))
    assert same(net.parameters(), w)
    take_step(net, optimizer, (x, y))
    assert all(p.isfinite().all() for p in net.parameters())
    assert moved(net, w) > 0
    assert sam.stats["skipped"] == 1


def test_three_buffers_a_parameter_and_no_loss_from_the_closure():
    """jjsrf/SSAM-NEURIPS2024:sam.py keeps prev_grad, prev_u and e_w, and step(closure) returns None."""
    net, optimizer, _ = attached()
    own = [k for s in optimizer.state.values() for k in s if k != "momentum_buffer"]
    assert own == ["s2sam_buffer"] * 3
    x, y = make_data(1)[0]

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        at_w = float(F.cross_entropy(net(x), y))
    loss = optimizer.step(closure)
    assert loss.isfinite()
    assert loss.item() != at_w  # it is the loss at x


def test_the_scheduler_warning_that_step_was_never_called():
    """jjsrf/SSAM-NEURIPS2024:main_prune_train.py, davda54/sam#28: torch sees no optimizer.step()."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net, optimizer, _ = attached(warm=0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for batch in make_data(3):
            take_step(net, optimizer, batch)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_restoring_by_subtraction_drifts_in_half_precision(dtype):
    """jjsrf/SSAM-NEURIPS2024:sam.py computes (p + e) - e: a third of the bfloat16 entries change in 2000 steps."""
    w = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)).to(dtype))
    start = w.detach().clone()
    optimizer = torch.optim.SGD([w], lr=0.0)
    sam = S2SAM(optimizer, rho=RHO)
    g = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    naive = start.clone()
    for step in range(2000):
        sam.displace()
        if step == 1:
            assert total([w - start]) == pytest.approx(RHO, rel=0.1)
        w.grad = g[step]
        optimizer.step()
        e = (RHO * g[step] / g[step].float().norm()).to(dtype)
        naive = (naive + e) - e
    assert torch.equal(w, start)
    assert float((naive != start).float().mean()) > 0.1  # the defect is real


def test_weight_decay_acts_at_the_clean_weights():
    """jjsrf/SSAM-NEURIPS2024:sam.py gets this right; MarlonBecker/MSAM decays the displaced weights."""
    w = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.1, weight_decay=0.5)
    sam = S2SAM(optimizer, rho=1.0)
    path = []
    for _ in range(2):
        with sam.displaced():
            (w**2 / 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        path.append(w.item())
    first = 3 - 0.1 * (3 + 0.5 * 3)
    assert path == pytest.approx([first, first - 0.1 * ((first + 1) + 0.5 * first)], rel=1e-12)


def test_batch_norm_statistics_can_be_taken_again_at_the_clean_weights():
    """jjsrf/SSAM-NEURIPS2024:main_prune_train.py evaluates w with statistics of x; update_bn sees w here."""
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    optimizer = FACTORIES["sgd"](net.parameters())
    S2SAM(optimizer, model=net, rho=RHO)
    data = make_data(4)
    for batch in data:
        take_step(net, optimizer, batch)
    net(data[0][0])  # inside a window
    clean = net.state_dict()
    torch.optim.swa_utils.update_bn([x for x, _ in data], net)
    h = torch.stack([F.linear(x, clean["0.weight"], clean["0.bias"]) for x, _ in data])
    assert torch.allclose(net[1].running_mean, h.mean((0, 1)), atol=1e-12)
