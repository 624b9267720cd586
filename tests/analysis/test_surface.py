"""Loss around weights: directions, values against brute force, and weights that come back bit for bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

from s2sam.analysis.filter_directions import filter_direction, movable
from s2sam.analysis.surface import Landscape, SurfaceSettings
from s2sam.train.evaluate import BATCH, evaluate
from s2sam.train.seeding import derive

SMALL = SurfaceSettings(points=5, span=0.5, pairs=2)


@pytest.fixture
def net(make_generator):
    """A small convolutional network with BatchNorm whose statistics are not the initial ones, 2/3 of fc pruned."""
    torch.random.default_generator.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)
    )
    model(torch.randn(64, 1, 4, 4, generator=make_generator(1)))
    mask = torch.rand(3, 16, generator=make_generator(2)) < 1 / 3
    with torch.no_grad():
        model[5].weight.mul_(6.0 * mask)
        model[1].weight.uniform_(0.5, 2.0, generator=make_generator(3))
    return model, {"5.weight": mask}


@pytest.fixture
def images(make_generator):
    x = torch.randn(BATCH + 37, 1, 4, 4, generator=make_generator(4))
    return x, torch.randint(0, 3, (len(x),), generator=make_generator(5))


def plain(x):
    return x


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_filter_is_as_long_as_the_weights_and_stays_on_the_mask(net, make_generator):
    model, masks = net
    weights = movable(model)
    assert list(weights) == ["0.weight", "5.weight"]  # no bias, nothing of BatchNorm
    directions = dict(zip(weights, filter_direction(weights, make_generator(0), masks), strict=True))
    for name, w in weights.items():
        assert torch.allclose(directions[name].flatten(1).norm(dim=1), w.detach().flatten(1).norm(dim=1), rtol=1e-5)
    pruned = directions["5.weight"][~masks["5.weight"]]
    assert pruned.numel() > 20
    assert not pruned.any()
    assert (directions["5.weight"] != 0).sum() == masks["5.weight"].sum()


def test_a_sparse_network_gets_the_noise_of_the_dense_one(net, make_generator):
    model, masks = net
    dense, sparse = (filter_direction(movable(model), make_generator(0), m) for m in (None, masks))
    assert torch.equal(dense[0], sparse[0])
    ratio = (sparse[1] / dense[1])[masks["5.weight"]]
    assert torch.equal(ratio > 0, torch.ones_like(ratio, dtype=torch.bool))
    assert not torch.equal(filter_direction(movable(model), make_generator(1), masks)[0], sparse[0])


def test_a_filter_without_weights_does_not_move_and_a_strange_mask_is_refused(make_generator):
    w = {"w": torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.bfloat16)}
    (d,) = filter_direction(w, make_generator(0), {"w": torch.tensor([[False, False], [True, True]])})
    assert d.dtype == torch.bfloat16
    assert not d[0].any() and d[1].all()
    for mask in ({"v": torch.ones(2, 2, dtype=torch.bool)}, {"w": torch.ones(2, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="fits no weight of the network"):
            filter_direction(w, make_generator(0), mask)


def brute_force(model, masks, x, y, settings, point):
    """The loss at a point, from a copy whose weights are added up one tensor at a time."""
    twin = copy.deepcopy(model).eval()
    weights = movable(twin)
    generator = torch.Generator().manual_seed(derive(settings.seed, f"surface pair {point[0]}"))
    directions = [filter_direction(weights, generator, masks) for _ in point[1:]]
    with torch.no_grad():
        for i, w in enumerate(weights.values()):
            for direction, index in zip(directions, point[1:], strict=True):
                w += (settings.span * (2 * index / (settings.points - 1) - 1)) * direction[i]
        return F.cross_entropy(twin(x).double(), y).item()


@pytest.mark.parametrize("dims", [1, 2])
def test_values_are_the_mean_loss_over_all_images_at_the_displaced_weights(net, images, dims):
    model, masks = net
    settings = SurfaceSettings(points=5, span=0.5, pairs=2, dims=dims, seed=3)
    points = [(0, 0), (1, 4), (0, 2)] if dims == 1 else [(0, 0, 3), (1, 4, 0), (0, 2, 2), (0, 0, 3)]
    with Landscape(model, *images, plain, settings, masks).open() as landscape:
        found = [landscape.at(point)[0] for point in points]
    for point, loss in zip(points, found, strict=True):
        assert loss == pytest.approx(brute_force(model, masks, *images, settings, point), rel=1e-5), point
    assert max(found) - min(found) > 0.01
    assert dims == 1 or found[0] == found[3]  # the order of the points makes no difference


def test_the_centre_is_exactly_the_network_itself(net, images):
    model, masks = net
    with Landscape(model, *images, plain, SMALL, masks).open() as landscape:
        landscape.at((0, 0, 4))
        assert landscape.at((0, 2, 2)) == evaluate(model, *images, plain)
    assert SMALL.coordinates.tolist() == [-0.5, -0.25, 0.0, 0.25, 0.5]


def test_pruned_weights_stay_zero_and_biases_stay_put_in_every_forward(net, images):
    model, masks = net
    bias, seen = model[5].bias.detach().clone(), []

    def look(module, args):
        seen.append(module.weight.detach().clone())
        assert not module.weight[~masks["5.weight"]].any()
        assert torch.equal(module.bias, bias)

    model[5].register_forward_pre_hook(look)
    with Landscape(model, *images, plain, SMALL, masks).open() as landscape:
        for point in [(0, 0, 0), (1, 0, 4)]:
            landscape.at(point)
    assert len(seen) == 4
    assert not torch.equal(seen[0], seen[2])


class Stop(Exception):
    pass


@pytest.mark.parametrize("bn", ["eval", "recalibrated"])
@pytest.mark.parametrize("error", [None, Stop, KeyboardInterrupt, SystemExit])
def test_weights_statistics_and_modes_come_back_bit_for_bit(net, images, bn, error):
    model, masks = net
    model.train()
    model[3].eval()  # modes differ within the network
    before, modes = state(model), [m.training for m in model.modules()]
    places = [t.data_ptr() for t in model.state_dict().values()]
    settings = SurfaceSettings(points=5, bn=bn)
    forwards = []

    def interrupt(module, args):
        forwards.append(same(state(model), before))
        if len(forwards) == 4 and error:
            raise error

    model[5].register_forward_pre_hook(interrupt)
    ended = None
    try:
        with Landscape(model, *images, plain, settings, masks, images[0][:50]).open() as landscape:
            for point in [(0, 0, 0), (0, 4, 1)]:
                landscape.at(point)
    except (Stop, KeyboardInterrupt, SystemExit) as caught:
        ended = type(caught)
    assert ended is error
    assert len(forwards) >= 4 and not any(forwards)
    assert same(state(model), before)
    assert [m.training for m in model.modules()] == modes
    assert [t.data_ptr() for t in model.state_dict().values()] == places
    assert model[1].momentum == 0.1
    with pytest.raises(RuntimeError, match="the landscape is closed"):
        landscape.at((0, 0, 0))


def test_recalibrated_statistics_are_those_of_the_displaced_weights(net, images):
    model, masks = net
    calibration = images[0][:200]
    settings = SurfaceSettings(points=5, bn="recalibrated")
    with Landscape(model, *images, plain, settings, masks, calibration).open() as landscape:
        found = landscape.at((0, 0, 1))[0]
        twin = copy.deepcopy(model)  # at the displaced weights
        assert landscape.at((0, 0, 1))[0] == found
    update_bn([calibration], twin)
    assert found == pytest.approx(evaluate(twin, *images, plain)[0], rel=1e-6)
    with Landscape(model, *images, plain, SurfaceSettings(points=5), masks).open() as landscape:
        assert abs(landscape.at((0, 0, 1))[0] - found) > 1e-3


def test_losses_that_are_not_finite_are_given_as_they_are(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        model[1].weight.fill_(3e38)
    with Landscape(model, *images, plain, SurfaceSettings(points=5)).open() as landscape:
        assert not math.isfinite(landscape.at((0, 0, 0))[0])
    assert (model[1].weight == 3e38).all()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [({"points": 0}, "odd number of points"), ({"points": 20}, "odd number of points"), ({"points": 3}, "at least 5"),
     ({"span": 0.0}, "above 0"), ({"span": -1.0}, "above 0"), ({"span": math.nan}, "above 0"),
     ({"span": math.inf}, "above 0"), ({"pairs": 0}, "at least one pair"), ({"dims": 3}, "1 or 2 dimensions"),
     ({"bn": "evil"}, "did you mean 'eval'"), ({"seed": -1}, "at least 0")],
)  # fmt: skip
def test_impossible_settings_are_refused(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        SurfaceSettings(**given)


def test_what_a_landscape_needs(net, images):
    x, y = images
    bare = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    again = SurfaceSettings(bn="recalibrated")
    for model, x_, y_, settings, sentence in [
        (bare, x[:0], y[:0], SMALL, "needs images"),
        (bare, x, y, again, "no BatchNorm statistics"),
        (net[0], x, y, again, "needs at least 2 calibration images"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            Landscape(model, x_, y_, plain, settings)
    with pytest.raises(ValueError, match="as many as the others, got 1"):
        Landscape(net[0], x[:1], y[:1], plain, again, calibration=x[:1])


def test_a_landscape_that_is_open_is_not_opened_again(net, images):
    model, masks = net
    before = state(model)
    landscape = Landscape(model, *images, plain, SMALL, masks)
    with landscape.open():
        landscape.at((0, 0, 0))
        with pytest.raises(RuntimeError, match="is open already"), landscape.open():
            pass
    assert same(state(model), before)
