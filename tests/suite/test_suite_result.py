"""The written table equals numbers worked out by hand; what the runs are not is said on it."""

from __future__ import annotations

import csv
import io
import re

import pytest

from s2sam.data import load_data
from s2sam.suite.execute import run_plan
from s2sam.suite.page import render
from s2sam.suite.plan import make_plan
from s2sam.suite.result import build_accuracy
from s2sam.suite.schema import parse_suite
from s2sam.suite.text import cells_csv, runs_csv, to_markdown, to_rich
from s2sam.suite.write import write_table

TOP1 = {("SGD", 0): 0.90, ("SGD", 1): 0.92, ("S2-SAM", 0): 0.91, ("S2-SAM", 1): 0.95}


@pytest.fixture
def table_of(invented):
    """`table_of(plan)` -> its table with the accuracies above in every cell."""
    return lambda plan, top1=TOP1: build_accuracy(
        plan, {p: invented(p, top1[p.column, p.config.seed]) for p in plan.runs()}, {}
    )


def test_every_format_holds_the_numbers_worked_out_by_hand(small, plan_of, tmp_path, table_of):
    # SGD: 91 +- 1.414; S2-SAM: 93 +- 2.828; differences 1 and 3: mean 2, sd sqrt(2), t(0.975, 1) = 12.7062
    # half width = 12.7062 * sqrt(2) / sqrt(2) = 12.7062
    table = table_of(plan_of(small))
    text = "93.00 +- 2.83 (+2.00 [-10.71, +14.71])"
    line = next(line for line in to_markdown(table).splitlines() if line.startswith("| Static"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["Static", "91.00 +- 1.41", text, "2"]
    sgd, s2sam, pooled = csv.DictReader(io.StringIO(cells_csv(table)))
    assert (float(sgd["value"]), float(sgd["sd"]), sgd["difference"], sgd["seeds"]) == (
        pytest.approx(0.91), pytest.approx(0.0141421, abs=1e-6), "", "0 1",
    )  # fmt: skip
    for row in (s2sam, pooled):  # one cell: pooled is the cell
        assert float(row["difference"]) == pytest.approx(0.02)
        assert (float(row["low"]), float(row["high"])) == pytest.approx((-0.107062, 0.147062), abs=1e-6)
    assert [float(row["test_top1"]) for row in csv.DictReader(io.StringIO(runs_csv(table)))] == [0.90, 0.91, 0.92, 0.95]
    page = render(table, how="s2sam table here")
    assert "93.00 &plusmn; 2.83<small>+2.00 [-10.71, +14.71]</small>" in page
    assert "<pre>s2sam table here</pre>" in page
    paths = write_table(table, tmp_path / "written")
    assert [path.name for path in paths] == ["table.md", "table.csv", "runs.csv", "table.html"]
    assert (tmp_path / "written" / "table.md").read_text() == to_markdown(table)


def test_the_page_needs_nothing_from_elsewhere(small, plan_of, table_of):
    page = render(table_of(plan_of(small)))
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "<script" not in page
    assert "$" not in page
    assert "--ink:" in page  # the report's style is there


def test_rows_are_methods_and_groups_are_sparsities(small, plan_of, table_of):
    small["rows"]["SET"] = {"method": "set"}
    small["sparsities"] = [0.9, 0.95]
    markdown = to_markdown(table_of(plan_of(small)))
    head, _, *rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.split("|")[1:-1]] == [
        "", "90 %: SGD", "90 %: S2-SAM", "95 %: SGD", "95 %: S2-SAM", "n",
    ]  # fmt: skip
    assert [row.split("|")[1].strip() for row in rows] == ["Static", "SET"]
    assert "S2-SAM minus SGD, mean over 4 cells: +2.00 points" in markdown
    assert "S2-SAM at 95 % minus SGD, mean over 2 cells: +2.00 points" in markdown
    assert "the 4 of the table hold together" in markdown


def test_the_cells_interval_covers_the_whole_table(small, plan_of, table_of):
    one = table_of(plan_of(small)).entries[1].interval
    small["rows"]["SET"] = {"method": "set"}
    two = table_of(plan_of(small)).entries[1].interval
    assert one.half_width == pytest.approx(0.127062, abs=1e-6)
    assert two.half_width == pytest.approx(0.254517, abs=1e-6)  # t(1 - 0.025 / 2, 1) = 25.4517


def test_one_seed_has_no_interval_and_says_so(small, plan_of, table_of):
    markdown = to_markdown(table_of(plan_of(small, seeds=[0])))
    assert "| 91.00 (+1.00) " in markdown
    assert "[" not in markdown.partition("## Notes")[0]
    assert "Fewer than 2 seeds: no interval is printed" in markdown
    assert "no interval" in render(table_of(plan_of(small, seeds=[0])))


def test_missing_rows_stay_in_the_table(small, plan_of, table_of):
    small["rows"]["Some"] = {"method": "some-day"}
    table = table_of(plan_of(small | {"planned": ["some-day"]}))
    assert "Missing: the method some-day does not exist here yet." in to_markdown(table)
    line = next(line for line in to_markdown(table).splitlines() if line.startswith("| Some"))
    assert line.count("missing") == 2
    assert "the method some-day does not exist here yet" in cells_csv(table)
    assert 'class="absent" title="missing: the method some-day' in render(table)
    assert len(list(to_rich(table))) == 1


def test_a_failed_run_takes_its_column_out_and_is_named(small, plan_of, invented):
    small["rows"]["SET"] = {"method": "set"}
    plan = plan_of(small)
    broken = next(p for p in plan.runs() if p.cell.row == "SET" and p.column == "S2-SAM")
    runs = {p: invented(p, TOP1[p.column, p.config.seed]) for p in plan.runs() if p is not broken}
    runs = {p: run for p, run in runs.items() if p.name != broken.name}
    table = build_accuracy(plan, runs, {broken: "RuntimeError: training\n  diverged\n"})
    entry = next(e for e in table.entries if e.cell.row == "SET" and e.column == "S2-SAM")
    assert (entry.center, entry.difference, entry.state) == (None, None, "1 of 2 runs failed")
    assert (table.pooled["S2-SAM"].cells, table.pooled["S2-SAM"].planned) == (1, 2)
    assert "S2-SAM minus SGD, mean over 1 of 2 cells: +2.00 points" in to_markdown(table)
    assert table.comparisons == 1
    assert f"- Failed: {broken.name}: RuntimeError: training diverged\n" in to_markdown(table)
    assert "failed: RuntimeError: training diverged," in runs_csv(table)


def test_without_a_reference_a_cell_is_compared_with_nothing(small, plan_of, invented):
    plan = plan_of(small)
    broken = next(p for p in plan.runs() if p.column == "SGD")
    runs = {p: invented(p, TOP1[p.column, p.config.seed]) for p in plan.runs() if p.name != broken.name}
    table = build_accuracy(plan, runs, {broken: "RuntimeError: training diverged"})
    sgd, s2sam = table.entries
    assert (sgd.center, sgd.state) == (None, "1 of 2 runs failed")
    assert (s2sam.center, s2sam.difference) == (pytest.approx(0.93), None)
    assert (table.pooled, table.comparisons) == ({}, 0)


def test_several_versions_or_data_are_said_on_the_table(small, plan_of, invented):
    plan = plan_of(small)
    runs = {p: invented(p, TOP1[p.column, p.config.seed]) for p in plan.runs()}
    assert "All runs were made by s2sam 0.1.0, torch 2.13.0, commit c0ffee." in build_accuracy(plan, runs, {}).notes
    first, second, *_ = runs
    runs[first] = invented(first, 0.9, env={"git_commit": "beef-dirty"})
    runs[second] = invented(second, 0.91, data_digest="d2")
    notes = " ".join(build_accuracy(plan, runs, {}).notes)
    assert "made by 2 versions of the code: s2sam 0.1.0, torch 2.13.0, commit beef-dirty (1 runs); s2sam 0.1.0" in notes
    assert "trained on 2 different sets of images: d1 (3 runs), d2 (1 runs)" in notes
    assert "kinds of machine" not in notes
    assert "A commit marked -dirty does not say which code ran" in notes


def test_a_dirty_tree_is_not_told_by_its_commit(small, plan_of, invented):
    plan = plan_of(small)
    clean, dirty = (
        build_accuracy(plan, {p: invented(p, 0.9, env={"git_commit": commit}) for p in plan.runs()}, {}).notes
        for commit in ("c0ffee", "c0ffee-dirty")
    )
    assert "All runs were made by s2sam 0.1.0, torch 2.13.0, commit c0ffee-dirty." in dirty
    sentences = [note for note in dirty if note.startswith("A commit marked -dirty does not say which code ran")]
    assert len(sentences) == 1 and "two such trees look alike here" in sentences[0]
    assert not any("dirty" in note for note in clean)


def test_images_that_were_kept_back_are_said(small, plan_of, invented):
    small["blocks"] = {name: {"data": "digits"} for name in ("CIFAR-10", "CIFAR-100", "part")}
    small["base"]["data_options"] = {}
    small["blocks"]["part"]["data_options.train_size"] = 200
    plan = plan_of(small)
    trained = {"CIFAR-10": 45_000, "CIFAR-100": 45_000, "part": 200}
    runs = {p: invented(p, 0.9, train_images=trained[p.cell.block]) for p in plan.runs()}
    note = next(note for note in build_accuracy(plan, runs, {}).notes if note.startswith("Images"))
    assert note.startswith(
        "Images: 45,000 for training and 5,000 (10 % of all) kept for validation in CIFAR-10, CIFAR-100; 200 for "
        "training and 10 % of all kept for validation in part. Published numbers normally come from training on all"
    )
    small["base"]["data_options"] = {"val_fraction": 0.0}
    plan = plan_of(small)
    runs = {p: invented(p, 0.9, train_images=50_000) for p in plan.runs()}
    assert not any(note.startswith("Images") for note in build_accuracy(plan, runs, {}).notes)


def test_the_note_on_images_counts_those_of_a_run(small, plan_of, console):
    small["base"]["data_options"] = {}
    plan = plan_of(small, seeds=[0])
    table = run_plan(plan, console=console)
    data = load_data("digits")
    sentence = f"Images: {len(data.train_x):,} for training and {len(data.val_x)} (10 % of all) kept for validation"
    assert any(note.startswith(sentence) for note in table.notes)


def test_a_run_that_went_on_elsewhere_says_so(small, plan_of, invented):
    plan = plan_of(small)
    runs = {p: invented(p, TOP1[p.column, p.config.seed]) for p in plan.runs()}
    first, second, *_ = runs
    old = {"versions": {"s2sam": "0.1.0", "torch": "2.13.0"}, "git_commit": "c0ffee", "hardware": {"cpu": "A"}}
    runs[first] = invented(first, 0.9, env=old | {"resumed": [old, old | {"git_commit": "beef"}]})
    runs[second] = invented(second, 0.91, env={"hardware": {"cpu": "A", "gpu": "B"}})
    notes = " ".join(build_accuracy(plan, runs, {}).notes)
    assert "made by 2 versions of the code: s2sam 0.1.0, torch 2.13.0, commit c0ffee, then s2sam 0.1.0, torch" in notes
    assert "3 kinds of machine, which round differently: A (1 runs); B (1 runs); unknown (2 runs)" in notes


def test_another_sparsity_than_that_of_the_cell_is_said(small, plan_of, invented):
    plan = plan_of(small)
    runs = {p: invented(p, TOP1[p.column, p.config.seed]) for p in plan.runs()}
    assert not any("another sparsity" in note for note in build_accuracy(plan, runs, {}).notes)
    first = next(iter(runs))
    runs[first] = invented(first, 0.9, sparsity=0.893)
    assert (
        "Ended at another sparsity than that of their cell: digits, Static 90 %, SGD: 89.30 %."
        in build_accuracy(plan, runs, {}).notes
    )


def linked(small, plan_of, table_of, effect, noise):
    """A table of 3 rows and 3 seeds; the difference is `effect` plus that of the seed plus a little that alternates."""
    small["rows"] |= {"SET": {"method": "set"}, "RigL": {"method": "rigl"}}
    small["seeds"] = [0, 1, 2]
    plan = plan_of(small)
    table = {("SGD", s): 0.5 for s in small["seeds"]} | {("S2-SAM", s): 0.5 + effect + noise[s] for s in range(3)}
    return table_of(plan, table)


def test_a_difference_that_only_holds_if_cells_are_independent_is_said_so(small, plan_of, table_of):
    # three equal cells: the first interval is 1 +- 2.45 * .02 / 3 * ..., the second that of one cell, df 2
    table = linked(small, plan_of, table_of, 0.01, [-0.01, 0.0, 0.01])
    pooled, cell = table.pooled["S2-SAM"], table.entries[1].paired
    assert pooled.correlation == pytest.approx(1.0)
    assert pooled.over_seeds.half_width == pytest.approx(cell.interval.half_width)
    assert pooled.interval.low > 0 > pooled.over_seeds.low and pooled.shows == 0
    sentence = next(line for line in to_markdown(table).splitlines() if "minus SGD" in line)
    assert sentence == (
        "- S2-SAM minus SGD, mean over 3 cells: +1.00 points, 95 % interval [+0.18, +1.82], df 6, if the cells are "
        "independent, and [-1.48, +3.48], df 2, whatever links them; their correlation over seeds is 1.00: higher if "
        "they are, else not shown."
    )
    row = next(row for row in csv.DictReader(io.StringIO(cells_csv(table))) if row["block"] == "pooled")
    assert (float(row["low_over_seeds"]), row["shows"]) == (pytest.approx(-0.014841, abs=1e-6), "0")
    sure = linked(small, plan_of, table_of, 0.05, [-0.01, 0.0, 0.01])
    assert sure.pooled["S2-SAM"].shows == 1
    assert "whatever links them; their correlation over seeds is 1.00: higher." in to_markdown(sure)


def test_a_badly_tuned_reference_is_called_out_at_full_budget(small, tmp_path, table_of):
    small["tripwires"] = {"digits": {"Static": [95.0]}}
    small["budgets"] = {"smoke": {}}
    suite = parse_suite(small)
    full, smoke = (table_of(make_plan(suite, budget=budget, out=tmp_path)) for budget in ("full", "smoke"))
    assert any(
        note.startswith("Tripwire: digits, Static 90 %, SGD reaches 91.00 %, below the 95 %") for note in full.notes
    )
    assert not any(note.startswith("Tripwire") for note in smoke.notes)
    assert "1 SGD are below what a well-tuned pipeline reaches, so nothing below counts" in render(full)
    assert "nothing below counts" not in render(smoke)


def test_impossible_differences_are_cut_off(small, plan_of, table_of):
    wild = {("SGD", 0): 0.1, ("SGD", 1): 0.9, ("S2-SAM", 0): 0.9, ("S2-SAM", 1): 0.1}
    interval = table_of(plan_of(small), wild).entries[1].interval
    assert (interval.low, interval.high) == (-1.0, 1.0)


def test_scaling_and_stand_in_are_printed_on_the_table(small, plan_of, table_of):
    small["base"]["epochs"] = 100
    small["base"]["data"] = "cifar10"
    small["budgets"] = {"smoke": {"seeds": 2, "set": {"epochs": 1}, "stand_in": {"data": "digits"}}}
    markdown = to_markdown(table_of(plan_of(small, budget="smoke")))
    assert (
        "Scaled by --budget smoke or by --set, so these are not the numbers of Table 0: "
        "data cifar10 -> digits; epochs 100 -> 1." in markdown
    )
    assert "Fewer epochs reward fast optimisation" in markdown
    assert "stand in for the data of the table" in markdown
    assert "nothing below is evidence" in render(table_of(plan_of(small, budget="smoke")))
    assert "nothing below is evidence" not in render(table_of(plan_of(small | {"base": {}})))
    assert "they differ in sharpness, rho and sam.* only. Nothing was tuned" in markdown


def test_a_baseline_is_named_where_the_columns_are_called_matched(small, plan_of, invented):
    small["columns"]["Nesterov"] = {"sharpness": "none", "optim.nesterov": True}
    plan = plan_of(small | {"baselines": ["Nesterov"]})
    notes = build_accuracy(plan, {p: invented(p, 0.9) for p in plan.runs()}, {}).notes
    assert any(
        "they differ in sharpness, rho and sam.* only, and Nesterov (another plain optimizer, as a baseline) in "
        "optim.nesterov. Nothing was tuned" in note
        for note in notes
    )


def test_a_column_beside_those_of_the_paper_is_marked_and_compared(small, plan_of, table_of):
    small["columns"]["Echo"] = {"sharpness": "echo", "rho": 0.04}
    small["rows"]["SET"] = {"method": "set"}
    top1 = TOP1 | {("Echo", 0): 0.93, ("Echo", 1): 0.93}  # minus SGD: 3 and 1, mean 2
    table = table_of(plan_of(small | {"not_in_paper": ["Echo"]}), top1)
    markdown, page = to_markdown(table), render(table)
    head, _, first, _ = [line for line in markdown.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.split("|")[2:-2]] == [
        "90 %: SGD",
        "90 %: S2-SAM",
        "90 %: Echo (not in the paper)",
    ]
    assert first.split("|")[4].strip() == "93.00 +- 0.00 (+2.00 [-48.92, +52.92])"  # t(1 - .05 / 4 / 2, 1) = 50.9
    assert "Columns: SGD and S2-SAM as in Table 0 of the paper." in markdown
    assert "compare with: Echo (left out by --columns SGD S2-SAM)" in markdown
    assert "Echo minus SGD, mean over 2 cells: +2.00 points" in markdown
    assert "order of the data (each batch twice in a row: Echo), learning rate" in markdown
    assert "an epoch has as many steps as in the other columns" in markdown
    assert '<th scope="col">Echo<small>not in the paper</small></th>' in page
    assert '<th scope="col">S2-SAM</th>' in page
    assert "SGD, S2-SAM and Echo, in rows of methods and groups of sparsities. Echo is not in the paper.</p>" in page
    assert "93.00 &plusmn; 0.00<small>+2.00 [-48.92, +52.92]</small>" in page
    lines = list(csv.DictReader(io.StringIO(cells_csv(table))))
    assert {(line["column"], line["in_paper"]) for line in lines} == {("SGD", "yes"), ("S2-SAM", "yes"), ("Echo", "no")}
    assert {line["difference"] for line in lines if line["column"] == "Echo"} == {"0.020000000000000018"}
    assert to_rich(table)[0].columns[3].header == "Echo (not in the paper)"


def test_without_such_columns_nothing_is_said_of_a_paper_or_of_echo(small, plan_of, table_of):
    markdown = to_markdown(table_of(plan_of(small)))
    assert not re.search("not in the paper|Columns:|twice in a row", markdown)
    lines = csv.DictReader(io.StringIO(cells_csv(table_of(plan_of(small | {"paper": ""})))))
    assert {line["in_paper"] for line in lines} == {""}


def test_the_pooled_lines_of_single_sparsities_know_their_column(small, plan_of, table_of):
    small["columns"]["Echo at half"] = small["columns"].pop("S2-SAM")
    top1 = {(name.replace("S2-SAM", "Echo at half"), seed): value for (name, seed), value in TOP1.items()}
    plan = plan_of(small | {"sparsities": [0.9, 0.95], "not_in_paper": ["Echo at half"]})
    lines = list(csv.DictReader(io.StringIO(cells_csv(table_of(plan, top1)))))
    assert [line["in_paper"] for line in lines if line["block"] == "pooled"] == ["no"] * 3


def test_a_table_of_the_reference_alone_compares_nothing_and_says_so(small, plan_of, table_of):
    page = render(table_of(plan_of(small | {"budgets": {"full": {"columns": ["SGD"]}}})))
    assert "SGD is the only column, so nothing is compared." in page
    assert "last epoch: SGD, in rows" in page
