"""Adam after growth: torch's own first updates, and the correction, which makes a grown weight's Adam a new one."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from s2sam import S2SAM, sparsify
from s2sam.sparse.adam import BiasByAge, first_update

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import generator, make_batches, make_net, one_step

KINDS = {
    "adam": lambda p, **kw: torch.optim.Adam(p, **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, weight_decay=0.1, **kw),
    "l2": lambda p, **kw: torch.optim.Adam(p, weight_decay=0.1, **kw),
    "amsgrad": lambda p, **kw: torch.optim.AdamW(p, amsgrad=True, **kw),
    "fused": lambda p, **kw: torch.optim.AdamW(p, fused=True, **kw),
    "betas": lambda p, **kw: torch.optim.Adam(p, betas=(0.5, 0.9), **kw),
}


@pytest.mark.parametrize("t", [1, 10, 300, 1000, 8000])
def test_torchs_first_update_with_zeroed_moments(t):
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=0.01, eps=0.0)
    weight.grad = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    optimizer.step()
    state = optimizer.state[weight]
    state["exp_avg"].zero_(), state["exp_avg_sq"].zero_()
    state["step"].fill_(t - 1)
    before = weight.detach().clone()
    optimizer.step()
    moved = (weight.detach() - before) / 0.01
    assert moved.tolist() == pytest.approx([-first_update(t), first_update(t), -first_update(t)], rel=1e-6)
    assert (first_update(1000), first_update(10**6)) == pytest.approx((2.514, 3.162), abs=1e-3)
    for _ in range(11):
        before = weight.detach().clone()
        optimizer.step()
    if t == 8000:
        assert float((weight.detach() - before)[1]) == pytest.approx(0.066, abs=1e-3)


def grow(optimizer_kind, *, correct, warm=40):
    """A weight that is pruned for `warm` steps and then active, next to one that always was; gradients by hand."""
    layer = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, 0.4, 0.0, 0.3]]))
    optimizer = KINDS[optimizer_kind](layer.parameters(), lr=0.01)
    sparsifier = sparsify(layer, optimizer, method="magnitude", sparsity=0.25)
    aged = BiasByAge(sparsifier) if correct else None
    g = generator(2)
    grads = torch.randn(warm + 30, 1, 4, generator=g, dtype=torch.float64)
    path = []
    for t, grad in enumerate(grads):
        if t == warm:
            sparsifier.masks["weight"].fill_(True)
        layer.weight.grad = grad.clone()
        optimizer.step()
        path.append(layer.weight.detach().clone())
    fresh = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    other, wanted = KINDS[optimizer_kind]([fresh], lr=0.01), []
    for grad in grads[warm:]:
        fresh.grad = grad[:, 2:3].clone()
        other.step()
        wanted.append(float(fresh.detach()))
    return torch.stack(path)[:, 0], torch.tensor(wanted, dtype=torch.float64), aged


@pytest.mark.parametrize("kind", KINDS)
def test_a_grown_weight_takes_the_steps_of_a_new_adam(kind):
    path, wanted, aged = grow(kind, correct=True)
    assert torch.allclose(path[40:, 2], wanted, rtol=1e-9, atol=1e-12)
    plain, _, _ = grow(kind, correct=False)
    assert (plain[40:, 2] - wanted).abs().max() > 1e-3
    assert torch.equal(plain[:, [0, 1, 3]], path[:, [0, 1, 3]]), "the others are not touched"
    assert path[:40, 2].abs().sum() == 0
    assert aged.birth["weight"].tolist() == [[0, 0, 40, 0]]


def test_births_follow_a_moving_mask_and_skipped_steps_are_none():
    net = make_net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    rigl = sparsify(net, optimizer, method="rigl", sparsity=0.7, total_steps=40, delta_t=4, generator=generator())
    aged = BiasByAge(rigl)
    sam = S2SAM(optimizer, model=net, rho=0.05)
    for t, (x, y) in enumerate(make_batches(12), 1):
        before = {name: birth.clone() for name, birth in aged.birth.items()}
        one_step(net, optimizer, (x * torch.nan if t == 6 else x, y))
        if t == 6:
            sam.restore()
        for name, birth in aged.birth.items():
            if t in (4, 6, 8, 12):
                assert torch.equal(birth, before[name]), "a step that is replaced or skipped ages nobody"
            else:
                assert torch.equal(birth >= 0, rigl.masks[name])
    steps = optimizer.state[net[0].weight]["step"]
    assert int(steps) == 8
    found = torch.cat([birth.flatten() for birth in aged.birth.values()])
    # grown in steps 4 and 8; by then the optimizer had made 3 and 5 steps of its own
    assert set(found.tolist()) == {-1, 0, 3, 5}


def test_it_resumes_and_comes_off():
    def start():
        net = make_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
        options = {"sparsity": 0.7, "total_steps": 40, "delta_t": 3, "generator": generator()}
        rigl = sparsify(net, optimizer, method="rigl", **options)
        return net, optimizer, rigl, BiasByAge(rigl)

    run, other = start(), start()
    batches = make_batches(12)
    for batch in batches[:7]:
        one_step(run[0], run[1], batch)
    for mine, theirs in zip(other, run, strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for net, optimizer, _, _ in (run, other):
        for batch in batches[7:]:
            one_step(net, optimizer, batch)
    assert all(torch.equal(a, b) for a, b in zip(run[0].parameters(), other[0].parameters(), strict=True))
    births = run[3].birth["0.weight"].clone()
    run[3].remove()
    one_step(run[0], run[1], batches[0])
    one_step(run[0], run[1], batches[0])
    assert torch.equal(births, run[3].birth["0.weight"])
    with pytest.raises(ValueError, match="of other weights"):
        run[3].load_state_dict({"birth": {"a": births}})


def test_other_optimizers_are_refused():
    net = make_net()
    rigl = sparsify(net, torch.optim.NAdam(net.parameters()), method="rigl", sparsity=0.7, total_steps=40)
    with pytest.raises(ValueError, match="NAdam has no bias correction of theirs"):
        BiasByAge(rigl)
