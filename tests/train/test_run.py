"""Whole runs: every method with every sharpness, what the folder holds, and that equal settings give equal weights."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file

from s2sam import registry
from s2sam.train import TrainConfig, load_config, loop, run
from s2sam.train.checkpoint import load_checkpoint
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, SparseConfig
from s2sam.train.state import build

METHODS = ["dense", *(row.name for row in registry.list_methods())]
TINY = TrainConfig(
    epochs=2,
    data_options=DataConfig(train_size=320),
    sam=SamConfig(stats_every=2),
    sparse=SparseConfig(options={"delta_t": 3, "rate": 0.6, "rounds": 5, "threshold": 0.02, "stretch": [], "l1": 0.02}),
)
EXPLORED = {"gmp": 1.0, "lt": 1.0, "granet": 0.5, "ac-dc": 1.0, "str": 1.0, "chex": 11627 / 84480}  #: at the start
SPARSITY = {"nm": 0.75, "nm-rigl": 0.75, "sr-ste": 0.75}  #: of the others it is 0.9; these keep 1 of 4
LEVELS = {"lt": 4}  #: trainings in one run: sparsity 0, 0.6, 0.84, 0.9


def records(folder, kind=None):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in found if kind in (None, r["kind"])]


@pytest.mark.parametrize(("method", "sharpness"), list(itertools.product(METHODS, ["none", "s2sam", "sam"])))
def test_every_arm_trains_into_a_whole_folder(tmp_path, method, sharpness):
    folder = tmp_path / "run"
    sparsity = SPARSITY.get(method, TINY.sparsity)
    config = dataclasses.replace(TINY, method=method, sharpness=sharpness, sparsity=sparsity, out=str(folder))
    final = run(config)

    assert load_config(folder / "config.yaml") == config
    sealed = json.loads((folder / "DONE").read_text())["sha256"]
    assert {"metrics.jsonl", "model.safetensors"} <= sealed.keys()
    env = json.loads((folder / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__
    assert final == records(folder, "final")[0]
    assert records(folder)[-1] == final
    assert final["data_digest"] == env["data_digest"]
    before = 10 * (LEVELS.get(method, 1) - 1)
    assert (final["n_steps"], final["train_images"], final["test_images"]) == (before + 10, 320, 359)

    epochs = records(folder, "epoch")
    assert [(r["epoch"], r["step"]) for r in epochs] == [(1, before + 5), (2, before + 10)]
    assert all(0 <= r[k] <= 1 for r in epochs for k in ("train_top1", "val_top1", "test_top1"))
    assert final["test_top1"] == epochs[-1]["test_top1"]
    sparsest = [r["val_top1"] for r in epochs if r["sparsity"] > final["sparsity"] - 1e-3]
    assert final["best_val_top1"] == max(sparsest)
    assert len(sparsest) == (1 if method in ("gmp", "granet", "ac-dc", "str", "chex", "chase") else 2)
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    with open(folder / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["test_top1"]) for r in rows] == [r["test_top1"] for r in epochs]

    weights = load_file(folder / "model.safetensors")
    prunable = {name: w for name, w in weights.items() if w.ndim == 2}
    total = sum(w.numel() for w in prunable.values())
    zeros = sum(int((w == 0).sum()) for w in prunable.values())
    if method == "dense":
        assert not (folder / "masks.safetensors").exists()
        assert (zeros, final["sparsity"], records(folder, "topology")) == (0, 0.0, [])
        assert final["active_parameters"] == final["parameters"]
    else:
        masks = load_file(folder / "masks.safetensors")
        kept = sum(int(m.sum()) for m in masks.values())
        assert masks.keys() == prunable.keys()
        if method == "chex":  # a tenth of the channels is left: of 64 x 256 + 256 x 256 + 256 x 10 weights
            assert 0 < kept < 0.04 * total
        else:
            assert kept == pytest.approx(round((1 - sparsity) * total), abs=5 if method == "srigl" else 0)
        assert final["sparsity"] == epochs[-1]["sparsity"] == 1 - kept / total
        assert all(not w[~masks[name]].any() for name, w in prunable.items())
        assert final["active_parameters"] == final["parameters"] - (total - kept)
    last = load_checkpoint(folder / "checkpoints" / "last.pt")
    assert all(torch.equal(weights[name], w) for name, w in last["model"].items())
    assert load_checkpoint(folder / "checkpoints" / "best.pt")["epoch"] == final["best_epoch"]


@pytest.mark.parametrize("method", METHODS[1:])
def test_topology_records_follow_the_masks(tmp_path, method):
    sparsity = SPARSITY.get(method, TINY.sparsity)
    run(dataclasses.replace(TINY, method=method, sharpness="none", sparsity=sparsity, out=str(tmp_path / "run")))
    found = records(tmp_path / "run", "topology")
    assert (found[0]["step"], found[0]["survival"], found[0]["dropped"]) == (0, 1.0, 0)
    assert found[0]["explored"] == pytest.approx(EXPLORED.get(method, 1 - sparsity), abs=1e-4)
    steps = [r["step"] for r in found[1:]]
    changes = {"set": [3, 6, 9], "rigl": [3, 6], "gmp": [3, 6, 8], "mest": [3, 6], "lt": [10, 20, 30]}
    changes |= {"set-itop": [3, 6, 9], "rigl-itop": [3, 6, 9], "granet": [3, 6, 7, 9]}
    changes |= {"deepr": [3, 6, 9], "top-kast": [3, 6, 9], "dsr": [3, 6, 9], "snfs": [3, 6, 9]}
    changes |= {"ac-dc": [1, 4, 8], "srigl": [3, 6], "str": [3, 6, 8]}
    changes |= {"nm-rigl": [3, 6], "block-rigl": [3, 6], "sr-ste": [3, 6, 9], "chex": [3, 6, 7], "chase": [3, 6, 8, 9]}
    assert steps == changes.get(method, [])  # RigL, GMP and MEST end at 75 % of the steps, LT prunes after a training
    for before, after in itertools.pairwise(found):
        if method in ("gmp", "lt"):
            assert (after["dropped"] > 0, after["grown"]) == (True, 0)
            assert all(after["density"][name] <= d for name, d in before["density"].items())
            continue
        assert after["explored"] >= before["explored"]
        if method == "ac-dc":
            assert (after["dropped"] > 0) == (after["grown"] == 0) == (after["step"] in (1, 8))
            continue
        if method == "srigl":  # a neuron less, and the others share its inputs
            assert after["dropped"] == pytest.approx(after["grown"], abs=10)
            assert after["grown"] > 0
            continue
        if method in ("granet", "str"):
            assert after["dropped"] > after["grown"] or after["step"] > 7
            continue
        if method in ("chex", "chase"):  # Chase grows beyond its target first, and falls back to it
            assert (after["dropped"], after["grown"]) != (0, 0)
            assert after["dropped"] > after["grown"] or (method, after["step"]) in (("chase", 3), ("chase", 9))
            continue
        assert after["dropped"] == after["grown"] > 0
        assert (after["density"] == before["density"]) == (method not in ("dsr", "snfs"))
    if method in ("set", "rigl"):
        active = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["active_parameters"]
        dense = 85_514 - sum(m.numel() for m in load_file(tmp_path / "run" / "masks.safetensors").values())
        assert found[1]["survival"] == pytest.approx(1 - found[1]["dropped"] / (active - dense))
        assert 0 < found[-1]["survival"] < 1


def test_levels_of_lt_are_whole_trainings_from_the_same_weights(tmp_path):
    optim = OptimConfig(ema=0.5)
    run(dataclasses.replace(TINY, method="lt", sharpness="none", optim=optim, out=str(tmp_path / "lt")))
    levels = records(tmp_path / "lt", "level")
    assert [(r["level"], r["epoch"], r["step"]) for r in levels] == [
        (0, 1, 5), (0, 2, 10), (1, 1, 15), (1, 2, 20), (2, 1, 25), (2, 2, 30),
    ]  # fmt: skip
    assert [r["sparsity"] for r in levels] == pytest.approx([0, 0, 0.6, 0.6, 0.84, 0.84], abs=1e-3)
    epochs = levels + records(tmp_path / "lt", "epoch")
    assert len({r["lr"] for r in epochs[::2]}) == len({r["lr"] for r in epochs[1::2]}) == 1
    run(dataclasses.replace(TINY, method="dense", sharpness="none", optim=optim, out=str(tmp_path / "dense")))
    dense = records(tmp_path / "dense", "epoch")
    same = ("train_loss", "val_top1", "test_loss", "ema_test_top1")
    assert [[r[key] for key in same] for r in levels[:2]] == [[r[key] for key in same] for r in dense]
    with open(tmp_path / "lt" / "summary.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_step_records_show_the_realised_displacement(tmp_path):
    config = dataclasses.replace(TINY, rho=0.07, out=str(tmp_path / "run"), method="static")
    run(config)
    found = records(tmp_path / "run", "step")
    assert [r["step"] for r in found] == [0, 2, 4, 6, 8]
    assert [r["epoch"] for r in found] == [1, 1, 1, 2, 2]
    for r in found[1:]:
        assert r["displacement"] == pytest.approx(0.07, rel=1e-3)
        assert r["projection"] == pytest.approx(0.07, rel=1e-3)
        assert r["gradient_norm"] > 0
        assert -1 <= r["alignment"] <= 1
    assert [r["lr"] for r in found] == pytest.approx(
        [0.1 * (1 + math.cos(math.pi * s / 10)) / 2 for s in range(0, 10, 2)]
    )


def test_no_step_records_if_not_wanted(tmp_path):
    run(dataclasses.replace(TINY, sam=SamConfig(stats_every=0), out=str(tmp_path / "run")))
    assert records(tmp_path / "run", "step") == []


@pytest.mark.parametrize(("method", "sharpness"), [("rigl", "s2sam"), ("set", "sam"), ("dense", "none")])
def test_equal_settings_give_equal_weights(tmp_path, method, sharpness):
    config = dataclasses.replace(TINY, method=method, sharpness=sharpness)
    for name in ("a", "b"):
        torch.rand(3)  # the global random state is nobody's business
        run(dataclasses.replace(config, out=str(tmp_path / name)))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    run(dataclasses.replace(config, out=str(tmp_path / "c"), seed=1))
    c = load_file(tmp_path / "c" / "model.safetensors")
    assert not torch.equal(a["body.fc1.weight"], c["body.fc1.weight"])


@pytest.mark.parametrize(
    ("method", "sharpness"), [("rigl", "s2sam"), ("set", "s2sam"), ("set", "sam"), ("rigl", "sam"), ("dense", "sam")]
)
def test_rho_zero_is_the_plain_run(tmp_path, method, sharpness):
    for name in ("none", sharpness):
        run(dataclasses.replace(TINY, method=method, sharpness=name, rho=0.0, out=str(tmp_path / name)))
    plain, other = (load_file(tmp_path / name / "model.safetensors") for name in ("none", sharpness))
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_arms_of_a_seed_share_weights_masks_and_batches(tmp_path, monkeypatch):
    seen: dict[str, list] = {}
    step = loop.train_step

    def spy(state, x, y):
        seen[state.config.out].append((x.clone(), y.clone()))
        return step(state, x, y)

    monkeypatch.setattr(loop, "train_step", spy)
    arms = list(itertools.product(["dense", "static", "rigl"], ["none", "s2sam", "sam"]))
    states = []
    for method, sharpness in arms:
        config = dataclasses.replace(
            TINY, method=method, sharpness=sharpness, out=str(tmp_path / f"{method}-{sharpness}")
        )
        states.append(build(config))
        seen[config.out] = []
        run(config)
    first, *others = seen.values()
    assert len(first) == 10
    for batches in others:
        assert all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(first, batches, strict=True))
    dense = dict(states[0].model.named_parameters())
    assert sum(int((p == 0).sum()) for p in dense.values() if p.ndim == 2) == 0
    for state in states[3:]:
        assert all(
            torch.equal(state.sparsifier.masks[k], states[3].sparsifier.masks[k]) for k in state.sparsifier.masks
        )
        for name, p in state.model.named_parameters():
            mask = state.sparsifier.masks.get(name)
            assert torch.equal(p, dense[name] if mask is None else dense[name] * mask)


def test_seeds_share_their_images_and_nothing_else():
    a, b = build(TINY), build(dataclasses.replace(TINY, seed=1))
    assert a.data.digest == b.data.digest
    assert not torch.equal(a.model.body.fc1.weight, b.model.body.fc1.weight)
    assert not torch.equal(next(iter(a.batches))[1], next(iter(b.batches))[1])


@pytest.mark.parametrize(("sharpness", "forwards"), [("none", 1), ("s2sam", 1), ("sam", 2)])
def test_forwards_and_backwards_of_a_step(sharpness, forwards):
    state = build(dataclasses.replace(TINY, sharpness=sharpness, method="static"))
    counts = {"forward": 0, "backward": 0}
    state.model.register_forward_hook(lambda *_: counts.__setitem__("forward", counts["forward"] + 1))
    state.model.classifier.weight.register_hook(lambda g: counts.__setitem__("backward", counts["backward"] + 1))
    for x, y in itertools.islice(state.batches, 3):
        loop.train_step(state, x, y)
    assert counts == {"forward": 3 * forwards, "backward": 3 * forwards}


def test_weights_are_clean_between_steps():
    state = build(dataclasses.replace(TINY, method="static", rho=0.5))
    for x, y in itertools.islice(state.batches, 4):
        loop.train_step(state, x, y)
        assert not state.sharpness.is_displaced
        assert state.sharpness.stats["step"] > 0
        assert all(p.grad is None for p in state.model.parameters())


@pytest.mark.parametrize("sharpness", ["none", "s2sam"])
def test_a_few_epochs_are_far_above_chance(tmp_path, sharpness):
    config = TrainConfig(method="rigl", sharpness=sharpness, epochs=6, out=str(tmp_path / "run"))
    assert run(config)["test_top1"] > 0.85


def test_divergence_stops_with_a_sentence_and_no_result(tmp_path):
    config = dataclasses.replace(TINY, sharpness="none", lr=1e20, out=str(tmp_path / "run"))
    with pytest.raises(RuntimeError, match=r"training diverged: the loss is .* lower --lr \(now 1e\+20\)"):
        run(config)
    assert not (tmp_path / "run" / "DONE").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_s2sam_skips_a_step_that_is_not_finite_and_goes_on(tmp_path, monkeypatch):
    step, calls = loop.train_step, itertools.count()

    def poisoned(state, x, y):
        return step(state, x * math.nan if next(calls) == 3 else x, y)

    monkeypatch.setattr(loop, "train_step", poisoned)
    monkeypatch.setattr("s2sam.models.mlp.MLP.forward", lambda self, x: self.classifier(x.flatten(1).repeat(1, 4)))
    run(dataclasses.replace(TINY, sam=SamConfig(stats_every=1), method="static", out=str(tmp_path / "s2sam")))
    found = records(tmp_path / "s2sam", "step")
    assert [r["skipped"] for r in found] == [0.0] * 3 + [1.0] * 7
    assert found[3]["loss"] is None
    assert found[4]["loss"] > 0
    calls = itertools.count()
    with pytest.raises(RuntimeError, match="training diverged"):
        run(dataclasses.replace(TINY, sharpness="none", out=str(tmp_path / "plain")))


def test_without_validation_images_the_last_epoch_is_best(tmp_path):
    options = DataConfig(train_size=320, val_fraction=0.0)
    final = run(dataclasses.replace(TINY, data_options=options, out=str(tmp_path / "run")))
    assert (final["best_epoch"], final["best_val_top1"]) == (2, None)
    assert final["best_test_top1"] == final["test_top1"]


@pytest.mark.parametrize("method", ["dense", "lt"])
def test_an_average_is_measured_with_the_network_it_follows(tmp_path, method):
    optim = OptimConfig(ema=0.9)
    config = dataclasses.replace(
        TINY, method=method, epochs=3, evaluate_every=2, optim=optim, out=str(tmp_path / "run")
    )
    final = run(config)
    with (tmp_path / "run" / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [[row[key] != "" for key in ("test_top1", "ema_test_top1", "ema_val_top1")] for row in rows]
    assert measured == [[False] * 3, [True] * 3, [True] * 3]
    assert float(rows[-1]["ema_test_top1"]) == final["ema_test_top1"]


def test_a_batch_of_one_image_is_left_out(tmp_path):
    options = DataConfig(train_size=321)
    final = run(dataclasses.replace(TINY, data_options=options, out=str(tmp_path / "run"), epochs=1))
    assert final["n_steps"] == 5


def test_resnet_and_adamw_and_layer_map(tmp_path):
    text = yaml.safe_dump(
        {
            "model": "resnet20",
            "model_options": {"width": 0.25},
            "method": "static",
            "sparsity": 0.5,
            "epochs": 1,
            "lr": 0.001,
            "optim": {"name": "adamw"},
            "sparse": {"distribution": "uniform", "exclude": ["classifier"]},
            "data_options": {"train_size": 128},
        }
    )
    (tmp_path / "c.yaml").write_text(text)
    final = run(load_config(tmp_path / "c.yaml", out=str(tmp_path / "run")))
    assert final["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert "classifier.weight" not in load_file(tmp_path / "run" / "masks.safetensors")


def test_real_images_train(tmp_path, cifar10):
    config = load_config(
        "cifar10-resnet20",
        data=str(cifar10),
        data_options=DataConfig(train_size=128),
        model_options={"width": 0.25},
        epochs=1,
        out=str(tmp_path / "run"),
    )
    final = run(config)
    assert final["test_images"] == 10_000
    assert final["sparsity"] == pytest.approx(0.9, abs=1e-3)
