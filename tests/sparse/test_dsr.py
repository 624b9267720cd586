"""DSR by hand: one threshold that adapts, growth in proportion to the survivors, overflow, no layer empty."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2sam import sparsify
from s2sam.sparse.budget import share_out

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import generator, golden_pair, make_batches, make_net, one_step, step_by

# |w| of a: .5 .1 .3 .4 .6 .7, of b: .9 .05 .1 .15 .2 .01; six active in each
MASKS = {"a": [1] * 6 + [0] * 6, "b": [0] * 6 + [1] * 6}
WEIGHTS = {"a": [0.5, -0.1, 0.3, -0.4, 0.6, 0.7, *[0.0] * 6], "b": [*[0.0] * 6, -0.9, 0.05, -0.1, 0.15, 0.2, 0.01]}
OPTIONS = {"total_steps": 40, "delta_t": 1, "stretch": (), "threshold": 0.25, "drop_fraction": 0.5}


def active(dsr):
    return {name: mask.flatten().nonzero().flatten().tolist() for name, mask in dsr.masks.items()}


def pair(masks=MASKS, weights=WEIGHTS, **options):
    return golden_pair(masks, weights, "dsr", **{**OPTIONS, **options})


def test_golden_change():
    net, optimizer, dsr = pair()
    step_by(net, optimizer)
    # below .25: one of a, five of b; the survivors are 5 and 1, so that 5 of the 6 come to a and 1 to b
    assert dsr.last_update.dropped == {"a.weight": 1, "b.weight": 5}
    assert dsr.last_update.grown == {"a.weight": 5, "b.weight": 1}
    now = active(dsr)
    assert {0, 2, 3, 4, 5} < set(now["a.weight"]) and 1 not in now["a.weight"], "what was just dropped is not drawn"
    assert len(now["a.weight"]) == 10
    assert now["b.weight"][-1] == 6 and now["b.weight"][0] < 6 and len(now["b.weight"]) == 2
    assert net["a"].weight.flatten().tolist() == pytest.approx([0.5, 0, 0.3, -0.4, 0.6, 0.7, *[0.0] * 6])
    assert dsr.parts[0].kept == {"a.weight": 10, "b.weight": 2}


@pytest.mark.parametrize(("share", "threshold"), [(0.5, 0.25), (0.15, 0.125), (0.9, 0.5), (0.46, 0.25), (0.44, 0.125)])
def test_the_threshold_follows_how_many_were_dropped(share, threshold):
    net, optimizer, dsr = pair(drop_fraction=share)  # 6 of 12 are dropped; N_p = 12 * share
    step_by(net, optimizer)
    assert dsr.thresholds == [threshold]
    assert dsr.state_dict()["extra"] == {"thresholds": [threshold]}


def test_what_does_not_fit_goes_to_the_other_layer():
    masks = {"a": [1] * 9 + [0] * 3, "b": [1] * 4 + [0] * 8}
    weights = {"a": [0.1, *[0.5] * 8, *[0.0] * 3], "b": [0.9, 0.1, 0.1, 0.1, *[0.0] * 8]}
    net, optimizer, dsr = pair(masks, weights)
    step_by(net, optimizer)
    # 4 dropped; a's share of 8 to 1 is 3.6, but it has 3 free places
    assert dsr.last_update.grown == {"a.weight": 3, "b.weight": 1}
    assert active(dsr)["a.weight"] == list(range(1, 12))


def test_no_layer_is_emptied():
    net, optimizer, dsr = pair(threshold=10.0)
    step_by(net, optimizer)
    assert dsr.last_update.dropped == {"a.weight": 5, "b.weight": 5}
    now = active(dsr)
    assert 5 in now["a.weight"] and 6 in now["b.weight"], "the largest of each stay"
    assert len(now["a.weight"]) == len(now["b.weight"]) == 6


def test_no_more_is_dropped_than_there_is_room_to_grow():
    masks = {"a": [1] * 12, "b": [0] + [1] * 11}
    weights = {"a": [1.0 + i for i in range(12)], "b": [0.0, *(0.1 + 0.1 * i for i in range(11))]}
    net, optimizer, dsr = pair(masks, weights, threshold=100.0)
    step_by(net, optimizer)
    assert dsr.last_update.dropped == {"a.weight": 0, "b.weight": 1}
    assert active(dsr)["b.weight"] == [0, *range(2, 12)]


def test_nothing_is_dropped_below_the_smallest_weight_and_the_threshold_doubles():
    net, optimizer, dsr = pair(threshold=1e-3)
    for _ in range(3):
        step_by(net, optimizer)
    assert dsr.updates == 3 and dsr.survival() == 1.0
    assert dsr.thresholds == [8e-3]


def test_intervals_double_and_end():
    _, _, dsr = pair(delta_t=2, stretch=(0.25, 0.5))
    assert [t for t in range(1, 41) if dsr.due(dsr.parts[0], t)] == [2, 4, 6, 8, 12, 16, 24, 32]
    _, _, dsr = pair(delta_t=2, stretch=(), t_end=0.2)
    assert [t for t in range(1, 41) if dsr.due(dsr.parts[0], t)] == [2, 4, 6, 8]


def test_weights_move_between_layers_and_each_optimizer_has_its_threshold():
    net = make_net()
    both = [torch.optim.SGD([net[0].weight], lr=0.1), torch.optim.SGD([net[2].weight, net[4].weight], lr=0.1)]
    dsr = sparsify(
        net, both, method="dsr", sparsity=0.7, generator=generator(), **{**OPTIONS, "threshold": 0.1}, min_per_filter=0
    )
    first = dict(dsr.parts[1].kept)
    for x, y in make_batches(6):
        for optimizer in both:
            optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        for optimizer in both:
            optimizer.step()
    assert dsr.parts[1].kept != first
    assert sum(dsr.parts[1].kept.values()) == sum(first.values())
    first, second = dsr.thresholds
    assert first != 0.1 and second != 0.1
    both[0].step()
    assert dsr.thresholds == [first / 2, second], "the other one did not step"
    dsr.verify()


def test_the_draw_is_the_generator_s():
    found = []
    for seed in (1, 1, 2):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        dsr = sparsify(net, optimizer, method="dsr", sparsity=0.7, generator=generator(0), **OPTIONS)
        dsr.generator.manual_seed(seed)
        one_step(net, optimizer, make_batches(1)[0])
        found.append(active(dsr))
    assert found[0] == found[1] != found[2]


@given(st.data())
def test_share_out_is_exact_in_proportion_and_within_the_room(data):
    names = [str(i) for i in range(data.draw(st.integers(1, 6)))]
    room = {name: data.draw(st.integers(0, 50)) for name in names}
    shares = {name: data.draw(st.floats(0, 100)) for name in names}
    total = data.draw(st.integers(0, sum(room.values())))
    found = share_out(total, shares, room)
    assert sum(found.values()) == total
    assert all(0 <= found[name] <= room[name] for name in names)
    ideal = {name: total * share / (sum(shares.values()) or 1) for name, share in shares.items()}
    if sum(shares.values()) > 1e-3 and all(ideal[name] <= room[name] for name in names):
        assert all(abs(found[name] - ideal[name]) < 1 + 1e-3 for name in names)


def test_share_out_by_hand():
    assert share_out(4, {"a": 0.0, "b": 0.0}, {"a": 9, "b": 9}) == {"a": 2, "b": 2}
    assert share_out(7, {"a": 1.0, "b": 0.0, "c": 0.0}, {"a": 3, "b": 2, "c": 9}) == {"a": 3, "b": 2, "c": 2}
    assert share_out(10, {"a": 1e-4, "b": 4e-4}, {"a": 20, "b": 20}) == {"a": 2, "b": 8}
    assert share_out(0, {"a": 1.0}, {"a": 0}) == {"a": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": None}, "give total_steps"),
        ({"threshold": 0.0}, "threshold must be above 0"),
        ({"threshold": -1}, "threshold must be"),
        ({"drop_fraction": 2}, "drop_fraction must be"),
        ({"stretch": 0.5}, "stretch must be a list"),
        ({"stretch": (0.5, 0.5)}, "stretch must be rising"),
        ({"t_end": None}, "t_end must be"),
        ({"regrow_dropped": True}, "unknown option of method 'dsr'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        pair(**options)
