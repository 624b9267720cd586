"""RigL by hand: drop by |w|, grow by the dense gradient, no gradient step, cosine."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import golden

# 12 weights, 6 active: .1 .2 .3 .4 .5 .6 by magnitude
MASK = [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
WEIGHTS = [0.5, -0.1, 0.3, -0.2, 0.6, -0.4, 0, 0, 0, 0, 0, 0]
HALF = {"delta_t": 1, "total_steps": 10**6, "t_end": 1.0, "drop_fraction": 0.5}  # f = 0.5: 3 of 6


def step(layer, optimizer, grad):
    layer.weight.grad = torch.tensor(grad).view(3, 4)
    optimizer.step()


def test_golden_drop_and_grow():
    layer, optimizer, sparsifier = golden(MASK, WEIGHTS, "rigl", **{**HALF, "drop_fraction": 0.5001})
    #         kept .5 .6 .4; candidates: the dropped 1, 2, 3 and the inactive 6..11; largest |grad|: 2 (dropped), 7, 10
    step(layer, optimizer, [9.0, 0.1, -5.0, 0.3, 9.0, 9.0, 0.2, 3.0, 0.0, 0.1, -4.0, 1.0])
    mask = sparsifier.masks["weight"].flatten()
    assert mask.nonzero().flatten().tolist() == [0, 2, 4, 5, 7, 10]
    # no gradient step; the re-picked 2 keeps its value; grown ones are 0; dropped ones are 0
    assert layer.weight.flatten().tolist() == pytest.approx([0.5, 0, 0.3, 0, 0.6, -0.4, 0, 0, 0, 0, 0, 0])
    assert sparsifier.last_update.dropped == sparsifier.last_update.grown == {"weight": 2}
    # what reads the gradient next sees the new mask, with grown positions at 0
    assert layer.weight.grad.flatten().tolist() == pytest.approx([9, 0, -5, 0, 9, 9, 0, 0, 0, 0, 0, 0])


def test_ties_go_to_the_lower_index():
    layer, optimizer, sparsifier = golden(MASK, [0.5] * 6 + [0] * 6, "rigl", **{**HALF, "drop_fraction": 0.5001})
    step(layer, optimizer, [1.0] * 12)
    assert sparsifier.masks["weight"].flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]
    layer, optimizer, sparsifier = golden(MASK, [0.5] * 6 + [0] * 6, "rigl", **{**HALF, "drop_fraction": 0.5001})
    step(layer, optimizer, [1.0] * 3 + [0.5] * 3 + [1.0] * 6)
    assert sparsifier.masks["weight"].flatten().nonzero().flatten().tolist() == [0, 1, 2, 6, 7, 8]


def test_an_update_replaces_the_step_bit_for_bit_and_clears_state_only_where_the_mask_changed():
    layer, optimizer, sparsifier = golden(MASK, WEIGHTS, "rigl", **{**HALF, "delta_t": 2, "drop_fraction": 0.5001})
    step(layer, optimizer, [0.1] * 12)
    weight, state = layer.weight.detach().clone(), optimizer.state[layer.weight]["momentum_buffer"].clone()
    old = sparsifier.masks["weight"].clone()
    step(layer, optimizer, [1.0, 0, 0, 0, 1.0, 1.0, 2.0, 3.0, 0, 0, 4.0, 0])
    new = sparsifier.masks["weight"]
    assert not torch.equal(old, new)
    assert torch.equal(layer.weight.detach(), weight * (old & new))
    assert torch.equal(optimizer.state[layer.weight]["momentum_buffer"], state * (old & new))
    assert sparsifier.step == 2


def test_parameters_without_masks_wait_too_and_schedules_advance():
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    from s2sam import sparsify

    sparsifier = sparsify(net, optimizer, method="rigl", sparsity=0.5, total_steps=100, delta_t=3)
    for t in range(1, 7):
        before = [p.detach().clone() for p in net.parameters()]
        steps = [float(s["step"]) for s in optimizer.state.values()]
        net(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        scheduler.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
        if t % 3:
            assert all(moved)
        else:
            assert not any(m for m, p in zip(moved, net.parameters(), strict=True) if p.dim() == 1)
            assert [float(s["step"]) for s in optimizer.state.values()] == steps
            assert sparsifier.last_update.step == t
    assert scheduler.get_last_lr() == [0.1 / 64]


def test_cosine_decides_the_number_and_the_end():
    drops = []
    layer, optimizer, sparsifier = golden(
        MASK, WEIGHTS, "rigl", delta_t=1, total_steps=20, t_end=0.5, drop_fraction=1.0
    )
    part = sparsifier.parts[0]
    for t in range(1, 12):
        drops.append(sparsifier.drop_count(part, "weight", t) if sparsifier.due(part, t) else 0)
    # 6 * (1 + cos(pi t / 10)) / 2, rounded down; from t = 10 on nothing, and 6 * .0245 at t = 9 is nothing as well
    assert drops == [5, 5, 4, 3, 3, 2, 1, 0, 0, 0, 0]


def test_a_step_with_nothing_to_exchange_is_not_replaced():
    layer, optimizer, _ = golden(MASK, WEIGHTS, "rigl", delta_t=1, total_steps=20, drop_fraction=0.01)
    step(layer, optimizer, [1.0] * 12)
    assert layer.weight[0, 0] == 0.0  # 0.5 - 0.5 * 1


def test_a_layer_without_a_gradient_stays_as_it_is():
    net = torch.nn.ModuleDict({"used": torch.nn.Linear(6, 6), "unused": torch.nn.Linear(6, 6)})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    from s2sam import sparsify

    sparsifier = sparsify(net, optimizer, method="rigl", sparsity=0.5, total_steps=10, delta_t=1)
    before = sparsifier.masks["unused.weight"].clone()
    net["used"](torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    assert sparsifier.last_update.dropped["used.weight"] > 0
    assert torch.equal(sparsifier.masks["unused.weight"], before)


def test_gradients_of_micro_batches_add_up():
    """Two halves whose gradients cancel at position 6: it is not grown, though each half alone would grow it."""
    layer, optimizer, sparsifier = golden(MASK, WEIGHTS, "rigl", **{**HALF, "drop_fraction": 0.17})
    first = torch.zeros(12)
    first[6], first[7] = 9.0, 1.0
    second = first.clone()
    second[6] = -9.0
    for grad in (first, second):
        (layer.weight.flatten() * grad).sum().backward()
    optimizer.step()
    assert sparsifier.masks["weight"].flatten().nonzero().flatten().tolist() == [0, 2, 3, 4, 5, 7]


def test_clipping_before_a_replaced_step_leaves_its_growth_scores():
    layer, optimizer, sparsifier = golden(MASK, WEIGHTS, "rigl", **{**HALF, "delta_t": 2, "drop_fraction": 0.17})
    layer.weight.grad = torch.ones(3, 4)
    sparsifier.mask_gradients()
    assert layer.weight.grad.sum() == 6
    optimizer.step()
    layer.weight.grad = torch.ones(3, 4)
    layer.weight.grad[2, 3] = 5.0
    sparsifier.mask_gradients()
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    assert bool(sparsifier.masks["weight"][2, 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give total_steps"),
        ({"total_steps": 0}, "total_steps must be a whole number"),
        ({"total_steps": 10, "t_end": None}, "needs a t_end above 0"),
        ({"total_steps": 10, "t_end": 0.0}, "needs a t_end above 0"),
        ({"total_steps": 10, "alpha": 0.3}, "unknown option of method 'rigl'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        golden(MASK, WEIGHTS, "rigl", **options)
