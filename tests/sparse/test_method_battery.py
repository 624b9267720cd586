"""The battery: what every sparse training method in the registry must pass. A new row needs no new line here."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from s2sam.registry import list_methods
from s2sam.sparse.drop_grow import DropGrow
from s2sam.sparse.reserve import Reserve

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import (
    MOVING,
    OPTIMIZERS,
    attach,
    copy_masks,
    equal_masks,
    loss_fn,
    make_batches,
    make_net,
    one_step,
    rows,
    sgd,
    shaped_states,
    usable,
    usual,
)  # fmt: skip

METHODS = [info for info in list_methods() if usable(info)]
BETWEEN_LAYERS = ("dsr", "snfs", "srigl")  #: which move weights from layer to layer
#: whole neurons with equal inputs, whole blocks, whole channels
COARSE = {"srigl": 0.015, "block-rigl": 0.005, "chex": 0.3}
every_method, dynamic = rows(), rows(*MOVING)


# -- counts and zeros, over all optimizers ---------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pruned_means_exactly_zero_after_every_step(info, optimizer):
    net = make_net()
    optimizer = OPTIMIZERS[optimizer](net.parameters())
    sparsifier = attach(info, net, optimizer)
    first, kept, updates = copy_masks(sparsifier), dict(sparsifier.parts[0].kept), sparsifier.updates
    moved = torch.zeros(())
    for t, batch in enumerate(make_batches(16), 1):
        before = [p.detach().clone() for p in net.parameters()]
        old = copy_masks(sparsifier)
        one_step(net, optimizer, batch)
        for name, w in net.named_parameters():
            mask = sparsifier.masks[name]
            assert w[~mask].abs().sum() == 0
            # weights of Reserve were trained outside the network, STR's come out from under their threshold
            if not isinstance(sparsifier, Reserve) and info.name not in ("chex", "str"):
                assert w[mask & ~old[name]].abs().sum() == 0, "a grown weight starts at 0"
            assert w.grad[~(mask & old[name])].abs().sum() == 0
            if not info.dense_state:
                clear = ~mask if info.name == "sr-ste" else ~(mask & old[name])  # there momentum enters with a weight
                assert all(s[clear].abs().sum() == 0 for s in shaped_states(optimizer, w))
        moved += sum((p - b).detach().abs().sum() for p, b in zip(net.parameters(), before, strict=True))
        now = {name: int(m.sum()) for name, m in sparsifier.masks.items()}
        assert now == sparsifier.parts[0].kept, "the host's counts are the device's"
        assert min(now.values()) >= 1
        assert sum(now.values()) == round((1 - sparsifier.target_sparsity(t)) * 222)
        if isinstance(sparsifier, DropGrow) and info.name not in BETWEEN_LAYERS:
            assert now == kept
    assert moved > 0.1
    meant = sparsifier.target_sparsity(16)
    assert meant == pytest.approx(usual(info), abs=COARSE.get(info.name))
    pruned = 222 - round((1 - meant) * 222)
    assert sum(int((~m).sum()) for m in sparsifier.masks.values()) == pruned
    assert sum(int((p == 0).sum()) for p in net.parameters()) >= pruned
    assert sparsifier.sparsity() == pytest.approx(pruned / 222)
    assert equal_masks(first, sparsifier.masks) == (info.kind not in MOVING)
    assert (sparsifier.updates > updates) == (info.kind in MOVING)
    assert sparsifier.step == 16
    sparsifier.verify()


@every_method
@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_the_target_of_each_step_is_met_exactly(info, sparsity, distribution):
    if "m" in info.defaults and (distribution != "uniform" or sparsity > 0.5):
        pytest.skip("n of m weights: one share in all layers, and no other than n / m")
    if info.name == "chex" and (distribution != "erk" or sparsity > 0.5):
        pytest.skip("channels of 12 and 10: spread by |gamma|, one of each at least")
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(info, net, optimizer, sparsity=sparsity, distribution=distribution)
    for t, batch in enumerate(make_batches(16), 1):
        one_step(net, optimizer, batch)
        meant = sparsifier.target_sparsity(t)
        assert sum(int(m.sum()) for m in sparsifier.masks.values()) == round((1 - meant) * 222)
    assert meant == pytest.approx(sparsity, abs=COARSE.get(info.name))


@every_method
def test_set_to_none_makes_no_difference(info):
    runs = []
    for to_none in (True, False):
        net = make_net()
        optimizer = sgd(net)
        sparsifier = attach(info, net, optimizer)
        for x, y in make_batches(8):
            loss_fn(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        runs.append((copy_masks(sparsifier), net))
    assert equal_masks(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1].parameters(), runs[1][1].parameters(), strict=True))


@every_method
def test_registry_row_and_class_agree(info):
    cls = info.load()
    assert cls.method == info.name
    assert dict(info.defaults) == vars(cls.Options()) if info.defaults else not vars(cls.Options())
    assert cls.dense_state == info.dense_state
    assert info.paper


# -- non-finite gradients --------------------------------------------------------------------------------------------


@dynamic
@pytest.mark.parametrize("where", ["active", "pruned"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_due_change_with_bad_gradients_does_not_happen(info, where, value):
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(info, net, optimizer)
    masks = copy_masks(sparsifier)
    batches = make_batches(6)
    for t, (x, y) in enumerate(batches, 1):
        optimizer.zero_grad()
        loss_fn(net(x), y).backward()
        if t == 3:
            mask = sparsifier.masks["2.weight"]
            if where == "pruned" and bool(mask.all()):
                pytest.skip("dense until here")
            net[2].weight.grad.view(-1)[(mask if where == "active" else ~mask).flatten().nonzero()[0]] = value
        before = net[0].weight.detach().clone()
        optimizer.step()
        if t == 3:
            assert equal_masks(masks, sparsifier.masks)
            assert sparsifier.updates == 0
            assert not torch.equal(before, net[0].weight), "the step is not replaced"
            late = sparsifier.behind(sparsifier.parts[0])
            if where == "active":
                return
    assert sparsifier.updates == 1 + late, "the next one that is due happens, and a prune is made up for before it"
    assert all(p.isfinite().all() for p in net.parameters())


@dynamic
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_an_overflow_under_grad_scaler_changes_no_topology(info, fused):
    net = make_net()
    optimizer = sgd(net, fused=fused)
    sparsifier = attach(info, net, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t, (x, y) in enumerate(make_batches(9), 1):
        optimizer.zero_grad()
        scaler.scale(loss_fn(net(x), y)).backward()
        if t == 3:
            net[0].weight.grad[0, 0] = float("inf")
        masks, weights = copy_masks(sparsifier), [p.detach().clone() for p in net.parameters()]
        updates = sparsifier.updates
        scaler.step(optimizer)
        scaler.update()
        if t == 3:
            assert equal_masks(masks, sparsifier.masks)
            assert sparsifier.updates == updates == 0
            assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
            late = sparsifier.behind(sparsifier.parts[0])
    # an optimizer that handles the overflow itself is called, and its step counts; the others are not called at all
    assert sparsifier.step == (9 if fused else 8)
    assert sparsifier.updates == 2 + late
    assert all(p.isfinite().all() for p in net.parameters())


@dynamic
def test_a_step_that_the_base_optimizer_skips_on_the_device_changes_no_topology(info):
    """The gradients are finite, but `found_inf` says otherwise, as it does when another part of a scaler overflowed."""
    net = make_net()
    optimizer = sgd(net, fused=True)
    sparsifier = attach(info, net, optimizer, delta_t=1)
    batch = make_batches(1)[0]
    one_step(net, optimizer, batch)  # torch leaves the momentum of a fused step that is skipped at first uninitialised
    masks = copy_masks(sparsifier)
    optimizer.found_inf = torch.tensor(1.0)
    one_step(net, optimizer, batch)
    assert equal_masks(masks, sparsifier.masks)
    optimizer.found_inf = torch.tensor(0.0)
    for _ in range(10):  # small steps may leave the largest weights the largest for a while
        one_step(net, optimizer, batch)
    assert not equal_masks(masks, sparsifier.masks)


# -- resume in a fresh process ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Every method: 7 steps here, saved; 7 more in one other process. -> {method: (uninterrupted, resumed)}."""
    from sparse_resume import continue_run, start_run

    folder = tmp_path_factory.mktemp("resume")
    whole = {}
    for info in METHODS:
        run = start_run(info)
        torch.save(continue_run(*run, first=0, last=7), folder / f"{info.name}.pt")
        whole[info.name] = continue_run(*run, first=7, last=14)
    subprocess.run(
        [sys.executable, str(Path(__file__).with_name("sparse_resume.py")), str(folder)], check=True, timeout=100
    )
    return {name: (end, torch.load(folder / f"{name}.done.pt", weights_only=True)) for name, end in whole.items()}


def assert_same(a, b, path="state"):
    """Bit-equal nested state."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@every_method
def test_a_run_resumed_in_a_fresh_process_is_bit_equal(info, resumed):
    whole, part = resumed[info.name]
    assert_same(whole, part)
    assert whole["sparsifier"]["steps"] == [14]
    assert (whole["sparsifier"]["updates"] == 4) == (info.kind in MOVING)
    assert bool(whole["sparsifier"]["explored"]) == (info.kind != "static")


# -- torch.compile ---------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_mask_changes_do_not_recompile_the_model(info, backend):
    torch._dynamo.reset()
    counter = CompileCounter() if backend == "eager" else CompileCounterWithBackend("aot_eager")
    net = make_net()
    compiled = torch.compile(net, backend=counter)
    optimizer = sgd(net)
    sparsifier = attach(info, compiled, optimizer)
    first = copy_masks(sparsifier)
    batches = make_batches(10)
    for batch in batches[:2]:
        one_step(compiled, optimizer, batch)
    frames = counter.frame_count
    assert frames > 0
    for batch in batches[2:]:
        one_step(compiled, optimizer, batch)
    assert counter.frame_count == frames
    assert equal_masks(first, sparsifier.masks) == (info.kind not in MOVING)
    plain_net = make_net()
    plain_optimizer = sgd(plain_net)
    plain = attach(info, plain_net, plain_optimizer)
    for batch in batches:
        one_step(plain_net, plain_optimizer, batch)
    assert equal_masks(plain.masks, sparsifier.masks), "the compiled model sees the new masks as the plain one does"
    pruned = 222 - round((1 - plain.target_sparsity(10)) * 222)
    assert sum(int((p == 0).sum()) for p in net.parameters()) >= pruned > 100


# -- other models ----------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_convolutions_and_other_dtypes(info, dtype):
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2), nn.Flatten(), nn.Linear(16, 3)
    )
    net = net.to(dtype)
    optimizer = sgd(net)
    g = torch.Generator().manual_seed(0)
    images = [(torch.randn(8, 2, 6, 6, generator=g), torch.randint(0, 3, (8,), generator=g))]
    kw = {"batches": images} if info.load().needs_batches else {}
    sparsifier = attach(info, net, optimizer, sparsity=usual(info, 0.8), **kw)
    for _ in range(7):
        optimizer.zero_grad()
        net(torch.randn(8, 2, 6, 6, generator=g).to(dtype)).square().sum().mul(1e-3).backward()
        optimizer.step()
    assert list(sparsifier.masks) == ["0.weight", "3.weight", "5.weight"]
    sparsifier.verify()
    kept = 1 - sparsifier.target_sparsity(7)
    assert sum(int(m.sum()) for m in sparsifier.masks.values()) == round(kept * (144 + 144 + 48))


@every_method
def test_a_saved_state_is_a_snapshot(info):
    """Neither the training that goes on nor one that resumes from it changes it."""
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(info, net, optimizer)
    batches = make_batches(8)
    for batch in batches[:4]:
        one_step(net, optimizer, batch)
    saved, weights = sparsifier.state_dict(), copy.deepcopy(net.state_dict())
    copied = copy.deepcopy(saved)
    for batch in batches[4:]:
        one_step(net, optimizer, batch)
    assert_same(saved, copied)
    other = make_net()
    other.load_state_dict(weights)
    other_optimizer = sgd(other)
    resumed = attach(info, other, other_optimizer, init=False)
    resumed.load_state_dict(saved)
    for batch in batches[4:]:
        one_step(other, other_optimizer, batch)
    assert_same(saved, copied)
    assert saved["steps"] == [4]
    assert resumed.step == sparsifier.step == 8


@every_method
def test_its_state_loads_with_weights_only(info):
    net = make_net()
    optimizer = sgd(net)
    sparsifier = attach(info, net, optimizer)
    for batch in make_batches(4):
        one_step(net, optimizer, batch)
    buffer = io.BytesIO()
    torch.save(sparsifier.state_dict(), buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=True), sparsifier.state_dict())
