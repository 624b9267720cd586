"""The demonstration, shortened to two epochs and two seeds: what it trains, writes, says and reuses, how it fails."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console

from s2sam.analysis.surface_file import load_surface
from s2sam.cli import demo
from s2sam.cli.main import main
from s2sam.export.active_weights import load_active
from s2sam.report.read import read_run
from s2sam.train.finished import read_tensors
from s2sam.train.state import training_images

SHORT = ["--epochs", "2", "--seeds", "0", "1", "--jobs", "1"]
ROOT = Path(__file__).resolve().parents[2]


def call(out, capsys, *options):
    code = main(["demo", "--out", str(out), *(options or SHORT)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def quick():
    """Few rounds of step times and small surfaces."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ROUNDS": 2, "POINTS": 5, "PAIRS": 1}.items():
            patch.setattr(demo, name, value)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quick):
    """A finished short demonstration: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "runs"
    console = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", console)
        assert demo.run(["--out", str(out), *SHORT]) == 0
    return out, console.getvalue()


def runs_of(out, act):
    """Arm -> seed -> run."""
    found = {}
    for path in sorted((out / act).glob("*/config.yaml")):
        arm, _, seed = path.parent.name.rpartition("-seed")
        found.setdefault(arm, {})[int(seed)] = read_run(path.parent)
    return found


def test_it_trains_every_arm_of_both_acts_with_every_seed(finished):
    out, printed = finished
    saves, flat = runs_of(out, "sparsity"), runs_of(out, "flatness")
    assert saves.keys() == {"dense", "rigl80", "rigl90", "rigl95", "rigl98"}
    assert flat.keys() == {"sgd", "nesterov", "s2sam", "echo", "sam", "sgd-tuned", "echo-tuned"}
    for arms in (saves, flat):
        assert all(sorted(runs) == [0, 1] for runs in arms.values())
    for name, runs in saves.items():
        for run in runs.values():
            wanted = 0.0 if name == "dense" else int(name.removeprefix("rigl")) / 100
            assert run.final["sparsity"] == pytest.approx(wanted, abs=1e-4)
            assert run.env["hardware"]["threads"] == 1
    assert "[24/24]" in printed


def test_all_arms_of_act_2_take_equally_many_gradients(finished):
    out, _ = finished
    flat = runs_of(out, "flatness")
    for name, runs in flat.items():
        for run in runs.values():
            steps, gradients = (19, 2) if name == "sam" else (38, 1)
            assert run.final["n_steps"] == run.epochs[-1]["step"] == steps
            assert steps * gradients == 38
            assert (run.config["sharpness"] == "sam") == (gradients == 2)
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert {row["gradients"] for row in rows if row["act"] == "2"} == {"38"}
    assert "<b>38</b> gradients a run in act 2" in (out / "report.html").read_text()
    whole = demo.make_configs(out, [0])  # 600 images in batches of 32 are 19 steps
    for name, config in whole.items():
        if name.startswith("flatness/"):
            assert config.epochs * 19 * (2 if config.sharpness == "sam" else 1) == 1900


def test_arms_differ_in_their_own_keys_only(finished):
    out, _ = finished
    own = {
        "sparsity": {"method", "sparsity"},
        "flatness": {"sharpness", "rho", "lr", "epochs", "evaluate_every", "sam", "optim", "data_options"},
    }
    for act, keys in own.items():
        configs = [yaml.safe_load(path.read_text()) for path in sorted((out / act).glob("*/config.yaml"))]
        for key in set(configs[0]) - keys - {"seed", "out"}:
            assert len({json.dumps(config[key]) for config in configs}) == 1, key
    flat = {(Path(c["out"]).name.rpartition("-seed")[0], c["seed"]): c for c in configs}
    for (name, seed), config in flat.items():
        assert config["data_options"] == flat["sgd", 0]["data_options"] | {"split_seed": seed}
        assert config["data_options"]["label_noise"] == 0.4
        assert ((config["lr"], config["optim"]["weight_decay"]) == (0.1, 5e-4)) == (not name.endswith("-tuned"))
        assert config["optim"]["nesterov"] == (name == "nesterov")
        assert {k: v for k, v in config["optim"].items() if k not in ("weight_decay", "nesterov")} == {
            k: v for k, v in flat["sgd", 0]["optim"].items() if k not in ("weight_decay", "nesterov")
        }
    digests = {seed: {runs[seed].env["data_digest"] for runs in runs_of(out, "flatness").values()} for seed in (0, 1)}
    assert [len(found) for found in digests.values()] == [1, 1]
    assert digests[0] != digests[1]


def test_240_of_600_training_labels_are_wrong_and_no_others(tmp_path):
    config = demo.flatness_config(demo.FLATNESS["sgd"], 3, str(tmp_path))
    noisy = training_images(config)
    clean = training_images(replace(config, data_options=replace(config.data_options, label_noise=0.0)))
    assert torch.equal(noisy.train_x, clean.train_x)
    assert len(noisy.train_y) == 600
    assert int((noisy.train_y != clean.train_y).sum()) == 240
    assert torch.equal(noisy.val_y, clean.val_y) and torch.equal(noisy.test_y, clean.test_y)


def test_displacement_is_realised_where_it_is_meant(finished):
    out, _ = finished
    for name, runs in (runs_of(out, "flatness") | runs_of(out, "sparsity")).items():
        for run in runs.values():
            measured = [r["displacement"] for r in run.steps if r.get("displacement")]
            assert bool(measured) == (name in ("s2sam", "echo", "echo-tuned"))
            if name == "s2sam":
                rho = demo.FLATNESS["s2sam"].rho
                assert measured == pytest.approx([rho] * len(measured), rel=1e-3)


def test_files_hold_the_active_weights_and_their_sizes_are_those_told(finished):
    out, printed = finished
    page = (out / "report.html").read_text()
    rows = {row["arm"]: row for row in csv.DictReader((out / "table.csv").open()) if row["act"] == "1"}
    files = sorted(path.name for path in (out / "files").iterdir())
    assert files == sorted(f"rigl{s}-seed{seed}.safetensors" for s in (80, 90, 95, 98) for seed in (0, 1))
    dense = (out / "sparsity" / "dense-seed0" / "model.safetensors").stat().st_size
    assert float(rows["Dense"]["file_bytes"]) == dense
    for sparsity in (80, 90, 95, 98):
        sizes = []
        for seed in (0, 1):
            path = out / "files" / f"rigl{sparsity}-seed{seed}.safetensors"
            found, masks = load_active(path)
            whole = read_tensors(out / "sparsity" / f"rigl{sparsity}-seed{seed}", "model.safetensors")
            assert found.keys() == whole.keys()
            assert all(torch.equal(found[name], whole[name]) for name in whole)
            assert sum(int(mask.sum()) for mask in masks.values()) < 0.21 * 85_000
            sizes.append(path.stat().st_size)
        mean = sum(sizes) / 2
        assert float(rows[f"RigL {sparsity} %"]["file_bytes"]) == mean < 0.3 * dense
        assert f"<td>{mean:,.0f}</td>" in page
        assert f"{mean / 1000:.0f} kB" in printed
    assert float(rows["RigL 98 %"]["active_parameters"]) < 3000


def test_the_page_shows_both_acts_first_and_is_named_last(finished):
    out, printed = finished
    page = (out / "report.html").read_text()
    first, _, rest = page.partition("Differences of act 1")
    for act, picture in (("act-1", "saves"), ("act-2", "flat")):
        section = re.search(rf'<section class="card act" id="{act}">.*?</section>', first, re.DOTALL).group()
        assert section.count("<svg") == 1
        assert f'id="{picture}-' in section
    assert "S2-SAM (the paper" in first and "SGD, tuned" in first
    for heading in ("Differences of act 2", "Loss surfaces of act 2", "What is on the disk", "What this does not show"):
        assert heading in rest
    assert "s2sam demo --out" in rest
    assert printed.splitlines()[-1] == str(out / "report.html")
    assert "Act 1, what sparsity saves" in printed and "Act 2, when flatness pays" in printed


def test_what_is_said_agrees_with_the_intervals(finished):
    """Two seeds of two epochs: wide intervals, so that nothing is found, or seeds that differ equally."""
    out, printed = finished
    page = " ".join(unescape((out / "report.html").read_text()).replace("\xa0", " ").split())
    said = " ".join(printed.split())
    rows = list(csv.DictReader((out / "table.csv").open()))
    compared = [row for row in rows if row["reference"]]
    assert [row["act"] for row in compared] == ["1"] * 4 + ["2"] * 9
    assert {row["comparisons"] for row in compared if row["act"] == "1"} == {"4"}
    assert {row["comparisons"] for row in compared if row["act"] == "2"} == {"9"}
    for row in compared:
        low, high = row["simultaneous_low"], row["simultaneous_high"]
        if not low:
            assert row["verdict"] == "no interval (all equal)"
        elif float(low) > 0 or float(high) < 0:
            assert row["verdict"] == f"{'higher' if float(low) > 0 else 'lower'} than {row['reference']}"
        else:
            assert row["verdict"] == "no difference shown"
    (echo,) = [row for row in compared if (row["arm"], row["reference"]) == ("Echo", "SGD, tuned")]
    points = f"{100 * float(echo['difference']):+.1f} points"
    if echo["verdict"] == "no difference shown":
        assert f"learning rate, no gain was found ({points}, 95 % interval " in page
        assert f"learning rate, no gain was found ({points}, 95 % interval " in said
    for text in (page, said):
        assert "over the reference, SGD at its best weight decay and learning rate, " in text


def test_surfaces_of_two_arms_stand_side_by_side(finished):
    out, _ = finished
    surfaces = [load_surface(path) for path in sorted((out / "surface").glob("*/surface.npz"))]
    assert [surface.label for surface in surfaces] == ["echo-seed0", "sgd-seed0"]
    assert all(surface.done.all() and surface.loss.shape == (1, 5, 5) for surface in surfaces)
    assert {surface.facts["images"] for surface in surfaces} == {600}
    page = (out / "report.html").read_text()
    assert page.count('class="map"') == 2
    for surface in surfaces:
        row = surface.summary()
        assert f"Ra {row['ra_raw_mean']:.3g} nats, without the bowl {row['ra_detrended_mean']:.3g}" in page


def test_finished_runs_are_reused_and_broken_ones_redone(finished, monkeypatch):
    out, _ = finished
    configs = demo.make_configs(out, [0, 1], 2)
    assert len(configs) == 24
    assert all(demo.reusable(config) for config in configs.values())
    assert not any(demo.reusable(config) for config in demo.make_configs(out, [0, 1], 4).values())
    monkeypatch.setitem(demo.FLATNESS, "echo", replace(demo.FLATNESS["echo"], rho=0.5))
    fit = [name for name, config in demo.make_configs(out, [0], 2).items() if not demo.reusable(config)]
    assert fit == ["flatness/echo-seed0"]


def test_only_what_is_missing_is_trained_again(finished, capsys):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/metrics.jsonl")}
    (out / "sparsity" / "rigl95-seed1" / "DONE").unlink()
    stale = load_surface(out / "surface" / "sgd-seed0" / "surface.npz")
    stale.facts["weights_sha256"] = "0" * 64
    stale.save(out / "surface" / "sgd-seed0" / "surface.npz")
    code, printed, _ = call(out, capsys)
    changed = {path.parent.name for path in before if path.stat().st_mtime_ns != before[path]}
    assert (code, changed) == (0, {"rigl95-seed1"})
    assert "23 finished runs are reused" in printed
    assert "[1/1]" in printed
    again = load_surface(out / "surface" / "sgd-seed0" / "surface.npz")
    assert again.facts["weights_sha256"] != "0" * 64
    assert (again.loss == stale.loss).all()


def test_the_step_times_can_be_read_by_the_report(finished, capsys):
    out, _ = finished
    rounds = json.loads((out / "cost.json").read_text())["seconds_per_step"]
    assert [len(seconds) for seconds in rounds.values()] == [2] * 10
    page = out / "again.html"
    assert main(["report", str(out / "sparsity"), "--cost", str(out / "cost.json"), "--out", str(page)]) == 0
    assert "RigL 98&nbsp;%" in page.read_text()


def test_two_processes_give_the_numbers_of_one(finished, tmp_path):
    out, _ = finished
    names = ("sparsity/rigl90-seed0", "flatness/echo-seed0")
    configs = {name: config for name, config in demo.make_configs(tmp_path, [0], 2).items() if name in names}
    outcomes = demo.train_all(configs, 2, Console(file=io.StringIO()))
    assert {name for name, _, _ in outcomes} == set(names)
    for name, final, reason in outcomes:
        assert reason == ""
        lines = (out / name / "metrics.jsonl").read_text().splitlines()
        alone = json.loads(lines[-1])
        same = set(alone) - {"step_seconds", "kind", "time"}
        assert {k: final[k] for k in same} == {k: alone[k] for k in same}


def only(monkeypatch, **changes):
    """Leave the demonstration a dense and an SGD arm."""
    monkeypatch.setattr(demo, "SPARSITY", {"dense": replace(demo.SPARSITY["dense"], **changes)})
    monkeypatch.setattr(demo, "FLATNESS", {"sgd": demo.FLATNESS["sgd"]})


def test_a_folder_in_the_way_is_named_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    only(monkeypatch)
    (tmp_path / "sparsity" / "dense-seed0").mkdir(parents=True)
    (tmp_path / "sparsity" / "dense-seed0" / "letter.txt").write_text("mine")
    code, printed, _ = call(tmp_path, capsys, "--epochs", "2", "--seeds", "0", "--jobs", "1")
    assert code == 2
    assert "failed: sparsity/dense-seed0: ValueError" in printed
    assert (tmp_path / "flatness" / "sgd-seed0" / "DONE").exists()
    assert (tmp_path / "sparsity" / "dense-seed0" / "letter.txt").read_text() == "mine"
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_diverges_is_named(tmp_path, capsys, monkeypatch):
    only(monkeypatch, lr=1e30)
    code, printed, _ = call(tmp_path, capsys, "--epochs", "2", "--seeds", "0", "--jobs", "1")
    assert code == 1
    assert "failed: sparsity/dense-seed0: RuntimeError: training diverged" in printed


def test_one_seed_makes_a_page_that_concludes_nothing(finished, tmp_path, capsys):
    for act in ("sparsity", "flatness"):
        shutil.copytree(finished[0] / act, tmp_path / act)
    code, printed, _ = call(tmp_path, capsys, "--epochs", "2", "--seeds", "1", "--jobs", "1")
    assert code == 0
    assert "12 finished runs are reused" in printed
    said = " ".join(printed.split())
    assert said.count("and one seed gives no interval)") == 4
    page = (tmp_path / "report.html").read_text()
    assert page.count("no interval from one seed") == 13
    assert not re.search("points (above|below|higher|lower|of gain)", unescape(page))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--epochs", "0"], "epochs must be a whole number of at least 1"),
        (["--epochs", "-2"], "epochs must be a whole number of at least 1"),
        (["--epochs", "3"], "--epochs must be even, so that SAM can take as many gradients in half the epochs; got 3"),
        (["--seeds", "-1"], "seed must be a whole number of at least 0"),
        (["--seeds", "1", "1"], "names a seed twice"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--seeds", "one"], "invalid int value"),
        (["--epoch", "3"], "there is no option --epoch; did you mean --epochs?"),
    ],
)
def test_bad_options_end_in_one_sentence(tmp_path, capsys, options, sentence):
    code, _, error = call(tmp_path, capsys, *options)
    assert code == 2
    assert sentence in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_settings_are_those_that_were_chosen():
    """The numbers in demo.py are the choices that the committed file of the tuning holds."""
    chosen = json.loads((ROOT / "benchmarks" / "results" / "demo_settings.json").read_text())
    assert chosen["quick"] is False
    assert not set(chosen["seeds"]) & set(demo.SEEDS)
    assert chosen["epochs"] == {"sparsity": demo.SPARSITY_EPOCHS, "flatness": demo.FLATNESS_EPOCHS}
    assert chosen["flatness"].keys() == {"s2sam", "echo", "sam", "sgd-tuned", "echo-tuned"}
    assert chosen["sparsity"]["trials"] == 9
    assert {act["trials"] for act in chosen["flatness"].values()} == {12}
    ends = {name for name, act in chosen["flatness"].items() if act["at_end_of_axis"]}
    assert ends <= {"echo-tuned"}  # two values of weight decay and of radius are all ends
    for arm in demo.SPARSITY.values():
        assert {name: getattr(arm, name) for name in chosen["sparsity"]["choice"]} == chosen["sparsity"]["choice"]
    for name, act in chosen["flatness"].items():
        arm, choice = demo.FLATNESS[name], act["choice"]
        assert {setting: getattr(arm, setting) for setting in choice} == choice
        best = max(chosen["flatness"][name]["rows"], key=lambda row: row["mean_val_top1"])
        assert choice.items() <= best.items()
