"""The window: where the weights are in every forward, and what ends it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, attached, distance, make_data, make_net, moved, same, snapshot, take_step, total
from torch import nn

from s2sam import S2SAM


def gradients(net):
    return [p.grad.clone() for p in net.parameters()]


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
