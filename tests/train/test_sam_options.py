"""The options of S2SAM as settings of a run: what they do, that a killed run resumes exactly, what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import sys
from pathlib import Path

import pytest

from s2sam.sam.single_step import S2SAM
from s2sam.train.checkpoint import load_checkpoint
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, SparseConfig, TrainConfig
from s2sam.train.state import build
from s2sam.train.step import train_step

sys.path.insert(0, str(Path(__file__).parent))
from forked import forked, killed, run, same, warm_up

TINY = TrainConfig(
    epochs=2,
    batch_size=32,
    checkpoint_every=2,
    rho=0.2,
    data_options=DataConfig(train_size=128),
    model_options={"width": 0.125},
    sam=SamConfig(stats_every=1),
    sparse=SparseConfig(options={"delta_t": 2, "t_end": 1.0}),
)
OPTIONS = {
    "random": {"direction": "random"},
    "random-late": {"direction": "random", "rho_schedule": "late", "rho_start": 0.5},
    "ema": {"direction": "ema", "sign": -1},
    "ema-filter": {"direction": "ema", "ema_beta": 0.5, "scale": "filter", "rho_schedule": "rising"},
    "momentum-step": {"direction": "momentum", "scale": "step", "rho_schedule": "lr", "scope": "weights"},
}


@pytest.fixture(autouse=True, scope="module")
def _warm(tmp_path_factory):
    warm_up(dataclasses.replace(TINY, out=str(tmp_path_factory.mktemp("warm"))))


def with_sam(**options):
    return dataclasses.replace(TINY, sam=dataclasses.replace(TINY.sam, **options))


def final(folder):
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    return {key: state[key] for key in ("model", "optimizer", "sparsifier", "scheduler", "step")}


def displacements(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["displacement"] for row in rows if "displacement" in row]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", OPTIONS)
def test_killed_and_resumed_is_the_unbroken_run(tmp_path, name, optimizer):
    config = dataclasses.replace(
        with_sam(**OPTIONS[name]), optim=OptimConfig(name=optimizer), lr=0.1 if optimizer == "sgd" else 1e-3
    )
    whole, broken = (dataclasses.replace(config, out=str(tmp_path / folder)) for folder in ("whole", "broken"))
    assert forked(lambda: run(whole)) == 0
    for at in (6, 2):  # then in the second step after the resume
        assert killed(broken, at) == -signal.SIGKILL
    assert forked(lambda: run(broken)) == 0
    resumed = json.loads((tmp_path / "broken" / "env.json").read_text())["resumed"]
    assert [entry["step"] for entry in resumed] == [4, 4]
    one, other = final(tmp_path / "whole"), final(tmp_path / "broken")
    assert [key for key in one if not same(one[key], other[key])] == []
    assert displacements(tmp_path / "whole") == displacements(tmp_path / "broken")
    assert max(displacements(tmp_path / "whole")) > 1e-5


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.2] * 7),
        ("late", [0, 0, 0, 0, 0.2, 0.2, 0.2]),
        ("rising", [0.2 * t / 8 for t in range(1, 8)]),
        ("lr", None),
    ],
)
def test_the_radius_follows_its_schedule(tmp_path, schedule, expected):
    config = dataclasses.replace(with_sam(rho_schedule=schedule, rho_start=0.6), method="static")
    run(dataclasses.replace(config, out=str(tmp_path / "run")))
    found = displacements(tmp_path / "run")[1:]  # the first step is plain
    if expected is None:
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        rates = [row["lr"] for row in rows if "displacement" in row][1:]
        assert found == sorted(found, reverse=True) and len(rates) == 7
        assert min(abs(a / b - 2.0) for a, b in zip(found, rates, strict=True)) < 1e-3  # 0.2 lr / 0.1
    else:
        assert found == pytest.approx([0.0 if schedule == "late" and t < 5 else v for t, v in enumerate(expected, 1)])


def test_lt_begins_its_schedule_anew_in_each_training():
    config = dataclasses.replace(with_sam(rho_schedule="late", rho_start=0.5), method="lt")
    config = dataclasses.replace(config, sparse=SparseConfig(options={"rate": 0.7}))
    state = build(config)
    slot = state.sharpness._slots[0]
    steps = config.epochs * len(state.batches)
    assert state.n_steps > steps
    factors = [slot.factor(t) for t in range(state.n_steps)]
    assert factors[:steps] == [0.0] * (steps // 2) + [0.2] * (steps // 2)
    assert factors[steps : 2 * steps] == factors[:steps]


def test_noise_depends_on_the_seed_of_the_run_alone():
    def seed_of(seed, **more):
        state = build(dataclasses.replace(with_sam(direction="random"), seed=seed, **more))
        assert isinstance(state.sharpness, S2SAM)
        return state.optimizer.param_groups[0]["s2sam_seed"]

    assert seed_of(3) == seed_of(3, method="static", sparsity=0.5, epochs=1) != seed_of(4)


def test_norm_scope_leaves_all_other_weights_without_a_buffer():
    config = dataclasses.replace(
        with_sam(scope="norm"), model="resnet20", model_options={"width": 0.25}, method="static"
    )
    state = build(config)
    train_step(state, *next(iter(state.batches)))
    kept = {n for n, p in state.model.named_parameters() if "s2sam_buffer" in state.optimizer.state[p]}
    norm = {n for n, p in state.model.named_parameters() if p.dim() == 1 and not n.startswith("fc")}
    assert kept and kept <= norm and len(kept) >= 38


REFUSED = [
    (lambda: SamConfig(direction="emma"), "did you mean 'ema'"),
    (lambda: SamConfig(scale="filters"), "did you mean 'filter'"),
    (lambda: SamConfig(scope="weight"), "did you mean 'weights'"),
    (lambda: SamConfig(rho_schedule="lte"), "did you mean 'late'"),
    (lambda: SamConfig(ema_beta=1.0), "sam.ema_beta must be a number at least 0 and below 1"),
    (lambda: SamConfig(rho_start=1.5), "sam.rho_start must be a number between 0 and 1"),
    (lambda: SamConfig(scale="filter", scope="norm"), "sam.scope norm has none"),
    (lambda: with_sharpness("sam", scale="step"), "sam.scale step is for sharpness s2sam; sam has norm"),
    (lambda: with_sharpness("sam", direction="momentum"), "sam.direction momentum is for sharpness s2sam"),
    (lambda: with_sharpness("sam", sign=-1), "sam.sign -1 is for sharpness s2sam; with sam leave it at 1"),
    (lambda: with_sharpness("sam", scope="norm"), "sam.scope norm is for"),
    (lambda: with_sharpness("sam", rho_schedule="late"), "sam.rho_schedule late is for"),
    (lambda: with_sharpness("s2sam", 0.0, direction="momentum"), "needs an optim.momentum above 0"),
]


def with_sharpness(sharpness, momentum=0.9, **options):
    return dataclasses.replace(
        TINY, sharpness=sharpness, optim=OptimConfig(momentum=momentum), sam=SamConfig(**options)
    )


@pytest.mark.parametrize(("make", "sentence"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_is_refused_in_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_sam_and_plain_runs_take_what_they_have():
    assert with_sharpness("sam", scale="asam").sam.scale == "asam"
    assert with_sharpness("none", direction="random", scope="norm").sharpness == "none"


def test_clean_growth_leaves_the_steps_alone_that_change_the_topology(tmp_path):
    config = dataclasses.replace(with_sam(clean_growth=True), method="rigl", sparsity=0.8, out=str(tmp_path / "run"))
    assert forked(lambda: run(config)) == 0
    found = [length > 0 for length in displacements(tmp_path / "run")]
    assert found == [False, False, True, False, True, False, True, True]  # delta_t is 2; the last step changes nothing


def test_two_step_sam_has_no_clean_growth():
    with pytest.raises(ValueError, match="clean_growth"):
        dataclasses.replace(with_sam(clean_growth=True), sharpness="sam")
