"""`s2sam theory check` and `s2sam bound`: table, JSON and plots; exit codes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from s2sam.analysis import bound_run, bound_suite
from s2sam.analysis.bound_check import Check
from s2sam.cli.main import main
from s2sam.train import TrainConfig, run
from s2sam.train.config import DataConfig


@pytest.fixture(scope="module")
def suite():
    """A suite with one rate, two boundaries and a few checks, from short runs of the real experiments."""
    import torch

    generator = torch.Generator().manual_seed(0)
    found = bound_suite.Suite(bound_suite.Setting(), 0)
    found.checks += bound_suite.bound_average.negative_control(generator, replicas=1000)
    found.rates += bound_suite.bound_rates.in_radius(generator, steps=200)
    found.boundaries += [bound_suite.Boundary("SGD", 38.0, 38.01), bound_suite.Boundary("SAM", 19.33, 19.3)]
    found.checks += map(bound_suite.boundary_check, found.boundaries)
    return found


def test_table_json_and_plots(suite, tmp_path, capsys, monkeypatch):
    asked = {}
    monkeypatch.setattr(bound_suite, "run_suite", lambda setting, **rest: asked.update(rest, setting=setting) or suite)
    out = tmp_path / "a" / "b"
    assert main(["theory", "check", "--out", str(out), "--seed", "3", "--lr", "0.2"]) == 0
    assert (asked["seed"], asked["setting"].lr, asked["setting"].momentum) == (3, 0.2, 0.9)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == ""
    assert lines[1] == "experiment\tsetting\tmeasured\tbound\tholds"
    assert sum(line.endswith("\tyes") for line in lines) == len(suite.checks) == 5
    assert any(line.startswith("Lipschitz\tyes\t-\t") for line in lines)
    assert lines[-1] == "5 of 5 checks hold"
    data = json.loads((out / "bound.json").read_text())
    assert data["command"].startswith("s2sam theory check --out")
    assert data["versions"]["torch"]
    assert [c["control"] for c in data["checks"]][:3] == [False, False, True]
    assert data["checks"][0]["terms"]["radius"] == pytest.approx(0.09)
    assert data["checks"][0]["low"] is None
    assert data["rates"][0]["slope"] == pytest.approx(2.0, abs=0.1)
    for name in ("measured", "rates", "stability"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_old_name_does_the_same_and_says_the_new_one(suite, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        bound_suite, "run_suite", lambda setting, **rest: asked.append((setting, rest["seed"])) or suite
    )
    given = ["--seed", "3", "--lr", "0.2", "--momentum", "0.8", "--c", "0.1"]
    assert main(["theory", "check", *given]) == 0
    new = capsys.readouterr()
    assert main(["bound", "--suite", *given]) == 0
    old = capsys.readouterr()
    assert asked[0] == asked[1] and asked[0][0].momentum == 0.8
    assert old.out == new.out.replace("runs/theory", "runs/bound")
    assert old.err == "s2sam: s2sam bound --suite is now called `s2sam theory check`\n"
    theirs, ours = (json.loads((tmp_path / "runs" / name / "bound.json").read_text()) for name in ("bound", "theory"))
    assert theirs.pop("command").startswith("s2sam bound --suite --seed 3")
    assert ours.pop("command").startswith("s2sam theory check --seed 3")
    assert theirs == ours


@pytest.mark.parametrize("argv", [["theory", "check"], ["bound", "--suite"]])
def test_a_violated_bound_is_exit_code_1(suite, tmp_path, capsys, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    worse = dataclasses.replace(suite, checks=[*suite.checks, Check("mean iterate", "made up", 2.0, high=1.0)])
    monkeypatch.setattr(bound_suite, "run_suite", lambda setting, **rest: worse)
    assert main(argv) == 1
    out = capsys.readouterr().out
    assert "mean iterate\tmade up\t2\t<= 1\tNO" in out
    assert out.splitlines()[-1] == "5 of 6 checks hold"
    assert (tmp_path / "runs" / argv[0] / "measured.png").is_file()  # plots also where no folder is named


def test_theory_alone_says_what_there_is(capsys):
    assert main(["theory"]) == 0
    out = capsys.readouterr().out
    assert "usage: s2sam theory" in out and "check     run all experiments" in out and "`s2sam bound RUN...`" in out


def test_wrong_use_ends_in_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    options = [
        (["--lr", "0"], "lr must be above 0"),
        (["--momentum", "1"], "momentum must be below 1"),
        (["--momentum", "0.995"], "at most 0.99"),
        (["--c", "-1"], "c must be a finite number >= 0"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--out", str(tmp_path / "file")], "is or goes through a file"),
        (["--out", str(tmp_path / "file" / "x")], "give --out the name of a folder"),
    ]
    cases = [
        (["bound"], "name finished runs (see `s2sam bound --help`)"),
        (["bound"], "the checks where constants are known are `s2sam theory check`"),
        (["bound", "runs/first"], "runs/first is not a run folder"),
        (["bound", "runs/first", "--suite"], "is now called `s2sam theory check`, which is about problems with known"),
        (["bound", "runs/first", "--lr", "0.2"], "--lr has no effect on runs, it belongs to `s2sam theory check`"),
        (["bound", "--suite", "--images", "100"], "--images has no effect with --suite"),
        (["bound", "--suite", "--json"], "--json has no effect with --suite"),
        (["bound", "runs/first", "--images", "x"], "invalid images value: 'x'"),
        (["bound", "runs/first", "--images", "1"], "at least two batches of them, got 1"),
        (["bound", "runs/first", "--steps", "0"], "at least one step"),
        (["bound", "runs/first", "--seed", "-1"], "--seed must be at least 0"),
        (["bound", "a", "a"], "the same run is named twice"),
        (["bound", "--suit"], "there is no option --suit; did you mean --suite?"),
        (["theory", "chekc"], "unknown theory action 'chekc'; did you mean 'check'?"),
        (["theory", "check", "runs/first"], "unrecognized arguments: runs/first (see `s2sam theory check --help`)"),
        (["theory", "check", "--images", "100"], "there is no option --images (see `s2sam theory check --help`)"),
        *((["bound", "--suite", *argv], sentence) for argv, sentence in options),
        *((["theory", "check", *argv], sentence) for argv, sentence in options),
    ]
    for argv, sentence in cases:
        assert main(argv) == 2, argv
        error = capsys.readouterr().err
        assert error.startswith("s2sam: error: ") and error.count("\n") == 1, error
        assert sentence in error, error


def test_every_experiment_is_in_the_suite(monkeypatch):
    """The order and the names, without the time: each experiment gives one check."""
    told = []
    monkeypatch.setattr(bound_suite, "measure_boundary", lambda m, s: bound_suite.Boundary(m.name, 1.0, 1.0))
    monkeypatch.setattr(bound_suite, "limit_cycles", lambda g: iter(()))
    bound_suite.limit_cycles.__name__ = "limit_cycles"
    monkeypatch.setattr(bound_suite, "RATES", (lambda g: iter(()),) * 4)
    for place, name in (
        ("bound_average", "mean_iterate"),
        ("bound_average", "tight"),
        ("bound_average", "negative_control"),
        ("bound_average", "random_iterate"),
        ("bound_average", "published"),
        ("bound_rates", "decay_place"),
        ("bound_echo", "momentum_filter"),
        ("bound_echo", "echo_pairs"),
        ("diagonal_network", "same_batch_force"),
        ("diagonal_network", "recovery"),
    ):

        def stub(generator, name=name):
            yield Check(name, "", 0.0, high=1.0)

        stub.__name__ = name
        monkeypatch.setattr(getattr(bound_suite, place), name, stub)
    monkeypatch.setattr(bound_suite.RATES[0], "__name__", "rate")
    found = bound_suite.run_suite(bound_suite.Setting(momentum=0.0), tell=told.append)
    assert found.holds
    assert [c.experiment for c in found.checks if c.setting == ""] == [
        "mean_iterate", "tight", "negative_control", "random_iterate", "decay_place", "published",
        "momentum_filter", "echo_pairs", "same_batch_force", "recovery",
    ]  # fmt: skip
    assert told[0] == "same as the classes"
    assert len([t for t in told if t.startswith("stability of")]) == 10  # no direction momentum without momentum


QUICK = ("--images", "128", "--steps", "2", "--examples", "1", "--power", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A sparse run with S2-SAM and a dense one without, on the same images."""
    root = tmp_path_factory.mktemp("bound")
    for name, method, sharpness in [("rigl", "rigl", "s2sam"), ("dense", "dense", "none")]:
        data = DataConfig(train_size=320)
        run(TrainConfig(epochs=1, method=method, sharpness=sharpness, data_options=data, out=str(root / name)))
    return root


def test_runs_side_by_side(runs, tmp_path, capsys):
    before = {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()}
    out = tmp_path / "a" / "b"
    argv = [str(runs / "rigl"), str(runs / "dense"), *QUICK, "--out", str(out)]
    assert main(["bound", *argv]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert "run\tL >=\tmu <=\tmu if F* = 0\tsigma^2 >=" in printed
    assert sum(line.startswith(("rigl\t", "dense\t")) for line in lines) == 2 + 2 * 3
    flat = " ".join(printed.split())
    assert "dense: no displacement: the radius term is 0" in flat and "rigl: displacement 0.0" in flat
    for name in ("rigl", "dense"):
        stored = json.loads((runs / name / "bound.json").read_text())
        assert stored["command"].startswith("s2sam bound ") and stored["versions"]["torch"]
        assert [p["at"] for p in stored["probes"]] == ["start", "last"]
        total = stored["terms"]["corollary"]["total"]
        assert f"{name}\tcorollary" in printed and f"\t{total:.3g}\t" in printed
        (runs / name / "bound.json").unlink()
    together = json.loads((out / "bounds.json").read_text())
    assert [r["run"] for r in together] == ["rigl", "dense"] and "probes" not in together[0]
    assert (out / "bounds.png").read_bytes().startswith(b"\x89PNG")
    assert "guessing" in (out / "bounds.svg").read_text()
    assert {p: p.read_bytes() for p in runs.rglob("*") if p.is_file()} == before

    assert main(["bound", str(runs / "dense"), *QUICK, "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)
    assert row["constants"] == together[1]["constants"] and "bounds.png" in captured.err
    (runs / "dense" / "bound.json").unlink()


def test_ctrl_c_leaves_nothing(runs, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    before = sorted(runs.rglob("*"))
    monkeypatch.setattr(bound_run, "measure", interrupted)
    assert main(["bound", str(runs / "dense"), *QUICK, "--out", str(tmp_path / "out")]) == 130
    assert sorted(runs.rglob("*")) == before
    assert list((tmp_path / "out").iterdir()) == []


def test_runs_that_cannot_be_measured(runs, tmp_path, capsys):
    begun = shutil.copytree(runs / "dense", tmp_path / "begun")
    (begun / "DONE").unlink()
    other = shutil.copytree(runs / "dense", tmp_path / "other")
    env = json.loads((other / "env.json").read_text())
    (other / "env.json").write_text(json.dumps({**env, "data_digest": "0" * 64}))
    for argv, sentence in [
        ([begun], "is not a finished run (no DONE file)"),
        ([tmp_path], "is not a run folder"),
        ([runs / "dense", other], "were trained on different images"),
        ([runs / "dense", "--images", "100"], "do not fill two batches of 64"),
    ]:
        assert main(["bound", *map(str, argv), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("s2sam: error: ") and error.count("\n") == 1 and sentence in error
