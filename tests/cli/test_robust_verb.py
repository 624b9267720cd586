"""`s2sam robust`: what is measured and written, official files, what is refused, and an interrupt."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from s2sam.analysis import robustness_run
from s2sam.analysis.opened import load_common
from s2sam.analysis.robustness_run import RobustSettings, stored
from s2sam.cli.main import main
from s2sam.data.corruption_draws import image_generators
from s2sam.data.corruptions import corrupt
from s2sam.train import TrainConfig, run
from s2sam.train.config import DataConfig

QUICK = ("--corruptions", "fog", "impulse_noise", "--severities", "1", "5", "--images", "60", "--device", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of a sparse arm, a dense run, and one on other images."""
    root = tmp_path_factory.mktemp("robust")
    for name, method, seed in [("rigl-seed0", "rigl", 0), ("rigl-seed1", "rigl", 1), ("dense", "dense", 0)]:
        data = DataConfig(train_size=320)
        run(TrainConfig(epochs=2, method=method, seed=seed, sparsity=0.9, data_options=data, out=str(root / name)))
    shutil.copytree(root / "dense", root / "other")
    env = json.loads((root / "other" / "env.json").read_text())
    (root / "other" / "env.json").write_text(json.dumps({**env, "data_digest": "0" * 64}))
    return root


@pytest.fixture(scope="module")
def official(runs, tmp_path_factory):
    """A CIFAR-C of the digits: the generated fog, as its authors' files would hold it."""
    folder = tmp_path_factory.mktemp("digits-c")
    data = load_common([runs / "dense"])
    rows = range(len(data.test_y))
    blocks = [corrupt(data.test_x, "fog", s, image_generators(0, "fog", s, rows)) for s in range(1, 6)]
    np.save(folder / "fog.npy", torch.cat(blocks).permute(0, 2, 3, 1).numpy())
    np.save(folder / "labels.npy", data.test_y.repeat(5).numpy().astype(np.uint8))
    return folder


def refused(capsys, *argv):
    assert main(["robust", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("s2sam: error: ") and captured.err.count("\n") == 1
    return captured.err


def test_every_run_gets_its_result_and_arms_are_compared(runs, tmp_path, capsys):
    names = ("dense", "rigl-seed0", "rigl-seed1")
    folders = [str(runs / name) for name in names]
    assert main(["robust", *folders, *QUICK, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "robustness.json").read_text())
    assert [row["run"] for row in found] == list(names)
    assert found == [json.loads((runs / name / "robustness-generated.json").read_text()) for name in names]
    for row in found:
        assert row["source"] == "generated" and row["constants"] == "cifar" and row["corruption_seed"] == 0
        assert row["corruptions"] == ["impulse_noise", "fog"] and row["severities"] == [1, 5]
        assert row["images"] == 60 and row["all_images"] == 359 and len(row["corrupted_digest"]) == 64
        assert row["cells"]["fog"]["5"]["top1"] < row["clean"]["top1"] and row["mce_alexnet"] is None
        values = [cell["top1"] for row_ in row["cells"].values() for cell in row_.values()]
        assert row["mean_corruption_accuracy"] == pytest.approx(sum(values) / 4)
    assert found[1]["arm"] == found[2]["arm"] != found[0]["arm"]
    assert len({row["weights_sha256"] for row in found}) == 3
    flat = " ".join(printed.split())
    assert "GENERATED here with the constants of cifar" in flat and "not the official files" in flat
    assert f"{100 * found[0]['mean_corruption_error']:.2f}" in flat and "rigl and dense have other seeds" in flat
    for name in ("accuracy.png", "accuracy.svg", "difference.png", "difference.svg"):
        assert (tmp_path / name).stat().st_size > 1000


def test_the_clean_numbers_are_those_of_eval_and_batches_change_nothing(runs, tmp_path, capsys):
    few = ("--corruptions", "fog", "--severities", "3")
    argv = ["robust", str(runs / "dense"), *few, "--device", "cpu", "--out", str(tmp_path), "--json"]
    assert main([*argv, "--batch-size", "359"]) == 0
    (whole,) = json.loads(capsys.readouterr().out)
    assert main([*argv, "--batch-size", "50"]) == 0
    (parts,) = json.loads(capsys.readouterr().out)
    assert whole["corrupted_digest"] == parts["corrupted_digest"]
    assert whole["cells"]["fog"]["3"]["top1"] == parts["cells"]["fog"]["3"]["top1"]
    assert main(["eval", str(runs / "dense"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert whole["clean"]["top1"] == found["top1"] and whole["clean"]["nll"] == pytest.approx(found["loss"], rel=1e-6)
    assert main([*argv, "--seed", "1"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["corrupted_digest"] != whole["corrupted_digest"]


def test_official_files_hold_what_was_generated(runs, official, tmp_path, capsys):
    argv = ["robust", str(runs / "dense"), "--corruptions", "fog", "--device", "cpu", "--out", str(tmp_path), "--json"]
    assert main(argv) == 0
    (made,) = json.loads(capsys.readouterr().out)
    assert main([*argv, "--source", "official", str(official)]) == 0
    (read,) = json.loads(capsys.readouterr().out)
    assert read["source"] == "official" and read["layout"] == "cifar-c" and "constants" not in read
    assert read["cells"] == made["cells"] and read["corrupted_digest"] == made["corrupted_digest"]
    assert {p.name for p in (runs / "dense").glob("robustness-*.json")} == {
        "robustness-generated.json", "robustness-official.json",
    }  # fmt: skip


def test_stored_results_are_compared_without_measuring(runs, tmp_path, capsys, monkeypatch):
    pair = [str(runs / "rigl-seed0"), str(runs / "rigl-seed1")]
    assert main(["robust", *pair, *QUICK, "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(robustness_run, "measure", None)
    assert main(["robust", *pair, "--read-only", "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "robustness.json").read_text() == (tmp_path / "robustness.json").read_text()
    capsys.readouterr()
    assert "official.json is not there; measure the run" in refused(
        capsys, *pair, "--read-only", "--source", "official", "nowhere", "--out", tmp_path
    )
    other = runs / "rigl-seed1" / "robustness-generated.json"
    other.write_text(other.read_text().replace('"corruption_seed": 0', '"corruption_seed": 4'))
    said = refused(capsys, *pair, "--read-only", "--out", tmp_path)
    assert "corruption_seed is 0 for the first and 4 for the second; measure both in one command" in said


def test_stored_results_of_other_weights_are_not_shown(runs, tmp_path, capsys):
    folders = [shutil.copytree(runs / f"rigl-seed{seed}", tmp_path / f"run{seed}") for seed in (0, 1)]
    assert main(["robust", *map(str, folders), *QUICK, "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    argv = (*folders, "--read-only", "--out", tmp_path / "again")
    path = folders[1] / "robustness-generated.json"
    whole, weights = path.read_text(), folders[1] / "model.safetensors"
    shutil.copy(weights, folders[1] / "ema.safetensors")
    path.write_text(whole.replace('"weights": "final"', '"weights": "ema"'))
    assert "weights is final for the first and ema for the second" in refused(capsys, *argv)
    path.write_text(whole.replace('"arm"', '"arms"'))
    assert "is damaged or no result of" in refused(capsys, *argv)
    path.write_text(whole)
    assert main(["robust", *map(str, argv)]) == 0
    capsys.readouterr()
    shutil.copy(folders[0] / "model.safetensors", weights)
    assert f"{path} was measured at other weights than the run has now" in refused(capsys, *argv)


@pytest.mark.parametrize("option", ["--corruptions=fog", "--severities=3", "--images=20", "--seed=4", "--weights=ema"])
def test_options_of_a_measurement_have_no_effect_on_stored_results(runs, tmp_path, capsys, option):
    said = refused(capsys, runs / "dense", "--read-only", option, "--out", tmp_path / "out")
    assert f"{option.partition('=')[0]} has no effect with --read-only; leave it out" in said
    assert not (tmp_path / "out").exists()


def test_a_stored_result_is_of_the_constants_asked_for_or_of_those_of_the_size(runs, tmp_path):
    folder = shutil.copytree(runs / "dense", tmp_path / "run", ignore=shutil.ignore_patterns("robustness-*"))
    few = ("--corruptions", "brightness", "--severities", "1", "--images", "60", "--device", "cpu")
    assert main(["robust", str(folder), *few, "--out", str(tmp_path / "out")]) == 0
    own = RobustSettings(corruptions=("brightness",), severities=(1,), images=60)
    made, path = json.loads((folder / "robustness-generated.json").read_text()), folder / "robustness-generated.json"
    older = {key: value for key, value in made.items() if key != "image_side"}
    assert made["image_side"] == 8
    for whole in (made, older):
        path.write_text(json.dumps(whole))
        assert stored(folder, own) == stored(folder, replace(own, constants="cifar")) == whole
        assert stored(folder, replace(own, constants="imagenet")) is None
        path.write_text(json.dumps({**whole, "constants": "imagenet"}))
        assert stored(folder, own) is None  # 8 pixels get those of cifar
        assert stored(folder, replace(own, constants="imagenet")) is not None


def test_an_interrupt_leaves_nothing_half_written(runs, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(runs / "dense", tmp_path / "run", ignore=shutil.ignore_patterns("robustness-*"))
    before = sorted(p.name for p in folder.rglob("*"))
    whole, calls = robustness_run.Generated.batches, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(robustness_run.Generated, "batches", interrupted)
    assert main(["robust", str(folder), *QUICK, "--out", str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert sorted(p.name for p in folder.rglob("*")) == before and not [*(tmp_path / "out").iterdir()]


@pytest.mark.parametrize(("argv", "sentence"), [
    (["--source", "generated", "official", "x"], "never mixed in one table; give one --source"),
    (["--source", "generated", "--source", "official", "x"], "never mixed in one table; give one --source"),
    (["--source", "offical", "x"], "--source is `generated` or `official DIR`, not `offical x`"),
    (["--source", "official", "nowhere"], "nowhere holds no corrupted test set"),
    (["--source", "official", "x", "--constants", "cifar"], "leave out --constants"),
    (["--corruptions", "fogg"], "unknown corruption 'fogg'; did you mean 'fog'?"),
    (["--severities", "0"], "a severity is 1, 2, 3, 4 or 5, got 0"),
    (["--constants", "cifr"], "unknown table of constants 'cifr'; did you mean 'cifar'?"),
    (["--images", "0"], "at least one image"), (["--batch-size", "0"], "at least one image"),
    (["--seed", "-1"], "seed must be at least 0"), (["--weights", "ema"], "kept no average"),
])  # fmt: skip
def test_wrong_use_is_one_sentence(runs, tmp_path, capsys, argv, sentence):
    assert sentence in refused(capsys, runs / "dense", "--out", tmp_path / "out", *argv)


def test_runs_that_cannot_be_compared(runs, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "were trained on different images" in refused(capsys, runs / "dense", runs / "other", *out)
    assert "named twice" in refused(capsys, runs / "dense", runs / "dense", *out)
    twin = shutil.copytree(runs / "dense", tmp_path / "twin")
    assert "dense and twin are the same arm and seed" in refused(capsys, runs / "dense", twin, *QUICK, *out)
    (twin / "DONE").unlink()
    assert f"{twin} is not a finished run" in refused(capsys, runs / "dense", twin, *out)
    assert f"{twin} is not a finished run" in refused(capsys, runs / "dense", twin, "--read-only", *out)


def test_damaged_official_files_are_named(runs, official, tmp_path, capsys):
    folder = shutil.copytree(official, tmp_path / "c")
    argv = (runs / "dense", "--source", "official", folder, "--out", tmp_path / "out")
    assert "gaussian_noise.npy is missing" in refused(capsys, *argv)
    (folder / "fog.npy").write_bytes((folder / "fog.npy").read_bytes()[:5000])
    assert "fog.npy is damaged, perhaps truncated" in refused(capsys, *argv, "--corruptions", "fog")
    np.save(folder / "labels.npy", np.zeros(5 * 359, np.uint8))
    assert "does not list the labels of the run's test images" in refused(capsys, *argv, "--corruptions", "fog")
