"""The direction study's analysis on small tables with values worked out apart from it, and on what is committed."""

from __future__ import annotations

import csv
import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest

from s2sam.report.stats import paired_difference
from s2sam.suite.plan import make_plan
from s2sam.suite.schema import load_suite
from s2sam.suite.tuned import check_tuned, plan_trials

FOLDER = Path(__file__).parents[2] / "results" / "direction-study"
MODULES = ("study", "sparser", "control", "analyse", "figures")
SEEDS = range(1000, 1008)
GAPS = (1.0, 2.0, 3.0, 4.0, -1.0, 0.0, 1.0, 2.0)  #: mean 1.5; sd sqrt(18 / 7); t at 97.5 and 99.75 %: 2.36462, 4.02934


@pytest.fixture
def direction():
    """The study's modules, which share names with those of other studies."""
    apart = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(apart)


@pytest.fixture
def small(direction, tmp_path, monkeypatch):
    """The modules on files of their own: `rows` writes some, with what every reading of them needs."""
    monkeypatch.setattr(direction.study, "RAW", tmp_path / "raw.csv")
    monkeypatch.setattr(direction.study, "GUARDED_CSV", tmp_path / "guarded.csv")
    tuning = [
        {"stage": "screening", "arm": "sgd", "val_top1": 0.5},
        {"stage": "screening", "arm": "nesterov", "val_top1": 0.6},
        {"stage": "joint", "arm": "+g-0.05 lr 0.3 wd 0.0005", "val_top1": 0.5},
    ]  # fmt: skip
    for arm, value in (("sgd", 0.5), ("nesterov", 0.6), ("+g-0.05", 0.5)):
        for lr, wd in direction.sparser.GRID:
            name = f"{arm} lr {lr:g} wd {wd:g}"
            tuning.append({"stage": "sparser tuning", "cell": "static95", "arm": name, "val_top1": value})
    direction.rows = lambda found: save(direction.study, [*tuning, *found])
    return direction


def save(study, found):
    """Rows with the columns that they lack."""
    basis = {"cell": "static80", "seed": 0, "lr": 0.01, "weight_decay": 0.0005, "outcome": "ok", "version": "0"}
    for path, fields, own in (
        (study.RAW, study.FIELDS, [r for r in found if r["stage"] != "guarded"]),
        (study.GUARDED_CSV, (*study.FIELDS, "commit"), [r for r in found if r["stage"] == "guarded"]),
    ):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fields, restval="")
            writer.writeheader()
            writer.writerows(basis | row for row in own)
    study.read.cache_clear()


def fresh(stage, cell, arm, accuracies):
    """Rows of an arm on the fresh seeds; accuracies in %."""
    return [
        {"stage": stage, "cell": cell, "arm": arm, "seed": seed, "test_top1": value / 100}
        for seed, value in zip(SEEDS, accuracies, strict=True)
    ]


def headline(cell_gaps):
    """SGD at 50 % and the paper's arm so many points above it, by cell."""
    found = []
    for cell, points in cell_gaps.items():
        stage = "guarded" if "guarded" in cell else "confirmation" if cell[-2:] in ("80", "90") else "sparser"
        paper = "+g-0.05 lr 0.3 wd 0.0005" if stage == "confirmation" else "+g-0.05"
        found += fresh(stage, cell, "sgd", [50.0] * 8)
        found += fresh(stage, cell, paper, [50.0 + point for point in points])
    return found


def test_a_contrast_is_the_mean_over_the_cells_that_count(small):
    cells = dict.fromkeys(("static90", "rigl90", "static95", "rigl95", "static98"), GAPS)
    small.rows(headline(cells | {"rigl98": [-12.0 + gap for gap in GAPS], "rigl98 guarded": [6 + g for g in GAPS]}))
    sparser = small.sparser
    without, published, guarded = (sparser.difference(sparser.THE_PAPERS, way) for way in sparser.STAND_INS)
    assert without.mean == pytest.approx(1.5)
    assert (without.interval.low, without.interval.high) == pytest.approx((0.159391, 2.840609), abs=1e-5)
    assert published.mean == pytest.approx(1.5 - 12 / 6)
    assert guarded.mean == pytest.approx(1.5 + 6 / 6)
    joint = small.analyse.together(without)
    assert (joint.low, joint.high) == pytest.approx((-0.784419, 3.784419), abs=1e-5)
    assert small.analyse.conclusion(without) == "suggestive: better"


def test_a_contrast_that_lacks_a_cell_is_none(small):
    small.rows(headline({"static95": GAPS, "static98": GAPS}))
    assert small.sparser.difference(small.sparser.THE_PAPERS) is None
    assert small.sparser.gaps("+g-0.05", "sgd", ["static95"])["static95"] == pytest.approx(
        dict(zip(SEEDS, GAPS, strict=True))
    )


@pytest.mark.parametrize(
    ("scale", "shift", "said"),
    [
        (1.0, 0.0, "suggestive: better"),  # by itself [0.16, 2.84], together [-0.78, 3.78]
        (1.0, -3.0, "suggestive: worse"),
        (1.0, -1.5, "cannot tell"),
        (0.1, -0.1, "no difference larger than 0.5"),  # together [-0.18, 0.28]
        (0.1, 1.0, "better"),  # together [0.92, 1.38]
        (0.1, -1.0, "worse"),
    ],
)
def test_what_holds_with_all_primary_contrasts_together(direction, scale, shift, said):
    found = {seed: scale * gap + shift for seed, gap in zip(SEEDS, GAPS, strict=True)}
    assert direction.analyse.conclusion(paired_difference(found, dict.fromkeys(found, 0.0))) == said


def test_a_verdict_that_does_not_hold_with_the_others_is_suggestive(direction):
    gap = paired_difference(dict(zip(SEEDS, GAPS, strict=True)), dict.fromkeys(SEEDS, 0.0))
    assert "suggestive: by itself a is better, not with all" in direction.analyse.verdict("First", "a", "b", gap)


def test_the_slope_has_a_level_for_each_method(direction):
    slope, halvings = direction.sparser.slope, {"80": 2.321928, "90": 3.321928, "95": 4.321928, "98": 5.643856}
    line = {f"{m}{at}": {7: level + 0.5 * x} for m, level in (("static", 0), ("rigl", 9)) for at, x in halvings.items()}
    del line["rigl98"]
    assert slope(line) == pytest.approx([0.5])  # the 9 points between the methods are no slope
    draws = np.random.default_rng(0).normal(size=(2, 4))
    both = {f"{m}{at}": {7: draws[i, j]} for i, m in enumerate(("static", "rigl")) for j, at in enumerate(halvings)}
    assert slope(both) == pytest.approx([np.polyfit(list(halvings.values()), draws.mean(0), 1)[0]], rel=1e-5)


def test_trials_are_settings_not_runs(direction):
    def row(arm, lr, decay, seed):
        return {"arm": arm, "lr": lr, "weight_decay": decay, "seed": seed}

    found = [row("sgd lr 0.1 wd 0.002", 0.1, 0.002, seed) for seed in (0, 1)]
    found += [row("sgd", 0.1, 0.002, seed) for seed in range(8)]  # the same setting, screened on
    found += [row("sgd lr 0.3 wd 0.002", 0.3, 0.002, 0)]
    found += [row(f"-g-{rho}", 0.1, 0.002, 0) for rho in (0.05, 0.1)] + [row("-g-0.1 lr 0.3 wd 0.002", 0.3, 0.002, 0)]
    count = direction.analyse.trial_count
    assert count(found, "SGD") == (2, 11)
    assert count(found, "other displacements with one gradient") == (3, 3)
    assert count(found, "Nesterov") == (0, 0)


def test_every_arm_of_the_study_is_of_one_kind(direction):
    analyse = direction.analyse
    kinds = {
        row["arm"]: analyse.kind_of(row["arm"])
        for stage in analyse.TUNED_IN.values()
        for row in direction.study.rows()
        if row["stage"] in stage
    }
    assert set(kinds.values()) == set(analyse.KINDS)
    assert kinds["+g 0.1 lr 0.1 wd 0.002"] == kinds["+g-0.05"] != kinds["+g-0.05-late"] == kinds["-m-step-1.8"]
    assert kinds["nesterov random-norm-0.2 lr 0.3 wd 0.002"] == kinds["random-filter-0.05"] == "noise"


def test_the_radius_is_a_share_of_the_weights(direction):
    share = direction.control.share
    assert share([{"arm": "sam 0.1 lr 0.1 wd 0.002", "displacement": "", "weight_norm": 8.0}]) == "1.2"
    assert share([{"arm": "-g", "displacement": 0.2, "weight_norm": w} for w in (5.0, 10.0)]) == "3.0"
    assert share([{"arm": "nesterov", "displacement": "", "weight_norm": 8.0}]) == "-"


# ------------------------------------------------------------------------------------------------- the guarded cell
def test_the_guarded_cell_differs_from_that_of_stage_5_by_the_guard_alone(direction):
    study, arms = direction.study, direction.sparser.fresh_arms()
    assert set(arms) == {"sgd", "nesterov", "+g-0.05", "nesterov -g-norm-0.2-late", "+g-0.05 x sqrt(density)"}
    stored = {row["arm"]: row for row in study.rows() if row["stage"] == "sparser" and row["cell"] == "rigl98"}
    assert set(stored) == set(arms)
    for arm, changes in arms.items():
        before, now = (study.config(cell, 1000, changes, "x") for cell in ("rigl98", study.GUARDED_CELL))
        assert (before.lr, before.optim.weight_decay) == (stored[arm]["lr"], stored[arm]["weight_decay"])
        assert before.sparse.options == {"delta_t": 50, "min_per_filter": 0}
        assert now == replace(before, sparse=replace(before.sparse, options={"delta_t": 50, "min_per_filter": 1}))
    assert arms["+g-0.05 x sqrt(density)"]["rho"] == pytest.approx(0.05 * 0.1**0.5)
    assert arms["nesterov"]["optim.ema"] == 0.995  # its runs hold the averaged weights


def test_runs_of_the_guarded_cell_are_stored_apart_and_never_twice(small, monkeypatch):
    small.rows([])
    study, trained = small.study, []

    def train_all(configs, jobs, console):
        trained.extend(configs)
        return [(name, {"name": name}, "") for name in configs]

    def record(stage, cell, arm, seed, settings, final, reason):
        assert (settings.method_options["min_per_filter"], final, reason) == (
            1,
            {"name": f"{stage}-{cell}-{arm}-{seed}"},
            "",
        )
        return {"stage": stage, "cell": cell, "arm": arm, "seed": seed, "outcome": "ok", "commit": "c0ffee"}

    monkeypatch.setattr(study, "train_all", train_all)
    monkeypatch.setattr(study, "record", record)
    monkeypatch.setattr(study, "finished", lambda settings: None)
    before = study.RAW.read_bytes()
    study.run("guarded", [(study.GUARDED_CELL, "sgd", seed, {"sharpness": "none"}) for seed in (1000, 1001)], 1)
    study.run("guarded", [(study.GUARDED_CELL, "sgd", seed, {"sharpness": "none"}) for seed in SEEDS], 1)
    assert trained == [f"guarded-rigl98 guarded-sgd-{seed}" for seed in SEEDS]
    assert study.RAW.read_bytes() == before
    assert [(row["seed"], row["commit"]) for row in study.rows() if row["stage"] == "guarded"] == [
        (s, "c0ffee") for s in SEEDS
    ]


# ------------------------------------------------------------------------------------------------- what is committed
def test_the_default_minus_sgd_by_hand_from_raw_csv(direction):
    values = {}
    for row in csv.DictReader((FOLDER / "raw.csv").open(newline="")):
        own = {"confirmation": ("sgd", "+g-0.05 lr 0.3 wd 0.0005"), "sparser": ("sgd", "+g-0.05")}.get(row["stage"], ())
        if row["arm"] in own and row["cell"][-2:] != "80":
            sign = -1 if row["arm"] == "sgd" else 1
            values.setdefault(row["cell"], {}).setdefault(row["seed"], []).append(sign * 100 * float(row["test_top1"]))
    assert len(values) == 6
    for cells, way in ((set(values) - {"rigl98"}, "left out"), (set(values), "as published")):
        seeds = [fmean(sum(values[cell][str(seed)]) for cell in cells) for seed in SEEDS]
        half = 2.364624 * np.std(seeds, ddof=1) / 8**0.5
        found = direction.sparser.difference(direction.sparser.THE_PAPERS, way)
        assert found.mean == pytest.approx(np.mean(seeds), abs=1e-9)
        assert found.interval.high - found.mean == pytest.approx(half, abs=1e-5)


def test_the_family_is_as_large_as_it_says(direction):
    found = direction.analyse.primaries()
    assert len(found) == direction.analyse.FAMILY == 10
    assert [what for _, what, gap in found if gap is None] == ["right labels, the candidate of stage 6 minus nesterov"]
    assert [stage for stage, _, _ in found] == ["3", "4", "5", "5", "5", "added", "6", "6", "6", "6"]


def test_no_contrast_of_the_readme_table_stands_on_the_unsound_cell_unsaid(direction):
    names = [what for what, _, _ in direction.analyse.findings()]
    wide = [what for what in names if "98 %" in what]
    assert wide
    assert all("RigL 98 %" in what for what in wide)


def test_the_report_is_what_the_files_say_and_the_readme_quotes_it(direction, tmp_path, monkeypatch):
    monkeypatch.setattr(direction.analyse, "HERE", tmp_path)
    for name, file in (("draw", "contrasts.png"), ("draw_sparsities", "sparsities.png")):
        monkeypatch.setattr(direction.figures, name, lambda file=file: FOLDER / file)
    text = direction.analyse.report()
    assert text == (FOLDER / "report.md").read_text(encoding="utf-8")
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    quoted = re.findall(r"[+-]\d+\.\d\d\s\[[+-]\d+\.\d\d,\s[+-]\d+\.\d\d\]", readme)
    assert len(quoted) >= 10
    assert len(readme.split()) <= 680  # a page
    in_words = re.sub(r"\s*\|\s*", " ", text)
    assert [quote for quote in quoted if re.sub(r"\s+", " ", quote) not in in_words] == []


def test_the_confirmation_tries_echo_as_often_as_the_others(tmp_path):
    suite = load_suite(FOLDER / "confirm.yaml")
    assert list(suite.columns) == ["Nesterov", "SGD", "S2-SAM", "Echo"]
    check_tuned(suite)
    plan = make_plan(suite, mode="tuned", budget="full", out=tmp_path, read_only=True, data={"cifar10": "digits"})
    echo = [trial.config for trial in plan_trials(plan) if trial.column == "Echo"]
    assert len(echo) == 6 * 6  # cells x settings
    assert {(c.sharpness, c.sam.scale, c.optim.weight_decay) for c in echo} == {("echo", "filter", 5e-4)}
    assert {(c.lr, c.rho) for c in echo} == {(lr, rho) for lr in (0.05, 0.1, 0.2) for rho in (0.04, 0.08)}
    assert {c.method_options["min_per_filter"] for c in echo if c.method == "rigl"} == {1}
