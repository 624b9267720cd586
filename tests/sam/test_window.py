"""The window: where the weights are in every forward, and what ends it."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2sam import S2SAM

sys.path.insert(0, str(Path(__file__).parent))
from optimizers import FACTORIES, distance, make_data, make_net, same, snapshot, total


def attached(factory="sgd", dtype=torch.float64, warm=3, rho=0.3, **options):
    """A net that has taken `warm` steps with S2SAM."""
    net = make_net(dtype)
    optimizer = FACTORIES[factory](net.parameters())
    sam = S2SAM(optimizer, model=net, rho=rho, **options)
    for batch in make_data(warm, dtype, seed=7):
        take_step(net, optimizer, batch)
    return net, optimizer, sam


def take_step(net, optimizer, batch):
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


def moved(net, w):
    return total([p - q for p, q in zip(net.parameters(), w, strict=True)])


def gradients(net):
    return [p.grad.clone() for p in net.parameters()]


def state_tensors(optimizer):
    return [v.clone() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]


@pytest.mark.parametrize("rho", [1e-3, 0.3, 20.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inside_the_forward_the_distance_to_w_is_rho(dtype, rho):
    net, optimizer, _ = attached(dtype=dtype, rho=rho)
    seen = []
    net[2].register_forward_hook(lambda *_: seen.append(moved(net, w)))
    for batch in make_data(5, dtype):
        w = snapshot(net)
        take_step(net, optimizer, batch)
    assert seen == pytest.approx([rho] * 5, rel=1e-3 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("factory", ["sgd", "sgd-fused"])
@pytest.mark.parametrize("kind", ["eval", "no_grad", "eval no_grad", "clean"])
def test_a_look_inside_the_window_sees_w_and_x_returns(kind, factory):
    net, _, sam = attached(factory)
    w = snapshot(net)
    x, _y = make_data(1)[0]
    clean_output = net.eval()(x)
    net.train()
    net(x)
    displaced = snapshot(net)
    assert moved(net, w) == pytest.approx(0.3)
    inside = []
    net[1].register_forward_hook(lambda *_: inside.append(snapshot(net)))
    for _ in range(2):
        net.train("eval" not in kind)
        if kind == "clean":
            with sam.clean():
                out = net(x)
        else:
            with torch.set_grad_enabled("no_grad" not in kind):
                out = net(x)
        net.train()
        assert torch.equal(out, clean_output)
        assert same(inside[-1], w)
        assert same(net.parameters(), displaced)
    sam.restore()
    assert same(net.parameters(), w)


def test_x_returns_when_the_evaluation_raises():
    net, optimizer, _ = attached()
    x, y = make_data(1)[0]
    w = snapshot(net)
    loss = F.cross_entropy(net(x), y)
    displaced = snapshot(net)
    net.eval()
    with pytest.raises(RuntimeError, match="shapes"):
        net(torch.zeros(4, 5, dtype=torch.float64))
    net.train()
    assert same(net.parameters(), displaced)
    loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    assert same(net.parameters(), w)


def test_a_backward_pending_across_a_look_gives_the_same_gradient():
    net, optimizer, sam = attached()
    x, y = make_data(1)[0]
    F.cross_entropy(net(x), y).backward()
    expected = gradients(net)
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x), y)
    with torch.no_grad():
        net(x)
    with sam.clean():
        assert sam.is_displaced is False
    loss.backward()
    assert same(gradients(net), expected)


@pytest.mark.parametrize("pending", [False, True])
def test_the_backward_of_an_evaluation_inside_the_window_is_right_or_refused(pending):
    """Its forward ran at w and its weights are back at x: a mixture of the two would be silently wrong."""
    net, _, _ = attached(rho=1.0)
    twin = make_net()
    twin.load_state_dict(net.state_dict())
    x, y = make_data(1)[0]
    (expected,) = torch.autograd.grad(F.cross_entropy(twin(z := x.clone().requires_grad_()), y), z)
    loss = F.cross_entropy(net(x), y)
    if not pending:
        loss.backward()
    net.eval()
    z = x.clone().requires_grad_()
    evaluation = F.cross_entropy(net(z), y)
    try:
        (found,) = torch.autograd.grad(evaluation, z)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
    else:
        assert torch.allclose(found, expected, atol=1e-12)


def test_a_dropped_batch_leaves_the_window_at_the_same_x():
    net, optimizer, _ = attached()
    first, second = make_data(2)
    w = snapshot(net)
    net(first[0])
    displaced = snapshot(net)
    F.cross_entropy(net(second[0]), second[1]).backward()
    assert same(net.parameters(), displaced)
    optimizer.step()
    optimizer.zero_grad()

    twin, twin_optimizer, _ = attached()
    assert same(twin.parameters(), w)
    take_step(twin, twin_optimizer, second)
    assert same(net.parameters(), twin.parameters())


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_equals_one_big_batch_and_x_is_constant_within(parts):
    net, optimizer, sam = attached()
    big, big_optimizer, _ = attached()
    generator = torch.Generator().manual_seed(0)
    for round_ in range(5):
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (16,), generator=generator)
        points = []
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (F.cross_entropy(net(xs), ys) / parts).backward()
            points.append(snapshot(net))
            if round_ % 2:
                sam.restore()
        assert all(same(points[0], point) for point in points)
        optimizer.step()
        optimizer.zero_grad()
        take_step(big, big_optimizer, (x, y))
        assert distance(net.parameters(), big.parameters()) < 1e-13


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
@pytest.mark.parametrize("factory", ["sgd", "adamw-fused"])
def test_after_restore_the_next_window_opens_at_the_same_x(factory, direction):
    net, optimizer, sam = attached(factory, direction=direction)
    w = snapshot(net)
    x, y = make_data(1)[0]
    net(x)
    displaced = snapshot(net)
    for _ in range(3):
        sam.restore()
        assert same(net.parameters(), w)
        assert sam.is_displaced is False
        sam.restore()
        net(x)
        assert same(net.parameters(), displaced)
        assert sam.is_displaced is True
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    assert moved(net, w) > 0


def test_after_restore_a_smaller_rho_shortens_the_same_displacement():
    net, optimizer, sam = attached()
    w = snapshot(net)
    with sam.displaced():
        e = [p.detach() - q for p, q in zip(net.parameters(), w, strict=True)]
    optimizer.param_groups[0]["rho"] = 0.1
    with sam.displaced():
        shorter = [p.detach() - q for p, q in zip(net.parameters(), w, strict=True)]
    assert distance([a * 0.1 / 0.3 for a in e], shorter) < 1e-14
    assert same(net.parameters(), w)


def test_displaced_and_clean_end_with_an_exception():
    net, _, sam = attached()
    w = snapshot(net)
    with pytest.raises(KeyError), sam.displaced():
        assert moved(net, w) == pytest.approx(0.3)
        raise KeyError
    assert same(net.parameters(), w)
    sam.displace()
    displaced = snapshot(net)
    with pytest.raises(KeyError), sam.clean(), sam.clean():
        assert same(net.parameters(), w)
        raise KeyError
    assert same(net.parameters(), displaced)


def test_a_closure_that_raises_leaves_the_clean_weights():
    net, optimizer, _ = attached()
    w = snapshot(net)
    seen = []

    def closure():
        seen.append(moved(net, w))
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert seen == [pytest.approx(0.3)]
    assert same(net.parameters(), w)
    take_step(net, optimizer, make_data(1)[0])
    assert moved(net, w) > 0


@pytest.mark.parametrize("factory", ["sgd", "sgd-fused"])
def test_an_error_in_the_base_step_does_not_make_the_weights_a_direction(factory):
    net, optimizer, sam = attached(factory)
    x, y = make_data(1)[0]
    w = snapshot(net)
    F.cross_entropy(net(x), y).backward()

    def out_of_memory(*_):
        raise MemoryError

    handle = optimizer.register_step_pre_hook(out_of_memory)
    with pytest.raises(MemoryError):
        optimizer.step()
    handle.remove()
    optimizer.zero_grad()
    assert same(net.parameters(), w)
    with sam.displaced():
        e = [p.detach() - q for p, q in zip(net.parameters(), w, strict=True)]
    if total(e) > 0:  # the old direction, the new one, or none at all: but never w itself
        cosine = sum(float((a * b).sum()) for a, b in zip(e, w, strict=True)) / total(e) / total(w)
        assert abs(cosine) < 0.9


@pytest.mark.parametrize("closure_form", [False, True])
def test_a_subclass_that_calls_the_step_of_its_parent_steps_once(closure_form):
    """torch wraps step() of the class and of its parent, so the hooks of such an optimizer fire twice."""

    class Counting(torch.optim.SGD):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

    torch.optim.SGD([torch.zeros(1)])  # from here on torch.optim.SGD.step has its wrapper
    net, twin = make_net(), make_net()
    optimizer = Counting(net.parameters(), lr=0.1)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    sam = S2SAM(optimizer, model=net, rho=0.3)
    S2SAM(plain, model=twin, rho=0.3)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    for x, y in make_data(4):
        if closure_form:
            optimizer.step(closure)
        else:
            take_step(net, optimizer, (x, y))
        take_step(twin, plain, (x, y))
        assert same(net.parameters(), twin.parameters())
    assert optimizer.calls == 4
    assert sam.stats["step"] == 4


@pytest.mark.parametrize("limit", [1e-3, 10.0])
def test_clipping_before_the_step_leaves_the_next_displacement_as_it_is(limit):
    points = []
    for clip in (False, True):
        net, optimizer, _ = attached()
        optimizer.param_groups[0]["lr"] = 0.0
        x, y = make_data(1)[0]
        F.cross_entropy(net(x), y).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), limit)
        optimizer.step()
        net(x)
        points.append(snapshot(net))
    assert distance(*points) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_lr_zero_the_weights_never_change(dtype):
    net = make_net(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    sam = S2SAM(optimizer, model=net, rho=lambda step: 0.5 * (1 + step % 5))
    w = snapshot(net)
    for step, (x, y) in enumerate(make_data(300, dtype)):
        F.cross_entropy(net(x).float(), y).backward()
        if step > 1:
            assert moved(net, w) > 0.1
        if step % 7 == 0:
            net[0].weight.grad = None
        if step % 11 == 0:
            sam.restore()
        optimizer.step()
        assert same(net.parameters(), w)
        optimizer.zero_grad(set_to_none=step % 3 == 0)


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


def test_a_frozen_part_in_eval_mode_inside_a_training_forward_gets_its_right_gradient():
    """model=[outer, inner] with inner.eval(): what flows back through inner must be its Jacobian where it ran."""
    inner = make_net()
    outer = nn.Sequential(inner, nn.Linear(3, 3, bias=False).double())
    optimizer = FACTORIES["sgd"](outer.parameters())
    S2SAM(optimizer, model=[outer, inner], rho=1.0)
    for batch in make_data(2):
        take_step(outer, optimizer, batch)
    inner.eval()
    ran_at = []
    inner[1].register_forward_hook(lambda *_: ran_at.append(snapshot(inner)))
    x, y = make_data(1)[0]
    x.requires_grad_()
    loss = F.cross_entropy(outer(x), y)
    try:
        (found,) = torch.autograd.grad(loss, x)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        return
    twin = copy.deepcopy(outer)
    with torch.no_grad():
        for p, q in zip(twin[0].parameters(), ran_at[-1], strict=True):
            p.copy_(q)
    (expected,) = torch.autograd.grad(F.cross_entropy(twin(x), y), x)
    assert torch.allclose(found, expected, atol=1e-12)


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
