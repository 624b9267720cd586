"""The figures show the numbers of the runs, in the colour of their arm."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2sam.report.plots import draw_all, treatments
from s2sam.report.svg import PALETTE, spread_apart
from s2sam.report.write import make_table


@pytest.fixture(scope="module")
def sections(design_table):
    return {section.title: section for section in draw_all(design_table)}


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_sections_and_panels(sections):
    assert {title: len(s.figures) for title, s in sections.items()} == {
        "Difference in accuracy, and its price": 2,
        "Test accuracy": 2,
        "Test loss": 2,
        "Training loss": 2,
        "Sparsity per layer": 2,
        "How the masks move": 3,
        "Masks over the training, method by method": 1,
        "What the displacement does": 4,
    }


def test_lines_carry_the_class_and_colour_of_their_arm(sections):
    svg = sections["Test accuracy"].figures[0].svg
    for series, name in enumerate(["SGD", "S2-SAM", "SAM"]):
        groups = re.findall(rf'<g class="s{series}">(.*?)</g>', svg, flags=re.DOTALL)
        assert len(groups) >= 3  # line, band, label
        assert any(f"var(--s{series})" in g for g in groups)
        assert any(f">{name}<" in g for g in groups)
    assert "dense" in texts(svg)


def test_overlapping_bands_are_no_verdict_on_paired_arms(sections):
    for title in ("Test accuracy", "Test loss", "Training loss"):
        caption = sections[title].caption
        assert caption.endswith("although the paired differences above show something; only those decide.")
        assert "do not separate" not in caption


def test_layers_show_the_recorded_densities(sections):
    shown = texts(sections["Sparsity per layer"].figures[0].svg)
    for layer, share in {"body.fc1": "30.0 %", "body.fc2": "8.0 %", "classifier": "60.0 %"}.items():
        assert layer in shown and share in shown


def test_moving_and_fixed_masks(sections):
    survival, explored, density = (figure.svg for figure in sections["How the masks move"].figures)
    for svg in (survival, explored):
        assert {"SGD", "S2-SAM", "SAM", "Static ERK 90 %"} <= set(texts(svg))
    assert {"RigL 90 %", "Static ERK 90 %"} <= set(texts(density))


def test_displacement_names_what_was_measured(sections):
    labels = [figure.label for figure in sections["What the displacement does"].figures]
    assert labels[0] == "Realised displacement of S2-SAM: RigL 90 % ends at 0.05, Static ERK 90 % ends at 0.05"
    assert sum(label.startswith("Alignment") for label in labels) == 2


def test_figures_are_reproducible(make_run):
    folders = [make_run("rigl", "s2sam", seed) for seed in (0, 1)]
    first, second = (draw_all(make_table(folders)) for _ in range(2))
    assert first == second


def test_no_displacement_no_section(make_run):
    titles = [s.title for s in draw_all(make_table([make_run("rigl", "none", 0), make_run("rigl", "none", 1)]))]
    assert "What the displacement does" not in titles
    assert "How the masks move" in titles


def test_plain_optimizer_has_the_first_colour(design):
    arms = [row.arm for row in make_table(design[::-1]).rows]
    assert treatments(arms)[0] == "SGD"


def luminance(colour):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize(("mode", "paper"), [(0, "#ffffff"), (1, "#171d27")])
def test_colours_are_readable_as_text(mode, paper):
    for colours in PALETTE:
        a, b = sorted([luminance(colours[mode]), luminance(paper)])
        assert (b + 0.05) / (a + 0.05) >= 4.5  # WCAG AA


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.floats(0.1, 30), st.floats(-100, 100))
def test_labels_never_overlap(values, gap, floor):
    moved = spread_apart(values, gap, floor)
    ordered = sorted(moved)
    assert all(b - a >= gap * (1 - 1e-9) - 1e-9 for a, b in pairwise(ordered))
    assert ordered[0] >= floor - 1e-9
    assert [i for _, i in sorted((v, i) for i, v in enumerate(values))] == sorted(
        range(len(moved)), key=lambda i: moved[i]
    )
