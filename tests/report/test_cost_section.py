"""What runs cost, counted: equal to the counts of s2sam.analysis.flops, at the densities that the runs really had."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from s2sam.analysis.flops import count_macs, inference_flops
from s2sam.analysis.opened import load_masks
from s2sam.cli.main import main
from s2sam.models import create_model
from s2sam.report.arms import group_runs
from s2sam.report.cost_section import CAPTION, HEADS, cells, cost_section, scaled
from s2sam.report.counted import Network, count, images, network_of
from s2sam.report.read import Run, read_run
from s2sam.sparse.budget import densities
from s2sam.train import TrainConfig, run
from s2sam.train.config import DataConfig, SparseConfig
from s2sam.train.finished import load_images, load_model, read_folder

EPOCHS, IMAGES = 2, 320
ARMS = {
    "dense": {"method": "dense", "sharpness": "none"},
    "dense-sam": {"method": "dense", "sharpness": "sam"},
    "rigl": {"method": "rigl", "sharpness": "s2sam"},
    "gmp": {"method": "gmp", "sharpness": "none"},
    "lt": {"method": "lt", "sharpness": "none"},
    "chex": {"method": "chex", "sharpness": "none"},
}
OPTIONS = {"rigl": {"delta_t": 3}, "gmp": {"t_start": 0.0, "t_end": 1.0, "delta_t": 2}, "lt": {"rate": 0.5}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A short real run of each kind, all with half of the weights."""
    root = tmp_path_factory.mktemp("counted")
    for name, arm in ARMS.items():
        if name == "chex":
            pytest.importorskip("torch_pruning")
        options = SparseConfig(options=OPTIONS.get(arm["method"], {}))
        data = DataConfig(train_size=320)
        run(TrainConfig(epochs=EPOCHS, sparsity=0.5, sparse=options, data_options=data, out=str(root / name), **arm))
    return {name: root / name for name in ARMS}


@pytest.fixture(scope="module")
def network(folders):
    return network_of(read_run(folders["dense"]))


def golden_network(name, **options):
    model = create_model(name, num_classes=10, generator=torch.Generator(), **options)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.ndim >= 2}
    return Network(count_macs(model, torch.zeros(1, 3, 32, 32)), sizes, (3, 32, 32)), shapes


def made_run(tmp_path, method, sharpness, topology, steps=1000):
    config = {"method": method, "sharpness": sharpness, "seed": 0, "sparse": {"options": {"delta_t": 99}}}
    epochs = [{"epoch": e, "step": e * steps // 4, "seconds": 2.0, "images_per_second": 500.0} for e in (1, 2, 3, 4)]
    records = [{"kind": "topology", "step": step, "density": density} for step, density in topology]
    return Run(tmp_path, config, {}, {"n_steps": steps}, epochs, [], records)


def test_golden_counts_of_resnet32(tmp_path):
    network, shapes = golden_network("resnet32", width=2.0)
    at_90 = densities(shapes, 0.9, "erk")
    found = count(made_run(tmp_path, "rigl", "s2sam", [(0, at_90)]), network)
    assert found.dense == 275_612_928 and round(found.final / found.dense, 3) == 0.175
    f_s, f_d = found.final, found.dense
    assert found.training == pytest.approx(4000 * (3 * f_s * 99 + 2 * f_s + f_d) / 100)
    assert found.dense_training == 4000 * 3 * f_d
    assert found.parameters == sum(network.sizes.values()) and found.dense_bytes == 4 * found.parameters
    prunable = sum(network.sizes[name] for name in shapes)
    assert found.parameters - found.active == pytest.approx(0.9 * prunable, rel=1e-3)
    assert found.stored == 4 * found.active + prunable / 8
    twice = count(made_run(tmp_path, "rigl", "sam", [(0, at_90)]), network)
    assert twice.training == pytest.approx(4000 * (6 * f_s * 99 + 5 * f_s + f_d) / 100)
    once = count(made_run(tmp_path, "set", "none", [(0, at_90)]), network)
    assert once.training == pytest.approx(4000 * 3 * f_s)


def test_densities_count_as_long_as_they_held(tmp_path):
    network, shapes = golden_network("resnet8")
    dense, half = (dict.fromkeys(shapes, share) for share in (1.0, 0.5))
    found = count(made_run(tmp_path, "gmp", "none", [(0, dense), (250, half)]), network)
    assert found.final == found.dense / 2
    assert found.training == pytest.approx(found.dense_training * (0.25 + 0.75 / 2))


@pytest.mark.parametrize("name", ARMS)
def test_a_real_run_counts_as_the_network_it_left(folders, network, name):
    record, folder = read_run(folders[name]), folders[name]
    found = count(record, network)
    config, env = read_folder(folder)
    data = load_images(config, env, None)
    shares = {key: float(mask.float().mean()) for key, mask in load_masks(folder).items()}
    if name.startswith("dense"):
        shares = dict.fromkeys(n for n, p in load_model(folder, config, env, data).named_parameters() if p.ndim > 1)
        shares = dict.fromkeys(shares, 1.0)
    flops = inference_flops(load_model(folder, config, env, data), data.image_shape, shares)
    assert found.dense == flops.dense and found.final == pytest.approx(flops.sparse)
    assert (found.parameters, found.active) == (record.final["parameters"], record.final["active_parameters"])
    assert (found.final < 0.9 * found.dense) == (not name.startswith("dense"))


@pytest.mark.parametrize("name", ARMS)
def test_the_training_of_a_real_run_step_by_step(folders, network, name):
    record = read_run(folders[name])
    found, steps, total = count(record, network), record.final["n_steps"], 0.0
    for step in range(steps):
        now = [r["density"] for r in record.topology if r["step"] <= step][-1] if record.topology else {}
        total += sum(now.get(weight, 1.0) * macs for weight, macs in network.macs.items())
    trainings = 2 if name == "lt" else 1
    if name == "rigl":
        f_s, f_d = total / steps, found.dense
        each = (3 * f_s * 3 + 2 * f_s + f_d) / 4
    else:
        each = (6 if name == "dense-sam" else 3) * total / steps
    assert found.training == pytest.approx(each * IMAGES * EPOCHS * trainings)
    assert found.dense_training == 3 * found.dense * IMAGES * EPOCHS


def test_several_trainings_cost_more_than_one(folders, network):
    record = read_run(folders["lt"])
    assert len(record.levels) == EPOCHS and images(record.levels) == IMAGES * EPOCHS
    found = count(record, network)
    assert found.training == pytest.approx(found.dense_training + 3 * found.final * IMAGES * EPOCHS)
    alone = count(replace(read_run(folders["dense"])), network)
    assert alone.training == alone.dense_training
    assert count(read_run(folders["dense-sam"]), network).training == 2 * alone.training


def test_the_page_tells_it(folders, network, tmp_path, capsys):
    out = tmp_path / "page.html"
    runs = [str(folders[name]) for name in ("dense", "dense-sam", "rigl")]
    assert main(["report", *runs, "--out", str(out)]) == 0
    page = out.read_text(encoding="utf-8")
    assert "in dense arithmetic: zeros save no time here" in page and CAPTION[:40] in page
    assert (
        "SAM&#x27;s two passes count twice" in page and "are not compared" in page and "one image of 1 x 8 x 8" in page
    )
    table = page[page.index("Size, FLOPs and throughput") :]
    table = table[: table.index("</table>")]
    for name in ("dense", "dense-sam", "rigl"):
        found = count(read_run(folders[name]), network)
        told = [scaled(2 * found.final), f"{found.final / found.dense:.3f}x", scaled(2 * found.training)]
        told += [f"{found.training / found.dense_training:.3f}x", f"{found.parameters:,}", scaled(found.stored, "B")]
        assert all(f"<td>{text}</td>" in table for text in told)
    assert "<td>2.000x</td>" in table  # SAM on the dense network
    assert page.index("Difference in accuracy") < page.index("Size, FLOPs and") < page.index("<h2>Test accuracy")


def test_the_number_of_images_a_second_is_the_recorded_one(folders):
    (arm,) = group_runs([read_run(folders["dense"])])
    run = next(iter(arm.runs.values()))
    for epoch, rate in zip(run.epochs, (1000.0, 3000.0), strict=True):
        epoch["images_per_second"] = rate
    assert dict(zip(HEADS[1:], cells(arm, []), strict=True))["images/s, as recorded"] == "2,000"


def test_what_cannot_be_counted_is_a_dash_with_its_reason(folders, tmp_path):
    old = shutil.copytree(folders["rigl"], tmp_path / "old")
    lines = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] != "topology"]
    for line in kept:
        line.pop("active_parameters", None)
    (old / "metrics.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")
    (old / "DONE").write_text("")  # as an s2sam of that time left it
    arms = group_runs([read_run(folders["dense"]), read_run(old)])
    html = cost_section(arms).figures[0].svg
    rows = re.findall(r"<th scope=\"row\">.*?</tr>", html)
    assert "-</td>" not in rows[0] and rows[1].count("<td>-</td>") == len(HEADS) - 3
    assert "RigL 50&nbsp;%, S2-SAM: 1 of 1 runs not counted: the run has no records of its masks" in html
    moved = shutil.copytree(folders["dense"], tmp_path / "moved")
    config = (moved / "config.yaml").read_text().replace("data: digits", "data: /nowhere/data")
    (moved / "config.yaml").write_text(config)
    section = cost_section(group_runs([read_run(moved)]))
    assert len(section.figures) == 1 and "no data at /nowhere/data" in section.figures[0].svg
    assert section.figures[0].svg.count("<td>-</td>") == 7


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda run: replace(run, topology=[{"step": 0, "density": {"gone": 0.5}}]), "tell of a weight 'gone'"),
        (lambda run: replace(run, topology=[{"step": 3, "density": {}}]), "must begin at step 0"),
        (lambda run: replace(run, config={**run.config, "method": "unheard-of"}), "unknown method 'unheard-of'"),
        (lambda run: replace(run, epochs=[{"step": 10}]), "do not tell how many images"),
    ],
)
def test_records_that_do_not_tell_are_refused(folders, network, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        count(change(read_run(folders["rigl"])), network)


def test_synthetic_runs_without_their_facts_make_a_page(design, tmp_path):
    assert main(["report", *map(str, design[:3]), "--out", str(tmp_path / "page.html")]) == 0
    assert "FLOPs and bytes are not counted:" in (tmp_path / "page.html").read_text(encoding="utf-8")
