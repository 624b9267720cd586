"""Steps that never reach the optimizer: the plan keeps to the time of the training, and ends at its target."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam import S2SAM, sparsify

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import copy_masks, generator, make_batches, make_net, one_step

OPTIONS = {
    "gmp": {"method": "gmp", "delta_t": 4, "t_start": 0.0, "t_end": 0.8},
    "granet": {"method": "granet", "delta_t": 4, "t_start": 0.0, "t_end": 0.8},
    "mest": {"method": "mest", "variant": "em_s", "delta_t": 4, "phases": (0.5, 0.8)},
}


def make(method, *, lr=0.05, **kw):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    options = {"sparsity": 0.8, "total_steps": 10, "generator": generator()} | OPTIONS[method] | kw
    return net, optimizer, sparsify(net, optimizer, **options)


def active(sparsifier):
    return sum(int(mask.sum()) for mask in sparsifier.masks.values())


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("missed", [{4}, {8}, {1, 2, 3, 4, 5}, {7, 8, 9}])
def test_a_missed_step_counts_and_the_next_one_prunes(method, missed):
    net, optimizer, sparsifier = make(method)
    _, _, whole = make(method)
    for t, batch in enumerate(make_batches(10), 1):
        before = copy_masks(sparsifier)
        if t in missed:
            sparsifier.missed_step()
            assert all(torch.equal(mask, before[name]) for name, mask in sparsifier.masks.items())
        else:
            one_step(net, optimizer, batch)
            assert sparsifier.sparsity() == pytest.approx(whole.target_sparsity(t), abs=1 / 222)
        assert sparsifier.step == t
    assert active(sparsifier) == 44


@pytest.mark.parametrize("method", OPTIONS)
def test_what_the_last_step_missed_is_pruned_at_the_end(method):
    kw = {"phases": (0.5, 1.0)} if method == "mest" else {"t_end": 1.0}
    net, optimizer, sparsifier = make(method, **kw)
    for batch in make_batches(9):
        one_step(net, optimizer, batch)
    assert not sparsifier.catch_up(), "the plan is kept up to here"
    sparsifier.missed_step()
    assert active(sparsifier) > 44
    part = sparsifier.parts[0]
    assert sparsifier.behind(part)
    assert sparsifier.catch_up()
    assert (active(sparsifier), sparsifier.sparsity()) == (44, pytest.approx(0.8, abs=1 / 222))
    assert not sparsifier.behind(part) and not sparsifier.catch_up()
    for name, mask in sparsifier.masks.items():
        assert optimizer.state[net.get_parameter(name)]["momentum_buffer"][~mask].abs().sum() == 0
        assert net.get_parameter(name)[mask].abs().min() > 0


def test_gradients_that_are_not_finite_in_the_last_step():
    net, optimizer, gmp = make("gmp", t_end=1.0)
    sam = S2SAM(optimizer, model=net, rho=0.05)
    *batches, last = make_batches(10)
    for batch in batches:
        one_step(net, optimizer, batch)
    one_step(net, optimizer, (last[0] * torch.nan, last[1]))
    assert gmp.step == 10 and active(gmp) > 44
    net(last[0])  # a forward that no step follows
    with pytest.raises(RuntimeError, match=r"displaced; call sam\.restore\(\) before sparsifier\.catch_up"):
        gmp.catch_up()
    assert active(gmp) > 44
    sam.restore()
    assert gmp.catch_up() and active(gmp) == 44
    gmp.verify()


def test_a_frozen_topology_stays_behind():
    _, _, gmp = make("gmp")
    gmp.freeze()
    for _ in range(10):
        gmp.missed_step()
    assert not gmp.catch_up()
    assert active(gmp) == 222


def test_it_is_saved_with_the_step_it_missed():
    net, optimizer, gmp = make("gmp")
    for batch in make_batches(3):
        one_step(net, optimizer, batch)
    gmp.missed_step()
    twin, other, resumed = make("gmp", init=False)
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.load_state_dict(gmp.state_dict())
    assert resumed.step == 4 and resumed.behind(resumed.parts[0])
    batch = make_batches(4)[3]
    one_step(net, optimizer, batch)
    one_step(twin, other, batch)
    assert gmp.updates == 1
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in gmp.masks.items())


def test_of_two_optimizers_the_one_that_missed_it():
    net = make_net()
    first = torch.optim.SGD([net[0].weight], lr=0.1)
    second = torch.optim.SGD([net[2].weight, net[4].weight], lr=0.1)
    gmp = sparsify(net, [first, second], sparsity=0.5, total_steps=4, **(OPTIONS["gmp"] | {"delta_t": 1}))
    gmp.missed_step(second)
    assert [part.step for part in gmp.parts] == [0, 1]
    with pytest.raises(ValueError, match="one of the optimizers that sparsify"):
        gmp.missed_step(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


def test_methods_without_a_plan_only_count():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rigl = sparsify(net, optimizer, method="rigl", sparsity=0.8, total_steps=10, delta_t=2)
    before = copy_masks(rigl)
    one_step(net, optimizer, make_batches(1)[0])
    rigl.missed_step()
    assert not rigl.catch_up()
    assert (rigl.step, rigl.updates) == (2, 0)
    one_step(net, optimizer, make_batches(1)[0])
    assert all(torch.equal(mask, before[name]) for name, mask in rigl.masks.items())


def test_lt_takes_its_snapshot_at_the_next_step_if_rewind_step_was_missed():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    lt = sparsify(net, optimizer, method="lt", sparsity=0.2, total_steps=5, rewind_step=2)
    first, second, *_ = make_batches(4)
    one_step(net, optimizer, first)
    lt.missed_step()
    one_step(net, optimizer, second)
    expected = net[0].weight.detach().clone()
    one_step(net, optimizer, first)
    assert lt.next_level()
    kept = lt.masks["0.weight"]
    assert torch.equal(net[0].weight[kept], expected[kept])


def test_a_gradscaler_that_skips_is_told_as_the_page_says():
    net, optimizer, gmp = make("gmp", t_end=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    skipped = 0
    for t, (x, y) in enumerate(make_batches(10), 1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        scaler.scale(loss * (torch.inf if t in (4, 10) else 1.0)).backward()
        before = gmp.step
        scaler.step(optimizer)
        scaler.update()
        if gmp.step == before:
            gmp.missed_step()
            skipped += 1
    assert (gmp.step, skipped) == (10, 2)
    assert gmp.catch_up()
    assert active(gmp) == 44
