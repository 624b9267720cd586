"""The image study: its plan, its runs (equal to the library's own), its gate and contrasts, its commands."""

import importlib.util
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import analyse
import image_plan
import image_report
import plan
from image_plan import ImageCell, ImagePlan
from s2sam.train import run
from s2sam.train.lock import hold

ROOT = Path(__file__).resolve().parents[2]
FIRST = "40-raw-static80"
RHO = {"sgd": 0.0, "nesterov": 0.0, "sam": 0.05, "+g": 0.5, "echo": 0.05}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """An .npz file with 200 images of ten shapes under noise: a network can learn them, but not in a moment."""
    draws, path = np.random.default_rng(0), tmp_path_factory.mktemp("shapes") / "shapes.npz"
    patterns, arrays = draws.integers(0, 256, size=(10, 3, 16, 16)), {"classes": np.array([str(c) for c in range(10)])}
    for split, each in (("train", 20), ("test", 30)):
        labels = np.repeat(np.arange(10), each)
        noise = draws.normal(0, 60, size=(len(labels), 3, 16, 16))
        arrays |= {f"{split}_x": np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8), f"{split}_y": labels}
    np.savez(path, **arrays)
    return path


@pytest.fixture
def study(tmp_path, shapes):
    """The smoke plan, on those images, with a table of its own."""
    made = ImagePlan.read("smoke", out=tmp_path, data=shapes)
    made.settings["training"] |= {"images": 100, "epochs": 4}
    made.table.parent.mkdir()
    return made


@pytest.fixture(scope="module")
def commands():
    """run.py of this study; the module `run` of the tests is that of studies/control."""
    spec = importlib.util.spec_from_file_location("image_commands", ROOT / "studies/images/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- the plan --------------------------------------------------------------------------------------------------------


def test_cells_run_in_the_order_of_the_protocol():
    cells = ImagePlan.read().cells
    groups = ("40-raw", "0-raw", "40-aug", "0-aug")
    assert list(cells) == [f"{group}-{masks}" for group in groups for masks in ("static80", "dense", "static95")]
    assert cells["40-aug-static95"] == ImageCell(0.4, "crop+flip", "static", 0.95)
    assert cells["0-raw-dense"] == ImageCell(0.0, "none", "dense", 0.0)


def test_the_two_budgets_share_no_seed_and_no_table():
    small, large = ImagePlan.read(), ImagePlan.read("large")
    seeds = [small.tuning, small.fresh, large.tuning, large.fresh]
    assert len({seed for some in seeds for seed in some}) == sum(map(len, seeds))
    assert len(small.fresh) == 6
    assert len(large.fresh) == 12
    assert small.table != large.table
    assert large.settings["training"] == small.settings["training"] | {"epochs": 50}


@pytest.mark.parametrize("variant", ["", "large"])
def test_every_lattice_has_the_trials_and_first_trials_lie_inside_it(variant):
    study = ImagePlan.read(variant)
    sizes = study.settings["trials"]
    for arm in study.arms:
        axes = study.axes(arm)
        assert np.prod([len(axis) for axis in axes]) >= sizes["number"] + sizes["extensions"] * sizes["extension"]
        assert len(study.start(arm)) <= sizes["number"]
        for point in study.start(arm):
            assert len(study.neighbours(arm, point)) == 2 * sum(len(axis) > 1 for axis in axes)


def test_all_arms_of_a_cell_take_the_same_number_of_gradients_on_the_same_images():
    study = ImagePlan.read()
    for cell in study.cells:
        made = {arm: study.config(cell, arm, (0.1, 5e-4, rho), 3) for arm, rho in RHO.items()}
        assert {arm: config.epochs * study.arms[arm].gradients for arm, config in made.items()} == dict.fromkeys(
            made, 30
        )
        assert len({(str(config.data_options), config.method, config.sparsity) for config in made.values()}) == 1
    assert made["sam"].epochs == 15
    assert made["nesterov"].optim.nesterov
    assert [made[arm].sharpness for arm in RHO] == ["none", "none", "sam", "s2sam", "echo"]
    assert (made["+g"].sam.scale, made["sam"].sam.scale, made["echo"].sam.scale) == ("norm", "filter", "filter")
    assert made["sgd"].data_options.split_seed == 3


def test_a_cell_begins_where_the_one_before_it_ended():
    study = ImagePlan.read()
    assert [study.before(cell) for cell in (FIRST, "40-raw-dense", "40-aug-static80", "0-aug-static95")] == [
        None, FIRST, FIRST, "0-aug-static80",
    ]  # fmt: skip
    assert (study.number(FIRST), study.number("0-raw-static80"), study.number("40-raw-static95")) == (10, 10, 7)
    with pytest.raises(ValueError, match=r"40-raw-dense begins at the choices of 40-raw-static80, whose tuning is not"):
        study.first_trials("40-raw-dense", "sam", [])


def imitation(study, stop_after=None, best=None):
    """A train() that takes no time: the nearer a trial is to `best`, in steps of the lattice, the better."""
    count = 0

    def train(config, *, test):
        nonlocal count
        count += 1
        if stop_after is not None and count > stop_after:
            raise KeyboardInterrupt
        arm = (
            "nesterov"
            if config.optim.nesterov
            else {"none": "sgd", "s2sam": "+g"}.get(config.sharpness, config.sharpness)
        )
        target = best or (0.1, 1.5e-3, 0.0)
        point = config.lr, config.optim.weight_decay, config.rho if study.arms[arm].displace else 0.0
        axes = study.axes(arm)
        away = sum(
            abs(a.index(x) - (a.index(t) if t in a else len(a) // 2))
            for a, x, t in zip(axes, point, target, strict=True)
        )
        value = 0.5 - 0.02 * away + 0.001 * config.seed
        return {"val": value, "train": 0.9, "seconds": 1.0} | ({"test": value} if test else {})

    return train


@pytest.fixture
def whole_plan(tmp_path, shapes):
    return ImagePlan.read(out=tmp_path, data=shapes)


def test_the_tuning_gives_all_arms_the_same_trials_and_finds_the_best(whole_plan, monkeypatch):
    monkeypatch.setattr(image_plan, "train", imitation(whole_plan))
    for cell in (FIRST, "40-raw-dense"):
        image_plan.tune(whole_plan, cell)
    rows = whole_plan.rows()
    assert all(row["test"] is None for row in rows)
    for cell, numbers in ((FIRST, (10, 12)), ("40-raw-dense", (7, 9))):
        counts = {arm: len(whole_plan.screened(whole_plan.tried(cell, arm, rows))) for arm in whole_plan.arms}
        assert len(set(counts.values())) == 1
        assert counts["sgd"] in numbers
        assert whole_plan.refusals(cell, rows) == []
        for arm in whole_plan.arms:
            assert whole_plan.chosen(cell, arm, rows)[:2] == (0.1, 1.5e-3)
    first = next(row for row in rows if (row["cell"], row["arm"]) == ("40-raw-dense", "echo"))
    assert (first["lr"], first["weight_decay"], first["rho"]) == whole_plan.chosen(FIRST, "echo", rows)


def test_a_tuning_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, shapes, monkeypatch):
    whole, stopped = (ImagePlan.read(out=tmp_path / name, data=shapes) for name in ("whole", "stopped"))
    for one in (whole, stopped):
        one.table.parent.mkdir()
    monkeypatch.setattr(image_plan, "train", imitation(whole))
    image_plan.tune(whole, FIRST)
    for count in (3, 17, 40):
        monkeypatch.setattr(image_plan, "train", imitation(stopped, stop_after=count))
        with pytest.raises(KeyboardInterrupt):
            image_plan.tune(stopped, FIRST)
    monkeypatch.setattr(image_plan, "train", imitation(stopped))
    image_plan.tune(stopped, FIRST)

    def key(row):
        return row["arm"], row["seed"], row["lr"], row["weight_decay"], row["rho"]

    assert sorted(map(key, stopped.rows())) == sorted(map(key, whole.rows()))
    before = stopped.table.read_bytes()
    monkeypatch.setattr(image_plan, "train", None)  # calling it is an error
    image_plan.tune(stopped, FIRST)
    assert stopped.table.read_bytes() == before


def test_other_images_than_those_of_the_table_are_refused(study, tmp_path, monkeypatch):
    monkeypatch.setattr(image_plan, "train", imitation(study))
    wanted = {"sgd": [((0.1, 5e-4, 0.0), 0)]}
    image_plan.execute(study, "tune", FIRST, wanted)
    other = tmp_path / "other.npz"
    with np.load(study.data) as arrays:
        np.savez(other, **{key: value[::-1] if key == "train_x" else value for key, value in arrays.items()})
    changed = ImagePlan(study.settings, study.table, other)
    with pytest.raises(ValueError, match="holds runs on other images"):
        image_plan.execute(changed, "tune", FIRST, {"sgd": [((0.1, 5e-4, 0.0), 1)]})
    assert len(study.rows()) == 1


# -- one run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arm", "cell", "augment"),
    [(arm, cell, "none") for arm in RHO for cell in (FIRST, "0-raw-dense")] + [("echo", FIRST, "crop+flip")],
)
def test_a_run_is_that_of_s2sam_train(study, tmp_path, arm, cell, augment):
    config = study.config(cell, arm, (0.1, 5e-4, RHO[arm]), 5)
    config = replace(config, data_options=replace(config.data_options, augment=augment))
    found = image_plan.train(config)
    final = run(replace(config, out=str(tmp_path / "run")))
    assert (found["test"], found["val"]) == (final["test_top1"], final["val_top1"])
    if cell != FIRST:
        assert found["train"] > 0.2  # it has learned something, so that the accuracies could differ
    saved, mine = load_file(tmp_path / "run" / "model.safetensors"), image_plan.trained(config).model.state_dict()
    assert saved.keys() == mine.keys()
    assert all(torch.equal(saved[name], mine[name]) for name in saved)


def test_arms_differ(study):
    made = {arm: image_plan.train(study.config(FIRST, arm, (0.1, 5e-4, rho), 5))["train"] for arm, rho in RHO.items()}
    assert len(set(made.values())) > 2, made


def test_weights_that_are_not_finite_count_as_chance(study):
    found = image_plan.train(study.config(FIRST, "sgd", (1e30, 5e-4, 0.0), 0))
    assert (found["val"], found["train"], found["test"]) == (0.1, 0.1, 0.1)


def test_real_images_have_the_form_that_the_study_wants(commands, cifar10, tmp_path):
    path = tmp_path / "pooled.npz"
    commands.main(["data", "--source", str(cifar10), "--data", str(path)])
    study = ImagePlan.read(out=tmp_path, data=path)
    noisy, config = (study.config(cell, "sgd", (0.1, 5e-4, 0.0), 900) for cell in (FIRST, "0-raw-dense"))
    state = image_plan.build(noisy)
    assert (len(state.data.train_y), len(state.data.val_y), len(state.data.test_y)) == (1500, 2000, 10_000)
    assert "600 of 1,500 training labels are made wrong" in state.data.notes
    assert 100 / len(state.data.test_y) == study.grain
    assert state.data.image_shape == (3, 16, 16)
    assert image_plan.train(replace(config, epochs=2))["test"] > 0.15


# -- the report ------------------------------------------------------------------------------------------------------


def made_up(study, gains, cells, memory=0.9):
    """A table: arm a has 30 % + gains[a], and a point more in odd seeds.

    SGD validates best, Nesterov in cells with right labels. Tuned SGD has 62 % of its labels and memorises nothing; at
    the common setting it has `memory`.
    """
    rows = []
    for cell in cells:
        better = "nesterov" if cell.startswith("0-") else "sgd"
        for arm in study.arms:
            rho = study.start(arm)[0][2]
            common = {
                "cell": cell,
                "arm": arm,
                "lr": 0.1,
                "weight_decay": 5e-4,
                "rho": rho,
                "epochs": 30,
                "seconds": 20.0,
            }
            common |= {"environment": "none", "train": 0.62, "val": 0.4 if arm == better else 0.3}
            rows += [common | {"stage": "tune", "seed": seed} for seed in study.tuning]
            for seed in study.fresh:
                test = 0.3 + gains.get(arm, 0.0) + 0.01 * (seed % 2) * (arm in gains)
                rows.append(common | {"stage": "fresh", "seed": seed, "test": test})
                if arm == "sgd":
                    rows.append(rows[-1] | {"stage": "equal", "train": memory, "test": 0.2})
    return rows


GAINS = {"sam": 0.06, "echo": 0.05, "+g": -0.01, "nesterov": 0.02}


@pytest.fixture
def reported(tmp_path, shapes):
    """The study's plan, with one trial for each arm."""
    study = ImagePlan.read(out=tmp_path, data=shapes)
    study.settings["trials"] |= {"number": 1, "after": 1, "finalists": 1, "extensions": 0}
    (tmp_path / "environments.jsonl").write_text(
        json.dumps({
            "environment": "none", "commit": "0" * 40, "changed": [], "torch": "2", "python": "3", "processor": "a",
            "data": "b",
        }) + "\n"
    )  # fmt: skip
    return study


def test_contrasts_take_noisy_cells_by_the_gate_and_clean_cells_without_augmentation(reported):
    cells = [FIRST, "40-raw-dense", "40-aug-dense", "0-raw-static80", "0-raw-dense", "0-aug-static80"]
    rows = made_up(reported, GAINS, cells)
    stages = [(row["cell"], row["stage"]) for row in rows]
    rows = [
        row | {"train": 0.65} if at == ("40-aug-dense", "equal") else row for row, at in zip(rows, stages, strict=True)
    ]
    found, _ = analyse.whole_cells(reported, rows)
    gate = analyse.gates(reported, rows, found)  # 60 % of the labels are right
    assert [cell for cell in gate if gate[cell].passes] == [FIRST, "40-raw-dense"]
    assert [gate[cell].baseline for cell in (FIRST, "0-raw-dense")] == ["sgd", "nesterov"]
    lines = [one.line() for one in image_report.contrasts(reported, found, gate)]
    assert [line[:3] for line in lines] == [
        ["1: echo minus the better baseline", "2", "+5.50"],
        ["all cells with wrong labels", "3", "+5.50"],
        ["2: echo minus sam", "2", "-1.00"],
        ["all cells with wrong labels", "3", "-1.00"],
        ["3: +g minus the better baseline", "2", "-0.50"],
        ["all cells with wrong labels", "3", "-0.50"],
        ["4: echo minus the better baseline", "2", "+3.00"],
        ["5: echo minus sam", "2", "-1.00"],
        ["6: +g minus the better baseline", "2", "-3.00"],
    ]
    first = image_report.contrasts(reported, found, gate)[0]
    assert first.bounds == analyse.t_interval(list(first.by_seed.values()), comparisons=6, grain=0.01)
    assert first.says == "a gain"


def test_no_claim_where_sam_does_not_gain(reported):
    rows = made_up(reported, {"echo": 0.05}, [FIRST])
    found, _ = analyse.whole_cells(reported, rows)
    gate = analyse.gates(reported, rows, found)
    lines = [one.line() for one in image_report.contrasts(reported, found, gate)]
    assert lines[0][1:] == ["0", "", "", "no cell passes the gate: nothing can be said"]
    assert lines[1][1:3] == ["1", "+5.50"]
    assert lines[6][1:] == ["0", "", "", "none of its cells has run"]


def test_the_report_names_what_is_missing_and_what_it_cost(reported):
    rows = made_up(reported, GAINS, [FIRST, "40-raw-dense", "40-raw-static95"])
    half = [row for row in rows if (row["cell"], row["stage"], row["seed"]) == ("40-raw-static95", "fresh", 100)]
    untuned = [row for row in rows if (row["cell"], row["arm"], row["stage"]) == ("40-raw-dense", "sam", "tune")]
    plan.append(
        reported.table,
        [
            row for row in rows
            if row not in half and row not in untuned and (row["cell"], row["stage"]) != ("40-raw-dense", "fresh")
        ],
    )  # fmt: skip
    text = image_report.report(reported)
    assert "40-raw-dense is being tuned (sam has 0 of 1 trials and 0 finalists)" in text
    assert "40-raw-static95 has 31 of 36 fresh runs" in text
    assert "not begun: 0-raw-static80, 0-raw-dense, 0-raw-static95, 40-aug-static80" in text
    assert f"| {FIRST} | sgd | +6.50 [+5.39, +7.61] | +2.0 | +30.0 | passes |" in text
    assert f"| {FIRST} | 60 | 62.0 | 30.0 | yes | 90.0 | 20.0 | yes |" in text
    assert f"| {FIRST} | 10 | 36 | 0.26 | 20.0 |" in text
    assert reported.table.with_name("report.md").read_text() == text
    facts = json.loads(reported.table.with_name("summary.json").read_text())
    assert list(facts["cells"]) == [FIRST]
    assert facts["cells"][FIRST]["minus"]["sam"]["mean"] == pytest.approx(6.5)
    assert [one["contrast"][0] for one in facts["primaries"]] == ["1", "1", "2", "2", "3", "3", "4", "5", "6"]


def test_a_report_without_a_whole_cell_or_with_unequal_trials_is_refused(reported):
    with pytest.raises(ValueError, match="no cell has all its fresh runs yet: not begun: 40-raw-static80"):
        image_report.report(reported)
    rows = made_up(reported, GAINS, [FIRST])
    plan.append(reported.table, [row for row in rows if row["stage"] != "equal"])
    with pytest.raises(ValueError, match="40-raw-static80 has 30 of 36 fresh runs"):
        image_report.report(reported)
    reported.table.unlink()
    extra = [row | {"weight_decay": 5e-3} for row in rows if (row["arm"], row["stage"]) == ("sgd", "tune")]
    plan.append(reported.table, rows + extra)
    with pytest.raises(ValueError, match="different numbers of trials"):
        image_report.report(reported)


# -- the commands ----------------------------------------------------------------------------------------------------


def test_a_study_of_random_images_from_the_first_trial_to_the_report(commands, tmp_path, capsys):
    smoke = ["--smoke", "--cells", FIRST, "--out", str(tmp_path), "--data", str(tmp_path / "none.npz")]
    for name in ("tune", "fresh", "report"):
        commands.main([name, *smoke])
    shown = capsys.readouterr().out
    assert f"1 of 1: {FIRST}" in shown
    assert "not begun: 40-raw-dense, 0-raw-static80, 0-raw-dense" in shown
    assert shown.strip().endswith((tmp_path / "smoke" / "report.md").read_text().strip())
    rows = plan.read_table(tmp_path / "smoke" / "runs.csv")
    assert {row["stage"]: row["test"] is None for row in rows} == {"tune": True, "fresh": False, "equal": False}
    common = [row for row in rows if row["stage"] == "equal"]
    assert [(row["arm"], row["lr"], row["weight_decay"], row["rho"], row["seed"]) for row in common] == [
        ("sgd", 0.1, 5e-4, 0.0, 100), ("sgd", 0.1, 5e-4, 0.0, 101),
    ]  # fmt: skip


def test_several_processes_train_what_one_trains(study, tmp_path, monkeypatch):
    both = study, replace(study, table=tmp_path / "pool" / "runs.csv")
    monkeypatch.setattr(image_plan, "train", imitation(study))
    with ThreadPoolExecutor(3) as pool:  # the interface is that of the pool of processes
        for one, workers in zip(both, (None, pool), strict=True):
            image_plan.tune(one, FIRST, workers)
            image_plan.fresh(one, FIRST, workers)
    assert sorted(map(str, both[0].rows())) == sorted(map(str, both[1].rows()))


def test_what_cannot_be_done_ends_with_one_sentence_and_code_2(commands, tmp_path, capsys):
    for arguments, words in (
        (["tune", "--data", tmp_path / "none.npz"], "make it by `run.py data --source FOLDER`"),
        (["report", "--out", tmp_path], "no cell has all its fresh runs yet"),
        (["fresh", "--smoke", "--out", tmp_path], "the tuning of 40-raw-static80 is not complete"),
        (["tune", "--smoke", "--out", tmp_path, "--cells", "30-*"], "no cell is called '30-*'"),
        (["tune", "--smoke", "--out", tmp_path, "--threads", "0"], "--threads must be at least 1"),
        (["data"], "data needs --source"),
    ):
        with pytest.raises(SystemExit) as ended:
            commands.main([str(argument) for argument in arguments])
        assert ended.value.code == 2
        assert words in capsys.readouterr().err


def test_a_second_process_is_kept_out(commands, tmp_path, capsys):
    with hold(tmp_path / "smoke"), pytest.raises(SystemExit) as ended:
        commands.main(["tune", "--smoke", "--out", str(tmp_path), "--data", str(tmp_path / "none.npz")])
    assert ended.value.code == 2
    assert "is in use by another process" in capsys.readouterr().err


def test_the_script_finds_its_modules():
    words = [sys.executable, ROOT / "studies/images/run.py", "--help"]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=110, check=True).stdout
    assert "python studies/images/run.py tune" in shown
