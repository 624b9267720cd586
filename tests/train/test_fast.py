"""A compiled run is the same run: weights, names, window, copies, resume; and nothing is compiled twice.

The graphs are captured and differentiated by torch as for any backend; the backend itself ("aot_eager") only runs them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from s2sam.cli.main import main
from s2sam.models import create_model
from s2sam.track.base import Loggers
from s2sam.train import fast, loop
from s2sam.train.averages import recalibrated
from s2sam.train.checkpoint import load_checkpoint
from s2sam.train.config import DataConfig, OptimConfig, SamConfig, SparseConfig, TrainConfig
from s2sam.train.folder import RunFolder
from s2sam.train.loop import Trainer, run
from s2sam.train.signals import Preempted
from s2sam.train.state import build

TINY = TrainConfig(
    epochs=3,
    batch_size=48,  # batches of 48, 48 and 32
    rho=0.3,
    compile="default",
    data_options=DataConfig(train_size=128, val_fraction=0.0),
    model_options={"width": 0.125},
    sam=SamConfig(stats_every=1),
    sparse=SparseConfig(options={"delta_t": 2}),
)


@pytest.fixture(autouse=True)
def _cheap_backend(monkeypatch):
    monkeypatch.setattr(fast, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Lines:
    """A logger that keeps the records."""

    def __init__(self):
        self.records = []

    def start(self, config, info):
        pass

    def scalars(self, record):
        self.records.append(dict(record))

    def artifact(self, path):
        pass

    def close(self):
        pass


def trained(config, folder, epochs):
    """The state after some epochs, its records, and how many graphs had been compiled after each epoch."""
    state, lines = build(config), Lines()
    trainer = Trainer(state, Loggers([lines]), RunFolder(folder))
    before, graphs = counters["stats"]["unique_graphs"], []
    for _ in range(epochs):
        trainer.epoch()
        graphs.append(counters["stats"]["unique_graphs"] - before)
    return state, lines.records, graphs


def weights(state):
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


@pytest.mark.parametrize(
    ("method", "sharpness"), [("dense", "none"), ("rigl", "s2sam"), ("gmp", "s2sam"), ("rigl", "sam")]
)
def test_a_compiled_run_takes_the_same_steps_and_compiles_each_batch_size_once(tmp_path, method, sharpness):
    config = dataclasses.replace(TINY, method=method, sharpness=sharpness)
    state, records, graphs = trained(config, tmp_path, 3)
    plain, expected, _ = trained(dataclasses.replace(config, compile="none"), tmp_path, 3)
    assert graphs == [2, 2, 2]  # 48 and 32 images; neither masks, rho, lr nor evaluations add one
    if method != "dense":
        assert state.sparsifier.updates == plain.sparsifier.updates > 1
        assert all(torch.equal(mask, plain.sparsifier.masks[name]) for name, mask in state.sparsifier.masks.items())
    torch.testing.assert_close(weights(state), weights(plain), atol=1e-5, rtol=1e-5)
    assert len(records) == len(expected)
    if sharpness == "s2sam":
        steps = [r for r in records if r["kind"] == "step" and "displacement" in r]
        assert [r["displacement"] for r in steps[1:]] == pytest.approx([0.3] * (len(steps) - 1), rel=1e-3)


def test_micro_batches_and_lower_precision(tmp_path):
    optim = OptimConfig(accumulate=2, ema=0.5, clip_norm=1.0)
    config = dataclasses.replace(TINY, optim=optim, precision="bf16", batch_size=64)
    state, _, graphs = trained(config, tmp_path, 2)
    plain, _, _ = trained(dataclasses.replace(config, compile="none"), tmp_path, 2)
    assert graphs == [1, 1]
    torch.testing.assert_close(weights(state), weights(plain), atol=2e-3, rtol=2e-2)
    assert not torch.equal(next(state.ema.module.parameters()), next(state.model.parameters()))


@pytest.mark.parametrize("mode", ["none", "default"])
def test_what_a_run_writes_has_the_same_names_and_fits_a_plain_network(tmp_path, mode):
    config = dataclasses.replace(TINY, epochs=1, compile=mode, optim=OptimConfig(ema=0.5), out=str(tmp_path / "run"))
    final = run(config)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    state = build(dataclasses.replace(config, compile="none"))
    assert saved.keys() == state.model.state_dict().keys()
    assert load_file(tmp_path / "run" / "ema.safetensors").keys() == saved.keys()
    state.model.load_state_dict(saved)
    x, y = state.data.split("test")
    with torch.no_grad():
        right = (state.model.eval()(state.augment(x)).argmax(1) == y).double().mean()
    assert final["test_top1"] == pytest.approx(float(right), abs=1e-9)
    assert {"ema_test_top1", "recalibrated_test_top1"} <= final.keys()


def test_copies_have_a_plain_forward_and_their_own_weights():
    state = build(TINY)
    x = state.augment(state.data.train_x[:8])
    state.model.train()(x)
    graphs = counters["stats"]["unique_graphs"]
    twin = recalibrated(state.model, state.data.train_x, 48, state.augment, torch.Generator().manual_seed(0))
    for other in (copy.deepcopy(state.model), copy.deepcopy(copy.deepcopy(state.model)), twin):
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert not other.train()(x).any()  # with weights of 0 nothing comes out
        assert state.model.eval()(x).any()
    loaded = pickle.loads(pickle.dumps(create_and_compile()))
    assert loaded.forward.__self__ is loaded
    assert graphs > 0
    assert counters["stats"]["unique_graphs"] == graphs


def create_and_compile():
    options = {"num_classes": 3, "in_channels": 1, "image_size": (8, 8), "generator": torch.Generator().manual_seed(0)}
    model = create_model("mlp", width=0.125, **options)
    fast.compile_network(model, "default")
    return model


def test_the_tenth_network_of_a_process_is_compiled_like_the_first(monkeypatch):
    monkeypatch.setattr(fast, "BACKEND", "eager")
    for count in range(10):  # torch gives up after eight graphs of one code object
        create_and_compile().train()(torch.zeros(2, 1, 8, 8))
        assert counters["stats"]["unique_graphs"] == count + 1


def test_evaluation_is_not_compiled_and_each_batch_size_is_once():
    model = create_and_compile()
    model.eval()(torch.zeros(2, 1, 8, 8))
    assert counters["stats"]["unique_graphs"] == 0
    for count, size in enumerate((2, 5, 9, 5, 2, 9), start=1):  # static shapes: each size has its own graph
        model.train()(torch.zeros(size, 1, 8, 8))
        assert counters["stats"]["unique_graphs"] == min(count, 3)


def test_a_compiled_run_resumes_exactly(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, epochs=2, optim=OptimConfig(ema=0.5, fused=True))
    run(dataclasses.replace(config, out=str(tmp_path / "whole")))
    broken = dataclasses.replace(config, out=str(tmp_path / "broken"))
    step = loop.train_step

    def preempted(state, x, y):
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state, x, y)

    monkeypatch.setattr(loop, "train_step", preempted)
    with pytest.raises(Preempted):
        run(broken)
    monkeypatch.setattr(loop, "train_step", step)
    run(broken)
    one, other = (load_checkpoint(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "broken"))
    assert json.loads((tmp_path / "broken" / "env.json").read_text())["resumed"][0]["step"] == 4
    for key in ("model", "ema"):
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items())
    for index, entry in one["optimizer"]["state"].items():
        assert all(torch.equal(v, other["optimizer"]["state"][index][k]) for k, v in entry.items())
    assert one["step"] == other["step"] == 6


def broken_backend(graph, inputs):
    raise RuntimeError("no working compiler\nfor many reasons")


def test_no_compiler_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fast, "BACKEND", broken_backend)
    assert main(["train", "--compile", "default", "--epochs", "1", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("s2sam: error: --compile default needs a C++ compiler, and torch cannot compile for this CPU")
    assert "no working compiler" in err
    assert err.rstrip().endswith("use --compile none")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="unknown compile 'defualt'; did you mean 'default'"):
        TrainConfig(compile="defualt")
    with pytest.raises(ValueError, match="compile reduce-overhead uses CUDA graphs, which lose gradients"):
        TrainConfig(compile="reduce-overhead", optim=OptimConfig(accumulate=2))


def test_the_setting_of_cudnn_is_put_back():
    assert torch.backends.cudnn.benchmark is False
    with fast.quickest_convolutions(torch.device("cpu")):
        assert torch.backends.cudnn.benchmark is False
    with pytest.raises(KeyError), fast.quickest_convolutions(torch.device("cuda")):
        assert torch.backends.cudnn.benchmark is True
        raise KeyError
    assert torch.backends.cudnn.benchmark is False
