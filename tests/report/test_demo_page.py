"""The page of the demonstration on invented runs: its sentences go by the intervals, and nothing of it is cut off."""

from __future__ import annotations

import csv
import io
import re
from html import unescape

import numpy as np
import pytest

from s2sam.analysis.surface import SurfaceSettings
from s2sam.analysis.surface_file import Surface
from s2sam.cli import demo
from s2sam.report import demo_page
from s2sam.report.arms import Arm
from s2sam.report.demo_page import Files, make_act
from s2sam.report.read import read_run

#: test accuracies of three seeds
CLEAN = {
    "dense": (0.990, 0.992, 0.991), "rigl80": (0.991, 0.992, 0.990), "rigl90": (0.989, 0.992, 0.990),
    "rigl95": (0.988, 0.991, 0.988), "rigl98": (0.900, 0.903, 0.901),
}  # fmt: skip
NOISY = {
    "sgd": (0.600, 0.603, 0.601), "nesterov": (0.602, 0.599, 0.606), "s2sam": (0.700, 0.703, 0.700),
    "echo": (0.900, 0.903, 0.901), "sam": (0.910, 0.912, 0.911), "sgd-tuned": (0.870, 0.873, 0.870),
    "echo-tuned": (0.920, 0.925, 0.922),
}  # fmt: skip


def act_of(run_writer, root, arms, pairs, tops):
    """An act whose runs end at these accuracies."""
    found = {}
    for name, arm in arms.items():
        runs = {}
        for seed, top1 in enumerate(tops[name]):
            folder = run_writer(root / name, arm.method, arm.sharpness, seed, top1=top1, sparsity=arm.sparsity)
            runs[seed] = read_run(folder)
            steps = 80 if name == "sam" else 160
            runs[seed].final.update(n_steps=steps, test_top1=top1)
        found[name] = Arm("", arm.label, (("method", arm.method),), (("sharpness", arm.sharpness),), runs)
    return make_act(found, pairs, {name: arm.gradients_a_step for name, arm in arms.items()})


@pytest.fixture
def acts(run_writer, tmp_path):
    """Makes both acts from test accuracies; those that are not given are CLEAN and NOISY."""

    def make(seeds=3, **changes):
        tops = {name: values[:seeds] for name, values in (CLEAN | NOISY | changes).items()}
        return (
            act_of(run_writer, tmp_path / f"s{len(changes)}", demo.SPARSITY, demo.SAVES_PAIRS, tops),
            act_of(run_writer, tmp_path / f"f{len(changes)}", demo.FLATNESS, demo.FLAT_PAIRS, tops),
        )

    return make


def sizes_of(act):
    return {name: [Files(4000, 0 if name == "dense" else 1000, size)] * 3 for name, size in zip(
        act.arms, (4000, 1000, 600, 400, 300), strict=True)}  # fmt: skip


def test_each_act_compares_what_it_declares_and_counts_gradients(acts):
    saves, flat = acts()
    assert len(saves.rows) == 4 and len(flat.rows) == 9
    assert {row.difference.comparisons for row in saves.rows} == {4}
    assert {row.difference.comparisons for row in flat.rows} == {9}
    assert set(flat.gradients.values()) == {160}  # sam: 80 steps of two
    assert flat.row("echo", "sgd").difference.mean == pytest.approx(0.3)
    assert flat.row("echo", "sgd-tuned").difference.mean == pytest.approx(0.0303, abs=1e-4)


def test_act_1_is_about_the_sparsest_network_without_a_loss(acts):
    saves, _ = acts()
    said = demo_page.saves_verdict(saves, sizes_of(saves))
    assert said.startswith(
        "RigL 95 % keeps 50 of 1,000 parameters, in a file 10.0 times smaller (0.4 kB instead of 4 kB)"
    )
    assert "no difference to the dense network's accuracy was found (-0.2 points, 95 % interval " in said
    assert said.endswith("; lower than dense: RigL 98 % (-9.0 points).")


def test_act_1_says_lower_where_all_are_and_nothing_where_intervals_are_wide(acts):
    low = {f"rigl{s}": (*(v - 0.05 for v in CLEAN["dense"][:2]), 0.942) for s in (80, 90, 95, 98)}
    saves, _ = acts(**low)
    said = demo_page.saves_verdict(saves, sizes_of(saves))
    assert said.startswith("RigL 80 % keeps")
    assert "its test accuracy is 5.0 points lower (95 % interval " in said
    assert (
        said.count("lower") == 2
        and "RigL 90 % (-5.0 points), RigL 95 % (-5.0 points), RigL 98 % (-5.0 points)." in said
    )
    wide = {f"rigl{s}": (0.999, 0.900, 0.950) for s in (80, 90, 95, 98)}
    saves, _ = acts(**wide, sgd=NOISY["sgd"])
    assert not any(demo_page.holds(row) for row in saves.rows)  # no loss is shown, and none is excluded
    assert demo_page.saves_verdict(saves, sizes_of(saves)).startswith("RigL 80 % keeps")


@pytest.mark.parametrize(
    ("echo", "first", "rest"),
    [
        ((0.900, 0.903, 0.902), "echo ends 30.0 points above SGD", "3.1 points of gain remain"),
        ((0.870, 0.875, 0.869), "echo ends 27.0 points above SGD", "no gain was found (+0.0 points"),
        ((0.700, 0.703, 0.702), "echo ends 10.0 points above SGD", "16.9 points are lost"),
        ((0.500, 0.503, 0.502), "echo ends 10.0 points below SGD", "36.9 points are lost"),
        ((0.600, 0.610, 0.594), "no difference between echo and SGD was found (+0.0", "27.0 points are lost"),
    ],
)
def test_act_2_goes_by_both_intervals(acts, echo, first, rest):
    _, flat = acts(echo=echo)
    said = demo_page.flat_verdict(flat, 0.4)
    before, _, after = said.partition("; over the reference, SGD at its best weight decay and learning rate, ")
    assert before.startswith("With 40 % wrong labels") and first in before
    after, _, tuned = after.partition(", and with echo tuned as well ")
    assert after.startswith(rest)
    assert tuned.startswith("5.1 points of gain remain (95 % interval ")
    pairs = {before: ("echo", "sgd"), after: ("echo", "sgd-tuned"), tuned: ("echo-tuned", "sgd-tuned")}
    for text, row in ((text, flat.row(*pair)) for text, pair in pairs.items()):
        interval = row.difference.simultaneous
        assert f"95 % interval {100 * interval.low:+.2f} to {100 * interval.high:+.2f}" in text
        assert ("was found" in text) == interval.contains(0.0)


def test_without_intervals_nothing_is_said(acts):
    saves, flat = acts(1)
    for said in (demo_page.saves_verdict(saves, sizes_of(saves)), demo_page.flat_verdict(flat, 0.4)):
        assert "nothing can be said (" in said and "one seed gives no interval" in said
        assert not re.search("points (above|below|higher|lower|of gain)", said)
    saves, _ = acts(rigl80=CLEAN["dense"])
    row = next(row for row in saves.rows if row.arm.treatment == "RigL 80 %")
    assert "all seeds differ equally" in demo_page.outcome(row, up="{}", down="{}")


def test_whether_a_network_memorises_is_read_from_its_records(acts):
    _, flat = acts()
    arm = flat.arms["sgd"]
    for fitted, end in ((0.95, "; it memorises wrong ones."), (0.65, " right.")):
        for run in arm.runs.values():
            run.epochs[-1]["train_top1"] = fitted
        said = demo_page.memorised(arm, 0.4)
        assert said.startswith(f"SGD fits {100 * fitted:.0f} % of its training labels at the end, and 60 % of them")
        assert said.endswith(end)


def test_the_table_as_csv_has_a_line_for_each_comparison(acts):
    saves, flat = acts()
    rows = list(csv.DictReader(io.StringIO(demo_page.to_csv({"1": saves, "2": flat}, sizes_of(saves)))))
    assert len(rows) == 5 + 10  # dense and SGD have a line without a comparison
    (echo,) = [row for row in rows if (row["arm"], row["reference"]) == ("Echo", "SGD, tuned")]
    assert float(echo["difference"]) == pytest.approx(0.0303, abs=1e-4)
    assert echo["verdict"] == "higher than SGD, tuned"
    assert echo["file_bytes"] == ""
    assert [row["verdict"] for row in rows if not row["reference"]] == ["reference", "reference"]


def page_of(saves, flat):
    surfaces = {}
    for name, height in (("sgd", 3.0), ("echo", 1.0)):
        surface = Surface.empty(name, SurfaceSettings(points=7, pairs=2), {"classes": 10, "images": 50})
        x = np.linspace(-1, 1, 7)
        surface.loss = np.stack([height * (x[:, None] ** 2 + x**2) * (1 + 0.1 * pair) for pair in range(2)])
        surface.top1, surface.done[:] = np.full((2, 7, 7), 0.5), True
        surfaces[flat.arms[name]] = surface
    rounds = {name: [0.002, 0.003] for act in (saves, flat) for name in act.arms}
    settings = {"act 2": {arm.label: demo.settings_of(arm) for arm in demo.FLATNESS.values()}}
    return demo_page.render(saves, flat, sizes_of(saves), surfaces, rounds, settings, noise=0.4, how="s2sam demo <x>")


@pytest.fixture
def page(acts, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page_of(*acts()), encoding="utf-8")
    return path


def test_the_page_is_whole_and_refers_to_nothing_outside(page):
    text = page.read_text(encoding="utf-8")
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert not re.search(r"https?://|@import|<script|javascript:", text)
    assert "s2sam demo &lt;x&gt;" in text
    for figure in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        assert not re.search(r"#[0-9a-f]{6}", re.sub(r'(href|clip-path)="[^"]*"', "", figure))
    assert unescape(text).count("it memorises wrong ones") == 2
    assert "Ra 1.21 nats" in unescape(text) or "nats, without the bowl" in unescape(text)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_no_table_and_no_figure_is_wider_than_its_place(browser, page, width, dark):
    errors, requests, evaluate = browser.open(page.as_uri(), width=width, dark=dark)
    assert errors == requests == []
    assert evaluate("document.documentElement.scrollWidth") <= width
    evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    cut = "[...document.querySelectorAll('.scroll')].filter(s => s.scrollWidth > s.clientWidth + 1).length"
    tables = evaluate("document.querySelectorAll('table').length")
    assert tables >= 6
    if width == 1280:
        assert evaluate(cut) == 0
    outside = evaluate(
        "[...document.querySelectorAll('figure')].flatMap(f => { const box = f.getBoundingClientRect();"
        " return [...f.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();"
        " return r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1 "
        "}).map(t => t.textContent) })"
    )
    assert outside == []


def test_both_pictures_are_on_the_first_screen(browser, page):
    _, _, evaluate = browser.open(page.as_uri(), width=1280)
    bottoms = evaluate("[...document.querySelectorAll('.act svg')].map(s => s.getBoundingClientRect().bottom)")
    assert len(bottoms) == 2 and max(bottoms) <= 800
    tops = evaluate("[...document.querySelectorAll('.act')].map(s => s.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
