"""Runs that differ in their seed are one arm; whatever else differs is an arm's own key or a refusal."""

from __future__ import annotations

import json

import pytest

from s2sam.report.arms import flatten, group_runs, reference_of
from s2sam.report.read import read_run, read_runs


def arms_of(*folders):
    return group_runs(read_run(folder) for folder in folders)


def test_the_design_of_the_demonstration(design):
    arms = group_runs(read_runs(design))
    assert [arm.name for arm in arms] == [
        "Dense, SGD",
        "RigL 90 %, SGD",
        "RigL 90 %, S2-SAM",
        "RigL 90 %, SAM",
        "Static ERK 90 %, SGD",
        "Static ERK 90 %, S2-SAM",
        "Static ERK 90 %, SAM",
    ]
    assert all(list(arm.runs) == [0, 1, 2] for arm in arms)
    assert [reference_of(arm, arms).name if reference_of(arm, arms) else None for arm in arms] == [
        None,
        None,
        "RigL 90 %, SGD",
        "RigL 90 %, SGD",
        None,
        "Static ERK 90 %, SGD",
        "Static ERK 90 %, SGD",
    ]


def test_keys_without_effect_make_no_arm(make_run):
    sam_options = {"direction": "momentum", "sign": -1, "scale": "norm", "stats_every": 5}
    arms = arms_of(make_run(seed=0, rho=0.05, sparsity=0.9), make_run(seed=1, rho=0.2, sparsity=0.5, sam=sam_options))
    assert len(arms) == 1
    assert sorted(arms[0].runs) == [0, 1]
    arms = arms_of(make_run("rigl", "sam", 0), make_run("rigl", "sam", 1, sam=sam_options))
    assert [sorted(arm.runs) for arm in arms] == [[0, 1]]  # two-step SAM has no direction and no sign
    assert len(arms_of(make_run("rigl", "s2sam", 0), make_run("rigl", "s2sam", 1, sam=sam_options))) == 2


def test_keys_that_an_older_run_lacks_have_their_defaults(make_run):
    new = {"direction": "gradient", "sign": 1, "scale": "norm", "scope": "all", "rho_schedule": "constant"}
    arms = arms_of(make_run("rigl", "s2sam", 0), make_run("rigl", "s2sam", 1, sam=new, evaluate_every=2))
    assert [sorted(arm.runs) for arm in arms] == [[0, 1]]
    idle = new | {"ema_beta": 0.99, "rho_start": 0.5, "stats_every": 0}
    assert len(arms_of(make_run("rigl", "s2sam", 0), make_run("rigl", "s2sam", 1, sam=idle))) == 1
    for change in ({"direction": "ema"}, {"rho_schedule": "late"}):
        runs = [make_run("rigl", "s2sam", seed, sam=s | change) for seed, s in enumerate((new, idle))]
        assert len(arms_of(*runs)) == 2


def test_everything_about_the_displacement_makes_an_arm(make_run):
    options = [
        {"rho_schedule": "late", "rho_start": 0.5},
        {"rho_schedule": "late"},
        {"rho_schedule": "lr"},
        {"direction": "ema", "ema_beta": 0.5},
        {"scope": "norm"},
        {"scale": "step"},
        {"sign": -1},
    ]
    arms = arms_of(make_run("rigl"), *(make_run("rigl", "s2sam", sam=one) for one in options))
    assert len({arm.name for arm in arms}) == len(arms) == 8
    assert "rho_schedule late" in arms[1].treatment and "rho_start 0.5" in arms[1].treatment
    assert {reference_of(arm, arms).treatment for arm in arms[1:]} == {"SGD"}


def test_arms_that_share_a_name_are_told_apart(make_run):
    arms = arms_of(make_run("rigl"), make_run("rigl", "s2sam", rho=0.05), make_run("rigl", "s2sam", rho=0.1))
    assert [arm.treatment for arm in arms] == ["SGD", "S2-SAM (rho 0.05)", "S2-SAM (rho 0.1)"]
    uniform = {"distribution": "uniform", "options": {}}
    arms = arms_of(make_run("rigl"), make_run("rigl", sparse=uniform), make_run("rigl", sparsity=0.95))
    assert [arm.base for arm in arms] == [
        "RigL 90 % (distribution erk)",
        "RigL 90 % (distribution uniform)",
        "RigL 95 %",
    ]


@pytest.mark.parametrize(
    "change", [{"lr": 0.05}, {"epochs": 4}, {"batch_size": 32}, {"model": "resnet20"}, {"data": "elsewhere"}]
)
def test_unmatched_settings_are_refused(make_run, change):
    first, second = make_run("rigl"), make_run("rigl", "s2sam", **change)
    key, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{key} is .* in the first and {value!r} in the second") as caught:
        arms_of(first, second)
    assert str(first) in str(caught.value) and str(second) in str(caught.value)


def test_another_weight_decay_in_one_arm_is_refused(make_run):
    optim = {"name": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 0.0001}
    with pytest.raises(ValueError, match=r"optim\.weight_decay is 0\.0005 in the first and 0\.0001"):
        arms_of(make_run("rigl"), make_run("rigl", "s2sam", optim=optim))


def with_final(folder, **values):
    path = folder / "metrics.jsonl"
    *rest, last = path.read_text().splitlines()
    path.write_text("\n".join([*rest, json.dumps(json.loads(last) | values)]) + "\n")
    return folder


def test_other_data_is_refused_but_each_seed_may_have_its_split(make_run):
    digests = {("none", 0): "a", ("none", 1): "b", ("s2sam", 0): "a", ("s2sam", 1): "b"}
    folders = [with_final(make_run("rigl", sharpness, seed), data_digest=d) for (sharpness, seed), d in digests.items()]
    assert len(arms_of(*folders)) == 2
    with_final(folders[-1], data_digest="c")
    with pytest.raises(ValueError, match="trained on different data"):
        arms_of(*folders)
    with pytest.raises(ValueError, match="number of test images is 360 in the first and 100"):
        arms_of(folders[0], with_final(folders[1], test_images=100))


def test_one_run_twice_is_refused(make_run):
    with pytest.raises(ValueError, match="same arm and seed"):
        arms_of(make_run(seed=1), make_run(seed=1))


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}}, "d": [1], "e": {}}) == {"a.b.c": 1, "d": [1], "e": {}}
