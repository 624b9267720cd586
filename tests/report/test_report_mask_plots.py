"""The picture of moving masks shows the densities, survival and exploration that the runs have recorded."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2sam.report.arms import group_runs
from s2sam.report.html import render
from s2sam.report.mask_plots import BINS, LABELS, SHADES, cells, evolution, layer_densities, moves
from s2sam.report.read import read_run
from s2sam.report.svg import style
from s2sam.report.write import make_table


def rewrite(folder: Path, topology: list[dict]) -> Path:
    """The run with these records of its topology in place of the others."""
    path = folder / "metrics.jsonl"
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["kind"] != "topology"]
    full = [{"kind": "topology", "dropped": 3, "grown": 3, "survival": 1.0, "explored": 0.1, **r} for r in topology]
    path.write_text("\n".join([*(json.dumps(r) for r in full), *kept]) + "\n")
    return folder


def arm_of(*folders: Path):
    (arm,) = group_runs([read_run(folder) for folder in folders])
    return arm


@pytest.fixture
def falling(make_run):
    """160 steps of two layers: "a" stays, "b" falls from 64 % to 4 % in steps 40 and 120."""
    steps = {0: 0.64, 40: 0.16, 120: 0.04}
    records = [{"step": t, "density": {"a.weight": 1.0, "b.weight": d}, "survival": d, "explored": 0.7} for t, d in
               steps.items()]  # fmt: skip
    return rewrite(make_run("gmp"), records)


def test_a_density_holds_until_the_next_record(falling):
    layers, density, end = layer_densities(arm_of(falling), bins=8)
    assert (layers, end) == (["a.weight", "b.weight"], 160.0)
    assert density[0].tolist() == [1.0] * 8
    assert density[1].tolist() == [0.64, 0.64, 0.16, 0.16, 0.16, 0.16, 0.04, 0.04]


def test_seeds_are_averaged(falling, make_run):
    records = [{"step": 0, "density": {"a.weight": 0.5, "b.weight": 0.32}}]
    other = rewrite(make_run("gmp", seed=1), records)
    _, density, _ = layer_densities(arm_of(falling, other), bins=4)
    assert density[0].tolist() == [0.75] * 4
    assert density[1].tolist() == pytest.approx([0.48, 0.24, 0.24, 0.18])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=BINS))
def test_cells_cover_the_row_once_in_its_shades(row):
    merged = cells(np.array(row))
    shades = [shade for _, n, shade in merged for _ in range(n)]
    assert len(shades) == len(row)
    assert [first for first, _, _ in merged] == np.cumsum([0, *(n for _, n, _ in merged)])[:-1].tolist()
    assert np.abs(np.array(shades) - np.sqrt(row)).max() <= 0.5 / SHADES + 1e-9
    assert all(a[2] != b[2] for a, b in pairwise(merged))


def shades_of(svg: str) -> list[float]:
    """Shade of each filled cell, in the order of drawing."""
    return [float(v) for v in re.findall(r"fill: var\(--ink\); fill-opacity: ([\d.]+)", svg)]


def test_the_picture_holds_cells_numbers_and_curves(falling):
    with style():
        (figure,) = evolution([arm_of(falling)]).figures
    assert shades_of(figure.svg) == pytest.approx([0.8, 0.4, 0.2], abs=0.5 / SHADES + 0.01)  # "a" is opaque
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", figure.svg)
    assert {"a", "b", "100", "64 to 4", "first left", "R_s"} <= set(shown)
    assert figure.label == (
        "Masks of gmp 90 % over 160 steps: first left 4.0 % at the end, R_s 70.0 % at the end; active per layer: "
        "a 100 %, b 64 to 4 %"
    )
    assert not re.search(r"#[0-9a-f]{6}", re.sub(r'(href|clip-path)="[^"]*"', "", figure.svg)), "colours follow a theme"


def test_only_moving_masks_have_a_picture(make_run):
    arms = [arm_of(make_run(method)) for method in ("dense", "static", "rigl")]
    assert [moves(arm) for arm in arms] == [False, False, True]
    with style():
        section = evolution(arms)
    assert [figure.label.split(" over ")[0] for figure in section.figures] == ["Masks of RigL 90 %"]
    assert evolution(arms[:2]).figures == ()


def test_each_moving_network_has_one_of_its_plain_runs(make_run):
    runs = [make_run(m, s, seed) for m in ("rigl", "set") for s in ("s2sam", "none") for seed in (0, 1)]
    for folder in runs:
        if folder.name.startswith("set-none"):
            rewrite(folder, [{"step": 0, "density": {"only.weight": 0.5}}])
    page = render(make_table(runs))
    pictures = re.findall(r'aria-label="(Masks of [^"]*)"', page)
    assert [p.split(" over ")[0] for p in pictures] == ["Masks of RigL 90 %", "Masks of SET 90 %"]
    assert "only 50 %" in pictures[1]
    assert "body.fc1 30 %" in pictures[0]


def test_a_deep_network_fits(make_run):
    names = [f"stages.{i // 9}.{i % 9}.a.long.name.of.a.layer.weight" for i in range(54)]
    records = [
        {"step": t, "density": {n: max(0.01, 1 - i * t / 6000) for i, n in enumerate(names)}} for t in (0, 50, 90)
    ]
    with style():
        (figure,) = evolution([arm_of(rewrite(make_run("rigl"), records))]).figures
    shown = re.findall(r"<text[^>]*>([^<]*)</text>", figure.svg)
    named = [text for text in shown if text.startswith("stages.")]
    assert len(named) == 18 <= LABELS
    assert all(len(text) <= 22 for text in named)
    assert len(figure.svg) < 100_000
