"""Which parameters the window moves: several optimizers, modules, odd parameters, loaded and converted weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, attached, distance, make_data, make_net, moved, same, snapshot, take_step, total
from torch import nn

from s2sam import S2SAM


def test_several_optimizers_share_one_norm():
    one, one_optimizer, _ = attached("sgd", warm=0)
    two = make_net()
    parts = [FACTORIES["sgd"](two[:2].parameters()), FACTORIES["sgd"](two[2:].parameters())]
    S2SAM(parts, model=two, rho=0.3)
    for x, y in make_data(6):
        take_step(one, one_optimizer, (x, y))
        w = snapshot(two)
        F.cross_entropy(two(x), y).backward()
        e = moved(two, w)
        for optimizer in parts:
            optimizer.step()
        two.zero_grad()
        assert distance(one.parameters(), two.parameters()) < 1e-13
    assert e == pytest.approx(0.3, rel=1e-12)


def test_several_optimizers_that_step_in_turn_keep_the_norm():
    """As in adversarial training: a forward for each optimizer, and only that optimizer's step."""
    net = make_net()
    parts = [FACTORIES["sgd"](net[:2].parameters()), FACTORIES["sgd"](net[2:].parameters())]
    S2SAM(parts, model=net, rho=0.3)
    norms = []
    for step, (x, y) in enumerate(make_data(8)):
        w = snapshot(net)
        F.cross_entropy(net(x), y).backward()
        norms.append(moved(net, w))
        parts[step % 2].step()
        net.zero_grad()
    assert norms[0] == 0.0
    assert norms[1:] == pytest.approx([0.3] * 7, rel=1e-9)


@pytest.mark.parametrize("lists", [False, True])
def test_two_sharpness_methods_on_two_optimizers_of_one_model_do_not_disturb_each_other(lists):
    net = make_net()
    parts = [FACTORIES["sgd"](net[:2].parameters()), FACTORIES["adamw"](net[2:].parameters())]
    model = [net, make_net(seed=5)] if lists else net
    sams = [S2SAM(o, model=model, rho=rho) for o, rho in zip(parts, (0.3, 0.1), strict=True)]
    for x, y in make_data(4):
        w = snapshot(net)
        F.cross_entropy(net(x), y).backward()
        e = [p.detach() - q for p, q in zip(net.parameters(), w, strict=True)]
        with torch.no_grad():
            inside = []
            handle = net[1].register_forward_hook(lambda *_, seen=inside: seen.append(snapshot(net)))
            net(x)
            handle.remove()
        assert same(inside[0], w)
        assert same(net.state_dict().values(), w)
        for optimizer in parts:
            optimizer.step()
        net.zero_grad()
    assert (total(e[:1]), total(e[1:])) == (pytest.approx(0.3), pytest.approx(0.1))
    for sam in sams:
        sam.remove()


def test_any_module_of_a_list_opens_the_window():
    encoder, head = make_net()[:2], make_net()[2:]
    optimizer = FACTORIES["sgd"]([*encoder.parameters(), *head.parameters()])
    S2SAM(optimizer, model=[encoder, head], rho=0.3)
    whole, whole_optimizer, _ = attached(warm=0)
    for x, y in make_data(5):
        F.cross_entropy(head(encoder(x)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        take_step(whole, whole_optimizer, (x, y))
    assert same([*encoder.parameters(), *head.parameters()], whole.parameters())


def test_parameters_of_a_loss_head_outside_the_model_are_displaced_with_it():
    whole, whole_optimizer, _ = attached(warm=0)
    net, head = make_net()[:3], make_net()[3:]
    optimizer = FACTORIES["sgd"]([*net.parameters(), *head.parameters()])
    S2SAM(optimizer, model=net, rho=0.3)
    for batch in make_data(5):
        F.cross_entropy(head(net(batch[0])), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        take_step(whole, whole_optimizer, batch)
    assert same([*net.parameters(), *head.parameters()], whole.parameters())


def test_frozen_and_unused_parameters_never_move_and_tied_ones_move_once():
    net = make_net()
    net.unused = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    net[0].weight.requires_grad_(False)
    net[4] = nn.Linear(7, 8, bias=False).double()
    net[4].weight = nn.Parameter(net[2].weight.detach().clone().t().contiguous().t())
    net[2].weight = net[4].weight  # one parameter in two places
    net[4].forward = lambda h: h @ net[4].weight
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 3
    S2SAM(optimizer, model=net, rho=0.3)
    for batch in make_data(3):
        w = snapshot(net)
        F.cross_entropy(net(batch[0]), batch[1]).backward()
        e = {n: total([p - q]) for (n, p), q in zip(net.named_parameters(), w, strict=True)}
        optimizer.step()
        optimizer.zero_grad()
    assert e == {"unused": 0.0, "0.weight": 0.0, "2.weight": pytest.approx(0.3, rel=1e-12)}


def test_a_group_added_later_joins_the_norm():
    net = make_net()
    optimizer = FACTORIES["sgd"](net[:2].parameters())
    S2SAM(optimizer, model=net, rho=0.3)
    data = make_data(6)
    for batch in data[:2]:
        take_step(net, optimizer, batch)
        net.zero_grad()
    net(data[2][0])  # added inside an open window
    optimizer.add_param_group({"params": list(net[2:].parameters()), "lr": 0.05})
    assert optimizer.param_groups[1]["rho"] == 0.3
    norms = []
    for x, y in data[2:]:
        w = snapshot(net)
        F.cross_entropy(net(x), y).backward()
        norms.append([total([p - q]) for p, q in zip(net.parameters(), w, strict=True)])
        optimizer.step()
        optimizer.zero_grad()
    assert all(n > 0 for n in norms[-1])
    assert total([torch.tensor(norms[-1])]) == pytest.approx(0.3)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_converting_the_model_after_attaching_keeps_the_method_alive(inside, direction):
    net = make_net(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if direction == "momentum":
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    sam = S2SAM(optimizer, model=net, rho=0.3, direction=direction)
    for batch in make_data(3, torch.float32):
        take_step(net, optimizer, batch)
    w = snapshot(net)
    if inside:
        net(make_data(1, torch.float32)[0][0])
        assert moved(net, w) == pytest.approx(0.3)
    net.double()
    if direction == "momentum":  # the base optimizer's own state is its user's business
        optimizer.load_state_dict(optimizer.state_dict())
    net(make_data(1)[0][0])
    assert moved(net, w) == pytest.approx(0.3, rel=1e-5)
    sam.restore()
    assert same(net.parameters(), [q.double() for q in w])
    for batch in make_data(3):
        take_step(net, optimizer, batch)
    w = snapshot(net)
    net(make_data(1)[0][0])
    assert moved(net, w) == pytest.approx(0.3, rel=1e-12)
    assert all(p.dtype == torch.float64 for p in net.parameters())


@pytest.mark.parametrize("factory", ["sgd", "sgd-fused"])
@pytest.mark.parametrize("when", ["between", "inside", "after restore"])
def test_loaded_weights_are_what_is_trained(when, factory):
    net, optimizer, sam = attached(factory)
    other = make_net(seed=9)
    x, y = make_data(1)[0]
    if when != "between":
        F.cross_entropy(net(x), y).backward()
    if when == "after restore":
        sam.restore()
    net.load_state_dict(other.state_dict())
    assert same(net.parameters(), other.parameters())
    optimizer.zero_grad()
    net(x)
    assert moved(net, snapshot(other)) < 0.3 + 1e-9  # never at an x that belongs to the old weights
    sam.restore()
    assert same(net.parameters(), other.parameters())
    optimizer.param_groups[0]["lr"] = 0.0
    take_step(net, optimizer, (x, y))
    assert same(net.parameters(), other.parameters())
    net(x)
    assert moved(net, snapshot(other)) == pytest.approx(0.3)


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
@pytest.mark.parametrize("factory", ["sgd", "sgd-fused", "adamw-fused"])
def test_loading_the_same_weights_between_steps_changes_nothing(factory, direction):
    """As an evaluation of averaged weights does once an epoch."""
    net, optimizer, _ = attached(factory, direction=direction)
    twin, twin_optimizer, _ = attached(factory, direction=direction)
    for batch in make_data(3):
        net.load_state_dict(copy.deepcopy(net.state_dict()))
        take_step(net, optimizer, batch)
        take_step(twin, twin_optimizer, batch)
        assert same(net.parameters(), twin.parameters())


def test_a_group_whose_rho_is_zero_for_one_dropped_batch_keeps_its_direction_or_forgets_it():
    """Its buffer holds x after restore(): that must never be taken for a direction."""
    net = make_net()
    optimizer = torch.optim.SGD([{"params": [p]} for p in net.parameters()], lr=0.1)
    sam = S2SAM(optimizer, model=net, rho=0.3)
    for batch in make_data(3):
        take_step(net, optimizer, batch)
    w = snapshot(net)
    sam.displace()
    sam.restore()
    optimizer.param_groups[0]["rho"] = 0.0
    net(make_data(1)[0][0])
    sam.restore()
    optimizer.param_groups[0]["rho"] = 0.3
    net(make_data(1)[0][0])
    e = net[0].weight.detach() - w[0]
    assert total([e]) < 0.3 + 1e-9
    if total([e]) > 0:
        assert abs(float((e * w[0]).sum())) < 0.9 * total([e]) * total(w[:1])


def test_complex_parameters():
    w = nn.Parameter(torch.tensor([3 + 4j, 1j], dtype=torch.complex128))
    optimizer = torch.optim.SGD([w], lr=0.0)
    sam = S2SAM(optimizer, rho=0.5, stats_every=1)
    d = torch.tensor([1 + 1j, 2.0], dtype=torch.complex128)
    w.grad = d.clone()
    optimizer.step()
    with sam.displaced():
        e = w.detach() - torch.tensor([3 + 4j, 1j], dtype=torch.complex128)
    assert torch.allclose(e, 0.5 * d / 6**0.5, atol=1e-15)
    assert sam.stats["displacement"] == pytest.approx(0.5)


def test_complex_parameters_under_asam():
    """e = rho |w|^2 d / || |w| d ||, with the modulus of w, not its square."""
    start = torch.tensor([3 + 4j, 1j], dtype=torch.complex128)
    w = nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([w], lr=0.0)
    sam = S2SAM(optimizer, rho=0.5, scale="asam")
    d = torch.tensor([1 + 1j, 2.0], dtype=torch.complex128)
    w.grad = d.clone()
    optimizer.step()
    with sam.displaced():
        e = w.detach() - start
    assert torch.allclose(e, 0.5 * start.abs() ** 2 * d / (start.abs() * d).abs().square().sum().sqrt(), atol=1e-14)
