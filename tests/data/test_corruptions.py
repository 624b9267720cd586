"""The generated corruptions: filters against scipy, kinds by hand, strength, seeds, batches, sizes and refusals."""

from __future__ import annotations

import colorsys
import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from s2sam.data import corruption_kinds as kinds
from s2sam.data.corruption_constants import CONSTANTS
from s2sam.data.corruption_draws import Draws, image_generators
from s2sam.data.corruption_filters import disk_blur, gaussian_blur, motion_blur, sample, zoomed
from s2sam.data.corruptions import CORRUPTIONS, Generated, corrupt, group_of

DRAWS = Draws([], torch.device("cpu"))  #: for kinds that draw nothing
DETERMINISTIC = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
#: their constants are not ordered by the distance to the clean image; see the tests of each below
UNORDERED = ("frost", "glass_blur", "elastic_transform")


def photos(count=24, side=32, channels=3):
    """Smooth images with edges, as photographs have: a gradient, a blob and a dark bar."""
    g = torch.Generator().manual_seed(3)
    y, x = torch.meshgrid(*[torch.linspace(0, 1, side)] * 2, indexing="ij")
    made = []
    for _ in range(count * channels):
        a, b, c, d = torch.rand(4, generator=g).tolist()
        blob = (-((y - a) ** 2 + (x - b) ** 2) / 0.02).exp()
        made.append(0.2 + 0.4 * (c * y + (1 - c) * x) + 0.4 * blob - 0.2 * ((x - d).abs() < 0.12))
    made = torch.stack(made).unflatten(0, (count, channels))
    return (made.clamp(0, 1) * 255).to(torch.uint8)


def corrupted(x, name, severity, *, seed=0, **options):
    return corrupt(x, name, severity, image_generators(seed, name, severity, range(len(x))), **options)


def unit(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ filters against scipy
@pytest.mark.parametrize(("sigma", "rule", "mode", "truncate"), [
    (0.7, "edge", "nearest", 4.0), (1.5, "edge", "nearest", 4.0), (2.0, "symmetric", "reflect", 3.0),
    (30.0, "symmetric", "reflect", 3.0), (0.05, "edge", "nearest", 4.0),
])  # fmt: skip
def test_a_gaussian_blur_is_scipys(sigma, rule, mode, truncate):
    x = unit(2, 3, 12, 17)
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode=mode, truncate=truncate)
    found = gaussian_blur(x, sigma, rule=rule, truncate=truncate)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_a_disk_of_radius_one_is_a_plus_and_its_border_reflects():
    x = unit(2, 1, 9, 8)
    plus = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]]) / 5
    expected = ndimage.correlate(x.numpy(), plus[None, None], mode="mirror")
    torch.testing.assert_close(disk_blur(x, 1.0, 0.01), torch.from_numpy(expected), rtol=0, atol=1e-12)
    near = np.exp(-0.5 * (np.array([-1, 0, 1]) / 0.4) ** 2)
    near /= near.sum()  # a disk of one pixel with a soft edge is that edge
    expected = ndimage.correlate(x.numpy(), np.outer(near, near)[None, None], mode="mirror")
    torch.testing.assert_close(disk_blur(x, 0.3, 0.4), torch.from_numpy(expected), rtol=0, atol=1e-12)
    wide = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    wide[..., 20, 20] = 1
    assert int((disk_blur(wide, 10.0, 0.01) > 1e-9).sum()) == 317  # points of the plane within 10 of the origin


@pytest.mark.parametrize("factor", [1.0, 1.06, 1.25, 1.75, 3.0])
def test_a_zoom_is_scipys(factor):
    x = unit(1, 2, 32, 32)
    cut = int(np.ceil(32 / factor))
    top = (32 - cut) // 2
    big = ndimage.zoom(x[0, :, top : top + cut, top : top + cut].numpy(), (1, factor, factor), order=1)
    trim = (big.shape[1] - 32) // 2
    expected = torch.from_numpy(big[:, trim : trim + 32, trim : trim + 32])[None]
    torch.testing.assert_close(zoomed(x, factor), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rule", "mode"), [("reflect", "mirror"), ("symmetric", "reflect"), ("edge", "nearest")])
def test_sampling_between_pixels_is_scipys(rule, mode):
    x = unit(2, 1, 7, 9)
    down, right = 20 * unit(2, 7, 9, seed=1) - 6, 24 * unit(2, 7, 9, seed=2) - 8
    found = sample(x, down, right, rule)
    for i in range(2):
        expected = ndimage.map_coordinates(x[i, 0].numpy(), [down[i].numpy(), right[i].numpy()], order=1, mode=mode)
        torch.testing.assert_close(found[i, 0], torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_motion_by_hand():
    x = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    x[:, :, 2, 2] = 1.0
    k = np.exp(-0.5 * np.arange(3) ** 2)
    k /= k.sum()
    along, across = motion_blur(x, 1, 1.0, torch.tensor([0.0, -90.0]))[:, 0]
    # y(p) = sum k_i x(p + o_i): a bright pixel leaves its trace where p + o_i hits it
    np.testing.assert_allclose(along[2].numpy(), [k[2], k[1], k[0], 0, 0], atol=1e-15)
    assert float(along.sum()) == pytest.approx(1.0) == float(across.sum())
    np.testing.assert_allclose(across[:, 2].numpy(), [0, 0, k[0], k[1], k[2]], atol=1e-15)
    assert torch.allclose(motion_blur(torch.ones(1, 1, 4, 4), 6, 2.0, torch.tensor([30.0])), torch.ones(1, 1, 4, 4))


# -------------------------------------------------------------------------------------------------------- kinds by hand
def test_brightness_adds_to_the_value_of_hsv():
    x = unit(1, 3, 4, 4)
    x[0, :, 0, 0] = 0.0
    found = kinds.brightness(x, 0.2, DRAWS)
    for h in range(4):
        for w in range(4):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[0, :, h, w].tolist())
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.2, 1.0))
            np.testing.assert_allclose(found[0, :, h, w].numpy(), expected, atol=1e-12)


def test_contrast_and_fog_by_hand(monkeypatch):
    x = torch.tensor([[0.2, 0.4], [0.6, 0.8]], dtype=torch.float64).reshape(1, 1, 2, 2)
    np.testing.assert_allclose(kinds.contrast(x, 0.5, DRAWS).flatten(), [0.35, 0.45, 0.55, 0.65])
    monkeypatch.setattr(kinds, "plasma", lambda x, decay, draws: torch.full_like(x, 0.5))
    np.testing.assert_allclose(kinds.fog(x, (1.2, 3.0), DRAWS).flatten(), [0.32, 0.4, 0.48, 0.56])


class Listed:
    """Draws that are given."""

    def __init__(self, *values):
        self.values = torch.tensor([values], dtype=torch.float64)

    def uniform(self, *shape, low=0.0, high=1.0):
        return self.values[:, : shape[0]]


def test_plasma_by_hand():
    # heights: corner 0, middle u0, right (2 u0) / 4 + u1, below (2 u0) / 4 + u2, in units of 100^2
    found = kinds.plasma(torch.zeros(1, 1, 2, 2), 2.0, Listed(0.4, -0.1, 0.6, 9.0))
    np.testing.assert_allclose(found[0, 0], np.array([[0.0, 0.1], [0.8, 0.4]]) / 0.8, atol=1e-12)
    # the next level moves 1 / decay^2 as much: (0 + 1/2 + 1/2 + 1) / 4 + 1 / 4
    found = kinds.plasma(torch.zeros(1, 1, 4, 4), 2.0, Listed(1.0, 0.0, 0.0, 1.0, *[0.0] * 12))
    np.testing.assert_allclose(found[0, 0, [0, 0, 2, 2, 1], [0, 2, 0, 2, 1]], [0, 0.5, 0.5, 1, 0.75], atol=1e-12)


def test_plasma_with_more_decay_is_smoother():
    def steps(decay):
        field = kinds.plasma(torch.zeros(8, 1, 32, 32), decay, Draws(image_generators(0, "fog", 1, range(8)), "cpu"))
        assert float(field.amin()) == 0.0 and float(field.amax()) == 1.0
        return float(field.diff(dim=2).abs().mean())

    assert steps(3.0) < 0.9 * steps(2.0) and steps(2.0) < 0.9 * steps(1.4)


def test_glass_copies_from_pixels_above_and_left():
    x = torch.arange(64, dtype=torch.float64).reshape(1, 1, 8, 8).repeat(50, 1, 1, 1) * 3 / 255
    found = kinds.glass_blur(x, (0.01, 1, 1), Draws(image_generators(0, "glass_blur", 1, range(50)), "cpu"))
    source = (found * 255 / 3).round().long()
    down, right = source[:, 0] // 8, source[:, 0] % 8
    rows, columns = torch.arange(8)[None, :, None], torch.arange(8)[None, None, :]
    inside = (rows >= 2) & (columns >= 2)
    assert bool(((rows - down) * inside).unique().tolist() == [0, 1])
    assert bool(((columns - right) * inside).unique().tolist() == [0, 1])
    assert torch.equal(found * ~inside, x * ~inside)
    moved = ((down != rows) | (right != columns)).double().mul(inside).sum() / inside.sum() / 50
    assert 0.65 < float(moved) < 0.85  # three of four


def test_noise_has_the_strength_of_its_constant():
    x = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    assert float(corrupted(x, "gaussian_noise", 5).float().std()) == pytest.approx(0.10 * 255, rel=0.03)
    shot = corrupted(x, "shot_noise", 5).float()
    assert float(shot.std()) == pytest.approx(255 * (128 / 255 / 50) ** 0.5, rel=0.03)
    assert float(shot.mean()) == pytest.approx(128, abs=1.0)
    impulse = corrupted(x, "impulse_noise", 5)
    assert float((impulse != 128).float().mean()) == pytest.approx(0.07, rel=0.1)
    assert impulse[impulse != 128].unique().tolist() == [0, 255]
    assert float((impulse == 255).float().mean()) == pytest.approx(0.035, rel=0.15)
    coarse = corrupted(x, "gaussian_noise", 5, constants="imagenet").float()
    assert float(coarse.std()) == pytest.approx(81, abs=6)  # 0.38 of 255, cut off at black and white


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_jpeg_and_pixelate_are_pillows(channels):
    x = photos(3, 32, channels)
    for i in range(3):
        whole = x[i].permute(1, 2, 0).numpy()
        planes = [whole] if channels == 3 else [whole[:, :, c] for c in range(channels)]
        for name, change in [("jpeg_compression", through_jpeg), ("pixelate", through_box)]:
            expected = np.stack([np.asarray(change(Image.fromarray(plane))) for plane in planes], axis=-1)
            expected = expected.reshape(32, 32, channels)
            assert np.array_equal(corrupted(x, name, 4)[i].permute(1, 2, 0).numpy(), expected)


def through_jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer)


def through_box(image):
    return image.resize((24, 24), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)


def test_snow_pales_and_adds_flakes():
    x = photos()
    whiter = corrupted(x, "snow", 5).float().mean() - x.float().mean()
    assert float(whiter) > 20
    grey = kinds.grey(torch.tensor([1.0, 0.5, 0.25]).reshape(1, 3, 1, 1))
    assert float(grey) == pytest.approx(0.299 + 0.587 / 2 + 0.114 / 4)


# --------------------------------------------------------------------------------------- strength, seeds, batches, size
@pytest.mark.parametrize("table", ["cifar", "tiny-imagenet"])
@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in UNORDERED])
def test_a_higher_severity_is_farther_from_the_clean_image(name, table):
    x = photos()
    far = [float((corrupted(x, name, s, constants=table).float() - x.float()).abs().mean()) for s in range(1, 6)]
    assert far[0] > 0
    assert all(b > 0.97 * a for a, b in itertools.pairwise(far)), far  # of motion blur two are equal
    assert far[-1] > 1.2 * far[0]


def test_frost_hides_more_of_the_image_though_it_darkens_it():
    x = photos().float()
    alike = []
    for severity in range(1, 6):
        y = corrupted(photos(), "frost", severity).float()
        both = [v.flatten(1) - v.flatten(1).mean(dim=1, keepdim=True) for v in (x, y)]
        alike.append(float(torch.nn.functional.cosine_similarity(*both).mean()))
    assert all(b < a for a, b in itertools.pairwise(alike)), alike


def test_elastic_bends_more_at_higher_severities():
    plane = torch.arange(32, dtype=torch.float64).expand(8, 1, 32, 32)

    def bends(severity):  # second differences of a plane, which an affine map keeps a plane
        draws = Draws(image_generators(0, "elastic_transform", severity, range(8)), torch.device("cpu"))
        moved = kinds.elastic_transform(plane, CONSTANTS["cifar"]["elastic_transform"][severity - 1], draws)
        assert float((moved - plane).abs().mean()) > 0.5
        return float(moved[:, :, 10:-10, 10:-10].diff(n=2, dim=3).abs().mean())

    found = [bends(severity) for severity in range(1, 6)]
    assert found[0] < 1e-9
    assert all(b > a for a, b in itertools.pairwise(found)), found


def test_glass_is_ordered_by_its_shuffles():
    x = photos()
    far = [float((corrupted(x, "glass_blur", s).float() - x.float()).abs().mean()) for s in range(1, 6)]
    assert max(far[:3]) < min(far[3:])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_the_same_in_every_batch_and_of_every_seed_its_own(name):
    x = photos(7)
    whole = corrupted(x, name, 3)
    source = Generated(x)
    parts = torch.cat([*source.batches(name, 3, torch.tensor([4, 5, 6, 0]), 3)])
    assert torch.equal(parts, whole[[4, 5, 6, 0]])
    assert torch.equal(corrupted(x, name, 3), whole) and not torch.equal(x, whole)
    assert torch.equal(corrupted(x, name, 3, seed=1), whole) == (name in DETERMINISTIC)
    twins = corrupted(x[:1].repeat(2, 1, 1, 1), name, 3)
    assert torch.equal(twins[0], twins[1]) == (name in DETERMINISTIC)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 3, 64, 64), (2, 2, 9, 12)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_size_and_number_of_channels(name, shape):
    x = photos(shape[0], max(shape[2:]), shape[1])[:, :, : shape[2], : shape[3]]
    for table in CONSTANTS:
        y = corrupted(x, name, 5, constants=table)
        assert y.shape == x.shape and y.dtype == torch.uint8 and not torch.equal(x, y)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "glass_blur"])  # a slow loop over pixels
def test_224_pixels_take_the_constants_of_imagenet(name):
    x = photos(1, 224)
    y = corrupted(x, name, 5)
    assert torch.equal(y, corrupted(x, name, 5, constants="imagenet"))
    if name not in ("zoom_blur", "pixelate", "elastic_transform", "frost", "fog", "jpeg_compression", "snow"):
        milder = corrupted(x, name, 5, constants="cifar").float()
        assert float((y.float() - x).abs().mean()) > float((milder - x).abs().mean())


def test_the_tables_are_complete_and_the_groups_those_of_the_paper():
    assert len(CORRUPTIONS) == 15 and all(set(table) == set(CORRUPTIONS) for table in CONSTANTS.values())
    assert all(len(row) == 5 for table in CONSTANTS.values() for row in table.values())
    assert [group_of(name) for name in CORRUPTIONS] == ["noise"] * 3 + ["blur"] * 4 + ["weather"] * 4 + ["digital"] * 4
    assert Generated(photos(1)).facts["constants"] == "cifar"
    assert "not the official files" in str(Generated(photos(1)).facts["made_by"])


@pytest.mark.parametrize(("change", "sentence"), [
    ({"name": "fogg"}, "unknown corruption 'fogg'; did you mean 'fog'"),
    ({"severity": 6}, "a severity is 1, 2, 3, 4 or 5, got 6"),
    ({"constants": "imagnet"}, "unknown table of constants 'imagnet'; did you mean 'imagenet'"),
    ({"x": torch.zeros(1, 3, 8, 8)}, "must be uint8"),
    ({"count": 2}, "each image needs a generator, but there are 1 and 2"),
])  # fmt: skip
def test_refusals(change, sentence):
    given = {"name": "fog", "severity": 1, "constants": "cifar", "x": photos(1), "count": 1, **change}
    generators = image_generators(0, "fog", 1, range(given["count"]))
    with pytest.raises(ValueError, match=sentence):
        corrupt(given["x"], given["name"], given["severity"], generators, constants=given["constants"])


def test_no_images_stay_no_images():
    assert corrupt(photos(1)[:0], "fog", 1, []).shape == (0, 3, 32, 32)
