"""surface.npz: begun, interrupted, continued, refused; and points from several processes."""

from __future__ import annotations

import json
import math
import multiprocessing

import numpy as np
import pytest
import torch
from torch import nn

from s2sam.analysis.surface import Landscape, SurfaceSettings
from s2sam.analysis.surface_file import Surface
from s2sam.analysis.surface_run import measure
from s2sam.data.augment import Augment

SETTINGS = SurfaceSettings(points=5, pairs=2, seed=4)
FACTS = {"classes": 3, "images": 30, "weights_sha256": "0"}


@pytest.fixture
def landscape(make_generator):
    torch.random.default_generator.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8, generator=make_generator(4))
    y = torch.randint(0, 3, (30,), generator=make_generator(5))
    return Landscape(model, x, y, Augment(torch.tensor([0.5]), torch.tensor([0.25]), "none"), SETTINGS)


def empty(settings=SETTINGS, **facts):
    return Surface.empty("run", settings, {**FACTS, **facts})


@pytest.fixture
def whole(landscape, tmp_path):
    return measure(landscape, empty(), tmp_path / "whole.npz")


def test_every_point_is_measured_once_and_stored(landscape, whole, tmp_path):
    counts = []
    again = measure(landscape, empty(), tmp_path / "new" / "folder" / "surface.npz", on_point=counts.append)
    assert counts == list(range(51))
    assert np.array_equal(again.loss, whole.loss) and np.isfinite(whole.loss).all()
    assert len(np.unique(whole.loss)) == 49  # the centre belongs to both grids
    assert not np.array_equal(whole.loss[0], whole.loss[1])
    with np.load(tmp_path / "whole.npz", allow_pickle=False) as stored:
        assert np.array_equal(stored["loss"], whole.loss) and np.array_equal(stored["top1"], whole.top1)
        assert stored["coordinates"].tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
        settings = json.loads(str(stored["settings"]))
    assert settings.items() >= {**FACTS, "points": 5, "pairs": 2, "seed": 4, "normalisation": "filter"}.items()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_was_interrupted_goes_on_from_there(landscape, whole, tmp_path, error, monkeypatch):
    path = tmp_path / "surface.npz"
    before = [p.detach().clone() for p in landscape.model.parameters()]

    def stop(done):
        if done == 17:
            raise error

    with pytest.raises(error):
        measure(landscape, empty(), path, on_point=stop)
    assert all(torch.equal(a, b) for a, b in zip(landscape.model.parameters(), before, strict=True))
    begun = empty()
    begun.resume(path)
    assert begun.done.sum() == 17
    with pytest.raises(ValueError, match="is not finished"):
        begun.summary()

    asked, at = [], Landscape.at
    monkeypatch.setattr(Landscape, "at", lambda self, point: (asked.append(point), at(self, point))[1])
    resumed = measure(landscape, empty(), path)
    assert len(asked) == 50 - 17
    assert np.array_equal(resumed.loss, whole.loss)
    measure(landscape, empty(), path)
    assert len(asked) == 50 - 17


def test_a_file_of_other_settings_is_refused_and_left_alone(landscape, whole, tmp_path):
    path = tmp_path / "whole.npz"
    stored = path.read_bytes()
    for other, name in [
        (empty(SurfaceSettings(points=7, pairs=2, seed=4)), "points 5, not 7"),
        (empty(SurfaceSettings(points=5, pairs=2, seed=4, span=0.5)), "span 1.0, not 0.5"),
        (empty(weights_sha256="1"), "weights_sha256 '0', not '1'"),
        (empty(more=1), "more None, not 1"),
    ]:
        with pytest.raises(ValueError, match=f"was made with {name}; give another --out"):
            measure(landscape, other, path)
    assert path.read_bytes() == stored


def test_a_damaged_file_is_refused(landscape, whole, tmp_path):
    path = tmp_path / "whole.npz"
    stored = path.read_bytes()
    other = tmp_path / "other.npz"
    np.savez(other, loss=np.zeros(3))
    for content in (b"", b"not an archive", stored[:-100], stored[:200], other.read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged or no surface \(.+\); delete it"):
            measure(landscape, empty(), path)


def test_losses_that_are_not_finite_are_stored_and_counted(landscape, tmp_path, monkeypatch):
    wild = {(0, 0, 0): math.nan, (1, 4, 4): math.inf}
    at = Landscape.at
    monkeypatch.setattr(Landscape, "at", lambda self, p: (wild[p], 0.0) if p in wild else at(self, p))
    surface = measure(landscape, empty(), tmp_path / "surface.npz")
    again = empty()
    again.resume(tmp_path / "surface.npz")
    assert math.isnan(again.loss[0, 0, 0]) and math.isinf(again.loss[1, 4, 4])
    assert not again.todo()
    found = surface.summary()
    assert (found["not_finite"], found["clipped"]) == (2, 2)
    assert len(found["ra_raw"]) == 2 and found["ra_raw_spread"] > 0
    assert found["largest_loss"] == np.nanmax(np.where(np.isinf(surface.loss), np.nan, surface.loss))


def test_two_processes_measure_the_same_and_end_with_an_interrupt(landscape, whole, tmp_path):
    def stop(done):
        if done == 20:
            raise KeyboardInterrupt

    path = tmp_path / "surface.npz"
    with pytest.raises(KeyboardInterrupt):
        measure(landscape, empty(), path, jobs=2, on_point=stop)
    assert not multiprocessing.active_children()
    begun = empty()
    begun.resume(path)
    assert begun.done.sum() == 20
    assert np.allclose(begun.loss[begun.done], whole.loss[begun.done], rtol=1e-6)


def test_the_lines_through_the_centre_are_the_profiles(whole):
    profiles = whole.profiles()
    assert profiles.shape == (4, 5)
    assert np.array_equal(profiles[0], whole.loss[0, :, 2]) and np.array_equal(profiles[3], whole.loss[1, 2, :])
    assert (profiles[:, 2] == whole.centre[0]).all()
