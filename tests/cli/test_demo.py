"""The demonstration, shortened to two epochs and two seeds: what it writes, what it reuses, how it fails."""

from __future__ import annotations

import csv
import io
import json

import pytest
import yaml
from rich.console import Console

from s2sam.cli import demo
from s2sam.cli.main import main
from s2sam.report.arms import group_runs
from s2sam.report.read import read_runs

SHORT = ["--epochs", "2", "--seeds", "0", "1", "--jobs", "1"]


def call(out, capsys, *options):
    code = main(["demo", "--out", str(out), *(options or SHORT)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished short demonstration: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "runs"
    console = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "ROUNDS", 6)
        patch.setattr("sys.stdout", console)
        assert demo.run(["--out", str(out), *SHORT]) == 0
    return out, console.getvalue()


def test_it_trains_every_arm_with_every_seed(finished):
    out, printed = finished
    arms = group_runs(read_runs([out]))
    assert len(arms) == 7
    assert all(sorted(arm.runs) == [0, 1] for arm in arms)
    for arm in arms:
        for run in arm.runs.values():
            assert run.final["sparsity"] == pytest.approx(0.0 if arm.dense else 0.9, abs=1e-4)
            assert run.final["test_top1"] > 0.5
            assert run.env["hardware"]["threads"] == 1
    assert "[14/14]" in printed


def test_its_arms_differ_in_their_own_keys_only(finished):
    out, _ = finished
    configs = [yaml.safe_load(path.read_text()) for path in sorted(out.glob("*/config.yaml"))]
    assert len(configs) == 14
    for key in set(configs[0]) - {"method", "sharpness", "seed", "out"}:
        assert len({json.dumps(config[key]) for config in configs}) == 1, key


def test_it_writes_table_and_page_and_names_the_page_last(finished):
    out, printed = finished
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert len(rows) == 7
    assert {row["verdict"] for row in rows if row["treatment"] == "SGD"} == {"reference"}
    assert all(
        float(row["step_ratio_same_network"]) > 0.5
        and float(row["step_ratio_dense_network"]) > 0.5
        and row["test_images"] == "359"
        for row in rows
    )
    assert (out / "table.md").read_text().startswith("| arm ")
    assert "s2sam demo" in (out / "report.html").read_text()
    assert printed.splitlines()[-1] == str(out / "report.html")
    rounds = json.loads((out / "cost.json").read_text())["seconds_per_step"]
    assert [len(seconds) for seconds in rounds.values()] == [6] * 7


def test_displacement_is_realised_in_the_s2sam_runs(finished):
    out, _ = finished
    for arm in group_runs(read_runs([out])):
        for run in arm.runs.values():
            measured = [r["displacement"] for r in run.steps if "displacement" in r and r["step"] > 0]  # 0 is plain
            assert bool(measured) == (arm.treatment == "S2-SAM")
            assert measured == pytest.approx([0.05] * len(measured), rel=1e-3)


def test_finished_runs_are_reused_and_broken_ones_redone(finished, monkeypatch):
    out, _ = finished
    configs = demo.make_configs(out, [0, 1], 2)
    assert all(demo.reusable(config) for config in configs.values())
    assert not any(demo.reusable(config) for config in demo.make_configs(out, [0, 1], 3).values())
    monkeypatch.setattr(demo, "LR", 0.07)
    assert not any(demo.reusable(config) for config in demo.make_configs(out, [0], 2).values())


def test_only_what_is_missing_is_trained_again(finished, capsys, monkeypatch):
    out, _ = finished
    monkeypatch.setattr(demo, "ROUNDS", 2)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    (out / "rigl90-sam-seed1" / "DONE").unlink()
    code, printed, _ = call(out, capsys)
    changed = {path.parent.name for path in before if path.stat().st_mtime_ns != before[path]}
    assert (code, changed) == (0, {"rigl90-sam-seed1"})
    assert "13 finished runs are reused" in printed
    assert "[1/1]" in printed


def test_two_processes_give_the_numbers_of_one(finished, tmp_path):
    out, _ = finished
    configs = {
        name: config
        for name, config in demo.make_configs(tmp_path, [0], 2).items()
        if name in ("rigl90-s2sam-seed0", "static90-sam-seed0")
    }
    outcomes = demo.train_all(configs, 2, Console(file=io.StringIO()))
    assert {name for name, _, _ in outcomes} == set(configs)
    for name, final, reason in outcomes:
        assert reason == ""
        lines = (out / name / "metrics.jsonl").read_text().splitlines()
        alone = json.loads(lines[-1])
        same = set(alone) - {"step_seconds", "kind", "time"}
        assert {k: final[k] for k in same} == {k: alone[k] for k in same}


def test_a_folder_in_the_way_is_named_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "ARMS", (("dense", "none"), ("static", "none")))
    (tmp_path / "dense-none-seed0").mkdir()
    (tmp_path / "dense-none-seed0" / "letter.txt").write_text("mine")
    code, printed, _ = call(tmp_path, capsys, "--epochs", "1", "--seeds", "0", "--jobs", "1")
    assert code == 2
    assert "failed: dense-none-seed0: ValueError" in printed
    assert (tmp_path / "static90-none-seed0" / "DONE").exists()
    assert (tmp_path / "dense-none-seed0" / "letter.txt").read_text() == "mine"
    assert not (tmp_path / "report.html").exists()


def test_a_run_that_diverges_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "ARMS", (("dense", "none"),))
    monkeypatch.setattr(demo, "LR", 1e30)
    code, printed, _ = call(tmp_path, capsys, "--epochs", "1", "--seeds", "0", "--jobs", "1")
    assert code == 1
    assert "failed: dense-none-seed0: RuntimeError: training diverged" in printed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--epochs", "0"], "epochs must be a whole number of at least 1"),
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
