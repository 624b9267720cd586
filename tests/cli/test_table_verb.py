"""`s2sam table`: from one command to the written table, and every wrong use is one sentence."""

from __future__ import annotations

import csv
import sys

import pytest
import yaml

from s2sam.cli.main import main

TABLE = {
    "title": "A small table",
    "base": {
        "data": "cifar10", "model": "resnet20", "epochs": 100, "sam": {"stats_every": 10},
        "data_options": {"train_size": 300},
    },
    "blocks": {"CIFAR-10": {}},
    "rows": {"RigL": {"method": "rigl"}, "Some": {"method": "some-day"}},
    "sparsities": [0.9],
    "columns": {"SGD": {"sharpness": "none"}, "S2-SAM": {"sharpness": "s2sam", "rho": 0.05}},
    "reference": "SGD",
    "planned": ["some-day"],
    "seeds": [0, 1, 2],
    "budgets": {"smoke": {"seeds": 2, "set": {"epochs": 1}, "stand_in": {"data": "digits", "model": "mlp"}}},
}  # fmt: skip


def call(capsys, *argv):
    code = main(["table", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def table(tmp_path):
    """The file of the small table."""
    path = tmp_path / "small.yaml"
    path.write_text("# a table for tests\n" + yaml.safe_dump(TABLE, sort_keys=False))
    return path


def test_one_command_trains_compares_and_writes(table, tmp_path, capsys):
    code, printed, _ = call(capsys, table, "--budget", "smoke", "--out", tmp_path / "out", "--jobs", "1")
    assert code == 0
    assert "missing: the method some-day does not exist here yet" in printed
    assert "[4/4]" in printed
    lines = printed.splitlines()
    assert lines[-4:] == [str(tmp_path / "out" / name) for name in ("table.md", "table.csv", "runs.csv", "table.html")]
    markdown = (tmp_path / "out" / "table.md").read_text()
    assert "Scaled by --budget smoke" in markdown
    assert "epochs 100 -> 1" in markdown
    assert "digits (1,797 images of 8 x 8 pixels) stand in" in markdown
    runs = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert [(run["column"], run["seed"]) for run in runs] == [
        ("SGD", "0"),
        ("S2-SAM", "0"),
        ("SGD", "1"),
        ("S2-SAM", "1"),
    ]
    cells = {
        row["column"]: row for row in csv.DictReader((tmp_path / "out" / "table.csv").open()) if row["row"] == "RigL"
    }
    values = {(run["column"], run["seed"]): float(run["test_top1"]) for run in runs}
    for column, cell in cells.items():
        assert float(cell["value"]) == pytest.approx((values[column, "0"] + values[column, "1"]) / 2)
    differences = [values["S2-SAM", seed] - values["SGD", seed] for seed in "01"]
    assert float(cells["S2-SAM"]["difference"]) == pytest.approx(sum(differences) / 2)
    assert all(float(run["measured_sparsity"]) == pytest.approx(0.9, abs=1e-3) for run in runs)
    page = (tmp_path / "out" / "table.html").read_text()
    assert f"{100 * float(cells['S2-SAM']['value']):.2f} &plusmn;" in page
    assert "s2sam table" in page

    code, printed, _ = call(capsys, table, "--budget", "smoke", "--out", tmp_path / "out", "--read-only")
    assert code == 0
    assert "4 finished runs of 4 are reused" in printed
    assert (tmp_path / "out" / "table.md").read_text() == markdown


def test_a_dry_run_lists_and_writes_nothing(table, tmp_path, capsys):
    code, printed, _ = call(capsys, table, "--budget", "smoke", "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert printed.count("to do\t") == 4
    assert "scaled: epochs 100 -> 1" in printed
    assert printed.endswith("4 runs, 0 finished\n")
    assert not (tmp_path / "out").exists()


def test_part_of_a_table_says_so(table, tmp_path, capsys):
    _, printed, _ = call(capsys, table, "--budget", "smoke", "--rows", "RigL", "--seeds", 5, "--list")
    assert "scaled: rows RigL of RigL, Some" in printed
    assert "scaled: seeds 3 -> 1 (--seeds)" in printed
    assert "seed5" in printed
    assert "missing" not in printed
    some = call(capsys, "1", "--budget", "smoke", "--rows", "RigL", "--sparsities", 0.98, 0.9, "--list")[1]
    assert (
        "scaled: sparsities 98 %, 90 % of 90 %, 95 %, 98 %" in some and "16 runs, 0" in some and "rigl_95" not in some
    )


def test_the_columns_of_the_paper_alone_are_no_scaled_table(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = ["1", "--budget", "smoke", "--list"]
    whole, paper = call(capsys, *argv)[1], call(capsys, *argv, "--columns", "Original", "SAM", "S2-SAM")[1]
    assert whole.count("_echo_seed") == 60 and whole.endswith("240 runs, 0 finished\n")
    kept = [line for line in whole.splitlines() if "_echo_seed" not in line]
    assert kept[:-1] == paper.splitlines()[:-1] and paper.endswith("180 runs, 0 finished\n")
    less = call(capsys, *argv, "--columns", "Original", "Echo")[1]
    assert "scaled: columns Original, Echo of Original, SAM, S2-SAM, Echo" in less
    assert less.endswith("120 runs, 0 finished\n")
    tuned = call(capsys, *argv, "--mode", "tuned", "--columns", "Original", "Echo", "--rows", "SET")[1]
    assert tuned.endswith(f"{3 * 2 * 6 * 2} runs, 0 finished, then {3 * 2 * 2} of the settings chosen\n")


def test_settings_of_all_runs_win_over_the_budget_and_are_said(table, tmp_path, capsys):
    given = ["--budget", "smoke", "--set", "epochs=2", "optim.momentum=0.5", "--out", tmp_path / "out"]
    _, printed, _ = call(capsys, table, *given, "--list")
    assert "scaled: epochs 100 -> 2" in printed and "scaled: optim.momentum 0.9 -> 0.5" in printed
    assert call(capsys, table, *given, "--jobs", 1)[0] == 0
    for folder in (tmp_path / "out" / "runs").iterdir():
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert (config["epochs"], config["optim"]["momentum"]) == (2, 0.5)


def test_a_failure_is_told_by_the_exit_code(table, tmp_path, capsys):
    bad = tmp_path / "out" / "runs" / "cifar-10_rigl_90_sgd_seed0"
    bad.mkdir(parents=True)
    (bad / "letter.txt").touch()
    code, printed, _ = call(capsys, table, "--budget", "smoke", "--out", tmp_path / "out", "--jobs", "1")
    assert code == 1
    assert "Failed: cifar-10_rigl_90_sgd_seed0: ValueError" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["7"], "unknown table '7'"),
        (["1", "--budget", "full"], "get it with `s2sam data get cifar10`, which writes data/cifar10, or give --data"),
        (["1", "--budget", "short"], "--budget smoke needs no data"),
        (["1", "--budget", "smal"], "invalid choice: 'smal'"),
        (["1", "--budget", "smoke", "--rows", "Rigl"], "unknown row 'Rigl'; did you mean 'RigL'?"),
        (["1", "--budget", "smoke", "--columns", "Original", "echo"], "unknown column 'echo'; did you mean 'Echo'?"),
        (["4", "--budget", "smoke", "--columns", "SAM", "Echo"], "the columns SAM, Echo lack Original, with which the"),
        (["1", "--budget", "smoke", "--sparsities", "90"], "'90.0'; did you mean '0.9'? (one of: 0.9, 0.95, 0.98)"),
        (["1", "--budget", "smoke", "--data", "cifar10"], "--data takes cifar10=FOLDER, not 'cifar10'"),
        (["1", "--budget", "smoke", "--data", "cifar=x"], "unknown data of this table 'cifar'; did you mean 'cifar10'"),
        (["1", "--budget", "smoke", "--read-only"], "240 of 240 runs are missing: cifar-10_lt_90_original_seed1000"),
        (["1", "--budget", "smoke", "--jobs", "0"], "--jobs must be at least 1"),
        (["1", "--budget", "smoke", "--seeds", "1", "1"], "none twice"),
        (["1", "--budget", "smoke", "--launcher-option", "a=1"], "needs --launcher ray or --launcher slurm"),
        (["1", "--budget", "smoke", "--set", "epoch=3"], "unknown key 'epoch' in --set; did you mean 'epochs'?"),
        (["1", "--budget", "smoke", "--set", "sam.scope=norm"], "sam.scope cannot stand in --set, as it is what"),
        (["1", "--budget", "smoke", "--set", "rho=.1"], "rho cannot stand in --set, as"),
        (["1", "--budget", "smoke", "--set", "lr=[1"], "--set lr takes a value in YAML, not '[1'"),
        (["1", "--budget", "smoke", "--set", "lr=fast"], "lr must be"),
        (["2", "--budget", "smoke", "--mode", "tuned"], "declares no search"),
        (["none.yaml"], "there is no table at none.yaml"),
    ],
)
def test_wrong_use_is_a_sentence(argv, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = call(capsys, *argv)
    assert code == 2
    assert sentence in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("launcher", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_launcher_that_is_not_installed(launcher, package, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    code, _, error = call(capsys, "1", "--budget", "smoke", "--launcher", launcher)
    assert (code, error) == (
        2, f"s2sam: error: --launcher {launcher} needs the package {package}; pip install 's2sam[{launcher}]'\n",
    )  # fmt: skip
