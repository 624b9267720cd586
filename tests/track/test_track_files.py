"""The files every run has: one JSON object a line, one row an epoch, and both survive an interruption."""

from __future__ import annotations

import csv
import json
import math
import random
import sys
from pathlib import Path

import pytest

from s2sam.track.base import Loggers
from s2sam.track.files import FileLogger, plain

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutations import damaged

EPOCH = {"kind": "epoch", "epoch": 1, "step": 5, "train_loss": 0.5, "val_top1": None}


def test_records_are_there_at_once(tmp_path):
    logger = FileLogger(tmp_path)
    logger.start({}, {})
    logger.scalars({"kind": "step", "step": 0, "loss": 0.25})
    logger.scalars(EPOCH)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"kind": "step", "step": 0, "loss": 0.25}, EPOCH]
    logger.scalars(EPOCH | {"epoch": 2})
    logger.close()
    with open(tmp_path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["epoch"] for r in rows] == ["1", "2"]
    assert rows[0] == {"epoch": "1", "step": "5", "train_loss": "0.5", "val_top1": ""}


def test_what_is_not_finite_becomes_null(tmp_path):
    logger = FileLogger(tmp_path)
    logger.start({}, {})
    logger.scalars({"kind": "step", "loss": math.nan, "density": {"fc": math.inf, "out": 0.5}})
    logger.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "kind": "step",
        "loss": None,
        "density": {"fc": None, "out": 0.5},
    }
    assert plain([1.0]) == [1.0]


def test_a_new_start_empties_the_files(tmp_path):
    for name in ("metrics.jsonl", "summary.csv"):
        (tmp_path / name).write_text("old\n")
    logger = FileLogger(tmp_path)
    logger.start({}, {})
    logger.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (tmp_path / "summary.csv").read_text() == ""


class Recorder:
    def __init__(self, name, calls, fail=""):
        self.name, self.calls, self.fail = name, calls, fail

    def _note(self, what):
        self.calls.append((self.name, what))
        if self.fail == what:
            raise RuntimeError(f"{self.name} cannot {what}")

    def start(self, config, info):
        self._note("start")

    def scalars(self, record):
        self._note("scalars")

    def artifact(self, path):
        self._note("artifact")

    def close(self):
        self._note("close")


def test_loggers_are_driven_together_and_closed_in_reverse(tmp_path):
    calls: list[tuple[str, str]] = []
    with Loggers([Recorder("a", calls), Recorder("b", calls)]).tracking({}, {}) as log:
        log.scalars(EPOCH)
        log.artifact(tmp_path)
    names = [f"{name}.{what}" for name, what in calls]
    assert names == ["a.start", "b.start", "a.scalars", "b.scalars", "a.artifact", "b.artifact", "b.close", "a.close"]


@pytest.mark.parametrize("fail", ["start", "scalars", "close"])
def test_all_are_closed_when_one_fails(fail):
    calls: list[tuple[str, str]] = []
    with (
        pytest.raises(RuntimeError, match=f"b cannot {fail}"),
        Loggers([Recorder("a", calls), Recorder("b", calls, fail)]).tracking({}, {}) as log,
    ):
        log.scalars(EPOCH)
    assert [c for c in calls if c[1] == "close"] == [("b", "close"), ("a", "close")]


@pytest.mark.parametrize("seed", range(4))
def test_a_damaged_table_is_named_or_goes_on_with_its_columns(tmp_path, seed):
    draw, row = random.Random(seed), {"kind": "epoch", "epoch": 1, "step": 10, "test_top1": 0.5}
    first = FileLogger(tmp_path)
    first.start({}, {})
    first.scalars(row)
    lengths = first.position()
    first.close()
    content, refused = (tmp_path / "summary.csv").read_bytes(), 0
    for _ in range(60):
        (tmp_path / "summary.csv").write_bytes(damaged(content, draw).ljust(len(content), b"0"))
        again, said = FileLogger(tmp_path), ""
        try:
            again.start({}, {"logs": lengths})
            again.scalars(row | {"epoch": 2})
        except ValueError as error:
            said = str(error)
        again.close()
        refused += bool(said)
        assert not said or ("summary.csv" in said and "\n" not in said)
        if not said:
            assert (tmp_path / "summary.csv").read_bytes().endswith(b"2,10,0.5\r\n")
    assert refused > 10
