"""Defects of the published code and of its peers, one regression test each, by name.

Every docstring names the file or thread in which the defect is.
"""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from s2sam import S2SAM, SAM
from s2sam.hooks import Phase, step_hooks

sys.path.insert(0, str(Path(__file__).parent))
from optimizers import FACTORIES, distance, make_data, make_net, same, snapshot, total

RHO = 0.5


def attached(factory="sgd", dtype=torch.float64, warm=2, rho=RHO, **options):
    net = make_net(dtype)
    optimizer = FACTORIES[factory](net.parameters())
    sam = S2SAM(optimizer, model=net, rho=rho, **options)
    for batch in make_data(warm, dtype, seed=7):
        take_step(net, optimizer, batch)
    return net, optimizer, sam


def take_step(net, optimizer, batch, set_to_none=True):
    F.cross_entropy(net(batch[0]).to(torch.promote_types(net[0].weight.dtype, torch.float32)), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)


def moved(net, w):
    return total([p - q for p, q in zip(net.parameters(), w, strict=True)])


# jjsrf/SSAM-NEURIPS2024, in the order of its audit


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
    """jjsrf/SSAM-NEURIPS2024:sam.py, davda54/sam#34, mosaicml/composer PR 3259, NVIDIA/apex#766: two copies of groups."""
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
    assert set(optimizer.param_groups[0]) == set(optimizer.param_groups[1])


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


# Peers


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
