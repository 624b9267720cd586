"""A gradient that is not finite: nothing moves, nothing is forgotten, and it is counted."""

import pytest
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, WITHOUT_MOMENTUM, make_data, make_net, same, snapshot, total
from torch import nn

from s2sam import S2SAM
from s2sam.sam.displacement import choose_, copy_unless_
from s2sam.sam.scales import SCALES

NAMES = ("sgd", "sgd-foreach", "sgd-fused", "adamw", "adamw-fused", "nadam", "adafactor", "muon")
RHO = 0.3


def state_of(optimizer):
    """Copies of every state entry of the base optimizer and of the direction, by position and key."""
    found = {}
    for index, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        for key, value in optimizer.state.get(p, {}).items():
            found[index, key] = torch.as_tensor(value).clone()
    return found


def unchanged(before, after):
    """Nothing that was there is different; a state made by a skipped first step is no change if it is 0."""
    assert set(before) <= set(after)
    for key, value in after.items():
        expected = before.get(key, torch.zeros_like(value))
        assert torch.equal(value, expected), key


def take_step(net, optimizer, batch, form="loop"):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        return loss

    if form == "closure":
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    optimizer.zero_grad()


def poisoned(batch, value):
    x = batch[0].clone()
    x[0, 0] = value
    return x, batch[1]


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
@pytest.mark.parametrize("form", ["loop", "closure"])
@pytest.mark.parametrize("warm", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_weights_state_direction_and_the_next_x_are_bit_unchanged(name, warm, form, direction):
    if direction == "momentum" and name in WITHOUT_MOMENTUM:
        pytest.skip("this optimizer has no momentum buffer")
    dtype = torch.float32
    net = make_net(dtype)
    optimizer = FACTORIES[name](net.parameters())
    sam = S2SAM(optimizer, model=net, rho=RHO, direction=direction)
    data = make_data(warm + 4, dtype)
    for batch in data[:warm]:
        take_step(net, optimizer, batch, form)
    sam.displace()
    displaced = snapshot(net)
    sam.restore()
    w = snapshot(net)
    with sam.clean():
        before = state_of(optimizer)
    x_buffers = {k: v for k, v in before.items() if k[1] == "s2sam_buffer"}
    for value in (float("nan"), float("inf")):
        take_step(net, optimizer, poisoned(data[warm], value), form)
        assert same(net.parameters(), w)
        after = state_of(optimizer)
        unchanged({k: v for k, v in before.items() if k not in x_buffers},
                  {k: v for k, v in after.items() if k[1] != "s2sam_buffer"})  # fmt: skip
        sam.displace()
        assert same(net.parameters(), displaced)
        sam.restore()
    assert sam.stats["skipped"] == 2

    twin = make_net(dtype)
    twin_optimizer = FACTORIES[name](twin.parameters())
    S2SAM(twin_optimizer, model=twin, rho=RHO, direction=direction)
    for batch in [*data[:warm], *data[warm + 1 :]]:
        take_step(twin, twin_optimizer, batch, form)
    for batch in data[warm + 1 :]:
        take_step(net, optimizer, batch, form)
    assert same(net.parameters(), twin.parameters())  # as if the bad batch had never been
    assert total([p - q for p, q in zip(net.parameters(), w, strict=True)]) > 1e-3
    unchanged(state_of(twin_optimizer), state_of(optimizer))


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("overflow_at", [0, 2])
@pytest.mark.parametrize("name", ["sgd", "sgd-fused", "adamw", "adamw-fused"])
def test_an_overflow_under_a_grad_scaler(name, overflow_at, unscale):
    dtype = torch.float32
    runs = []
    for overflow in (False, True):
        net = make_net(dtype)
        optimizer = FACTORIES[name](net.parameters())
        sam = S2SAM(optimizer, model=net, rho=RHO)
        scaler = torch.amp.GradScaler(device="cpu", init_scale=4.0, growth_interval=10**6)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
        for step, (x, y) in enumerate(make_data(6, dtype)):
            if overflow and step == overflow_at:
                w = snapshot(net)
                scaler.scale(F.cross_entropy(net(x), y) * 1e38).backward()
                displaced = snapshot(net)
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update(2 * scaler.get_scale())
                optimizer.zero_grad()
                sam.restore()
                assert same(net.parameters(), w)
                with sam.displaced():
                    assert same(net.parameters(), displaced)
                scaler.update(new_scale=4.0)
            scaler.scale(F.cross_entropy(net(x), y)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
        runs.append(snapshot(net))
        if "fused" in name:  # elsewhere the scaler does not even call step()
            assert sam.stats["skipped"] == overflow
        assert not hasattr(optimizer, "found_inf")
        assert not hasattr(optimizer, "grad_scale")
    assert same(*runs)


@pytest.mark.parametrize("name", ["sgd", "sgd-fused", "adamw-fused"])
def test_the_scale_of_a_grad_scaler_does_not_reach_the_displacement(name):
    runs = []
    for scale in (None, 2.0**10):
        net = make_net(torch.float32)
        optimizer = FACTORIES[name](net.parameters())
        S2SAM(optimizer, model=net, rho=RHO)
        scaler = torch.amp.GradScaler(device="cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for x, y in make_data(6, torch.float32):
            w = snapshot(net)
            scaler.scale(F.cross_entropy(net(x), y)).backward()
            e = total([p - q for p, q in zip(net.parameters(), w, strict=True)])
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert e == pytest.approx(RHO, rel=1e-5)
        runs.append(snapshot(net))
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["sgd", "sgd-fused"])
def test_finite_gradients_whose_norm_overflows_are_no_skip(name):
    net = make_net(torch.float32)
    optimizer = FACTORIES[name](net.parameters())
    optimizer.param_groups[0]["lr"] = 1e-25
    sam = S2SAM(optimizer, model=net, rho=RHO)
    for x, y in make_data(3, torch.float32):
        w = snapshot(net)
        (F.cross_entropy(net(x), y) * 1e25).backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        assert torch.linalg.vector_norm(net[0].weight.grad).isinf()
        optimizer.step()
        optimizer.zero_grad()
        assert total([p - q for p, q in zip(net.parameters(), w, strict=True)]) > 1e-3
    assert sam.stats["skipped"] == 0


@pytest.mark.parametrize("name", ["adamw", "adamw-fused"])
def test_a_parameter_without_gradient_in_the_skipped_step_keeps_its_x(name):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = make_net(torch.float32), make_net(torch.float32, seed=1)

        def forward(self, x, both=True):
            return self.a(x) + self.b(x) if both else self.a(x)

    net = Two()
    optimizer = FACTORIES[name](net.parameters())
    S2SAM(optimizer, model=net, rho=RHO)
    data = make_data(4, torch.float32)
    for batch in data[:3]:
        take_step(net, optimizer, batch)
    x, y = poisoned(data[3], float("nan"))
    loss = F.cross_entropy(net(x, both=False), y)
    displaced = snapshot(net)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    net(data[0][0])
    assert same(net.parameters(), displaced)


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "sgd-fused"])
def test_groups_of_two_radii_recover_from_a_skipped_step(name):
    net = make_net(torch.float32)
    first, *rest = net.parameters()
    optimizer = FACTORIES[name]([{"params": [first], "rho": 0.1}, {"params": rest}])
    sam = S2SAM(optimizer, model=net, rho=RHO)
    data = make_data(6, torch.float32)
    for step, batch in enumerate(data):
        w = snapshot(net)
        take_step(net, optimizer, poisoned(batch, float("nan")) if step == 2 else batch)
        assert same(net.parameters(), w) == (step == 2)
    assert sam.stats["skipped"] == 1


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "sgd-fused"])
def test_parameters_of_two_dtypes(name):
    net = make_net(torch.float32)
    net[4].to(torch.bfloat16)
    net[3].register_forward_hook(lambda _m, _i, out: out.bfloat16())
    optimizer = FACTORIES[name](net.parameters())
    sam = S2SAM(optimizer, model=net, rho=RHO)
    data = make_data(5, torch.float32)
    for step, batch in enumerate(data):
        w = snapshot(net)
        x = poisoned(batch, float("nan"))[0] if step == 3 else batch[0]
        F.cross_entropy(net(x).float(), batch[1]).backward()
        e = total([p - q for p, q in zip(net.parameters(), w, strict=True)])
        g = [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        assert same(net.parameters(), w) == (step == 3)
        if step != 3:
            assert same([optimizer.state[p]["s2sam_buffer"] for p in net.parameters()], g)
        optimizer.zero_grad()
    assert e == pytest.approx(RHO, rel=0.01)
    assert sam.stats["skipped"] == 1


@pytest.mark.parametrize("policy", ["auto", "skip"])
def test_one_bad_gradient_hides_the_good_ones_of_the_same_optimizer(policy):
    net = make_net(torch.float32)
    optimizer = FACTORIES["adamw"](net.parameters())
    sam = S2SAM(optimizer, model=net, rho=RHO, nonfinite=policy)
    batch = make_data(1, torch.float32)[0]
    take_step(net, optimizer, batch)
    w = snapshot(net)
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    net[4].weight.grad[0, 0] = float("-inf")
    g = [p.grad for p in net.parameters()]
    optimizer.step()
    assert same(net.parameters(), w)
    assert all(p.grad is q for p, q in zip(net.parameters(), g, strict=True))  # they are the user's: put back
    assert sam.stats["skipped"] == 1


def test_ignore_lets_it_through():
    net = make_net(torch.float32)
    optimizer = FACTORIES["sgd"](net.parameters())
    sam = S2SAM(optimizer, model=net, rho=RHO, nonfinite="ignore")
    batch = make_data(1, torch.float32)[0]
    take_step(net, optimizer, poisoned(batch, float("nan")))
    assert not all(p.isfinite().all() for p in net.parameters())
    assert sam.stats["skipped"] == 0


def test_zero_gradients_are_a_step_and_momentum_moves_on():
    net = make_net(torch.float32)
    optimizer = FACTORIES["sgd"](net.parameters())
    sam = S2SAM(optimizer, model=net, rho=RHO)
    batch = make_data(1, torch.float32)[0]
    take_step(net, optimizer, batch)
    w = snapshot(net)
    net(batch[0])
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not same(net.parameters(), w)
    assert sam.stats["skipped"] == 0
    w = snapshot(net)
    with sam.displaced():
        assert same(net.parameters(), w)  # there is no direction now: e = 0, not NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 5, 21, 70])
def test_predicated_moves_do_all_or_nothing(dtype, numel):
    """They lean on a torch kernel, vectorised in some dtypes and not in others."""
    g = torch.Generator().manual_seed(0)
    w, x = (torch.randn(numel, generator=g).to(dtype) for _ in range(2))
    yes, no = torch.tensor(1.0), torch.tensor(0.0)
    for flag, done in ((no, True), (yes, False)):
        target, source = [w.clone()], [x.clone()]
        copy_unless_(target, source, flag)
        assert torch.equal(target[0], x if done else w) and torch.equal(source[0], x)
    p, b = [w.clone()], [x.clone()]
    choose_(p, b, b, torch.tensor(1e18), SCALES["norm"], yes, no)
    assert torch.equal(p[0], x) and torch.equal(b[0], w)
    p, b = [w.clone()], [x.clone()]
    choose_(p, b, b, torch.tensor(0.5), SCALES["norm"], no, yes)
    assert torch.equal(p[0], w + x * 0.5) and torch.equal(b[0], w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_skipped_fused_step_are_not_finite_afterwards(dtype):
    """Whatever passes through them meanwhile, nobody can take them for gradients."""
    w = nn.Parameter(torch.ones(40, dtype=dtype))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, fused=True)
    sam = S2SAM(optimizer, rho=RHO)
    for step in range(4):
        with sam.displaced():
            w.grad = torch.full_like(w, 0.5)
        w.grad[3] = float("nan") if step == 2 else 0.5
        sam.displace()
        optimizer.step()
        assert bool(torch.isfinite(w.grad).any()) is (step != 2)
    assert sam.stats["skipped"] == 1
