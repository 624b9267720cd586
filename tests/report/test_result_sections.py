"""Measurements in the report: the right runs, the numbers in the labels, stale and damaged files, the page itself."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from s2sam.analysis.robustness_file import assemble
from s2sam.cli.main import main
from s2sam.report import sharpness_density
from s2sam.report.arm_bars import Dot, arm_bars
from s2sam.report.bound_section import bound_sections, find_bounds
from s2sam.report.held import find
from s2sam.report.panels import treatments
from s2sam.report.premise_section import find_premise, premise_sections
from s2sam.report.robust_section import difference, find_robustness, mean_cells, robust_sections
from s2sam.report.sections import measured_sections
from s2sam.report.sharpness_section import PANELS, find_sharpness, sentences, sharpness_sections
from s2sam.report.svg import style
from s2sam.report.write import make_table
from s2sam.train.folder import FILES

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutations import changed

NAMES = ("gaussian_noise", "glass_blur", "fog")
SEEDS = (0, 1, 2)


def make_runs(write, root):
    """RigL with SGD and S2-SAM, three seeds each, and their weights."""
    folders = {(kind, seed): write(root, "rigl", kind, seed) for kind in ("none", "s2sam") for seed in SEEDS}
    for number, folder in enumerate(folders.values()):
        (folder / "model.safetensors").write_bytes(bytes([number]) * 64)
    return folders


@pytest.fixture
def runs(run_writer, tmp_path):
    """The runs, with nothing measured yet."""
    return make_runs(run_writer, tmp_path / "runs")


@pytest.fixture(scope="module")
def joint_page(run_writer, tmp_path_factory):
    """The page of runs of which everything was measured, as the command writes it."""
    root = tmp_path_factory.mktemp("joint")
    runs = make_runs(run_writer, root / "runs")
    put_all(runs)
    put_robust(runs, "official")
    assert main(["report", str(root / "runs"), "--out", str(root / "page.html")]) == 0
    return root / "page.html"


def put(folder, name, result):
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / name).write_text(json.dumps({"format": 1, "run": "x", "weights_sha256": digest, **result}))


def put_robust(runs, source="generated", **change):
    """S2-SAM is 5 points better on corrupted images, and 0.1 more for each seed."""
    for (kind, seed), folder in runs.items():
        top1 = 0.5 + 0.01 * seed + (0.05 + 0.001 * seed if kind == "s2sam" else 0.0)
        cells = {
            name: {s: {"top1": top1 + 0.1 * (k - 1), "nll": 1.0, "ece": 0.2 + 0.01 * seed} for s in (1, 3, 5)}
            for k, name in enumerate(NAMES)
        }
        facts = {
            "source": source, "constants": "cifar", "layout": "cifar-c", "corruption_seed": 0, "all_images": 500,
            "corruptions": list(NAMES), "severities": [1, 3, 5], "images": 400, "classes": 10, "arm": kind,
            "run_seed": seed, "weights": "final", "data_digest": "d", "corrupted_digest": "c", **change,
        }  # fmt: skip
        result = assemble(facts, {"top1": 0.9 + 0.01 * seed, "nll": 1.0, "ece": 0.1}, cells)
        put(folder, f"robustness-{source}.json", result)


def put_sharpness(runs, loss=None, converged=True, **change):
    """S2-SAM has half the sharpness."""
    for (kind, seed), folder in runs.items():
        size = (2.0 if kind == "none" else 1.0) + 0.1 * seed
        measured = {name: {"value": size, "sd": 0.1} for name in PANELS}
        measured |= {"lambda_max": {"value": size, "error": 0.1, "converged": converged}}
        measured |= {"lambda_w2": {"value": 10 * size, "error": 0.1, "converged": converged}}
        shared = {
            "settings": {"bn": "eval", "rho": 0.05}, "split": "train", "images": 100, "data_digest": "d",
            "augmentation": "none", "weights": "final",
        }  # fmt: skip
        density = {"nodes": [[-size, 0.0, 10 * size], [0.0, size, 5.25]], "weights": [[0.2, 0.7, 0.1], [0.5, 0.3, 0.2]]}
        given = {"train_loss": 0.1 if loss is None else loss[kind], "density": density}
        put(folder, "sharpness.json", {**shared, **measured, **given, **change})


def put_premise(runs):
    for (kind, seed), folder in runs.items():
        numbers = [f"{d}_{part}" for d in ("previous", "own", "random") for part in ("odd", "even")]
        points = [
            {"step": step, "looks": 4, "previous_rises": 0.75, "random_rises": 0.5, "over": False, "lr": 4 / step,
             "lambda_max": {"value": 2.0, "converged": step < 80}, "c_lambda_max": {"value": 0.2},
             **{name: {"mean": 0.001 * step, "sd": 0.1} for name in (*numbers, "batch_sharpness", "rho_over_w")},
             "cosine": {"mean": 0.01 * seed - (0.2 if kind == "s2sam" else 0.0), "sd": 0.1}}
            for step in (40, 80)
        ]  # fmt: skip
        shared = {"settings": {"looks": 4}, "data_digest": "d", "rho": 0.05, "direction": "e"}
        put(folder, "premise.json", {**shared, "points": points})


def put_bound(runs):
    for (kind, seed), folder in runs.items():
        part = {"start": 1.0 + seed, "noise": 20.0, "radius": 0.5 if kind == "s2sam" else 0.0, "generalisation": 4.0}
        terms = {name: part | {"total": sum(part.values())} for name in ("theorem 1", "theorem 1, own decay")}
        terms["corollary"] = {**part, "noise": 0.0, "generalisation": 0.0, "start": 1.0, "total": 1.0}
        put(folder, "bound.json", {
            "settings": {"steps": 3}, "split": "train", "images": 64, "data_digest": "d", "classes": 10,
            "terms": terms, "measured": {"test_loss": 0.5, "train_loss": 0.25}, "step_condition": 2.0 + seed,
        })  # fmt: skip


def put_all(runs):
    put_robust(runs)
    put_sharpness(runs)
    put_premise(runs)
    put_bound(runs)


def arms_of(runs):
    return [row.arm for row in make_table(runs.values()).rows]


def texts(svg):
    return [re.sub(r"<[^>]*>", "", part) for part in re.findall(r"<text[^>]*>(.*?)</text>", svg, flags=re.DOTALL)]


def test_nothing_measured_nothing_shown(runs):
    assert measured_sections(arms_of(runs)) == []


def test_all_kinds_appear_in_order_and_generated_never_with_official(joint_page):
    titles = re.findall(r"<h2>([^<]*)</h2><ul class=\"says\"><li>[^<]+", joint_page.read_text(encoding="utf-8"))
    assert [title.replace("&#x27;", "'") for title in titles] == [
        "Sharpness", "The premise of S2-SAM", "Robustness to corruption, images corrupted here",
        "Robustness to corruption, official files", "The theorem's terms",
    ]  # fmt: skip


def test_robustness_means_differences_and_words(runs):
    put_robust(runs)
    arms = arms_of(runs)
    held = find_robustness(arms, "generated")
    plain, treated = arms
    assert mean_cells(held.by_arm[plain].values())[1].tolist() == pytest.approx([51.0] * 3)
    gain = difference(held, arms, treated)
    assert gain == pytest.approx(5.1) and difference(held, arms, plain) is None
    with style():
        section, maps = robust_sections(held, arms)
    words = [figure.label for figure in (*section.figures, *maps.figures)]
    assert words[0] == "Accuracy on corrupted images: RigL 90 %, SGD 51.00 %, RigL 90 %, S2-SAM 56.10 %"
    assert words[1].endswith("SGD 40.00 points, RigL 90 %, S2-SAM 34.90 points")
    assert words[2] == "Calibration error on clean images: RigL 90 %, SGD 10.00 %, RigL 90 %, S2-SAM 10.00 %"
    assert words[3].endswith("SGD 21.00 %, RigL 90 %, S2-SAM 21.00 %")
    assert words[4:] == [
        "Accuracy, RigL 90 %, SGD: mean 51.00 %", "Accuracy, RigL 90 %, S2-SAM: mean 56.10 %",
        "Difference in accuracy, S2-SAM minus SGD, RigL 90 %: mean +5.10 points",
    ]  # fmt: skip
    cells = [t for t in texts(maps.figures[2].svg) if t.startswith("+")]
    assert cells == ["+5.1"] * 9
    assert [t for t in texts(maps.figures[0].svg) if t.isdigit() and len(t) == 2][:3] == ["41"] * 3
    (sentence,) = section.says
    assert sentence.startswith(
        "RigL 90 %, S2-SAM minus RigL 90 %, SGD: +5.10 points of corrupted accuracy (n = 3, 95 %"
    )
    assert "this shows a difference" in sentence and "+5.10 among 3 pair(s)" in sentence


def test_sharpness_is_compared_at_matched_train_loss_only(runs):
    put_sharpness(runs)
    arms = arms_of(runs)
    with style():
        section, _ = sharpness_sections(find_sharpness(arms), arms)
    assert section.figures[0].label.startswith("Train loss, which must match: RigL 90 %, SGD 0.1, RigL")
    assert section.figures[1].label == "Adaptive worst case: RigL 90 %, SGD 2.1, RigL 90 %, S2-SAM 1.1"
    assert section.figures[3].label == "lambda_max ||w||^2: RigL 90 %, SGD 21, RigL 90 %, S2-SAM 11"
    assert "train losses match, as they lie within 0.0 %" in section.says[0]
    assert [line.split(":")[0].split(", ")[1] for line in section.says[1:]] == [
        "adaptive worst case", "adaptive average", "lambda_max ||w||^2", "trace ||w||^2 / n",
    ]  # fmt: skip
    assert "S2-SAM minus SGD is -1 (n = 3, no interval)" in section.says[1]  # all seeds agree to the last digit
    assert section.says[3].endswith(
        "in units of ||w||, which a rescaled layer changes: S2-SAM minus SGD is -10 (n = 3); no verdict goes by it."
    )
    put_sharpness(runs, loss={"none": 0.1, "s2sam": 0.2})
    (only,) = sentences(find_sharpness(arms), arms)
    assert "train losses do not match" in only and "no run is called flatter" in only


def bells(record, grid, width):
    """The density of a spectrum, bell by bell."""
    heights = [0.0] * len(grid)
    spectrum = record["density"]
    for nodes, weights in zip(spectrum["nodes"], spectrum["weights"], strict=True):
        for node, weight in zip(nodes, weights, strict=True):
            for i, t in enumerate(grid):
                bell = math.exp(-(((t - node) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
                heights[i] += weight * bell / len(spectrum["nodes"])
    return heights


def test_the_spectral_density_is_that_of_the_files_on_one_scale(runs, monkeypatch):
    put_sharpness(runs)
    arms, drawn = arms_of(runs), []

    def to_svg(figure, *rest):
        drawn.append(figure)
        return original(figure, *rest)

    original = sharpness_density.to_svg
    monkeypatch.setattr(sharpness_density, "to_svg", to_svg)
    with style():
        _, section = sharpness_sections(find_sharpness(arms), arms)
    (figure,), (axes,) = section.figures, drawn[0].axes
    assert axes.get_yscale() == "log"
    files = {key: json.loads((folder / "sharpness.json").read_text()) for key, folder in runs.items()}
    low, high = -2.2, 22.0  # of all runs: those of seed 2 with SGD
    width = (high - low) / 100
    assert f"standard deviation {width:.3g}" in section.caption
    bottom, top = axes.get_ylim()
    assert bottom == pytest.approx(1e-8 / width)
    highest = 0.0
    for number, kind in enumerate(("none", "s2sam")):
        line, band = axes.lines[number], axes.collections[number]
        grid = line.get_xdata()
        assert grid[0] == pytest.approx(low - 4 * width) and grid[-1] == pytest.approx(high + 4 * width)
        each = np.array([bells(files[kind, seed], grid, width) for seed in SEEDS])
        assert each.max() > 0.1
        highest = max(highest, each.max())
        assert np.allclose(line.get_ydata(), each.clip(bottom).mean(0), rtol=1e-9)
        edges = band.get_paths()[0].vertices[:, 1]
        assert edges.max() == pytest.approx(each.max()) and edges.min() == pytest.approx(bottom)
    assert top == pytest.approx(3 * highest)
    assert figure.label == (
        "Spectral density, RigL 90 %: SGD from -2.2 to 22, mean 1.68; S2-SAM from -1.2 to 12, mean 1.13"
    )
    for words in ("100 train images", "2 random starts", "cut off after 3 steps", f"below {bottom:.2g} are not drawn"):
        assert words in section.caption
    assert section.says == () and {"SGD", "S2-SAM"} <= set(texts(figure.svg))


def test_runs_without_a_density_are_named_and_need_no_panel(runs):
    put_sharpness(runs)
    put_sharpness({("s2sam", 1): runs["s2sam", 1]}, density=None)
    arms = arms_of(runs)
    with style():
        _, section = sharpness_sections(find_sharpness(arms), arms)
    assert section.says == ("No spectral density was measured of every run of RigL 90 %, S2-SAM.",)
    assert "S2-SAM from -1.2 to 12" in section.figures[0].label
    put_sharpness(runs, density=None)
    with style():
        assert len(sharpness_sections(find_sharpness(arms), arms)) == 1


def test_one_seed_is_ranked_by_name_and_several_by_interval(runs):
    put_sharpness(runs)
    arms = arms_of({key: folder for key, folder in runs.items() if key[1] == 0})
    says = sentences(find_sharpness(arms), arms)
    assert any("lambda_max ||w||^2, in units of" in line and "changes: S2-SAM 10 < SGD 20" in line for line in says)
    assert says[-1].endswith("the scale-invariant measures agree that S2-SAM is the flattest.")
    for (kind, seed), folder in runs.items():
        result = json.loads((folder / "sharpness.json").read_text())
        for name in ("trace_w2_n", "worst_adaptive"):
            result[name]["value"] += 0.2 * seed if kind == "none" else 0.0
        put(folder, "sharpness.json", result)
    arms = arms_of(runs)
    says = sentences(find_sharpness(arms), arms)
    (line,) = [line for line in says if "adaptive worst case" in line]
    assert "S2-SAM minus SGD is -1.2, 95 % interval for all 2 together -1.92 to -0.483" in line
    assert line.endswith("(n = 3): this shows a difference.")
    (trace,) = [line for line in says if "trace" in line]
    assert "S2-SAM minus SGD is -1.2 (n = 3); no verdict goes by it." in trace and "interval" not in trace


def test_values_that_did_not_converge_are_hatched_and_not_compared(runs):
    put_sharpness(runs, converged=False)
    arms = arms_of(runs)
    with style():
        section, _ = sharpness_sections(find_sharpness(arms), arms)
    assert "SGD at least 21" in section.figures[3].label and "pattern" in section.figures[3].svg
    assert "pattern" not in section.figures[4].svg
    assert any("not compared, as there is no reliable value of" in line for line in section.says)
    with style():
        values = {arms[0]: [Dot(None)], arms[1]: [Dot(1.0), Dot(None)]}
        figure = arm_bars("t", "u", values, treatments(arms), "k")
    assert figure.label == "t: RigL 90 %, SGD no value, RigL 90 %, S2-SAM no value of 1 of 2"


def test_the_premise_is_drawn_and_said(runs):
    put_premise(runs)
    arms = arms_of(runs)
    with style():
        (section,) = premise_sections(find_premise(arms), arms)
    assert len(section.figures) == 6
    assert section.figures[0].label == "RigL 90 %, cosine: SGD ends at 0.01, S2-SAM ends at -0.19"
    assert "rises along +g_t-1 in 75 % of 12 looks, and along noise of the same length in 50 %" in section.says[0]
    assert section.says[0].startswith("RigL 90 %, SGD: from step 80 on, at learning rate 0.05, the loss of the next")
    assert re.search(r"is -0\.190 \(n = 3 runs, 95 % interval -0\.215 to -0\.165\)", section.says[1])
    assert {"previous", "own", "random"} <= set(texts(section.figures[1].svg))
    assert "SGD, previous ends at 0.08" in section.figures[1].label and "SGD" in texts(section.figures[0].svg)


def test_the_bound_says_how_vacuous_it_is(runs):
    put_bound(runs)
    arms = arms_of(runs)
    with style():
        (section,) = bound_sections(find_bounds(arms), arms)
    assert [figure.label for figure in section.figures] == [
        "Theorem 1, RigL 90 %: SGD at least 25 to 27; S2-SAM at least 25.5 to 27.5",
        "Theorem 1, own lambda, RigL 90 %: SGD at least 25 to 27; S2-SAM at least 25.5 to 27.5",
        "Corollary, RigL 90 %: SGD at least 1; S2-SAM at least 1",
    ]
    assert section.says[0] == (
        "Theorem 1: at least 25 to 27.5 nats in 6 runs, where the mean test loss was 0.5; vacuous in all of them, as "
        f"guessing costs {math.log(10):.3g}."
    )
    assert section.says[2].endswith(f"not shown to be vacuous, as guessing costs {math.log(10):.3g}.")
    assert "In 6 of 6 runs eta (L + lambda) was above 1" in section.says[3]


def test_results_of_other_weights_are_left_out_with_a_note(runs):
    put_sharpness(runs)
    stale = runs["none", 0]
    (stale / "model.safetensors").write_bytes(b"trained again")
    arms = arms_of(runs)
    held = find_sharpness(arms)
    assert [sorted(seeds) for seeds in held.by_arm.values()] == [[1, 2], [0, 1, 2]]
    assert str(stale / "sharpness.json") in held.notes[0] and "other weights" in held.notes[0]
    assert held.notes[1] == "Not every run was measured: RigL 90 %, SGD 2 of 3; RigL 90 %, S2-SAM 3 of 3."
    assert any("at other seeds, so they are not paired" in line for line in sentences(held, arms))
    with style():
        assert held.notes[0] in sharpness_sections(held, arms)[0].says
    for folder in runs.values():
        (folder / "model.safetensors").unlink()
    (only,) = measured_sections(arms)
    assert only.title == "Measurements left out" and "again." in only.says[0] and only.figures == ()


@pytest.mark.parametrize("name", ["sharpness.json", "premise.json", "robustness-generated.json", "bound.json"])
@pytest.mark.parametrize("text", ["{", "[1]", '{"format": 1}'])
def test_damaged_files_end_in_one_sentence(runs, tmp_path, capsys, name, text):
    path = runs["s2sam", 1] / name
    path.write_text(text)
    out = tmp_path / "page.html"
    assert main(["report", *map(str, runs.values()), "--out", str(out)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert name in said.replace(" ", "") and "damaged or no result of" in said and not out.exists()


WRITERS = {
    "sharpness.json": (find_sharpness, sharpness_sections, put_sharpness),
    "premise.json": (find_premise, premise_sections, put_premise),
    "bound.json": (find_bounds, bound_sections, put_bound),
    "robustness-generated.json": (lambda arms: find_robustness(arms, "generated"), robust_sections, put_robust),
}


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # of axes that end at 1e30
@pytest.mark.parametrize("name", WRITERS)
def test_any_damage_is_refused_or_drawn(runs, name):
    """Each value is another one, or gone, in one run or in all: what is read can be drawn, and nothing else is read."""
    find_them, draw_them, write = WRITERS[name]
    two = {key: folder for key, folder in runs.items() if key[1] < 1}
    arms, draw, drawn = arms_of(two), random.Random(name), 0
    for turn in range(40):
        write(two)
        files = [folder / name for folder in two.values()]
        whole = json.loads(files[0].read_text())
        other = changed(whole, draw)
        for path in files[: 1 + turn % 2]:
            own = json.loads(path.read_text())
            path.write_text(json.dumps({key: own[key] if value == whole.get(key) else value
                                        for key, value in other.items() if key in own}))  # fmt: skip
        sentence = ""
        try:
            held = find_them(arms)
        except ValueError as error:  # anything else fails the test
            sentence = str(error)
        assert "\n" not in sentence
        if not sentence and held.by_arm and drawn < 8:
            drawn += 1
            with style():
                assert draw_them(held, arms)
    assert drawn


def test_what_was_measured_otherwise_is_refused(runs):
    put_sharpness(runs)
    two = {key: runs[key] for key in [("s2sam", 0)]}
    put_sharpness(two, settings={"bn": "eval", "rho": 0.1})
    with pytest.raises(ValueError, match=r"rho is 0\.05 and 0\.1 for RigL 90 %, SGD, seed 0 and .*S2-SAM, seed 0"):
        find_sharpness(arms_of(runs))
    put_robust(runs)
    put_robust(two, images=300)
    with pytest.raises(ValueError, match="images is 400 and 300"):
        find_robustness(arms_of(runs), "generated")


def test_a_new_run_in_the_folder_leaves_no_old_measurement(runs, tmp_path):
    from s2sam.train.config import TrainConfig
    from s2sam.train.folder import RunFolder

    put_all(runs)
    put_robust(runs, "official")
    folder = runs["none", 0]
    RunFolder(folder).create(TrainConfig(), {}, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.yaml", "env.json"]
    assert {"bound.json", "robustness-official.json"} <= set(FILES)


def test_no_run_has_the_file(runs):
    held = find(arms_of(runs), "sharpness.json", "s2sam sharpness", shared=())
    assert held.by_arm == {} and held.notes == ()


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, True)])
def test_the_joint_page_is_quiet_and_fits(joint_page, browser, width, dark):
    errors, requests, evaluate = browser.open(joint_page.as_uri(), width=width, dark=dark)
    assert errors == [] and requests == []
    assert evaluate("document.documentElement.scrollWidth") <= width
    assert evaluate("document.querySelectorAll('ul.says li').length") == 4 + 2 + 1 + 1 + 6
    outside = evaluate(
        "[...document.querySelectorAll('figure')].flatMap(f => { const box = f.getBoundingClientRect();"
        " return [...f.querySelectorAll('text')].filter(t => { const r = t.getBoundingClientRect();"
        " return r.left < box.left - 1 || r.right > box.right + 1 }).map(t => t.textContent) })"
    )
    assert outside == []
    title = "[...document.querySelectorAll('figure svg text')].find(t => t.textContent == 'gaussian noise')"
    channels = evaluate(f"getComputedStyle({title}).fill").strip("rgb()").split(",")
    assert (sum(map(int, channels)) > 3 * 128) == dark
