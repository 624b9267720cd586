"""The table says what the intervals say, in every format."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from rich.console import Console

from s2sam.report.arms import group_runs
from s2sam.report.formats import to_csv, to_markdown, to_rich, to_rich_beside
from s2sam.report.read import read_runs
from s2sam.report.tables import NO_DIFFERENCE, build_table, cells, headers, percent


def table_of(make_run, **accuracies):
    """RigL arms with these accuracies by sharpness, one seed each position."""
    folders = [
        make_run("rigl", sharpness, seed, top1=top1)
        for sharpness, values in accuracies.items()
        for seed, top1 in enumerate(values)
    ]
    return build_table(group_runs(read_runs(folders)))


def texts(table, row):
    return list(cells(table, row).values())


def row_of(table, treatment):
    return next(row for row in table.rows if row.arm.treatment == treatment)


def test_numbers_by_hand(make_run):
    table = table_of(make_run, none=[0.90, 0.92, 0.94], s2sam=[0.91, 0.93, 0.97])
    plain, treated = table.rows
    assert plain.mean == pytest.approx(0.92)
    assert plain.deviation == pytest.approx(0.02)
    assert treated.difference.mean == pytest.approx(0.05 / 3)
    assert treated.difference.deviation == pytest.approx(0.011547, abs=1e-6)
    assert treated.difference.interval.half_width == pytest.approx(4.30265 * 0.011547 / 3**0.5, abs=1e-6)
    assert treated.cost.ratio == pytest.approx(1.1)
    assert texts(table, plain)[1:4] == ["92.00", "2.00", "-"]
    assert texts(table, treated)[1:4] == ["93.67", "3.06", "+1.67"]
    assert texts(table, treated)[-4:] == ["3", "360", "1.10x", "90.0"]
    assert table.binomial_error == pytest.approx((0.9283333 * 0.0716667 / 360) ** 0.5, rel=1e-4)


def test_no_superiority_where_the_interval_contains_zero(make_run):
    table = table_of(make_run, none=[0.90, 0.92, 0.94], s2sam=[0.91, 0.93, 0.97], sam=[0.91, 0.92, 0.93])
    assert row_of(table, "S2-SAM").verdict == NO_DIFFERENCE
    assert row_of(table, "SAM").verdict == NO_DIFFERENCE
    for text in (to_markdown(table), to_csv(table)):
        assert not re.search(r"\b(higher|lower|better|worse|improve\w*|gains?)\b", text)


def test_a_clear_difference_is_named_in_its_direction(make_run):
    table = table_of(make_run, none=[0.90, 0.91, 0.92], s2sam=[0.95, 0.961, 0.971], sam=[0.80, 0.811, 0.821])
    assert row_of(table, "S2-SAM").verdict == "higher than SGD"
    assert row_of(table, "SAM").verdict == "lower than SGD"
    assert table.comparisons == 2


def test_the_verdict_goes_by_all_comparisons_together(make_run):
    # differences .020 .020 .0325: t = 5.8, above 4.30 for one comparison and below 6.21 for each of two
    values = {"none": [0.90, 0.91, 0.92], "s2sam": [0.920, 0.930, 0.9525]}
    assert row_of(table_of(make_run, **values), "S2-SAM").verdict == "higher than SGD"
    table = table_of(make_run, **values, sam=[0.9, 0.91, 0.93])
    row = row_of(table, "S2-SAM")
    assert row.difference.interval.low > 0 > row.difference.simultaneous.low
    assert row.verdict == NO_DIFFERENCE


def test_one_seed_and_equal_differences_give_no_interval(make_run):
    table = table_of(make_run, none=[0.9], s2sam=[0.95])
    alone = row_of(table, "S2-SAM")
    assert (alone.verdict, texts(table, alone)[4:6], alone.deviation) == ("no interval from one seed", ["-", "-"], None)
    # six decimals, as a log may keep them: the same number of images each time
    equal = row_of(table_of(make_run, none=[0.944444, 0.947222, 0.95], s2sam=[0.95, 0.952778, 0.955556]), "S2-SAM")
    assert (equal.verdict, equal.difference.interval) == ("no interval (all equal)", None)


def test_seeds_must_match(make_run):
    with pytest.raises(ValueError, match=r"RigL 90 %, S2-SAM and RigL 90 %, SGD: seeds 0, 1 against seeds 0, 1, 2"):
        table_of(make_run, none=[0.9, 0.9, 0.91], s2sam=[0.9, 0.92])


def test_an_arm_without_a_plain_one_is_not_compared(make_run):
    table = table_of(make_run, s2sam=[0.9, 0.91])
    assert table.rows[0].verdict == "nothing to compare with"
    assert table.rows[0].cost.ratio is None
    assert table.comparisons == 0


def test_csv_reads_back(design):
    table = build_table(group_runs(read_runs(design)))
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert [r["arm"] for r in rows] == [row.arm.name for row in table.rows]
    for read, row in zip(rows, table.rows, strict=True):
        assert float(read["test_top1_mean"]) == row.mean
        assert read["seeds"] == "0 1 2"
        assert float(read["sparsity_max"]) == row.sparsity[1]
        assert read["simultaneous_low"] == (
            "" if row.difference is None or not row.difference.simultaneous else str(row.difference.simultaneous.low)
        )


def test_markdown_is_a_table(design):
    table = build_table(group_runs(read_runs(design)))
    lines = to_markdown(table).splitlines()
    assert len({line.count("|") for line in lines[:9]}) == 1
    assert set(lines[1]) == {"|", "-"}
    assert [c.strip() for c in lines[4].strip("|").split("|")] == texts(table, table.rows[2])
    assert "all 4 together" in lines[0] and "vs SGD" in lines[0]
    assert sum("Bonferroni" in line for line in lines) == 1


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_table_loses_no_number(design, width):
    table = build_table(group_runs(read_runs(design)))
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(to_rich(table))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    for row in table.rows:
        line = next(i for i in text.splitlines() if f"{percent(row.mean)} ({percent(row.deviation)})" in i)
        shown = cells(table, row)
        assert [row.arm.treatment, *(shown[k] for k in ("difference", "cost", "dense_cost", "sparsity"))] == [
            line.split()[i] for i in (0, 3, -3, -2, -1)
        ]
        assert row.verdict in " ".join(text.split()) or width < 100
    assert "…" not in text
    assert list(headers(table)) == list(cells(table, table.rows[0]))


def test_percent_has_no_negative_zero():
    assert percent(-0.00001, sign=True) == "0.00"
    assert percent(0.0, sign=True) == "+0.00"
    assert percent(-0.05, 1, sign=True) == "-5.0"


def with_beside(make_run, sharpness, seed, top1, **beside):
    """A run with further numbers in its final record."""
    folder = make_run("rigl", sharpness, seed, top1=top1)
    path = folder / "metrics.jsonl"
    *rest, last = path.read_text().splitlines()
    path.write_text("\n".join([*rest, json.dumps(json.loads(last) | beside)]) + "\n")
    return folder


@pytest.fixture
def beside(make_run):
    """Two arms of two seeds: all have re-estimated statistics, one run has averaged weights."""
    numbers = {
        ("none", 0): {"recalibrated_test_top1": 0.91, "ema_test_top1": 0.89},
        ("none", 1): {"recalibrated_test_top1": 0.93},
        ("s2sam", 0): {"recalibrated_test_top1": 0.95},
        ("s2sam", 1): {"recalibrated_test_top1": 0.95},
    }
    folders = [with_beside(make_run, *arm, 0.9 + 0.01 * arm[1], **more) for arm, more in numbers.items()]
    return build_table(group_runs(read_runs(folders)))


def test_further_accuracies_stand_beside_the_plain_one(beside):
    names = list(headers(beside))
    assert names[:5] == ["arm", "accuracy", "deviation", "recalibrated_test_top1", "ema_test_top1"]
    plain, treated = (cells(beside, row) for row in beside.rows)
    assert plain["recalibrated_test_top1"] == "92.00 (1.41)"
    assert treated["recalibrated_test_top1"] == "95.00 (0.00)"
    assert (plain["ema_test_top1"], treated["ema_test_top1"]) == ("89.00, n = 1", "-")
    assert beside.rows[1].difference.mean == pytest.approx(0.0)  # of the plain accuracies
    markdown = to_markdown(beside)
    assert "BatchNorm re-estimated %" in markdown.splitlines()[0] and "averaged weights %" in markdown.splitlines()[0]
    assert "BatchNorm re-estimated: test accuracy of the same weights" in markdown
    assert "go by the plain test accuracy alone" in markdown


def test_further_accuracies_are_in_the_csv_and_on_the_terminal(beside):
    first, second = csv.DictReader(io.StringIO(to_csv(beside)))
    assert float(first["recalibrated_test_top1_mean"]) == pytest.approx(0.92)
    assert float(first["recalibrated_test_top1_sd"]) == pytest.approx(0.02 / 2**0.5)
    assert (float(first["ema_test_top1_mean"]), first["ema_test_top1_sd"]) == (0.89, "")
    assert second["ema_test_top1_mean"] == ""
    console = Console(width=80, file=io.StringIO(), force_terminal=False)
    console.print(to_rich_beside(beside))
    text = console.file.getvalue()
    assert "92.00 (1.41)" in text and "89.00, n = 1" in text and "BatchNorm re-estimated %" in text


def test_without_further_accuracies_nothing_is_added(design_table):
    assert to_rich_beside(design_table) is None
    assert not {"recalibrated_test_top1", "ema_test_top1"} & set(headers(design_table))
    assert "re-estimated" not in to_markdown(design_table)
    row = next(csv.DictReader(io.StringIO(to_csv(design_table))))
    assert row["recalibrated_test_top1_mean"] == row["ema_test_top1_mean"] == ""


def test_step_times_say_against_what(design_table, make_run):
    head = headers(design_table)
    assert (head["cost"], head["dense_cost"]) == ("step time vs SGD, same network", "step time vs SGD, dense network")
    assert "compared with sparse, not with dense training" in to_markdown(design_table)
    assert "shows the price of the masks" in to_markdown(design_table)
    rows = list(csv.DictReader(io.StringIO(to_csv(design_table))))
    assert [float(r["step_ratio_dense_network"]) for r in rows] == pytest.approx([1, 1, 1.1, 2, 1, 1.1, 2])
    without = table_of(make_run, none=[0.9], s2sam=[0.95])
    assert "dense_cost" not in headers(without)
    assert "price of the masks" not in to_markdown(without)
    assert list(csv.DictReader(io.StringIO(to_csv(without))))[1]["step_ratio_dense_network"] == ""
