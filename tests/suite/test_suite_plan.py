"""From a table to runs: matched columns only, what is missing is named, what was scaled is listed."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from s2sam.suite.matched import check_matched
from s2sam.suite.plan import make_plan, slug
from s2sam.suite.schema import load_suite, tables
from s2sam.train.config import TrainConfig
from s2sam.train.state import build


def test_every_cell_column_and_seed_is_one_run(small, plan_of):
    small["rows"]["RigL"] = {"method": "rigl"}
    small["sparsities"] = [0.9, 0.95]
    runs = plan_of(small).runs()
    assert len(runs) == 2 * 2 * 2 * 2
    assert len({p.name for p in runs}) == len(runs)
    first = runs[0].config
    assert (first.method, first.sparsity, first.sharpness, first.seed, first.epochs) == ("static", 0.9, "none", 0, 1)
    assert runs[0].name == "digits_static_90_sgd_seed0"
    assert {p.config.rho for p in runs if p.column == "S2-SAM"} == {0.05}


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"lr": 0.2}, "lr is 0.1 in SGD and 0.2 in S2-SAM"),
        ({"optim.weight_decay": 1e-4}, "optim.weight_decay"),
        ({"epochs": 2}, "epochs"),
        ({"optim.nesterov": True}, "optim.nesterov"),
        ({"data_options.split_seed": 1}, "data_options.split_seed"),
        ({"batch_size": 32}, "batch_size"),
        ({"model_options": {"width": 1.0}}, "model_options"),
    ],
)
def test_unmatched_columns_are_refused_with_the_key(small, plan_of, settings, key):
    small["columns"]["S2-SAM"] |= settings
    with pytest.raises(ValueError, match="unmatched columns.*in mode matched") as error:
        plan_of(small)
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"epochs": 3}, "epochs is 1 in SGD and 3 in S2-SAM"),
        ({"data_options.train_size": 400}, "data_options.train_size is 200 in SGD and 400 in S2-SAM"),
        ({"model_options": {"width": 1.0}}, "model_options.width"),
        ({"data_options.split_seed": 1}, "data_options.split_seed"),
        ({"batch_size": 32}, "batch_size"),
        ({"method": "rigl"}, "method"),
        ({"sparse.options": {"delta_t": 5}}, "sparse.options"),
    ],
)
def test_mode_tuned_refuses_what_no_search_could_tune(small, plan_of, settings, key):
    small["columns"]["S2-SAM"] |= settings
    with pytest.raises(ValueError, match="unmatched columns.*in mode tuned") as error:
        plan_of(small, mode="tuned")
    assert key in str(error.value)


def test_mode_tuned_leaves_the_treatment_and_what_a_grid_may_hold_free(small, plan_of):
    own = {"lr": 0.2, "optim.weight_decay": 1e-4, "optim.nesterov": True, "schedule.warmup_epochs": 0.5, "sam.sign": -1}
    small["columns"]["S2-SAM"] |= own
    config = plan_of(small, mode="tuned").runs()[1].config
    assert (config.lr, config.optim.weight_decay, config.optim.nesterov) == (0.2, 1e-4, True)
    assert (config.schedule.warmup_epochs, config.sam.sign) == (0.5, -1)


@pytest.mark.parametrize("mode", ["matched", "tuned"])
def test_a_baseline_is_a_plain_optimizer(small, plan_of, mode):
    small["columns"]["S2-SAM"]["optim.nesterov"] = True
    with pytest.raises(ValueError, match="S2-SAM in `baselines` has sharpness s2sam"):
        plan_of(small | {"baselines": ["S2-SAM"]}, mode=mode)


@pytest.mark.parametrize("mode", ["matched", "tuned"])
@pytest.mark.parametrize("name", sorted(tables()))
def test_the_columns_of_every_table_of_the_package_are_fit_for_its_modes(name, mode):
    suite = load_suite(name)
    for budget in suite.budgets:
        assert make_plan(suite, budget=budget, mode=mode, read_only=True).cells


@pytest.mark.parametrize("name", tables())
def test_all_columns_take_fused_steps(name):
    """Without them S2-SAM, as its column only, would wait for a GPU in every step."""
    runs = make_plan(load_suite(name), budget="smoke").runs()
    assert runs and all(planned.config.optim.fused for planned in runs)


def test_the_treatment_may_differ_and_a_declared_baseline_may_use_nesterov(small, plan_of):
    small["columns"]["S2-SAM"] |= {"sam.sign": -1, "sam.direction": "momentum", "rho": 0.2}
    small["columns"]["Nesterov"] = {"sharpness": "none", "optim.nesterov": True}
    with pytest.raises(ValueError, match="optim.nesterov is False in SGD and True in Nesterov"):
        plan_of(small)
    runs = plan_of(small | {"baselines": ["Nesterov"]}).runs()
    assert {p.column: p.config.optim.nesterov for p in runs} == {"SGD": False, "S2-SAM": False, "Nesterov": True}


@pytest.mark.parametrize("name", sorted(tables()))
def test_echo_has_as_many_runs_as_every_column_and_as_many_epochs(name):
    runs = make_plan(load_suite(name), budget="smoke").runs()
    by_column = {}
    for planned in runs:
        by_column.setdefault(planned.column, []).append(planned)
    assert set(by_column) == set(load_suite(name).columns)
    for echo, plain in zip(by_column["Echo"], by_column["Original"], strict=True):
        assert (echo.cell, echo.config.seed, echo.config.epochs) == (plain.cell, plain.config.seed, plain.config.epochs)
        assert (echo.config.visits, plain.config.visits) == (2, 1)
    shape = {"1": 30 * 2, "A.1": 30 * 2, "2": 28 * 2, "3": 4 * 2, "4": 5, "5": 4 * 2, "6": 2}
    assert len(by_column["Echo"]) == shape[name] and len(runs) == shape[name] * len(by_column)


@pytest.mark.parametrize("mode", ["matched", "tuned"])
def test_an_echo_column_passes_and_has_the_same_batches_twice_in_a_row(small, plan_of, mode):
    """In as many steps it takes the first half of the batches of the others, in their order and augmented alike."""
    small["base"]["data_options"] |= {"train_size": 180, "augment": "crop", "mixup": 0.2}
    small["base"]["epochs"] = 2
    small["columns"]["Echo"] = {"sharpness": "echo", "rho": 0.04}
    taken, steps = {}, {}
    for planned in plan_of(small, mode=mode, seeds=[0]).runs():
        state = build(planned.config)
        steps[planned.column] = state.n_steps
        taken[planned.column] = [state.mix(*batch) for _ in range(2) for batch in state.batches]
    assert steps["Echo"] == steps["SGD"] == len(taken["Echo"]) == len(taken["SGD"])
    assert len(taken["SGD"]) == 6  # two epochs of three batches
    for step, (x, y) in enumerate(taken["Echo"]):
        assert torch.equal(x, taken["SGD"][step // 2][0]) and torch.equal(y, taken["SGD"][step // 2][1])
    assert not torch.equal(taken["SGD"][0][0], taken["SGD"][1][0])


def test_columns_may_be_left_out(small, plan_of):
    small["columns"] |= {"Echo": {"sharpness": "echo"}, "Nesterov": {"sharpness": "none", "optim.nesterov": True}}
    grids = {name: {"lr": [0.1, 0.2]} for name in small["columns"]}
    small |= {"baselines": ["Nesterov"], "not_in_paper": ["Echo"], "tuned": {"seeds": [7], "grids": grids}}
    every = ["SGD", "S2-SAM", "Echo", "Nesterov"]
    for kept, said in (
        (every, ()),
        (["SGD", "S2-SAM", "Nesterov"], ()),  # those of the paper: nothing was scaled
        (["S2-SAM", "SGD"], ("columns S2-SAM, SGD of SGD, S2-SAM, Echo, Nesterov",)),
        (["SGD", "Echo"], ("columns SGD, Echo of SGD, S2-SAM, Echo, Nesterov",)),
    ):
        for mode, most in (("matched", 2), ("tuned", 2)):
            plan = plan_of(small | {"budgets": {"full": {"columns": kept}}}, mode=mode)
            names = [name for name in every if name in kept]
            assert list(plan.suite.columns) == list(plan.suite.tuned.grids) == names
            assert [planned.column for planned in plan.runs()] == names * most
            assert plan.scaled == said
            assert plan.suite.not_in_paper == (("Echo",) if "Echo" in kept else ())
    with pytest.raises(ValueError, match="the columns S2-SAM lack SGD, with which the others are compared; name it"):
        plan_of(small | {"budgets": {"full": {"columns": ["S2-SAM"]}}})


def test_seeds_must_match_as_well():
    with pytest.raises(ValueError, match="seed is 0 in A and 1 in B"):
        check_matched({"A": TrainConfig(seed=0), "B": TrainConfig(seed=1)}, "A")


def test_missing_things_are_named_and_the_rest_runs(small, plan_of):
    small["rows"] |= {"Some": {"method": "some-day"}, "Big": {"method": "static", "model": "resnet1000"}}
    small["planned"] = ["some-day", "resnet1000", "imagenet"]
    small["blocks"]["ImageNet"] = {"data": "imagenet"}
    plan = plan_of(small)
    assert plan.missing == (
        "the method some-day does not exist here yet",
        "the model resnet1000 does not exist here yet",
        "the data imagenet cannot be fetched by this version; give --data imagenet=FOLDER",
    )
    assert {(cell.block, cell.row) for cell in plan.runnable} == {("digits", "Static")}
    assert len(plan.cells) == 6
    assert len(plan.runs()) == 4


def test_given_data_are_not_missing(small, plan_of, tmp_path):
    small["blocks"] = {"ImageNet": {"data": "imagenet"}}
    plan = plan_of(small | {"planned": ["imagenet"]}, data={"imagenet": "digits"})
    assert plan.missing == ()
    assert {p.config.data for p in plan.runs()} == {"digits"}


@pytest.mark.parametrize("budget", ["full", "short"])
def test_without_data_nothing_but_smoke_begins(budget, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="s2sam data get cifar10.*--data cifar10=FOLDER.*--budget smoke needs no data"):
        make_plan(load_suite("1"), budget=budget)
    with pytest.raises(ValueError, match="there is no data at"):
        make_plan(load_suite("1"), budget=budget, data={"cifar10": "no/such/folder", "cifar100": "digits"})


def test_data_are_looked_for_where_get_puts_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cifar10", "cifar100"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "test.bin").touch()
    plan = make_plan(load_suite("1"), budget="full")
    assert {p.config.data for p in plan.runs()} == {"data/cifar10", "data/cifar100"}
    assert plan.scaled == ()
    assert {(p.config.epochs, p.config.batch_size, p.config.lr) for p in plan.runs()} == {(160, 64, 0.1)}


def test_smoke_says_what_it_scaled():
    plan = make_plan(load_suite("1"), budget="smoke")
    assert {"epochs 160 -> 8", "data cifar10 -> digits", "model resnet32 -> mlp", "seeds 3 -> 2"} <= set(plan.scaled)
    assert "blocks CIFAR-10 of CIFAR-10, CIFAR-100" in plan.scaled
    assert {"rigl.delta_t 100 -> 5", "mest.delta_t 3520 -> 5"} <= set(plan.scaled)
    assert plan.missing == ()


def test_fewer_rounds_of_a_table_of_speed_are_scaled(small, plan_of):
    small |= {"measure": "throughput", "budgets": {"full": {"rounds": 30}, "short": {"rounds": 15}}}
    assert "rounds 30 -> 15" in plan_of(small, budget="short").scaled
    assert plan_of(small).scaled == ()
    assert plan_of(small | {"measure": "accuracy"}, budget="short").scaled == ()


def test_chex_and_chase_change_masks_in_the_smoke_run_of_table_3():
    suite = load_suite("3")
    runs = make_plan(suite, budget="smoke").runs()
    assert {tuple(p.config.method_options.items()) for p in runs} == {
        tuple(p.config.method_options.items()) for p in runs if p.cell.sparsity == 0.9
    }
    planned = {p.config.method: p for p in runs if p.cell.sparsity == 0.9}
    assert set(planned) == {"chex", "chase"}
    for p in planned.values():
        with warnings.catch_warnings():  # of an interval longer than the run
            warnings.simplefilter("error")
            state = build(p.config)
        assert state.n_steps == 168
        assert len(state.sparsifier.grid) > 5  # changes of channels
        assert p.config.method_options["delta_t"] == 20  # of Chase's weights
    full = make_plan(suite, budget="full", data={"imagenet": "digits"}).runs()
    assert {max(p.config.method_options.values()) for p in full} == {10010}


def test_smoke_uses_given_data(tmp_path):
    plan = make_plan(load_suite("1"), budget="smoke", data={"cifar10": "digits"})
    assert {(p.config.model, p.config.epochs) for p in plan.runs()} == {("resnet20", 2)}


def test_nothing_is_missing_without_a_word():
    for name in ("2", "3", "5"):
        plan = make_plan(load_suite(name), budget="smoke")
        assert any("imagenet" in sentence for sentence in plan.missing)
        assert any("imagenet" in sentence for sentence in plan.missing)
    assert any("images GENERATED by s2sam stand here" in sentence for sentence in plan.missing)
    for name in ("2", "3", "5"):
        plan = make_plan(load_suite(name), budget="full", read_only=True)
        assert plan.runnable == [] and all("imagenet" in cell.missing for cell in plan.cells)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget": "smal"}, "unknown budget 'smal'"),
        ({"mode": "tunned"}, "unknown mode 'tunned'; did you mean 'tuned'?"),
        ({"budget": "smoke"}, "declares no budget smoke"),
        ({"data": {"cifar": "x"}}, "unknown data of this table 'cifar'"),
        ({"seeds": [1, 1]}, "none twice"),
    ],
)
def test_wrong_options_are_a_sentence(small, plan_of, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        plan_of(small, **options)


def test_an_impossible_value_names_its_cell(small, plan_of):
    small["columns"]["S2-SAM"]["rho"] = -1
    with pytest.raises(ValueError, match="digits, Static 90 %, S2-SAM: rho must be a number at least 0"):
        plan_of(small)


def test_names_that_would_share_a_folder_are_refused(small, plan_of):
    small["rows"]["static"] = {"method": "magnitude"}
    with pytest.raises(ValueError, match="'Static' and 'static' would share a folder"):
        plan_of(small)
    assert slug("MEST (EM)") != slug("MEST (EM&S)")
