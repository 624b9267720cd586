"""The vectorised runner of studies/control takes the library's own steps, for every arm, with and without BatchNorm."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import analyse
import batched
import pictures
import plan
import run as commands
from s2sam import S2SAM, SAM, sparsify
from s2sam.data import echo
from s2sam.data.augment import normalise
from s2sam.data.images import ImageData
from s2sam.data.loader import Batches
from s2sam.report.stats import Interval
from s2sam.train.config import DataConfig, ScheduleConfig, SparseConfig, TrainConfig
from s2sam.train.schedule import make_scheduler
from s2sam.train.seeding import generator
from s2sam.train.state import build

STEPS, DELTA_T, DOUBLE = 42, 6, torch.float64
RHO = {"norm": 0.3, "relative": 0.03, "rms": 0.004, "filter": 0.03}
ARMS = {
    "sgd": batched.Arm(),
    "nesterov": batched.Arm(nesterov=True),
    "twice": batched.Arm(visits=2),
    "sam": batched.Arm("sam"),
    "sam rms": batched.Arm("sam", scale="rms"),
    "sam-independent": batched.Arm("batch", scale="relative"),
    "+g": batched.Arm("gradient"),
    "+g relative": batched.Arm("gradient", scale="relative"),
    "-m": batched.Arm("momentum", sign=-1, scale="relative"),
    "noise": batched.Arm("random", scale="rms"),
    **{f"echo {scale}": batched.Arm("echo", scale=scale, visits=2) for scale in RHO},
}
RUNS = [(4, 0.1, 5e-4, 1.0), (7, 0.03, 5e-3, 2.0)]  # seed, lr, weight decay, rho over RHO


@pytest.fixture
def noise_images(monkeypatch):
    """Images of noise in place of the digits.

    Some pixels of the digits are the same in every image. A filter whose mask leaves it nothing else has a variance of
    0, BatchNorm divides rounding by it, and the order of a sum then decides which weights are exactly 0 (scale rms,
    noise) and which of two equal scores grows (RigL): no two ways of computing agree there.
    """

    @functools.lru_cache
    def images_of(count, noise, seed):
        draws = torch.Generator().manual_seed(seed)

        def part(n):
            images = torch.randint(256, (n, 1, 8, 8), generator=draws, dtype=torch.uint8)
            return images, torch.randint(10, (n,), generator=draws)

        return ImageData.build("noise", part(count), part(50), part(60), [str(i) for i in range(10)])

    monkeypatch.setattr(batched, "images_of", images_of)


def by_the_library(cell, arm, run):
    """The same training with the library's own model, optimizer, sparsifier and sharpness, in its plain loop."""
    model = batched.build(cell, run.seed).to(DOUBLE)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=run.lr, momentum=0.9, weight_decay=run.weight_decay, nesterov=arm.nesterov
    )
    if cell.sparsity:
        options = {"delta_t": DELTA_T, "min_per_filter": 1} if cell.method == "rigl" else {}
        sparsify(
            model, optimizer, method=cell.method, sparsity=cell.sparsity, total_steps=batched.steps_of(cell, arm),
            generator=generator(run.seed, "sparsify"), **options,
        )  # fmt: skip
    options = {"model": model, "rho": run.rho, "scale": arm.scale}
    if arm.gradients == 2:
        SAM(optimizer, **options)
    elif arm.displace == "echo":
        S2SAM.echo(optimizer, **options)
    elif arm.displace:
        draws = generator(run.seed, "sharpness") if arm.displace == "random" else None
        S2SAM(optimizer, direction=arm.displace, sign=arm.sign, generator=draws, **options)
    total = batched.steps_of(cell, arm)
    scheduler = make_scheduler(optimizer, ScheduleConfig(), total, 1)
    data = batched.data(cell, run.seed)
    x = normalise(data.train_x, data.mean, data.std).to(DOUBLE)
    batches = Batches(x, data.train_y, cell.batch_size, generator(run.seed, "data"))
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    stream = iter(echo(stream) if arm.visits == 2 else stream)
    model.train()
    for _ in range(STEPS):
        taken = [next(stream) for _ in range(arm.batches)]

        def gradient(taken=taken):
            images, labels = taken.pop(0) if len(taken) > 1 else taken[0]
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        if arm.gradients == 2:
            optimizer.step(gradient)
        else:
            gradient()
            optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model


@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "no norm"])
@pytest.mark.parametrize("method", ["dense", "static", "rigl"])
@pytest.mark.parametrize("name", ARMS)
@pytest.mark.usefixtures("noise_images")
def test_the_runner_takes_the_librarys_steps(name, method, norm):
    arm, sparsity = ARMS[name], 0.0 if method == "dense" else 0.9
    cell = batched.Cell(
        sparsity=sparsity, norm=norm, method=method, width=0.125, images=100, batch_size=24, epochs=20,
        delta_t=DELTA_T * arm.gradients, split_seed=None,
    )  # fmt: skip
    runs = [batched.Run(seed, lr, wd, rho * RHO[arm.scale]) for seed, lr, wd, rho in RUNS]
    networks = batched.train(cell, arm, runs, dtype=DOUBLE, steps=STEPS)
    whole, found = networks.dense(networks.w), batched.accuracies(cell, networks, runs)
    for i, run in enumerate(runs):
        data = batched.data(cell, run.seed)
        model = by_the_library(cell, arm, run)
        expected = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert expected.isfinite().all()
        torch.testing.assert_close(whole[i], expected, atol=1e-8, rtol=1e-8)
        if norm:
            for layer, bn in enumerate((model.body.bn1, model.body.bn2)):
                torch.testing.assert_close(networks.means[layer][i], bn.running_mean, atol=1e-8, rtol=1e-8)
                torch.testing.assert_close(networks.variances[layer][i], bn.running_var, atol=1e-8, rtol=1e-8)
        logits = model.eval()(normalise(data.test_x, data.mean, data.std).to(DOUBLE))
        assert found[i]["test"] == pytest.approx(float((logits.argmax(1) == data.test_y).double().mean()))


@pytest.mark.parametrize("method", ["dense", "static", "rigl"])
def test_images_wrong_labels_weights_and_order_are_those_of_a_run_of_the_library(method):
    sparsity, share = 0.0 if method == "dense" else 0.95, 0.4
    cell = batched.Cell(noise=share, sparsity=sparsity, method=method, width=0.5, split_seed=None)
    for arm, sharpness in ((batched.Arm(), "none"), (batched.Arm("echo", scale="relative", visits=2), "echo")):
        config = TrainConfig(
            method=method, sparsity=sparsity, sharpness=sharpness, seed=3, batch_size=32, epochs=100, device="cpu",
            model_options={"width": 0.5}, sparse=SparseConfig(options={"delta_t": 50}),
            data_options=DataConfig(
                train_size=600, val_fraction=batched.VAL_FRACTION, split_seed=3, label_noise=share, augment="none"
            ),
        )  # fmt: skip
        state = build(config)
        data = batched.data(cell, 3)
        assert data.digest == state.data.digest
        assert len(data.train_y) == 600
        assert len(data.val_y) == 719
        networks = batched.Networks(cell, [3], torch.float32)
        assert torch.equal(
            networks.dense(networks.w)[0], torch.cat([p.detach().flatten() for p in state.model.parameters()])
        )
        assert batched.steps_of(cell, arm) == config.epochs * len(state.batches)
        order = batched.order(cell, arm, 3)
        for _ in range(3):
            for x, y in state.batches:
                rows = next(order)
                assert torch.equal(y, data.train_y[rows])
                assert torch.equal(x, normalise(data.train_x[rows], data.mean, data.std))


def test_arms_differ_and_a_displacement_is_seen():
    """The comparison above could not tell arms apart if none moved the weights."""
    cell = batched.Cell(norm=False, method="dense", width=0.125, images=100, batch_size=24, epochs=20)
    plain = batched.train(cell, batched.Arm(), [batched.Run(0, 0.1, 5e-4)], dtype=DOUBLE, steps=STEPS).w
    for name, arm in ARMS.items():
        if name != "sgd":
            run = batched.Run(0, 0.1, 5e-4, RHO[arm.scale])
            assert float((batched.train(cell, arm, [run], dtype=DOUBLE, steps=STEPS).w - plain).abs().max()) > 1e-4


LATTICE = {
    "lr": {"values": [0.01, 0.1, 1.0], "start": [0.1]},
    "weight_decay": {"values": [1e-4, 1e-3, 1e-2], "start": [1e-3]},
}

MASKS = {"dense": ["dense", 0.0], "static90": ["static", 0.9]}


@pytest.fixture
def small_plan(tmp_path):
    settings = {
        "training": {"width": 0.125, "images": 60, "batch_size": 30, "epochs": 2, "delta_t": 2},
        "cells": {"noise": [0.4], "networks": ["plain"], "masks": MASKS},
        "seeds": {"screen": [0], "finals": [1], "fresh": [100, 101]},
        "trials": {"number": 6, "at_once": 4, "finalists": 2, "extension": 1, "extensions": 1, "ends": False},
        "lattice": LATTICE | {"rho": {"norm": {"values": [0.1, 0.2, 0.4, 0.8, 1.6], "start": [0.1, 0.4]}}},
        "arms": {
            "sgd": {}, "nesterov": {"nesterov": True}, "sam": {"displace": "sam"}, "+g": {"displace": "gradient"},
            "echo": {"displace": "echo", "visits": 2},
        },
        "margin": 1.0,
    }  # fmt: skip
    return plan.Plan(settings, tmp_path / "runs.csv")


def test_the_settings_of_the_study_give_every_arm_enough_points_and_no_seed_two_uses():
    study = plan.Plan.read()
    assert len(study.cells) == 30
    assert not set(study.tuning) & set(study.fresh)
    sizes = study.settings["trials"]
    for arm in study.arms:
        points = 1
        for axis in study.axes(arm):
            points *= len(axis)
        assert points >= sizes["number"] + sizes["extensions"] * sizes["extension"]
        assert len(set(study.start(arm))) == len(study.start(arm)) < sizes["number"]
        for point in study.start(arm):
            assert all(study.neighbours(arm, there) for there in study.neighbours(arm, point))


def test_controls_run_only_in_the_cells_that_the_settings_name():
    study = plan.Plan.read()
    controls = {"sam-independent", "-m", "noise", "twice"}
    assert set(study.arms_in("40-bn-static98")) == set(study.arms) > controls
    for cell in ("40-bn-rigl90", "20-plain-dense", "0-bn-static90"):
        assert set(study.arms_in(cell)) == set(study.arms) - controls
    assert list(study.arms_in("20-plain-dense")) == ["sgd", "nesterov", "sam", "+g", "echo"]


def test_next_trials_are_untried_neighbours_of_the_best_and_then_of_the_second_best(small_plan):
    first, second = (0.1, 1e-3, 0.1), (0.1, 1e-3, 0.4)
    tried = {first: 0.5, second: 0.4}
    around = [(0.1, 1e-3, 0.2), (0.1, 1e-2, 0.1), (0.1, 1e-4, 0.1), (1.0, 1e-3, 0.1), (0.01, 1e-3, 0.1)]
    assert small_plan.next_trials("sam", tried, 4) == around[:4]
    assert small_plan.next_trials("sam", tried, 6) == [*around, (0.1, 1e-3, 0.8)]
    assert small_plan.next_trials("sam", tried, 1, first=second) == [(0.1, 1e-3, 0.8)]
    assert small_plan.on_edge("sam", [first, *around], first) == []
    assert small_plan.on_edge("sam", [first, *around[1:]], first) == around[:1]


def test_a_choice_at_an_end_of_the_lattice_is_refused_but_for_no_decay_and_no_radius(small_plan):
    assert small_plan.at_end("sam", (0.1, 1e-4, 0.1)) == []
    assert small_plan.at_end("sam", (0.01, 1e-2, 1.6)) == ["lr 0.01", "weight_decay 0.01", "rho 1.6"]
    assert small_plan.at_end("sgd", (1.0, 1e-3, 0.0)) == ["lr 1"]
    rows = [row | {"lr": 0.01} for row in made_up(small_plan, {"40-plain-dense": {}}) if row["stage"] == "tune"]
    small_plan.settings["trials"] |= {"number": 1, "finalists": 1, "extensions": 0, "ends": True}
    assert small_plan.untuned("40-plain-dense", rows) == []
    assert "sgd chose lr 0.01, an end of its lattice" in small_plan.refusals("40-plain-dense", rows)[0]


def test_fresh_runs_wait_for_the_tuning_and_what_is_there_is_not_run_again(small_plan, monkeypatch):
    cell = "40-plain-dense"
    with pytest.raises(ValueError, match=r"tuning of 40-plain-dense is not complete \(sgd has 0 of 6 trials"):
        commands.fresh(small_plan, cell)
    assert not small_plan.table.exists()
    commands.tune(small_plan, cell)
    rows = small_plan.rows()
    assert all(row["test"] is None for row in rows)
    counts = {arm: len(small_plan.tried(cell, arm, rows)) for arm in small_plan.arms}
    assert len(set(counts.values())) == 1
    assert counts["sgd"] >= 6
    commands.measure_times(small_plan, cell)
    commands.fresh(small_plan, cell)
    before = small_plan.table.read_bytes()
    monkeypatch.setattr(commands, "train", None)  # calling it is an error
    commands.tune(small_plan, cell)
    commands.fresh(small_plan, cell)
    assert small_plan.table.read_bytes() == before
    monkeypatch.setattr(commands, "train", batched.train)
    small_plan.settings["equal"] = {"lr": 0.1, "weight_decay": 1e-3}
    commands.equal(small_plan, cell)
    found = [row for row in small_plan.rows() if row["stage"] == "equal"]
    assert {row["arm"] for row in found} == set(plan.MAIN)
    assert {(row["lr"], row["weight_decay"]) for row in found} == {(0.1, 1e-3)}
    tried = small_plan.screened(small_plan.tried(cell, "echo"))
    best = max(score for point, score in tried.items() if point[:2] == (0.1, 1e-3))
    (rho,) = {row["rho"] for row in found if row["arm"] == "echo"}
    assert tried[0.1, 1e-3, rho] == best
    text = analyse.report(small_plan)
    assert "40-plain-static90 has not run" in text
    assert "not all its cells have run" in text
    monkeypatch.setattr(commands, "train", batched.train)
    commands.execute(
        small_plan, "tune", cell, "sgd", [((1.0, 1e-4, 0.0), 0), ((1.0, 1e-3, 0.0), 0), ((1.0, 1e-2, 0.0), 0)]
    )
    commands.execute(small_plan, "tune", cell, "sgd", [((0.01, wd, 0.0), 0) for wd in (1e-4, 1e-3, 1e-2)])
    with pytest.raises(ValueError, match="different numbers of trials"):
        analyse.report(small_plan)


def made_up(small_plan, gains, train=0.9):
    """A table: arm a of cell c has 50 % + gains[c][a], and a point more in odd seeds; SGD validates best."""
    rows = []
    for cell, by_arm in gains.items():
        for arm in (*small_plan.arms, plan.TIMED):
            rho = 0.1 if arm not in plan.BASELINES else 0.0
            common = {"cell": cell, "arm": arm, "lr": 0.1, "weight_decay": 1e-3, "rho": rho, "epochs": 2, "seconds": 1}
            better = 0.6 if arm == "sgd" else 0.5
            if arm != plan.TIMED:
                rows += [common | {"stage": "tune", "seed": s, "val": better, "train": train} for s in (0, 1)]
            for seed in small_plan.fresh:
                own = 0.01 * (seed % 2) * (arm in by_arm)
                test = 0.5 + by_arm.get(arm, 0.0) + own
                rows.append(common | {"stage": "fresh", "seed": seed, "val": 0.5, "test": test, "train": train})
    return [{"environment": "none"} | row for row in rows]


def test_the_report_takes_paired_differences_and_applies_the_gate(small_plan):
    small_plan.settings["seeds"]["fresh"] = [100, 123]
    gains = {"40-plain-dense": {"sam": 0.1, "echo": 0.08}, "40-plain-static90": {"sam": 0.0, "echo": 0.02}}
    rows = made_up(small_plan, gains)
    found, missing = analyse.whole_cells(small_plan, rows)
    assert missing == []
    gate = {cell: analyse.Gate(small_plan, rows, cell, found[cell], 2) for cell in found}
    assert [one.baseline for one in gate.values()] == ["sgd", "sgd"]
    assert [one.passes for one in gate.values()] == [True, True]  # in the second by the point in every other seed
    written = [one.line() for one in analyse.contrasts(small_plan, found, gate)]
    lines = {(line[0], line[1]): line[2:] for line in written}
    assert lines["1: echo minus the better baseline", "2"][0] == "+5.50"
    assert lines["3: +g minus the better baseline", "2"][0] == "+0.00"
    halvings = math.log2(10)
    of_echo = lines["4: echo's gain per halving of the density, plain", ""]
    assert of_echo[0] == f"{-6 / halvings:+.2f}"
    facts = analyse.summary(small_plan, found, gate, [])
    assert facts["cells"]["40-plain-dense"]["minus"]["sam"]["mean"] == pytest.approx(10.5)
    assert facts["cells"]["40-plain-dense"]["minus"]["+g"] == {"n": 24, "mean": 0.0}
    first = next(one for one in facts["primaries"] if one["scope"] == "gate")
    assert (first["contrast"], first["cells"], first["n"]) == ("1: echo minus the better baseline", 2, 24)
    assert first["mean"] == pytest.approx(5.5)
    assert first["low"] < 5.5 < first["high"]
    # tuned SGD has memorised nothing, but at the common setting it does
    weak = [row | {"train": 0.6} if row["arm"] == "sgd" else row for row in rows]
    common = [row | {"stage": "equal"} for row in rows if row["stage"] == "fresh" and row["arm"] in plan.MAIN]
    loose = analyse.whole_cells(small_plan, weak)[0]
    assert not any(one.passes for one in analyse.gates(small_plan, weak, loose).values())
    amended = analyse.gates(small_plan, weak + common, loose)
    assert [(one.passes, one.as_written) for one in amended.values()] == [(True, False)] * 2
    equal = analyse.equal_runs(small_plan, weak + common)
    facts = analyse.summary(small_plan, found, amended, [], equal=equal)["at one setting"]["40-plain-dense"]
    assert facts["sgd"] == pytest.approx(50.0)
    assert facts["minus sgd"]["sam"]["mean"] == pytest.approx(10.5)
    # SGD has 65 % of the labels that it was trained on, and 60 % are right: that is no memorising
    loose = analyse.whole_cells(small_plan, made_up(small_plan, gains, train=0.65))[0]["40-plain-dense"]
    assert not analyse.Gate(small_plan, rows, "40-plain-dense", loose, 2).passes


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [(-0.9, 0.5, "not worse"), (0.1, 2.0, "and better"), (-1.5, 0.5, "cannot tell"), (-3.0, -1.1, "worse than SAM")],
)
def test_non_inferiority_is_read_from_the_interval(low, high, says):
    assert says in analyse.non_inferior(Interval(low, high, 0.95), 1.0)


def test_the_pictures_show_the_gains_and_the_best_trial_at_each_radius(small_plan):
    small_plan.settings["seeds"]["fresh"] = [100, 123]
    made = made_up(small_plan, {"40-plain-dense": {"sam": 0.1, "echo": 0.08}, "40-plain-static90": {"sam": 0.02}})
    of_echo = {"stage": "tune", "cell": "40-plain-dense", "arm": "echo", "epochs": 2, "seconds": 1}
    tried = [(0.01, 0.2, 0.7), (0.1, 0.2, 0.8), (0.1, 0.4, 0.3)]  # lr, rho, validation accuracy
    made += [
        of_echo | {"lr": lr, "weight_decay": 1e-3, "rho": rho, "val": val, "train": 0.9, "seed": s, "environment": "no"}
        for lr, rho, val in tried
        for s in (0, 1)
    ]
    plan.append(small_plan.table, made)
    rows = small_plan.rows()
    best = pictures.best_by_radius(small_plan, rows, "40-plain-dense", "echo")
    assert best == pytest.approx({0.1: 50.0, 0.2: 80.0, 0.4: 30.0})
    found, _ = analyse.whole_cells(small_plan, rows)
    gate = {cell: analyse.Gate(small_plan, rows, cell, found[cell], 2) for cell in found}
    mean, bounds = pictures.gains(small_plan, found, gate, "sam")["40-plain-dense"]
    assert mean == pytest.approx(10.5)
    assert bounds.low < 10.5 < bounds.high
    for path in pictures.draw(small_plan):
        with Image.open(path) as picture:
            assert picture.size[0] > 300
            assert len(picture.getcolors(1 << 20)) > 5  # it is not empty
