"""The premise: a probe takes the run's own steps bit for bit, and its numbers are those of the loss itself."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from s2sam.analysis import premise
from s2sam.analysis.hessian import ActiveLoss
from s2sam.analysis.lanczos import extremes
from s2sam.analysis.opened import choose
from s2sam.analysis.premise import Look, batch_loss, cosine, mean_and_sd, probe, stream, summary
from s2sam.analysis.premise_run import PremiseSettings, find_checkpoints, measure_premise
from s2sam.train import TrainConfig, run
from s2sam.train.checkpoint import load_checkpoint
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, SparseConfig
from s2sam.train.state import build
from s2sam.train.step import train_step

QUICK = PremiseSettings(looks=2, images=40, max_steps=25)


def config(**changes):
    return TrainConfig(
        epochs=3, keep_every=1, sparsity=0.8, device="cpu", model_options={"width": 0.1}, rho=0.1,
        data_options=DataConfig(train_size=200), sparse=SparseConfig(options={"delta_t": 2}), **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short RigL run with S2-SAM that kept the checkpoint of each epoch; 4 steps an epoch."""
    folder = tmp_path_factory.mktemp("premise") / "rigl"
    run(config(out=str(folder)))
    return folder


def begun(trained, number):
    path, saved = find_checkpoints(trained)[number]
    state = build(config(out=str(trained)), init=False)
    state.load_state_dict(saved)
    return state, saved


def test_a_run_keeps_what_it_was_asked_to_keep(trained):
    found = find_checkpoints(trained)
    assert [(path.name, saved["step"], saved["epoch"]) for path, saved in found] == [
        ("step-00000004.pt", 4, 1), ("step-00000008.pt", 8, 2), ("step-00000012.pt", 12, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("bn", ["eval", "train"])
def test_the_steps_of_a_probe_are_those_of_the_run(trained, make_generator, bn):
    state, _ = begun(trained, 0)
    looks = probe(state, steps=7, rho=0.1, generator=make_generator(), bn=bn)
    assert [look.step for look in looks] == [6, 7, 8, 9, 10, 11, 12]
    after = find_checkpoints(trained)[2][1]
    assert state.step == after["step"] == 12
    for name, tensor in state.model.state_dict().items():
        assert torch.equal(tensor, after["model"][name]), name
    assert state.scheduler.state_dict()["last_epoch"] == after["scheduler"]["last_epoch"]


def test_the_numbers_are_those_of_the_loss(trained, make_generator):
    state, _ = begun(trained, 0)
    (look,) = probe(state, steps=1, rho=0.1, generator=make_generator(), bn="eval", dtype=torch.float64)
    again, _ = begun(trained, 0)
    (first, second), gradients = list(stream(again, 2)), []
    handle = again.optimizer.register_step_post_hook(
        lambda *_: gradients.append([p.grad.clone() for p in again.model.parameters()])
    )
    again.model.train()
    train_step(again, *first)
    again.advance()
    masks = again.sparsifier.masks
    named = dict(again.model.named_parameters())
    g = {name: t * masks.get(name, 1) for name, t in zip(named, gradients[0], strict=True)}
    size = torch.cat([t.flatten() for t in g.values()]).double().norm()

    def loss_at(factor):
        model = build(config(), init=False).model.double()
        model.load_state_dict(again.model.state_dict())
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(g[name].double(), alpha=factor * 0.1 / float(size))
        with torch.no_grad():
            return float(F.cross_entropy(model.eval()(second[0].double()), second[1]))

    plus, minus, base = loss_at(1.0), loss_at(-1.0), loss_at(0.0)
    assert look.numbers["loss"] == pytest.approx(base, rel=1e-9)
    assert look.numbers["previous_odd"] == pytest.approx((plus - minus) / 2, rel=1e-6)
    assert look.numbers["previous_even"] == pytest.approx((plus + minus) / 2 - base, rel=1e-6)
    assert abs(look.numbers["previous_odd"]) > 1e-4
    assert look.numbers["gradient_norm"] == pytest.approx(float(size), rel=1e-6)
    # SAM's own direction is the steepest of equal length, to first order
    assert look.numbers["own_odd"] > abs(look.numbers["previous_odd"])
    assert look.numbers["own_odd"] == pytest.approx(0.1 * look.numbers["own_gradient_norm"], rel=0.1)
    there = batch_loss(again, *second, "eval", torch.float64)
    _, own = there.gradient()
    quotient = float(own @ there.product(own[None])[0] / (own @ own))
    assert look.numbers["batch_sharpness"] == pytest.approx(quotient, rel=1e-9) and abs(quotient) > 0.01
    slope = look.numbers["cosine_own"] * look.numbers["own_gradient_norm"] * 0.1
    assert look.numbers["previous_odd"] == pytest.approx(slope, rel=0.1, abs=1e-3)
    train_step(again, *second)
    handle.remove()
    now = [t * masks.get(name, 1) for name, t in zip(named, gradients[1], strict=True)]
    flat = [torch.cat([t.flatten() for t in part]).double() for part in (g.values(), now)]
    assert look.numbers["cosine"] == pytest.approx(cosine(*flat), abs=1e-6)


def test_displacements_are_equally_long_and_stay_sparse(trained, make_generator, monkeypatch):
    seen = []
    monkeypatch.setattr(premise, "along", lambda loss, base, e: (seen.append((loss, e)), (0.0, 0.0))[1])
    state, _ = begun(trained, 0)
    probe(state, steps=2, rho=0.25, generator=make_generator())
    assert len(seen) == 8
    for loss, e in seen:
        assert float(e.norm()) == pytest.approx(0.25, rel=1e-5)
        assert loss.size == len(e) < sum(p.numel() for p in state.model.parameters())


def test_the_record_of_a_run(trained, make_generator):
    stored = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    before, counts = torch.get_rng_state(), []
    found = measure_premise(trained, QUICK, label="rigl", device="cpu", on_look=counts.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == stored
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert counts == [1, 2, 3, 4, 5, 6]
    assert [(p["step"], p["epoch"], p["over"]) for p in found["points"]] == [
        (4, 1, False), (8, 2, False), (12, 3, True),
    ]  # fmt: skip

    assert found["rho"] == 0.1 and found["points"][2]["lr"] < found["points"][0]["lr"]
    state, _ = begun(trained, 0)  # lambda_max is of the function whose batches are looked at: statistics of the batch
    x, y = choose(state.data.train_x, state.data.train_y, 40, 0)
    tops = [
        extremes(loss.product, loss.size, make_generator(1), max_steps=40, like=loss.weights).top[0].value
        for bn in ("train", "eval")
        for loss in [ActiveLoss(state.model, x, y, state.augment, state.sparsifier.masks, bn=bn, batch_size=64)]
    ]
    assert found["points"][0]["lambda_max"]["value"] == pytest.approx(tops[0], rel=2e-3)
    assert abs(tops[1] - tops[0]) > 0.01 * tops[0]
    for p in found["points"]:
        assert p["looks"] == 2 and len(p["each"]) == 2
        assert -1 <= p["cosine"]["mean"] <= 1 and p["lambda_max"]["value"] > 0
        for key in ("value", "residual"):
            assert p["c_lambda_max"][key] == pytest.approx(p["lambda_max"][key] * p["c"]["mean"])
        assert p["rho_over_w"]["mean"] == pytest.approx(0.1 / p["weight_norm"]["mean"], rel=1e-3)
        assert p["own_rises"] == 1.0 and p["momentum_odd"]["mean"] is not None
    assert found == measure_premise(trained, QUICK, label="rigl", device="cpu")


def test_runs_without_momentum_or_sparsity_or_s2sam(tmp_path, make_generator):
    plain = config(method="dense", sharpness="none", optim=OptimConfig(momentum=0.0), out=str(tmp_path / "dense"))
    run(plain)
    found = measure_premise(tmp_path / "dense", QUICK, label="dense", device="cpu")
    assert found["rho"] == 0.05
    for p in found["points"]:
        assert p["momentum_odd"] == {"mean": None, "sd": None} and p["momentum_rises"] is None
        assert p["previous_odd"]["mean"] is not None


def test_the_radius_is_that_of_the_run_where_it_has_one():
    assert PremiseSettings().radius(config()) == 0.1
    assert PremiseSettings(rho=0.3).radius(config()) == 0.3
    assert PremiseSettings().radius(config(sharpness="none")) == 0.05
    assert PremiseSettings().radius(config(sam=SamConfig(scale="relative"))) == 0.05


def test_numbers_that_are_not_there_are_left_out():
    assert cosine(torch.zeros(2), torch.ones(2)) != cosine(torch.zeros(2), torch.ones(2))  # NaN
    assert mean_and_sd([math.nan]) == {"mean": None, "sd": None}
    names = [f"{d}_{what}" for d in ("previous", "momentum", "own", "random") for what in ("odd", "even")]
    looks = [
        Look(i, {**dict.fromkeys(names, math.nan), "previous_odd": odd, "previous_even": 0.1, "gradient_norm": size,
                 "weight_norm": 2.0})
        for i, (odd, size) in enumerate([(1.0, 2.0), (-1.0, 0.0)])
    ]  # fmt: skip
    found = summary(looks, 0.5)
    assert (found["previous_rises"], found["own_rises"]) == (0.5, None)
    assert found["c"] == {"mean": 0.25, "sd": None} and found["rho_over_w"]["mean"] == 0.25
    assert summary([], 0.5) == {"looks": 0}


def test_wrong_use_is_refused(tmp_path, trained):
    with pytest.raises(ValueError, match="is not a run folder"):
        measure_premise(tmp_path, QUICK, label="x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no checkpoints to look from"):
        find_checkpoints(tmp_path / "empty")
    for wrong, sentence in [
        ({"looks": 1}, "looks"), ({"rho": 0.0}, "above 0"), ({"bn": "evl"}, "did you mean"), ({"images": 0}, "images"),
        ({"max_steps": 0}, "max_steps"), ({"precision": "bf16"}, "precision"), ({"rho": -1.0}, "rho"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            PremiseSettings(**wrong)


def test_a_kept_checkpoint_is_one_to_resume_from(trained, tmp_path):
    elsewhere = config(out=str(tmp_path / "branch"))
    run(elsewhere, resume=str(trained / "checkpoints" / "step-00000008.pt"))
    one, other = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (trained, tmp_path / "branch"))
    assert one["step"] == other["step"] == 12
    assert all(torch.equal(t, other["model"][name]) for name, t in one["model"].items())
    names = {path.name for path in (tmp_path / "branch" / "checkpoints").iterdir()}
    assert {"step-00000012.pt", "last.pt"} <= names and "step-00000004.pt" not in names
