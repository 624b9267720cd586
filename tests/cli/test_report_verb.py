"""`s2sam report` on real, tiny runs."""

from __future__ import annotations

import csv

import pytest

from s2sam.cli.main import main
from s2sam.report.read import read_run
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, TrainConfig
from s2sam.train.loop import run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """RigL with SGD and with S2-SAM, two seeds, one epoch."""
    root = tmp_path_factory.mktemp("runs")
    for sharpness in ("none", "s2sam"):
        for seed in (0, 1):
            name = f"rigl90-{sharpness}-seed{seed}"
            run(TrainConfig(sharpness=sharpness, seed=seed, epochs=1, out=str(root / name)))
    return root


def test_page_and_table(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(runs), "--out", str(out), "--tables"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(out)
    assert "RigL 90 %" in printed
    assert "S2-SAM" in printed
    page = out.read_text()
    assert "s2sam report" in page
    assert str(runs) in page
    assert (tmp_path / "table.csv").read_text().count("\n") == 3
    assert "inside the runs" in (tmp_path / "table.md").read_text()


def test_folders_one_by_one(runs, tmp_path):
    folders = [str(runs / f"rigl90-{sharpness}-seed0") for sharpness in ("none", "s2sam")]
    assert main(["report", *folders, "--out", str(tmp_path / "page.html")]) == 0
    assert "no interval from one seed" in (tmp_path / "page.html").read_text()
    assert not (tmp_path / "table.csv").exists()


def test_wrong_use_ends_in_one_sentence(runs, tmp_path, capsys):
    first = runs / "rigl90-none-seed0"
    (tmp_path / "empty").mkdir()
    cases = [
        ([], "arguments are required"),
        ([str(tmp_path / "nothing")], "nothing is not a run folder"),
        ([str(tmp_path / "empty")], "empty is not a run folder"),
        ([str(first), str(first)], "are the same arm and seed"),
        ([str(first), str(runs / "rigl90-s2sam-seed0"), str(runs / "rigl90-s2sam-seed1")], "cannot be paired"),
        ([str(runs), "--cost", str(tmp_path / "no.json")], "no cost measurement at"),
        ([str(runs), "--out", str(tmp_path)], "is a folder"),
    ]
    for argv, sentence in cases:
        assert main(["report", *argv]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1


def test_unfinished_run_is_refused_by_name(runs, tmp_path, capsys):
    config = TrainConfig(method="dense", sharpness="none", epochs=1, out=str(tmp_path / "run"))
    run(config)
    (config.folder / "DONE").unlink()
    assert main(["report", str(config.folder)]) == 2
    assert f"{config.folder} is not a finished run" in capsys.readouterr().err


def test_displacements_of_all_kinds_stand_side_by_side(tmp_path, capsys):
    kinds = {
        "late": SamConfig(rho_schedule="late", rho_start=1.0, stats_every=3),  # never displaced
        "rising": SamConfig(rho_schedule="rising", stats_every=3),
        "random": SamConfig(direction="random", scope="norm", stats_every=3),
        "filter": SamConfig(scale="filter", sign=-1, stats_every=0),
        "plain": SamConfig(),
    }
    for seed in (0, 1):
        for name, sam in kinds.items():
            run(
                TrainConfig(
                    method="static",
                    sharpness="none" if name == "plain" else "s2sam",
                    sam=sam,
                    optim=OptimConfig(ema=0.5),
                    data_options=DataConfig(train_size=320),
                    epochs=2,
                    seed=seed,
                    out=str(tmp_path / "runs" / f"{name}-{seed}"),
                )
            )
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html"), "--tables"]) == 0
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["n"] for row in rows] == ["2"] * 5
    assert rows[0]["treatment"] == "SGD"
    names = " ".join(row["treatment"] for row in rows[1:])
    for setting in ("rho_schedule late", "rho_schedule rising", "direction random", "scope norm", "scale filter"):
        assert setting in names
    finals = [read_run(folder).final for folder in sorted((tmp_path / "runs").glob("plain-*"))]
    for key in ("recalibrated_test_top1", "ema_test_top1"):
        assert float(rows[0][f"{key}_mean"]) == pytest.approx(sum(final[key] for final in finals) / 2)
    page = (tmp_path / "page.html").read_text()
    assert page.count("averaged weights&nbsp;%") == page.count("BatchNorm re-estimated&nbsp;%") == 2
    printed = capsys.readouterr().out
    assert "averaged weights %" in printed
    for row in rows:
        assert f"{100 * float(row['test_top1_mean']):.2f} (" in printed
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed  # the names give way, not the numbers
