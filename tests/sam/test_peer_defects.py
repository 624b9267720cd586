"""Defects of other implementations, one regression test each, by name; the docstring says where each of them is."""

from functools import partial

import pytest
import sam_common
import torch
import torch.nn.functional as F
from sam_common import distance, make_data, make_net, moved, same, snapshot, take_step, total
from torch import nn

from s2sam import S2SAM, SAM

RHO = 0.5
attached = partial(sam_common.attached, rho=RHO, warm=2)


def test_weights_changing_their_storage():
    """davda54/sam:sam.py assigns p.data: three storages in three steps, which breaks DDP buckets and CUDA graphs."""
    net, optimizer, sam = attached()
    before = [p.data_ptr() for p in net.parameters()]
    for batch in make_data(3):
        take_step(net, optimizer, batch)
        with sam.displaced():
            assert [p.data_ptr() for p in net.parameters()] == before
    assert [p.data_ptr() for p in net.parameters()] == before


def test_gradients_of_two_passes_adding_up():
    """kozistr/pytorch_optimizer (LookSAM): the base optimizer saw 2.95 times the gradient; rollovd/LookSAM#3 too."""
    for method in (S2SAM, SAM):
        w = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=1.0)
        method(optimizer, rho=0.25)
        seen = []
        optimizer.register_step_post_hook(lambda *_, w=w, seen=seen: seen.append(w.grad.item()))

        def closure(w=w):
            loss = 2 * w.sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
            optimizer.zero_grad()
        assert seen == [2.0] * 3


def test_a_base_optimizer_without_a_step_in_its_state():
    """kozistr/pytorch_optimizer (LookSAM) raises KeyError 'step' with SGD; THUDM/INFTY#18 silently becomes SGD."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sam = S2SAM(optimizer, model=net, rho=lambda step: step / 10, stats_every=1)
    for batch in make_data(4):
        take_step(net, optimizer, batch)
    assert sam.stats["displacement"] == pytest.approx(0.3)
    assert sam.stats["step"] == 4


def test_the_ascent_never_being_taken_back():
    """kozistr/pytorch_optimizer (BSAM): with lr = 0 the weights move 0.90, 1.78, 2.70 in three steps."""
    net, optimizer, _ = attached("adamw")
    for group in optimizer.param_groups:
        group.update(lr=0.0)
    w = snapshot(net)
    for batch in make_data(3):
        take_step(net, optimizer, batch)
        assert moved(net, w) == 0.0


def test_a_change_of_rho_in_mid_run_drifting():
    """MarlonBecker/MSAM restores with the new rho times the old norm: |w - w0| = 0.85 with lr = 0."""
    net, optimizer, sam = attached()
    optimizer.param_groups[0]["lr"] = 0.0
    w = snapshot(net)
    for batch in make_data(8):
        F.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.param_groups[0]["rho"] /= 2  # inside the window
        optimizer.step()
        optimizer.zero_grad()
        assert same(net.parameters(), w)
    with sam.displaced():
        assert moved(net, w) == pytest.approx(RHO / 2**8)


def test_more_than_one_group():
    """MarlonBecker/MSAM raises for more than one group; juntang-zhuang/GSAM has one rho for all of them."""
    net = make_net()
    groups = [{"params": [p], "rho": 0.1 * i, "lr": 0.01 * (i + 1)} for i, p in enumerate(net.parameters())]
    optimizer = torch.optim.SGD(groups)
    S2SAM(optimizer, model=net)
    x, y = make_data(1)[0]
    take_step(net, optimizer, (x, y))
    g = [optimizer.state[p]["s2sam_buffer"].clone() for p in net.parameters()]
    w = snapshot(net)
    net(x)
    e = [total([p - q]) for p, q in zip(net.parameters(), w, strict=True)]
    norm = total(g[1:])
    assert e == pytest.approx([0.0, 0.1 * total(g[1:2]) / norm, 0.2 * total(g[2:]) / norm], rel=1e-12)


@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_gradients_of_the_user_being_changed(direction):
    """MarlonBecker/MSAM adds weight decay into p.grad in place."""
    net, optimizer, _ = attached(direction=direction)
    x, y = make_data(1)[0]
    F.cross_entropy(net(x), y).backward()
    g = [p.grad for p in net.parameters()]
    copies = [t.clone() for t in g]
    optimizer.step()
    assert all(p.grad is t for p, t in zip(net.parameters(), g, strict=True))
    assert same(g, copies)


def test_frozen_parameters_being_unfrozen():
    """dydjw9/Efficient_SAM toggles requires_grad of random parameters and leaves frozen ones trainable."""
    net, optimizer, _ = attached(warm=0)
    net[2].requires_grad_(False)
    for batch in make_data(3):
        take_step(net, optimizer, batch)
    assert [p.requires_grad for p in net.parameters()] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["norm", "relative", "asam"])
def test_zero_over_zero_at_a_zero_gradient(scale, dtype):
    """google-deepmind/optax PR 1743, google-research/sam: no epsilon in the norm."""
    net, optimizer, _ = attached(dtype=dtype, warm=0, scale=scale)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    w = snapshot(net)
    net(make_data(1, dtype)[0][0])
    assert same(net.parameters(), w)


def test_norms_in_half_precision_that_overflow_or_vanish():
    """google-research/sam#3: fp16 gives a NaN gradient norm."""
    for size in (3e-5, 300.0):
        w = nn.Parameter(torch.zeros(400, dtype=torch.float16))
        optimizer = torch.optim.SGD([w], lr=0.0)
        sam = S2SAM(optimizer, rho=2.0)
        w.grad = torch.full_like(w, size)
        optimizer.step()
        with sam.displaced():
            assert total([w]) == pytest.approx(2.0, rel=0.01)


def test_state_that_a_wrapper_put_there_first():
    """kohya-ss/sd-scripts PR 1605: Adam sees a state that is not empty and misses 'exp_avg'."""
    for name in ("adam", "adamw", "nadam", "adafactor"):
        net, optimizer, _ = attached(name, warm=0)
        x, y = make_data(1)[0]
        net(x)
        assert not any(optimizer.state.values())
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        assert all("s2sam_buffer" in s and len(s) > 1 for s in optimizer.state.values())


def test_clipping_or_scaling_changing_the_direction():
    """davda54/sam#64: clip once or twice? A common factor does not reach e."""
    points = []
    for factor in (1.0, 1e-3, 64.0):
        net, optimizer, sam = attached()
        optimizer.param_groups[0]["lr"] = 0.0
        x, y = make_data(1)[0]
        (factor * F.cross_entropy(net(x), y)).backward()
        optimizer.step()
        with sam.displaced():
            points.append(snapshot(net))
    assert max(distance(points[0], other) for other in points[1:]) < 1e-12


def test_forgetting_to_tell_the_optimizer_about_evaluation():
    """facebookresearch/schedule_free#22, huggingface/accelerate#4159: displaced weights are evaluated or saved."""
    net, optimizer, _ = attached()
    x, y = make_data(1)[0]
    take_step(net, optimizer, (x, y))
    w = snapshot(net)
    net.eval()
    assert same(net.parameters(), w)  # nothing was told to anybody
    expected = net(x)
    net.train()
    net(x)
    net.eval()
    assert torch.equal(net(x), expected)
    assert same(net.state_dict().values(), w)


def test_accumulation_that_perturbs_only_once_or_every_time():
    """davda54/sam#3, #62, #94 call accumulation impossible; here each micro-batch is at the same x."""
    net, optimizer, _ = attached()
    w = snapshot(net)
    radii = []
    for x, y in make_data(4):
        F.cross_entropy(net(x), y).backward()
        radii.append(moved(net, w))
    optimizer.step()
    assert radii == pytest.approx([RHO] * 4, rel=1e-12)
    assert len({p.grad.data_ptr() for p in net.parameters()}) == 3


def test_optimizer_state_keyed_by_a_string_of_group_and_number():
    """kozistr/pytorch_optimizer (LookSAM) keys by f"{i}{j}": group 1, parameter 11 is group 11, parameter 1."""
    weights = [nn.Parameter(torch.full((1,), float(i + 1), dtype=torch.float64)) for i in range(24)]
    optimizer = torch.optim.SGD([{"params": weights[:12]}, *({"params": [w]} for w in weights[12:])], lr=0.0)
    sam = S2SAM(optimizer, rho=1.0)
    for i, w in enumerate(weights):
        w.grad = torch.full_like(w, float(i))
    optimizer.step()
    norm = sum(i * i for i in range(24)) ** 0.5
    with sam.displaced():
        e = [w.item() - i - 1 for i, w in enumerate(weights)]
    assert e == pytest.approx([i / norm for i in range(24)], abs=1e-12)
