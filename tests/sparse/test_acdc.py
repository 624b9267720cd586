"""AC/DC by hand: the authors' table of phases, which weights go and come back, and the end, whatever was missed."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2sam import S2SAM, sparsify
from s2sam.sparse.methods.acdc import phases

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import copy_masks, generator, golden_pair, make_batches, make_net, one_step, shaped_states, step_by

WEIGHTS = [0.5, -0.1, 0.3, -0.7, 0.2, -0.4, 0.8, -0.6, 0.9, 1.0, -1.1, 0.1]


def layer_of(lr=0.5, **kw):
    """Compressed after steps 2 to 4, 6 to 8 and from 12 on."""
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(WEIGHTS).view(3, 4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    options = {"sparsity": 0.5, "total_steps": 20, "delta_t": 2, "t_end": 0.6, "generator": generator()} | kw
    return layer, optimizer, sparsify(layer, optimizer, method="ac-dc", **options)


def active(acdc):
    return acdc.masks["weight"].flatten().nonzero().flatten().tolist()


def test_the_table_of_the_paper():
    _, _, acdc = layer_of(total_steps=100, delta_t=None, t_end=0.85)
    compressed = [*range(10, 71, 10), 85]
    assert acdc.changes[::2] == compressed
    assert acdc.changes[1::2] == list(range(15, 76, 10))
    dense = [t for t in range(101) if acdc.target_sparsity(t) == 0]
    assert dense == [*range(10), *(t + i for t in range(15, 70, 10) for i in range(5)), *range(75, 85)]


def test_a_golden_cycle():
    layer, optimizer, acdc = layer_of()
    step_by(layer, optimizer, [0.0] * 11 + [1.0])
    assert active(acdc) == list(range(12)), "dense at first"
    assert float(layer.weight.detach()[2, 3]) == pytest.approx(-0.4)
    step_by(layer, optimizer, [0.0] * 11 + [1.0])  # the last weight: -.4 - .5 * 1.9 = -1.35, now the largest
    assert active(acdc) == [3, 6, 8, 9, 10, 11]
    sparse = [0, 0, 0, -0.7, 0, 0, 0.8, 0, 0.9, 1.0, -1.1, -1.35]
    assert layer.weight.detach().flatten().tolist() == pytest.approx(sparse)
    assert acdc.last_update.dropped == {"weight": 6} and acdc.last_update.grown == {"weight": 0}
    mask = acdc.masks["weight"].clone()
    step_by(layer, optimizer, [9.0] * 3 + [0.0] * 9)
    assert torch.equal(mask, acdc.masks["weight"]), "the mask stays for the phase, and 0 stays 0"
    assert layer.weight.detach()[~mask].abs().sum() == 0
    momentum = shaped_states(optimizer, layer.weight)[0]
    assert momentum.abs().sum() > 1
    step_by(layer, optimizer)
    assert active(acdc) == list(range(12)) and acdc.last_update.grown == {"weight": 6}
    assert momentum.abs().sum() == 0, "a dense phase starts without momentum"
    step_by(layer, optimizer, [1.0] * 3)
    assert layer.weight.detach().flatten()[:3].tolist() == pytest.approx([-0.5] * 3), "from 0"
    step_by(layer, optimizer)
    assert (acdc.updates, acdc.sparsity()) == (3, 0.5)


def test_momentum_can_be_kept_and_second_moments_are():
    layer, optimizer, acdc = layer_of(reset_momentum=False)
    for _ in range(4):
        step_by(layer, optimizer, [0.1] * 12)
    kept = shaped_states(optimizer, layer.weight)[0]
    assert int((kept != 0).sum()) == 6, "of those that stayed"
    layer, _, acdc = layer_of()
    acdc.remove()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    sparsify(layer, optimizer, method="ac-dc", sparsity=0.5, total_steps=20, delta_t=2, t_end=0.6)
    for _ in range(4):
        step_by(layer, optimizer, [0.1] * 12)
    state = optimizer.state[layer.weight]
    assert state["exp_avg"].abs().sum() == 0
    assert int((state["exp_avg_sq"] > 0).sum()) == 6


def test_over_all_layers_by_default_and_layer_by_layer_if_asked():
    weights = {"a": [1.0 + i for i in range(12)], "b": [0.01 * (1 + i) for i in range(12)]}
    dense = {"a": [1] * 12, "b": [1] * 12}
    for distribution, kept in (("auto", (11, 1)), ("uniform", (6, 6)), ("uniform-first-last-dense", (12, 12))):
        net, optimizer, acdc = golden_pair(dense, weights, "ac-dc", total_steps=10, distribution=distribution)
        step_by(net, optimizer)
        assert tuple(acdc.parts[0].kept.values()) == kept


@settings(max_examples=80, deadline=None)
@given(start=st.integers(1, 60), length=st.integers(0, 200), c=st.integers(1, 50), d=st.integers(1, 50))
def test_phases_are_as_long_as_they_should_be(start, length, c, d):
    found = phases(start, start + length, c, d)
    assert found[0] == start if length >= c + d else found == [start + length]
    assert found[-1] == start + length and len(found) % 2 == 1
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert all(gap == c for gap in gaps[::2])
    assert all(gap == d for gap in gaps[1:-1:2])
    assert all(d <= gap < c + 2 * d for gap in gaps[-1:]), "the last dense phase is the longest"


@pytest.mark.parametrize("distribution", ["global", "erk"])
@pytest.mark.parametrize("missed", [{12}, {2, 4}, {4, 5}, {19, 20} | set(range(12, 19))])
def test_what_was_missed_is_made_up_for(missed, distribution):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    acdc = sparsify(net, optimizer, method="ac-dc", sparsity=0.8, total_steps=20, delta_t=2, t_end=0.6,
                    distribution=distribution)  # fmt: skip
    for t, batch in enumerate(make_batches(20), 1):
        before = copy_masks(acdc)
        if t in missed:
            acdc.missed_step()
            assert all(torch.equal(mask, before[name]) for name, mask in acdc.masks.items())
        else:
            one_step(net, optimizer, batch)
            assert sum(int(m.sum()) for m in acdc.masks.values()) == round((1 - acdc.target_sparsity(t)) * 222)
    assert acdc.behind(acdc.parts[0]) == acdc.catch_up() == (20 in missed)
    assert sum(int(m.sum()) for m in acdc.masks.values()) == 44
    acdc.verify()


def test_a_compressed_network_is_never_behind_in_a_dense_phase():
    layer, optimizer, acdc = layer_of()
    step_by(layer, optimizer)
    step_by(layer, optimizer)
    acdc.missed_step()
    acdc.missed_step()
    assert acdc.target_sparsity(4) == 0.0 and acdc.sparsity() == 0.5
    assert not acdc.behind(acdc.parts[0]) and not acdc.catch_up()
    step_by(layer, optimizer)
    assert acdc.sparsity() == 0.0, "the step after the one that was missed decompresses"


def test_under_s2sam_the_displacement_is_on_the_phases_weights():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    acdc = sparsify(net, optimizer, method="ac-dc", sparsity=0.8, total_steps=20, delta_t=2, t_end=0.6)
    sam = S2SAM(optimizer, model=net, rho=0.1)
    zeros = []

    def look(module, args):
        zeros.append(sum(int((w == 0).sum()) for w in net.parameters()) if sam.is_displaced else None)

    net[0].register_forward_pre_hook(look)
    for batch in make_batches(14):
        one_step(net, optimizer, batch)
    assert zeros[:2] == [None, 0]
    # just after a decompression the direction is 0 where weights came back; then they move, layer by layer
    assert [t for t, n in enumerate(zeros) if n == 178] == [2, 3, 4, 6, 7, 8, 12, 13]
    assert max(zeros[9:12]) < 178 and zeros[11] < 60, "between neurons that were cut off they stay 0"
    assert acdc.sparsity() == pytest.approx(178 / 222)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "give total_steps"),
        ({"t_start": 0.7}, "at t_start=0.7 of 20 steps, must be"),
        ({"t_start": 0.0}, "must be after step 0"),
        ({"t_end": 2}, "t_end must be"),
        ({"delta_t": 0}, "delta_t must be a whole number"),
        ({"dense_t": 1.5}, "dense_t must be a whole number"),
        ({"reset_momentum": "no"}, "reset_momentum must be true or false"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        layer_of(**options)
