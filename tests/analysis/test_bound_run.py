"""Probes of trained runs: steps on a copy, from the start and from checkpoints; run and process stay as they were."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from dataclasses import replace

import pytest
import torch

from s2sam.analysis import bound_run
from s2sam.analysis.bound_network import smallest_quotient
from s2sam.analysis.bound_probe import Probe, Stop
from s2sam.analysis.bound_run import (
    ProbeSettings,
    active_weights,
    checkpoints,
    displacement,
    fixed_batches,
    learning_rates,
    measure_run,
    stops,
    weighted,
)
from s2sam.analysis.bound_words import sentences
from s2sam.report.read import read_run
from s2sam.train import TrainConfig, run
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, ScheduleConfig, SparseConfig
from s2sam.train.state import build
from s2sam.train.step import train_step

SOME = {"points": [(1.0, 1.0), (0.5, 1.0)], "losses": [1.0], "gradients": [1.0], "quotients": {"step": [1.0]},
        "variances": [0.0]}  # fmt: skip
SMALL = ProbeSettings(images=160, steps=3, examples=2, power=2)
CONFIG = TrainConfig(
    epochs=2, sparse=SparseConfig(options={"delta_t": 2}), sam=SamConfig(stats_every=1), device="cpu",
    data_options=DataConfig(train_size=320),
)  # fmt: skip


@pytest.fixture(scope="module")
def rigl(tmp_path_factory):
    """A sparse S2-SAM run of 10 steps whose masks change."""
    folder = tmp_path_factory.mktemp("bound") / "rigl"
    run(replace(CONFIG, out=str(folder)))
    return folder


def probe(folder, settings=SMALL, **options):
    records = read_run(folder)
    return measure_run(folder, settings, label="x", epochs=records.epochs, steps=records.steps, device="cpu", **options)


def digests(folder):
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def found(rigl):
    torch.random.default_generator.manual_seed(12345)  # not where the run ended
    before, rng = digests(rigl), torch.get_rng_state()
    result = probe(rigl)
    assert digests(rigl) == before
    assert torch.equal(torch.get_rng_state(), rng)
    return result


def test_places_and_steps_are_those_of_the_run(rigl, found):
    places = found["probes"]
    assert places[0]["at"] == "start" and places[-1]["at"] == "last"
    assert [p["step"] for p in places] == sorted({0, *(c["step"] for c in checkpoints(rigl).values())})
    assert places[0]["lr"] == pytest.approx([r["lr"] for r in read_run(rigl).steps[:3]])
    assert places[-1]["lr"] == [0.001] * 3  # the schedule has come down to 0; 1 % of the largest
    assert places[0]["displacements"][0] == 0.0  # no direction yet
    assert places[0]["displacements"][1:] + places[-1]["displacements"] == pytest.approx([0.05] * 7, rel=1e-4)
    assert places[0]["moved_masks"] == 1 and places[-1]["moved_masks"] == 0
    assert (found["images"], found["all_images"], found["batches"]) == (128, 320, 2)
    assert found["squared_radius"] == pytest.approx(0.0025, rel=1e-3) and found["radius_from"] == "steps"
    assert places[0]["mask"] != places[-1]["mask"]
    still = [Probe(**{key: p[key] for key in ("points", "moved_masks")}) for p in places if not p["moved_masks"]]
    assert found["constants"]["pl"] == smallest_quotient([one.points for one in still])  # masks moved between them
    assert 0 < found["constants"]["pl_if_fitted"] < found["constants"]["pl"]
    assert found["constants"]["gap"] > 0 and found["constants"]["smooth"] > 0


def test_the_same_twice_and_another_with_another_seed(rigl, found):
    assert probe(rigl) == found
    other = probe(rigl, replace(SMALL, seed=1))
    assert other["constants"]["start"] != found["constants"]["start"]
    assert other["probes"][0]["lr"] == found["probes"][0]["lr"]


def test_progress_ends_at_the_whole_also_when_steps_are_cut(rigl):
    told = []
    result = probe(rigl, replace(SMALL, steps=12, power=0, examples=0), tell=lambda *counts: told.append(counts))
    total = 13 * len(result["probes"])
    assert told[-1] == (total, total) and [c for c, _ in told[:-1]] == list(range(1, len(told)))
    assert len(result["probes"][0]["losses"]) == result["rates"]["steps"] + 1  # not past the end of the run
    assert len(result["probes"][-1]["losses"]) == 13


def test_looking_does_not_change_the_training():
    """The stops of a probe are the weights of the plain loop, bit for bit, displacements and topology included."""
    config = replace(CONFIG, sam=SamConfig(direction="random", stats_every=1))
    looked, plain, taken = build(config), build(config), []
    seen = []
    for stop in stops(looked, 4, taken):
        seen.append(stop.w)
        stop.displaced(torch.zeros(0))
        stop.displaced(torch.zeros(0))
    batches = iter(plain.batches)
    for w, following in itertools.pairwise(seen):
        assert torch.equal(w, bound_run.flat(list(plain.model.parameters())))
        plain.model.train()
        train_step(plain, *next(batches))
        plain.advance()
        assert not torch.equal(w, following)
    assert torch.equal(seen[-1], bound_run.flat(list(plain.model.parameters())))
    assert torch.equal(active_weights(looked), active_weights(plain))


def test_displacements_are_on_active_weights_and_of_their_length():
    for sharpness, scale, within in (("s2sam", "norm", 0.05), ("sam", "norm", 0.05), ("sam", "relative", None)):
        state = build(replace(CONFIG, sharpness=sharpness, sam=SamConfig(scale=scale)))
        *_, stop = stops(state, 1, [])
        gradient = torch.randn(len(stop.w), generator=torch.Generator().manual_seed(0)) * stop.active
        e = stop.displaced(gradient)
        length = 0.05 * float(stop.w.norm()) if within is None else within
        assert float(e.norm()) == pytest.approx(length, rel=1e-4)
        assert bool((e[~stop.active] == 0).all()) and int((~stop.active).sum()) > 50_000
        if sharpness == "sam":
            assert torch.allclose(e / e.norm(), gradient / gradient.norm(), atol=1e-5)
    plain = build(replace(CONFIG, sharpness="none"))
    assert displacement(plain, gradient) is None
    asam = build(replace(CONFIG, sharpness="sam", sam=SamConfig(scale="asam")))
    w = bound_run.flat(list(asam.model.parameters()))
    e = displacement(asam, gradient)
    assert torch.allclose(e, 0.05 * w**2 * gradient / (w.abs() * gradient).norm(), atol=1e-7)


def test_batches_are_mixed_whatever_the_order_of_the_images():
    """Images stored class by class must not come in batches of one class."""
    state = build(CONFIG)
    order = state.data.train_y.argsort()
    object.__setattr__(state.data, "train_x", state.data.train_x[order])
    object.__setattr__(state.data, "train_y", state.data.train_y[order])
    batches = fixed_batches(state, ProbeSettings(images=None))
    assert [len(x) for x, _ in batches] == [64] * 5
    assert all(len(y.unique()) == 10 for _, y in batches)


def test_learning_rates_of_the_whole_run():
    schedule = ScheduleConfig(name="step", milestones=[0.5], gamma=0.1)
    rates = learning_rates(build(replace(CONFIG, schedule=schedule)))
    assert (rates.steps, rates.largest) == (10, 0.1)
    assert rates.total == pytest.approx(0.55)
    assert rates.effective == pytest.approx((5 * 0.01 + 5 * 0.0001) / 0.55)
    lottery = learning_rates(build(replace(CONFIG, method="lt", sparsity=0.5, schedule=schedule)))
    assert lottery.steps > 10 and lottery.total == pytest.approx(0.055 * lottery.steps)


def test_runs_without_and_with_two_step_displacement(tmp_path):
    results = {}
    for sharpness in ("none", "sam"):
        folder = tmp_path / sharpness
        optim = OptimConfig(momentum=0.0, weight_decay=0.0, clip_norm=1.0)
        run(replace(CONFIG, sharpness=sharpness, method="dense", epochs=1, optim=optim, out=str(folder)))
        results[sharpness] = probe(folder, replace(SMALL, steps=1))
    none, sam = results["none"], results["sam"]
    assert none["squared_radius"] == none["terms"]["corollary"]["radius"] == 0.0
    assert set(none["probes"][0]["quotients"]) == {"step", "chord", "curvature"}
    assert sam["squared_radius"] == pytest.approx(0.0025, rel=1e-3) and sam["radius_from"] == "probes"
    assert sam["terms"]["corollary"]["radius"] > 0 and "+-e" in sam["probes"][0]["quotients"]
    assert none["terms"]["theorem 1"]["start"] == pytest.approx(sam["terms"]["theorem 1"]["start"])
    assert none["measured"]["test_loss"] == pytest.approx(read_run(tmp_path / "none").epochs[0]["test_loss"])


def test_echo_is_measured_at_its_second_visits_and_the_bounds_are_not_claimed_for_it(tmp_path):
    """Step records are of second visits; first ones, whose displacement is 0, are half of the run."""
    config = replace(CONFIG, sharpness="echo", rho=0.5, sam=SamConfig(scale="norm", stats_every=2), method="dense")
    run(replace(config, out=str(tmp_path / "even")))
    assert all(r["displacement"] == pytest.approx(0.5, rel=1e-6) for r in read_run(tmp_path / "even").steps)
    found = probe(tmp_path / "even")
    assert found["squared_radius"] == pytest.approx(0.5**2 / 2, rel=1e-3) and found["radius_from"] == "steps"
    lengths = found["probes"][0]["displacements"]
    assert lengths == pytest.approx([0.0, 0.5, 0.0, 0.5], rel=1e-4)
    lines = sentences([found])
    assert sum("(not proved for this run): at least" in line for line in lines) == 3
    assert sum("neither bound applies" in line for line in lines) == 1
    assert not any("the corollary's bound is SGD's" in line for line in lines)
    logged = [{"step": s, "lr": 1.0, "displacement": 0.5 * (s % 2)} for s in range(9)]  # as an earlier s2sam logged
    found = bound_run.evaluate(build(config), [Probe(**SOME, displacements=[0.0])], [], logged)
    assert found["squared_radius"] == pytest.approx(0.125) and found["radius_from"] == "steps"


def test_looking_does_not_change_the_training_of_echo():
    config = replace(CONFIG, sharpness="echo", rho=0.5, sam=SamConfig(scale="norm"))
    looked, plain = build(config), build(config)
    seen = []
    for stop in stops(looked, 6, []):
        seen.append(stop.w)
        stop.displaced(torch.zeros(0))
    batches = itertools.chain.from_iterable(itertools.repeat(plain.batches))
    for w, following in itertools.pairwise(seen):
        assert torch.equal(w, bound_run.flat(list(plain.model.parameters())))
        plain.model.train()
        train_step(plain, *next(batches))
        plain.advance()
        assert not torch.equal(w, following)
    assert torch.equal(seen[-1], bound_run.flat(list(plain.model.parameters())))


def test_a_displacement_that_begins_late_counts_as_0_before():
    """Without step records the radius is that of the probes, and steps without displacement are steps, too."""
    sam = SamConfig(rho_schedule="late", rho_start=0.5, stats_every=0)
    state = build(replace(CONFIG, sam=sam))
    lengths = [0.0, 0.0, 0.0, 0.05, 0.05]  # the first of all: no direction yet
    probes = [
        Probe(**SOME, displacements=lengths[:3]),
        Probe(**SOME, displacements=lengths[3:]),
    ]
    found = bound_run.evaluate(state, probes, [], [])
    assert found["radius_from"] == "probes" and found["squared_radius"] == pytest.approx(2 * 0.0025 / 4)
    logged = [{"step": 0, "lr": 1.0, "displacement": 9.0}, {"step": 1, "lr": 1.0, "displacement": 0.0},
              {"step": 2, "lr": 3.0, "displacement": 0.05}]  # fmt: skip
    found = bound_run.evaluate(state, probes, [], logged)
    assert found["radius_from"] == "steps" and found["squared_radius"] == pytest.approx(0.75 * 0.0025)


def test_bad_inputs(rigl, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="40 images do not fill two batches of 64, .*: give --images 128 or more"):
        probe(rigl, replace(SMALL, images=40))
    state = build(replace(CONFIG, batch_size=200))
    with pytest.raises(ValueError, match="the run has too few training images"):
        fixed_batches(state, ProbeSettings(images=None))
    for wrong, sentence in [
        ({"images": 1}, "at least two batches"), ({"steps": 0}, "at least one step"), ({"seed": -1}, "seed must be"),
        ({"power": -1}, "power must be"), ({"examples": -1}, "examples must be"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            ProbeSettings(**wrong)
    bare = shutil.copytree(rigl, tmp_path / "bare")
    shutil.rmtree(bare / "checkpoints")
    with pytest.raises(ValueError, match=r"keeps no checkpoint to go on from \(checkpoints/last.pt\)"):
        probe(bare)
    torn = shutil.copytree(rigl, tmp_path / "torn")
    (torn / "checkpoints" / "last.pt").write_bytes(b"no")
    with pytest.raises(ValueError, match="is torn or no checkpoint"):
        probe(torn)
    other = shutil.copytree(rigl, tmp_path / "other")
    text = (other / "env.json").read_text()
    (other / "env.json").write_text(text.replace('"data_digest": "', '"data_digest": "0'))
    with pytest.raises(ValueError, match="are not those"):
        probe(other)


def test_weights_of_a_mean():
    records = [{"lr": 1.0, "x": 2.0}, {"lr": 3.0, "x": None}, {"lr": 0.0, "x": 9.0}, {"lr": 1.0, "x": 4.0}]
    assert weighted(records, "x") == 3.0 and weighted(records, "x", 2) == 10.0
    assert weighted([{"lr": 1.0}], "x") is None and weighted([], "x") is None
    assert Stop(torch.zeros(1), torch.ones(1, dtype=torch.bool)).displaced(torch.ones(1)) is None
