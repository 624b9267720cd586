"""The keys of a table: each typo is answered with the nearest valid name, each impossible value with a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from s2sam.registry import list_methods
from s2sam.sam.single_step import ECHO_RHO, ECHO_SCALE
from s2sam.suite.plan import make_plan
from s2sam.suite.schema import KEYS, is_path, load_suite, parse_suite, tables
from s2sam.suite.tuned import check_tuned

RESULTS = Path(__file__).parents[2] / "results"
COMMITTED = [path for path in sorted(RESULTS.glob("*/*.yaml")) if "columns" in yaml.safe_load(path.read_text())]


@pytest.mark.parametrize("name", sorted(tables()))
def test_every_table_of_the_package_is_whole(name):
    suite = load_suite(name)
    assert suite.description
    assert suite.paper == f"Table {name}"
    assert set(suite.budgets) == {"full", "short", "smoke"}
    assert suite.budgets["smoke"].stand_in["data"] == "digits"
    assert suite.columns[suite.reference]["sharpness"] == "none"
    assert min(suite.seeds) >= 1000  # seeds below 100 screen settings


def test_table_1_has_the_structure_of_the_paper():
    suite = load_suite("1")
    assert list(suite.blocks) == ["CIFAR-10", "CIFAR-100"]
    assert suite.sparsities == (0.9, 0.95, 0.98)
    assert {"LT", "SNIP", "GraSP", "SET", "DSR", "RigL", "MEST (EM)"} <= set(suite.rows)
    assert list(suite.columns) == ["Original", "SAM", "S2-SAM", "Echo"]


@pytest.mark.parametrize("name", sorted(tables()))
def test_every_table_has_echo_beside_the_columns_of_the_paper(name):
    suite = load_suite(name)
    assert suite.not_in_paper == ("Echo",) and list(suite.columns)[-1] == "Echo"
    column = suite.columns["Echo"]
    assert (column["sharpness"], column["rho"], column["sam.scale"]) == ("echo", ECHO_RHO, ECHO_SCALE)
    without = suite.columns if suite.tuned is None else suite.tuned.grids
    assert set(without) == set(suite.columns)
    if suite.tuned is not None:
        assert ECHO_RHO in suite.tuned.grids["Echo"]["rho"]


@pytest.mark.parametrize("name", sorted(tables()))
def test_s2sam_is_that_of_the_paper_whatever_the_defaults_become(name):
    column = load_suite(name).columns["S2-SAM"]
    assert (column["sam.direction"], column["sam.sign"], column["sam.scale"], column["rho"]) == (
        "gradient",
        1,
        "norm",
        0.05,
    )


@pytest.mark.parametrize("name", sorted(tables()))
@pytest.mark.parametrize("budget", ["full", "short", "smoke"])
def test_the_tables_let_filters_run_empty_as_published(name, budget):
    plan = make_plan(load_suite(name), budget=budget, read_only=True)
    takes = {row.name for row in list_methods() if "min_per_filter" in row.defaults}
    for cell in plan.cells:
        config = plan.config(cell, plan.suite.reference, 0)
        expected = 0 if config.method in takes else None
        assert config.method_options.get("min_per_filter") == expected, cell.label


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_studies_say_what_filters_keep(path):
    """So that a default cannot change what a study's command would do."""
    suite = load_suite(str(path))
    plan = make_plan(suite, mode="tuned" if suite.tuned else "matched", read_only=True)
    guarded = {row.name for row in list_methods() if row.defaults.get("min_per_filter")}
    for cell in plan.cells:
        config = plan.config(cell, plan.suite.reference, 0)
        assert config.method not in guarded or "min_per_filter" in config.method_options, cell.label


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"colums": {}}, "unknown key 'colums'; did you mean 'columns'?"),
        ({"rows": {"RigL": {"method": "riggl"}}}, "unknown method 'riggl'; did you mean 'rigl'?"),
        ({"rows": {"RigL": {"metod": "rigl"}}}, "unknown key 'metod' in the row RigL; did you mean 'method'?"),
        ({"base": {"model": "resnet23"}}, "unknown model 'resnet23'; did you mean"),
        ({"base": {"data": "cifar1"}}, "unknown data 'cifar1'; did you mean 'cifar10'?"),
        ({"planned": "chase"}, "planned must be a list"),
        ({"tripwires": {"digits": {"Static": ["high"]}}}, "need one accuracy in % for each sparsity"),
        ({"measure": "acuracy"}, "unknown measure 'acuracy'; did you mean 'accuracy'?"),
        ({"reference": "SDG"}, "unknown reference column 'SDG'; did you mean 'SGD'?"),
        ({"budgets": {"smok": {}}}, "unknown budget 'smok'; did you mean 'smoke'?"),
        ({"budgets": {"smoke": {"seed": 2}}}, "unknown key of the budget smoke 'seed'; did you mean 'seeds'?"),
        ({"budgets": {"smoke": {"rows": ["Statik"]}}}, "did you mean 'Static'?"),
        ({"budgets": {"smoke": {"sparsities": [0.8]}}}, "names the sparsity 0.8"),
        ({"budgets": {"smoke": {"seeds": 0}}}, "seeds of the budget smoke must be a whole number of at least 1"),
        ({"budgets": {"smoke": {"set": {"epoch": 1}}}}, "in set of smoke; did you mean 'epochs'?"),
        ({"tuned": {"seeds": [5], "grids": {"SGDD": {}}}}, "did you mean 'SGD'?"),
        ({"tuned": {"seeds": [5], "grids": {"SGD": {"lr": 0.1}}}}, "must be a list"),
        ({"tuned": {"seeds": [5], "grids": {"SGD": {"lr": []}}}}, "lr in the grid of SGD names no value"),
        ({"tripwires": {"digits": {"Static": [90.0, 91.0]}}}, "need one accuracy in % for each sparsity"),
        ({"baselines": ["Nesterov"]}, "unknown column of baselines 'Nesterov'"),
        ({"not_in_paper": ["S2SAM"]}, "unknown column of not_in_paper 'S2SAM'; did you mean 'S2-SAM'?"),
        ({"not_in_paper": ["S2-SAM"], "paper": ""}, "not_in_paper needs the key paper"),
        (
            {"budgets": {"smoke": {"columns": ["SGDD"]}}},
            "unknown column in the budget smoke 'SGDD'; did you mean 'SGD'",
        ),
        ({"seeds": [1, 1]}, "none twice"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": ["a"]}, "whole number"),
        ({"sparsities": [1.0]}, "at least 0 and below 1"),
        ({"sparsities": 0.9}, "must be a list"),
        ({"rows": {}}, "at least one row"),
        ({"rows": ["rigl"]}, "must be `key: value` pairs"),
    ],
)
def test_mistakes_are_a_sentence(small, change, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        parse_suite(small | change)


@pytest.mark.parametrize("key", ["title", "rows", "sparsities", "columns", "reference", "seeds"])
def test_a_key_that_is_needed_is_named(small, key):
    del small[key]
    with pytest.raises(ValueError, match=f"lacks the key {key}"):
        parse_suite(small)


def test_a_file_that_is_no_text_is_one_sentence(tmp_path):
    (tmp_path / "t.yaml").write_bytes(b"\xff\xfe\x00title")
    with pytest.raises(ValueError, match=r"t.yaml is no text in UTF-8"):
        load_suite(tmp_path / "t.yaml")


def test_a_planned_name_is_no_typo(small):
    small["rows"]["New"] = {"method": "brandnew"}
    with pytest.raises(ValueError, match="name it in `planned`"):
        parse_suite(small)
    assert parse_suite(small | {"planned": ["brandnew"]}).rows["New"] == {"method": "brandnew"}


def test_the_example_in_the_docs_is_a_table_and_shows_every_key():
    text = (Path(__file__).parents[2] / "docs" / "tables.md").read_text()
    content = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1))
    suite = parse_suite(content)
    assert set(content) == set(KEYS) - {"paper", "not_in_paper"}  # which need a paper, and stand below it
    assert "`paper:" in text and "`not_in_paper:" in text
    assert suite.blocks["mine"]["data"] == "./my-images"
    check_tuned(suite)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_tables_of_the_committed_results_still_load(path, tmp_path):
    suite = load_suite(path)
    options = {"out": tmp_path, "read_only": True, "data": dict.fromkeys(needed(suite), "digits")}
    for mode in ("matched", "tuned") if suite.tuned else ("matched",):
        if path.stem == "confirm" and mode == "matched":  # its reference is Nesterov, its other columns are not
            with pytest.raises(ValueError, match=r"optim\.nesterov.*use --mode tuned"):
                make_plan(suite, mode=mode, **options)
        else:
            assert make_plan(suite, mode=mode, **options).runnable


def needed(suite):
    """The names, not paths, of its data."""
    return {str(block["data"]) for block in suite.blocks.values() if not is_path(str(block["data"]))}


def test_files_that_are_no_table(tmp_path):
    with pytest.raises(ValueError, match="there is no table at"):
        load_suite(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("title: [\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_suite(bad)
    bad.write_text("just a text\n")
    with pytest.raises(ValueError, match="must be `key: value` pairs"):
        load_suite(bad)
    with pytest.raises(ValueError, match="unknown table '7'"):
        load_suite("7")
