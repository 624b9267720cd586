"""SET by hand: which weights go, how many come, and that the draw is uniform and leaves out what was just dropped."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import MASK, WEIGHTS, copy_masks, generator, golden, take_step


def test_drops_the_smallest_and_grows_others_at_zero():
    layer, optimizer, sparsifier = golden(MASK, WEIGHTS, "set", delta_t=1, drop_fraction=0.25)
    take_step(layer, optimizer)
    mask = sparsifier.masks["weight"].flatten().tolist()
    assert mask[:8] == [True, False, True, True, False, True, True, True]
    assert sum(mask[8:]) == 2
    assert layer.weight.flatten().tolist()[:8] == pytest.approx([0.5, 0, 0.3, -0.7, 0, -0.4, 0.8, -0.6])
    assert sparsifier.last_update.dropped == sparsifier.last_update.grown == {"weight": 2}


def test_the_change_follows_the_optimizer_step():
    layer, optimizer, sparsifier = golden(MASK, WEIGHTS, "set", delta_t=1, drop_fraction=0.125)
    grad = torch.zeros(3, 4)
    grad[0, 0] = 1.0  # 0.5 - 0.5 * 1 = 0: now the smallest
    take_step(layer, optimizer, grad)
    assert sparsifier.masks["weight"].flatten().tolist()[:8] == [False] + [True] * 7


def test_sign_split_drops_on_either_side():
    # positive .2 .3 .5 .8, negative -.1 -.4 -.6 -.7: a quarter of each side
    layer, optimizer, sparsifier = golden(MASK, WEIGHTS, "set", delta_t=1, drop_fraction=0.25, sign_split=True)
    take_step(layer, optimizer)
    assert sparsifier.masks["weight"].flatten().tolist()[:8] == [True, False, True, True, False, True, True, True]
    # positive .5 .1 .3 .7: .1 goes; negative -.9 -.9 -1 -1: the later -.9 goes, though .3 is nearer to 0
    weights = [0.5, 0.1, 0.3, 0.7, -0.9, -0.9, -1.0, -1.0, 0, 0, 0, 0]
    layer, optimizer, sparsifier = golden(MASK, weights, "set", delta_t=1, drop_fraction=0.25, sign_split=True)
    take_step(layer, optimizer)
    assert sparsifier.masks["weight"].flatten().tolist()[:8] == [True, False, True, True, True, False, True, True]
    assert int(sparsifier.masks["weight"].sum()) == 8


@pytest.mark.parametrize("regrow", [False, True])
def test_just_dropped_weights_come_back_only_if_asked(regrow):
    back = 0
    for seed in range(20):
        layer, optimizer, sparsifier = golden(MASK, WEIGHTS, "set", delta_t=1, drop_fraction=0.5, regrow_dropped=regrow)
        sparsifier.generator.manual_seed(seed)
        take_step(layer, optimizer)
        mask = sparsifier.masks["weight"].flatten()
        assert int(mask.sum()) == 8
        assert mask[[0, 3, 6, 7]].all()
        came_back = mask[[1, 2, 4, 5]]
        back += int(came_back.sum())
        kept_value = layer.weight.detach().flatten()[[1, 2, 4, 5]][came_back]
        assert torch.equal(kept_value, torch.tensor([-0.1, 0.3, 0.2, -0.4])[came_back])
    assert (back > 0) == regrow


def test_growth_is_uniform():
    """Chi-square over 4 equally likely positions, 600 draws of 1: 99.9 % quantile of 3 degrees of freedom is 16.3."""
    hits = torch.zeros(4)
    layer, optimizer, sparsifier = golden(MASK, WEIGHTS, "set", delta_t=1, drop_fraction=0.125)
    start = sparsifier.state_dict()
    draws = generator(11)
    for _ in range(600):
        sparsifier.load_state_dict({**start, "generator": draws.get_state()})
        sparsifier.apply()
        take_step(layer, optimizer)
        draws.set_state(sparsifier.generator.get_state())
        hits += sparsifier.masks["weight"].flatten()[8:]
    assert hits.sum() == 600
    assert float(((hits - 150) ** 2 / 150).sum()) < 16.3


def test_same_generator_same_masks_whatever_the_global_seed():
    found = []
    for seed in (1, 2):
        torch.random.default_generator.manual_seed(seed)
        layer, optimizer, sparsifier = golden(MASK, WEIGHTS, "set", delta_t=1, drop_fraction=0.5)
        before = torch.random.get_rng_state()
        take_step(layer, optimizer)
        assert torch.equal(torch.random.get_rng_state(), before)
        found.append(copy_masks(sparsifier)["weight"])
    assert torch.equal(*found)


def test_a_nearly_dense_layer_exchanges_no_more_than_it_has_room_for():
    layer, optimizer, sparsifier = golden(
        [1] * 11 + [0], [*WEIGHTS[:8], 0.9, 1.0, 1.1, 0], "set", delta_t=1, drop_fraction=0.9
    )
    take_step(layer, optimizer)
    assert sparsifier.last_update.dropped == {"weight": 1}
    assert sparsifier.masks["weight"].flatten().tolist() == [True, False] + [True] * 10


def test_t_end_stops_the_changes_and_needs_total_steps():
    layer, optimizer, sparsifier = golden(MASK, WEIGHTS, "set", delta_t=1, t_end=0.5, total_steps=4)
    for _ in range(4):
        take_step(layer, optimizer)
    assert sparsifier.updates == 2
    with pytest.raises(ValueError, match="give total_steps"):
        golden(MASK, WEIGHTS, "set", t_end=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_fraction": 1.5}, "drop_fraction must be"),
        ({"delta_t": 0}, "delta_t must be a whole number"),
        ({"delta_t": 2.5}, "delta_t must be a whole number"),
        ({"t_end": 2}, "t_end must be"),
        ({"delta": 3}, "unknown option of method 'set': 'delta'; did you mean 'delta_t'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        golden(MASK, WEIGHTS, "set", **options)
