"""`s2sam sharpness`: the records, the table, what is said and what is not, refusals, Ctrl-C; and --premise."""

from __future__ import annotations

import json
import math
import re
import shutil

import pytest
import torch

from s2sam.analysis import sharpness_run
from s2sam.cli.main import main
from s2sam.train import TrainConfig, run
from s2sam.train.config import DataConfig

QUICK = (
    "--images", "40", "--steps", "2", "--draws", "2", "--eigenvalues", "1", "--queries", "6", "--probes", "1",
    "--density-steps", "4", "--group", "16", "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def measured(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert main(["sharpness", str(runs / "dense"), str(runs / "rigl"), *QUICK, "--out", str(out)]) == 0
    return out


@pytest.fixture
def undrawn(monkeypatch):
    """No figures, which cost more than the measures."""
    for name in ("draw_bars", "draw_densities"):
        monkeypatch.setattr(f"s2sam.report.sharpness_plots.{name}", lambda records, stem: [])


def refused(capsys, *argv):
    assert main(["sharpness", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("s2sam: error: ") and captured.err.count("\n") == 1
    return captured.err


def numbers(value, path=""):
    """All numbers in a record, by where they stand."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {k: v for key, part in items for k, v in numbers(part, f"{path}.{key}").items()}
    return found | ({path: value} if isinstance(value, int | float) else {})


def test_records_and_figures_are_written(runs, measured):
    found = json.loads((measured / "sharpness.json").read_text())
    assert [row["run"] for row in found] == ["dense", "rigl"]
    assert found == [json.loads((runs / name / "sharpness.json").read_text()) for name in ("dense", "rigl")]
    dense, sparse = found
    assert dense["active_weights"] == dense["parameters"] == sparse["parameters"]
    assert sparse["active_weights"] < 0.3 * sparse["parameters"]
    for row in found:
        assert row["train_loss"] == row["loss"] and row["images"] == row["train_images"] == 40
        assert row["settings"]["bn"] == "eval" and row["settings"]["rho"] == 0.05
        assert len(row["data_digest"]) == len(row["weights_sha256"]) == 64
        assert row["worst"]["value"] >= row["worst"]["one_step"] > 0
        assert row["lambda_max"]["value"] > 0 and row["trace"]["queries"] == 6
    for name in ("sharpness", "density"):
        assert (measured / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "dense" in (measured / f"{name}.svg").read_text()


def test_the_loss_is_that_of_eval_and_train_loss_is_there_on_any_split(runs, tmp_path, capsys, undrawn):
    argv = [str(runs / "rigl"), *QUICK, "--images", "all", "--split", "test", "--bn", "eval", "--probes", "0"]
    assert main(["sharpness", *argv, "--out", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert main(["eval", str(runs / "rigl"), "--json"]) == 0
    assert row["loss"] == pytest.approx(json.loads(capsys.readouterr().out)["loss"], rel=1e-6)
    assert main(["eval", str(runs / "rigl"), "--json", "--split", "train"]) == 0
    assert row["train_loss"] == pytest.approx(json.loads(capsys.readouterr().out)["loss"], rel=1e-6)
    assert row["density"] is None


@pytest.mark.distributed
@pytest.mark.timeout(300)  # three imports of torch, on a machine that may be busy
def test_two_processes_find_what_one_finds(runs, tmp_path, capsys, undrawn):
    argv = [str(runs / "rigl"), *QUICK, "--batch", "15", "--split", "test", "--precision", "fp64"]
    argv += ["--json", "--out", str(tmp_path)]
    found = []
    for jobs in ("1", "2"):
        assert main(["sharpness", *argv, "--jobs", jobs]) == 0
        captured = capsys.readouterr()
        assert re.fullmatch(r"rigl: \d+ passes\n.*", captured.err, re.DOTALL)  # what the first rank tells arrives
        found += json.loads(captured.out)
    one, two = found
    assert (one.pop("ranks"), two.pop("ranks")) == (1, 2)
    assert numbers(two) == pytest.approx(numbers(one), rel=1e-6, abs=1e-9)
    assert one["lambda_max"]["converged"] and one["trace"]["value"] > 0
    assert two["passes"] == one["passes"] and two["train_loss"] != two["loss"]


def test_runs_are_ranked_in_words_at_matched_train_loss_only(runs, tmp_path, capsys, undrawn):
    argv = ["sharpness", str(runs / "dense"), str(runs / "rigl"), *QUICK, "--out", str(tmp_path), "--tolerance"]
    assert main([*argv, "0.0"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "train losses do not match" in printed and "0 % is the tolerance" in printed
    assert "lowest first" not in printed and "flattest" not in printed
    assert main([*argv, "1.0"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "train losses match" in printed and "flattest" in printed
    assert "40 of 200 train images, not augmented" in printed


def test_a_train_loss_that_is_not_finite_is_saved_as_null_and_said(measured, runs, tmp_path, capsys, monkeypatch):
    stored = {row["run"]: row for row in json.loads((measured / "sharpness.json").read_text())}
    folders = [shutil.copytree(runs / name, tmp_path / name) for name in ("dense", "rigl")]
    stored["rigl"] |= {"train_loss": math.inf, "split": "test"}
    monkeypatch.setattr(sharpness_run, "measure_run", lambda folder, *_, label, **__: stored[label])
    argv = ["sharpness", *map(str, folders), "--out", str(tmp_path / "out"), "--tolerance", "1"]
    assert main(argv) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "no finite train loss was measured of rigl" in printed and "flattest" not in printed
    own, joint = (
        json.loads((folder / "sharpness.json").read_text(), parse_constant=pytest.fail)
        for folder in (folders[1], tmp_path / "out")
    )
    assert own["train_loss"] is None and own == joint[1]
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)[1]["train_loss"] is None


def test_what_did_not_converge_is_marked(runs, tmp_path, capsys, undrawn):
    assert main(["sharpness", str(runs / "rigl"), *QUICK, "--max-steps", "2", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = json.loads((runs / "rigl" / "sharpness.json").read_text())
    assert row["lambda_max"]["converged"] is False
    for name, sign in [
        ("lambda_max ", ">="), ("lambda_min", "<="), ("lambda_max ||w||^2", ">="), ("c lambda_max", ">="),
    ]:  # fmt: skip
        (line,) = [line for line in lines if line.startswith(name) and not line.startswith(f"{name}||")]
        assert f" {sign} " in line and line.rstrip().endswith("?")
    assert "the largest eigenvalue of rigl did not converge" in " ".join(" ".join(lines).split())


def test_ctrl_c_leaves_runs_and_files_whole(runs, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(runs / "rigl", tmp_path / "run")
    (folder / "sharpness.json").write_text("[]")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    original = sharpness_run.measure

    def interrupted(loss, settings, *, on_pass):
        def stop(done):
            if done > 20:
                raise KeyboardInterrupt

        return original(loss, settings, on_pass=stop)

    monkeypatch.setattr(sharpness_run, "measure", interrupted)
    assert main(["sharpness", str(folder), *QUICK, "--out", str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [(["--rho", "0"], "rho must be above 0"), (["--jobs", "0"], "--jobs must be at least 1"),
     (["--premise", "--jobs", "2"], "leave out --jobs"), (["--images", "0"], "at least one image"),
     (["--bn", "evl"], "--bn"),
     (["--images", "x"], "invalid images value: 'x'"), (["--tolerance", "2"], "tolerance must be"),
     (["--queries", "2"], "at least 6 products"), (["--weights", "ema"], "kept no average"),
     (["--seed", "-3"], "seed must be"), (["--premise", "--looks", "1"], "looks must be"),
     (["--premise", "--images", "0"], "images must be"),
     (["--bn", "train", "--group", "1"], "a group of one image has no statistics"),
     (["--premise", "--steps=3"], "--steps has no effect with --premise; leave it out"),
     (["--premise", "--split", "train"], "--split has no effect with --premise"),
     (["--looks", "20"], "--looks has no effect without --premise")],
)  # fmt: skip
def test_wrong_use_is_one_sentence(runs, tmp_path, capsys, argv, sentence):
    assert sentence in refused(capsys, runs / "dense", "--out", tmp_path, *argv)


@pytest.mark.parametrize("premise", [[], ["--premise"]])
def test_a_file_where_the_results_should_go_is_told_before_anything_is_measured(runs, tmp_path, capsys, premise):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "goes through a file" in refused(capsys, runs / "dense", "--out", out, *premise)


@pytest.mark.parametrize("premise", [[], ["--premise"]])
def test_runs_that_cannot_be_measured(runs, tmp_path, capsys, premise):
    argv = ["--out", tmp_path / "out", *premise]
    assert "were trained on different images" in refused(capsys, runs / "dense", runs / "other", *argv)
    assert "is named twice" in refused(capsys, runs / "dense", runs / "dense", *argv)
    assert "is not a run folder" in refused(capsys, tmp_path, *argv)
    begun = shutil.copytree(runs / "rigl", tmp_path / "begun")
    (begun / "DONE").unlink()
    assert f"{begun} is not a finished run" in refused(capsys, begun, *argv)
    (begun / "DONE").touch()
    torn = begun / ("checkpoints/step-00000003.pt" if premise else "masks.safetensors")
    torn.write_bytes(b"no")
    assert "is torn" in refused(capsys, begun, *argv)
    assert not (tmp_path / "out").exists()


def test_the_premise_along_two_runs(runs, tmp_path, capsys):
    argv = ["sharpness", "--premise", str(runs / "dense"), str(runs / "rigl"), "--looks", "2", "--images", "40"]
    before = torch.get_rng_state()
    assert main([*argv, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "premise.json").read_text())
    assert found[1] == json.loads((runs / "rigl" / "premise.json").read_text())
    assert [[p["epoch"] for p in record["points"]] for record in found] == [[1, 2]] * 2
    assert found[1]["settings"]["bn"] == "train" and found[1]["rho"] == 0.05
    assert "cos(g_t, g_{t-1})" in printed and f"step {found[0]['points'][0]['step']}" in printed
    assert (tmp_path / "premise.png").read_bytes().startswith(b"\x89PNG")
    assert "rigl (rho 0.05)" in (tmp_path / "premise.svg").read_text()


def test_training_again_removes_what_was_measured(runs, tmp_path):
    folder = shutil.copytree(runs / "dense", tmp_path / "again")
    (folder / "sharpness.json").touch()
    (folder / "premise.json").touch()
    config = TrainConfig(epochs=1, data_options=DataConfig(train_size=200), out=str(folder))
    run(config, overwrite=True)
    assert not (folder / "sharpness.json").exists() and not (folder / "premise.json").exists()
