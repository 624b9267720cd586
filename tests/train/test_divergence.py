"""A run that will not come back ends with a sentence and without a result; a run that stumbles goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import pytest
import torch

from s2sam.cli.main import main
from s2sam.train import TrainConfig, loop, run
from s2sam.train.config import DataConfig, SamConfig, SparseConfig
from s2sam.train.divergence import PATIENCE, absurd_loss, check_skips
from s2sam.train.state import build

TINY = TrainConfig(
    epochs=2,
    method="static",
    data_options=DataConfig(train_size=320),
    sam=SamConfig(stats_every=0),
    sparse=SparseConfig(options={}),
)  # 5 steps an epoch


def unfinished(folder):
    return not (folder / "DONE").exists() and not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("method", ["dense", "rigl"])
@pytest.mark.parametrize(
    ("sharpness", "optimizer"), list(itertools.product(["none", "s2sam", "sam"], ["sgd", "adamw"]))
)
def test_an_absurd_learning_rate_ends_with_2(tmp_path, capsys, method, sharpness, optimizer):
    out = tmp_path / "run"
    argv = ["train", "--method", method, "--sharpness", sharpness, "--optim.name", optimizer, "--lr", "1e9"]
    assert main([*argv, "--data_options.train_size", "320", "--epochs", "3", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("s2sam: error: training diverged: ")
    assert "lower --lr (now 1e+09)" in err
    assert err.count("\n") == 1
    assert unfinished(out)


@pytest.fixture
def broken_gradients(monkeypatch):
    """`broken_gradients(when)`: the gradient is NaN in every step for which `when(step)`; the loss never is."""

    def install(when):
        step, broken = loop.train_step, set()

        def poisoned(state, x, y):
            if id(state) not in broken:
                broken.add(id(state))
                state.model.classifier.weight.register_hook(lambda g: g * math.nan if when(state.step) else None)
            return step(state, x, y)

        monkeypatch.setattr(loop, "train_step", poisoned)

    return install


@pytest.mark.parametrize("sharpness", ["s2sam", "sam"])
def test_a_whole_epoch_of_skipped_steps_is_the_end(tmp_path, broken_gradients, sharpness):
    broken_gradients(lambda step: step >= 3)
    config = dataclasses.replace(TINY, epochs=4, sharpness=sharpness, out=str(tmp_path / "run"))
    with pytest.raises(RuntimeError, match=r"no gradient was finite in the last 5 steps, none of .* at step 7 \(epoch"):
        run(config)
    assert unfinished(tmp_path / "run")


def test_in_a_long_epoch_a_hundred_steps_are_the_end(tmp_path, broken_gradients):
    broken_gradients(lambda step: step >= 2)
    config = dataclasses.replace(TINY, batch_size=2, out=str(tmp_path / "run"))
    with pytest.raises(RuntimeError, match=r"in the last 100 steps, none of .* at step 101 \(epoch 1\)"):
        run(config)


@pytest.mark.parametrize("sharpness", ["s2sam", "sam"])
def test_skipped_steps_between_others_are_counted_and_harmless(tmp_path, broken_gradients, sharpness):
    broken_gradients(lambda step: step % 5 != 0)  # four of five, across the epochs
    run(dataclasses.replace(TINY, sharpness=sharpness, sam=SamConfig(stats_every=1), out=str(tmp_path / "run")))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["skipped"] for r in lines if r["kind"] == "step"] == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]


def test_a_row_of_skips_is_remembered_by_a_resume(tmp_path, broken_gradients):
    state = build(TINY)
    state.skipped.total, state.skipped.row = 7, 3
    other = build(TINY)
    other.load_state_dict(state.state_dict())
    assert (other.skipped.total, other.skipped.row) == (7, 3)


def test_a_loss_scale_that_seeks_its_value_is_no_divergence():
    state = build(dataclasses.replace(TINY, precision="fp16"))
    assert len(state.batches) == 5
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    batches = itertools.cycle(list(state.batches))
    for _ in range(60):  # far above what fp16 holds: more than forty steps are skipped, eight epochs of them
        loop.train_step(state, *next(batches))
        state.skipped.count()
        check_skips(state)
    assert 30 < state.skipped.total < 55
    assert state.skipped.row == 0 and not state.sharpness.is_displaced
    state.skipped.row = PATIENCE - 1
    check_skips(state)
    state.skipped.row = PATIENCE
    with pytest.raises(RuntimeError, match="in the last 100 steps"):
        check_skips(state)


@pytest.mark.parametrize("sharpness", ["none", "s2sam"])
@pytest.mark.parametrize("spikes", [2, 3])
def test_a_few_absurd_losses_are_no_divergence_and_most_of_an_epoch_is(tmp_path, monkeypatch, spikes, sharpness):
    step = loop.train_step

    def spiking(state, x, y):
        logits, loss = step(state, x, y)
        return logits, loss + 1.01 * absurd_loss(10) if state.step % 5 < spikes else loss

    monkeypatch.setattr(loop, "train_step", spiking)
    config = dataclasses.replace(TINY, sharpness=sharpness, out=str(tmp_path / "run"))
    if spikes == 2:
        assert run(config)["n_steps"] == 10
        return
    with pytest.raises(
        RuntimeError, match=r"3 of 5 losses are not finite or above 1000 times that of a guess at step 5"
    ):
        run(config)
    assert unfinished(tmp_path / "run")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_evaluation_that_is_not_finite_is_no_result(tmp_path, monkeypatch, split):
    evaluate = loop.evaluate_split

    def broken(model, data, name, prepare):
        found = evaluate(model, data, name, prepare)
        return (math.nan, 0.1) if split.startswith(name) else found

    monkeypatch.setattr(loop, "evaluate_split", broken)
    with pytest.raises(RuntimeError, match=rf"the {split} loss is nan at step 5 \(epoch 1\)"):
        run(dataclasses.replace(TINY, out=str(tmp_path / "run")))
    assert unfinished(tmp_path / "run")


def test_a_plain_run_carries_no_hook():
    assert build(dataclasses.replace(TINY, method="dense", sharpness="none")).skipped is None
    assert absurd_loss(1) > 0
