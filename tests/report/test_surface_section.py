"""Surfaces in the report: found by the digest of the weights, comparable or refused, one picture at a time."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from s2sam.analysis.surface import SurfaceSettings
from s2sam.analysis.surface_file import Surface, load_surface
from s2sam.cli.main import main
from s2sam.report.surface_section import find_surfaces, surface_section
from s2sam.report.write import make_table


def bowl(height, pairs=2, points=7):
    """height (x^2 + y^2) + 0.1, a little higher for the second pair."""
    x = np.linspace(-1, 1, points)
    grid = height * (x[:, None] ** 2 + x**2) + 0.1
    return np.stack([grid * (1 + 0.1 * pair) for pair in range(pairs)])


@pytest.fixture
def runs(make_run):
    folders = [make_run("rigl", sharpness, seed) for sharpness in ("none", "s2sam") for seed in (0, 1)]
    for number, folder in enumerate(folders):
        (folder / "model.safetensors").write_bytes(bytes([number]) * 64)
    return folders


@pytest.fixture
def measured(runs, tmp_path):
    """Surfaces of the second seed of each arm, in a folder as `s2sam surface` leaves it."""
    out = tmp_path / "surface"
    for folder, height in ((runs[1], 1.0), (runs[3], 0.5)):
        write_surface(out, folder, height)
    return out


def write_surface(out, folder, height, done=True, **facts):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    facts = {"classes": 10, "images": 50, "split": "train", "weights_sha256": digest} | facts
    surface = Surface.empty(folder.name, SurfaceSettings(points=7, pairs=2), facts)
    surface.loss, surface.top1 = bowl(height), np.full((2, 7, 7), 0.5)
    surface.done[:] = True
    surface.done[1, 6, 6] = done
    surface.save(out / folder.name / "surface.npz")


def arms_of(runs):
    return [row.arm for row in make_table(runs).rows]


def test_a_surface_is_loaded_as_it_was_saved(runs, measured):
    surface = load_surface(measured / runs[1].name / "surface.npz")
    assert surface.label == runs[1].name and surface.settings == SurfaceSettings(points=7, pairs=2)
    assert np.array_equal(surface.loss, bowl(1.0)) and surface.done.all()
    assert surface.facts["images"] == 50 and "points" not in surface.facts
    again = Surface.empty("x", surface.settings, surface.facts)
    again.resume(measured / runs[1].name / "surface.npz")
    assert np.array_equal(again.loss, surface.loss)


def test_surfaces_belong_to_the_arms_whose_weights_they_have(runs, measured):
    arms = arms_of(runs)
    found = find_surfaces(measured, arms)
    assert {arm.name: s.label for arm, s in found.items()} == {
        "RigL 90 %, SGD": runs[1].name, "RigL 90 %, S2-SAM": runs[3].name,
    }  # fmt: skip
    words = [figure.label for figure in surface_section(found, arms).figures]
    ra = found[arms[0]].summary()["ra_raw_mean"]
    assert words[2] == f"Ra_raw, height of the bowl: RigL 90 %, SGD {ra:.3g}, RigL 90 %, S2-SAM {ra / 2:.3g}"
    assert re.search(r"SGD 1\.\d+ at the end, S2-SAM 0\.\d+ at the end", words[1])


def test_arms_of_a_network_are_shown_at_a_seed_that_all_of_them_have(runs, measured, make_run):
    write_surface(measured, runs[0], 3.0)  # SGD has both seeds now, S2-SAM seed 1 alone
    alone = make_run("static")
    (alone / "model.safetensors").write_bytes(b"alone")
    arms = arms_of([*runs, alone])
    found = find_surfaces(measured, arms)
    assert [surface.label for surface in found.values()] == [runs[1].name, runs[3].name]
    assert "Each run is of training seed 1." in surface_section(found, arms).caption
    write_surface(measured, alone, 2.0)  # another network, which has only seed 0
    found = find_surfaces(measured, arms)
    assert [surface.label for surface in found.values()] == [runs[1].name, runs[3].name, alone.name]
    caption = surface_section(found, arms).caption
    assert "RigL 90 %: training seed 1. Static ERK 90 %: training seed 0." in caption and "different" not in caption


def test_runs_of_different_seeds_are_named(runs, tmp_path):
    for folder in (runs[0], runs[3]):
        write_surface(tmp_path / "mixed", folder, 1.0)
    arms = arms_of(runs)
    caption = surface_section(find_surfaces(tmp_path / "mixed", arms), arms).caption
    assert (
        "RigL 90 %: the runs are of different training seeds (SGD seed 0; S2-SAM seed 1), so what differs between them "
        "may be due to the seed."
    ) in caption


def test_unfinished_surfaces_of_other_runs_are_no_hindrance(runs, measured, make_run):
    other = make_run("static")
    (other / "model.safetensors").write_bytes(b"other")
    write_surface(measured, other, 1.0, done=False)
    assert len(find_surfaces(measured, arms_of(runs))) == 2
    with pytest.raises(ValueError, match=rf"{other.name}.surface\.npz is not finished"):
        find_surfaces(measured, arms_of([*runs, other]))
    write_surface(measured, runs[0], 1.0, done=False)  # of an arm, at a seed that would not be shown
    with pytest.raises(ValueError, match=rf"{runs[0].name}.surface\.npz is not finished"):
        find_surfaces(measured, arms_of(runs))


def test_a_surface_without_a_digest_belongs_to_no_run(runs, measured):
    path = measured / runs[1].name / "surface.npz"
    nameless = load_surface(path)
    del nameless.facts["weights_sha256"]
    nameless.save(path)
    assert [surface.label for surface in find_surfaces(measured, arms_of(runs)).values()] == [runs[3].name]


def test_lines_have_no_grids(runs, tmp_path):
    digest = hashlib.sha256((runs[0] / "model.safetensors").read_bytes()).hexdigest()
    surface = Surface.empty("a", SurfaceSettings(points=7, dims=1), {"classes": 10, "weights_sha256": digest})
    surface.loss, surface.done[:] = np.linspace(-1, 1, 7)[None] ** 2, True
    surface.save(tmp_path / "lines" / "a" / "surface.npz")
    arms = arms_of(runs)
    section = surface_section(find_surfaces(tmp_path / "lines", arms), arms)
    assert len(section.figures) == 3 and not any(figure.wide for figure in section.figures)


def test_what_cannot_stand_together_is_refused(runs, measured, tmp_path, make_run, capsys):
    write_surface(tmp_path / "begun", runs[0], 1.0, done=False)
    write_surface(measured, runs[1], 1.0, images=60)
    foreign = make_run("static")
    (foreign / "model.safetensors").write_bytes(b"other")
    (tmp_path / "empty").mkdir()
    for folder, chosen, sentence in (
        (tmp_path / "empty", runs, "holds no surfaces"),
        (tmp_path / "begun", runs, "is not finished"),
        (measured, [foreign], "was measured at weights that these runs hold now"),
        (measured, runs, "images is 60 in one and 50 in another"),
    ):
        out = tmp_path / "refused.html"
        assert main(["report", *map(str, chosen), "--surfaces", str(folder), "--out", str(out)]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split()) and not out.exists()


def test_damaged_surfaces_are_named(runs, measured):
    path = measured / runs[1].name / "surface.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"surface\.npz is damaged or no surface"):
        find_surfaces(measured, arms_of(runs))


def test_surfaces_of_averaged_weights_join_too(runs, tmp_path):
    for folder in runs:
        (folder / "ema.safetensors").write_bytes(b"average of " + (folder / "model.safetensors").read_bytes())
    for folder in (runs[0], runs[2]):
        digest = hashlib.sha256((folder / "ema.safetensors").read_bytes()).hexdigest()
        write_surface(tmp_path / "ema", folder, 1.0, weights="ema", weights_sha256=digest)
    arms = arms_of(runs)
    found = find_surfaces(tmp_path / "ema", arms)
    assert [surface.label for surface in found.values()] == [runs[0].name, runs[2].name]
    assert "around the averaged weights" in surface_section(found, arms).caption
    write_surface(tmp_path / "ema", runs[0], 1.0, weights="final")  # the same run again, at its final weights
    with pytest.raises(ValueError, match="weights is 'final' in one and 'ema' in another"):
        find_surfaces(tmp_path / "ema", arms)
