"""`s2sam surface`: files, figures on one scale, the printed Ra, and refusals."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest

from s2sam.analysis.roughness import ra_detrended, ra_raw
from s2sam.analysis.surface import Landscape, SurfaceSettings
from s2sam.analysis.surface_file import Surface
from s2sam.cli import surface
from s2sam.cli.main import main
from s2sam.report.surface_plots import ceiling, cut_points, draw_profiles, draw_surfaces

QUICK = ("--points", "5", "--pairs", "2", "--images", "40", "--device", "cpu")


@pytest.fixture(scope="module")
def measured(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert main(["surface", str(runs / "dense"), str(runs / "rigl"), *QUICK, "--out", str(out)]) == 0
    return out


def refused(capsys, *argv):
    assert main(["surface", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("s2sam: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_grids_numbers_and_figures_are_written(runs, measured, capsys, monkeypatch):
    found = json.loads((measured / "surfaces.json").read_text())
    assert [row["run"] for row in found] == ["dense", "rigl"]
    assert (found[0]["masked_weights"], found[1]["masked_weights"] > 1000) == (0, True)
    for row in found:
        with np.load(measured / row["run"] / "surface.npz") as stored:
            loss = stored["loss"]
        assert loss.shape == (2, 5, 5)
        assert row["ra_raw"] == [ra_raw(z) for z in loss] and row["ra_detrended"] == [ra_detrended(z) for z in loss]
        assert row["loss"] == loss[0, 2, 2] == loss[1, 2, 2]
        assert row["images"] == 40 and len(row["data_digest"]) == 64
    for name in ("surfaces", "profiles"):
        assert (measured / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        drawn = (measured / f"{name}.svg").read_text()
        assert "dense" in drawn and "rigl" in drawn

    monkeypatch.setattr(Landscape, "at", None)  # nothing is measured a second time
    assert main(["surface", str(runs / "dense"), str(runs / "rigl"), *QUICK, "--out", str(measured)]) == 0
    printed = capsys.readouterr().out
    flat = " ".join(printed.split())
    mean, spread = found[0]["ra_raw_mean"], found[0]["ra_raw_spread"]
    assert f"{mean:.3g} +- {spread:.2g}" in flat
    assert (
        "5 points a side from -1 to 1" in flat
        and "40 of 200 train images" in flat
        and found[0]["data_digest"][:12] in flat
    )
    assert "is not finished" not in flat and str(measured / "surfaces.png") in printed


def test_the_centre_is_what_eval_says(runs, tmp_path, capsys):
    argv = [str(runs / "rigl"), "--dims", "1", "--points", "5", "--pairs", "1", "--images", "all", "--split", "test"]
    assert main(["surface", *argv, "--out", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert main(["eval", str(runs / "rigl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (row["loss"], row["top1"], row["images"]) == (found["loss"], found["top1"], 359)
    assert row["ra_raw_spread"] is None
    assert not (tmp_path / "surfaces.png").exists() and (tmp_path / "profiles.png").exists()


def test_statistics_estimated_anew_give_another_surface(runs, measured, tmp_path, capsys):
    argv = ["surface", str(runs / "rigl"), *QUICK, "--dims", "1", "--out", str(tmp_path), "--json", "--bn"]
    assert main([*argv, "recalibrated"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    plain = json.loads((measured / "surfaces.json").read_text())[1]
    assert row["calibration_images"] == 40 and plain["calibration_images"] == 0
    assert abs(row["loss"] - plain["loss"]) > 1e-3
    assert main([*argv, "eval"]) == 2
    assert "was made with bn 'recalibrated', not 'eval'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [(["--points", "0"], "odd number of points"), (["--span", "-1"], "span of a grid must be above 0"),
     (["--pairs", "0"], "at least one pair"), (["--images", "0"], "at least one image"), (["--jobs", "0"], "--jobs"),
     (["--images", "x"], "invalid images value: 'x'"), (["--split", "tset"], "invalid choice: 'tset'"),
     (["--weights", "ema"], "kept no average"), (["--seed", "-3"], "seed must be at least 0")],
)  # fmt: skip
def test_wrong_use_is_one_sentence(runs, tmp_path, capsys, argv, sentence):
    assert sentence in refused(capsys, runs / "dense", "--out", tmp_path, *argv)


def test_runs_that_cannot_be_compared(runs, tmp_path, capsys):
    assert "were trained on different images" in refused(capsys, runs / "dense", runs / "other", "--out", tmp_path)
    assert "is named twice" in refused(capsys, runs / "dense", runs / "dense", "--out", tmp_path)
    begun = shutil.copytree(runs / "dense", tmp_path / "begun")
    (begun / "DONE").unlink()
    assert f"{begun} is not a finished run" in refused(capsys, runs / "dense", begun, "--out", tmp_path)
    (begun / "DONE").touch()
    (begun / "masks.safetensors").write_bytes(b"no")
    assert "masks.safetensors is torn; train the run again" in refused(capsys, begun, "--out", tmp_path)


FOUND = [
    {
        "run": name, "not_finite": bad, "points": 7, "span": 1.0, "pairs": 1, "dims": 2, "bn": "eval", "images": 3,
        "all_images": 5, "split": "train", "data_digest": "0", "weights": "final", "seed": 0,
    }
    for name, bad in [("low", 0), ("wild", 2)]
]  # fmt: skip


def made(label, height, **wild):
    settings = SurfaceSettings(points=7)
    found = Surface.empty(label, settings, {"classes": 3})
    a, b = np.meshgrid(settings.coordinates, settings.coordinates, indexing="ij")
    found.loss[:], found.done[:] = height * (a**2 + b**2), True
    for index, value in wild.items():
        found.loss[0, int(index[1:]), 0] = value
    return found


def test_the_axis_ends_where_losses_mean_nothing(tmp_path):
    low, high = made("low", 0.5), made("high", 1.0)
    assert ceiling([low, high]) == 2.0
    assert cut_points([low, high]) == {}
    wild = made("wild", 1.0, p0=math.nan, p1=math.inf, p2=1e30)
    assert ceiling([low, wild]) == pytest.approx(10 * math.log(3))
    assert cut_points([low, wild]) == {"wild": 3}
    flat = made("flat", 0.0)
    assert len(draw_surfaces([flat], tmp_path / "flat")) == len(draw_profiles([low, wild], tmp_path / "lines")) == 2
    draw_surfaces([low, wild], tmp_path / "wild")
    assert "cut off at 11" in (tmp_path / "wild.svg").read_text()
    assert "cut off" not in (tmp_path / "flat.svg").read_text()
    assert math.isnan(wild.loss[0, 0, 0])
    notes = surface.notes([low, wild], FOUND, cut_points([low, wild]))
    assert notes[-2:] == [
        "wild: 2 losses are not finite; Ra takes the largest finite one of their grid instead",
        "wild: 3 of 49 points lie above the end of the figures' axis",
    ]


def test_both_runs_are_drawn_on_one_scale(tmp_path, monkeypatch):
    from mpl_toolkits.mplot3d import Axes3D

    limits, draw = [], Axes3D.plot_surface
    monkeypatch.setattr(
        Axes3D, "plot_surface", lambda self, *a, **k: (limits.append((k["vmin"], k["vmax"])), draw(self, *a, **k))[1]
    )
    draw_surfaces([made(f"{i}", 0.2 + i) for i in range(2)], tmp_path / "s")
    assert limits == [(0.0, pytest.approx(2.4))] * 2
    drawn = (tmp_path / "s.svg").read_text()
    assert re.search(r"\d{4}-\d\d-\d\dT", drawn) is None  # no date: the same grids give the same file
