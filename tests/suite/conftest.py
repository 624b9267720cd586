"""A small table of digits, plans of it, and runs with invented accuracies."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from s2sam.report.read import Run
from s2sam.suite.plan import Plan, Planned, make_plan
from s2sam.suite.schema import parse_suite

SMALL: dict[str, Any] = {
    "title": "A small table",
    "paper": "Table 0",
    "base": {
        "data": "digits",
        "model": "mlp",
        "model_options": {"width": 0.25},
        "epochs": 1,
        "sam": {"stats_every": 0},
        "data_options": {"train_size": 200},
    },
    "blocks": {"digits": {}},
    "rows": {"Static": {"method": "static"}},
    "sparsities": [0.9],
    "columns": {"SGD": {"sharpness": "none"}, "S2-SAM": {"sharpness": "s2sam", "rho": 0.05}},
    "reference": "SGD",
    "seeds": [0, 1],
}


@pytest.fixture
def small() -> dict[str, Any]:
    """The small table as a mapping that may be changed."""
    return copy.deepcopy(SMALL)


@pytest.fixture
def console() -> Console:
    """A console that writes into a string: `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def plan_of(tmp_path):
    """`plan_of(mapping, **options)` -> its plan, in a folder of the test."""

    def make(content: dict[str, Any], **options: Any) -> Plan:
        return make_plan(parse_suite(content), out=options.pop("out", tmp_path / "out"), **options)

    return make


@pytest.fixture
def invented():
    """`invented(planned, top1, **changes)` -> a run that never was."""
    return _invented


def _invented(planned: Planned, top1: float, **changes: Any) -> Run:
    """A finished run with this test accuracy; changes go into its final record, `env` into its environment."""
    env = {"versions": {"s2sam": "0.1.0", "torch": "2.13.0"}, "git_commit": "c0ffee"} | changes.pop("env", {})
    final = {
        "test_top1": top1, "val_top1": top1, "test_loss": 0.5, "best_epoch": 1, "sparsity": planned.cell.sparsity,
        "step_seconds": 0.01, "train_images": 200, "test_images": 1000, "data_digest": "d1",
    }  # fmt: skip
    return Run(Path(planned.config.folder), planned.config.as_dict(), env, final | changes, [])
