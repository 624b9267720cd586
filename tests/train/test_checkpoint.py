"""Checkpoints: whole or refused, plain values only, and enough to go on from."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from s2sam.track.base import Loggers
from s2sam.train.checkpoint import CONTENT, FORMAT, load_checkpoint, save_checkpoint
from s2sam.train.config import OptimConfig, SamConfig, SparseConfig, TrainConfig
from s2sam.train.folder import RunFolder
from s2sam.train.loop import Trainer
from s2sam.train.state import build

#: all that a checkpoint holds, and nothing in it
BLANK = {key: torch.zeros(5) if kinds[0] is torch.Tensor else kinds[0]() for key, kinds in CONTENT.items()}
CONFIG = TrainConfig(epochs=3, sparse=SparseConfig(options={"delta_t": 10}))


def test_round_trip_and_no_temporary_files(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, BLANK | {"step": 3, "w": torch.arange(4.0)})
    save_checkpoint(path, BLANK | {"step": 4, "w": torch.arange(4.0)})
    state = load_checkpoint(path)
    assert state["step"] == 4
    assert torch.equal(state["w"], torch.arange(4.0))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_torn_checkpoint_is_refused_by_name(tmp_path, keep):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"w": torch.randn(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=r"last\.pt is torn or no checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("key", CONTENT)
def test_what_is_missing_or_of_another_kind_is_named(tmp_path, key):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {name: value for name, value in BLANK.items() if name != key})
    with pytest.raises(ValueError, match=rf"last\.pt is damaged: it has no '{key}'; delete it and use an older one"):
        load_checkpoint(path)
    save_checkpoint(path, BLANK | {key: ("abc",)})
    with pytest.raises(ValueError, match=rf"last\.pt is damaged: its '{key}' is no \w+; delete it") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"step": -1}, {"epoch": -3}, {"logs": {"metrics.jsonl": "10"}}], ids=str)
def test_counts_must_be_whole_numbers(tmp_path, changes):
    save_checkpoint(tmp_path / "last.pt", BLANK | changes)
    with pytest.raises(ValueError, match=r"last\.pt is damaged: its counts"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("version", ["3", None, 2.5])
def test_a_version_of_another_kind_is_another_version(tmp_path, version):
    save_checkpoint(tmp_path / "last.pt", BLANK | {"version": version})
    with pytest.raises(ValueError, match=r"has version .* of the format, this s2sam reads version \d; continue it"):
        load_checkpoint(tmp_path / "last.pt")


class Malicious:
    def __reduce__(self):
        return print, ("never",)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda p: torch.save({"w": torch.ones(1)}, p), "was not written by s2sam train"),
        (lambda p: torch.save([1, 2], p), "was not written by s2sam train"),
        (lambda p: torch.save({"format": FORMAT, "x": Malicious()}, p), "torn or no checkpoint"),
        (lambda p: p.write_text("hello"), "torn or no checkpoint"),
        (lambda p: p.mkdir(), "there is no checkpoint at"),
        (lambda p: None, "there is no checkpoint at"),
    ],
    ids=["foreign", "list", "code", "text", "folder", "missing"],
)
def test_foreign_files_are_refused(tmp_path, capsys, write, sentence):
    path = tmp_path / "best.pt"
    write(path)
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(path)
    assert capsys.readouterr().out == ""


def trainer(config, folder):
    folder = RunFolder(folder)
    state = build(config)
    folder.create(config, {})
    return Trainer(state, Loggers([]), folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "set", "sharpness": "sam"},
        {"method": "dense", "sharpness": "none", "optim": OptimConfig(name="adamw"), "lr": 1e-3},
        {"method": "static", "sam": SamConfig(direction="momentum", sign=-1), "optim": OptimConfig(nesterov=True)},
    ],
    ids=["rigl-s2sam", "set-sam", "dense-adamw", "static-momentum"],
)
def test_last_checkpoint_goes_on_bit_by_bit(tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    whole = trainer(config, tmp_path / "whole")
    whole.keep(whole.epoch())
    middle = load_checkpoint(tmp_path / "whole" / "checkpoints" / "last.pt")
    whole.train()

    resumed = trainer(config, tmp_path / "resumed")
    resumed.state.load_state_dict(middle)
    assert resumed.state.epoch == 1
    resumed.train()

    a, b = whole.state, resumed.state
    assert (a.step, a.best) == (b.step, b.best)
    assert a.model.state_dict().keys() == b.model.state_dict().keys()
    for name, tensor in a.model.state_dict().items():
        assert torch.equal(tensor, b.model.state_dict()[name]), name
    for left, right in zip(a.optimizer.state.values(), b.optimizer.state.values(), strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(torch.as_tensor(left[k]), torch.as_tensor(right[k])) for k in left)
    assert torch.equal(a.batches.generator.get_state(), b.batches.generator.get_state())


def test_checkpoint_of_another_run_is_refused(tmp_path):
    first = trainer(CONFIG, tmp_path / "first")
    saved = first.state.state_dict()
    other = build(dataclasses.replace(CONFIG, lr=0.2))
    with pytest.raises(ValueError, match=r"another run: lr is 0\.1 there and 0\.2 here"):
        other.load_state_dict(saved)
    elsewhere = build(dataclasses.replace(CONFIG, out="elsewhere"))
    elsewhere.load_state_dict(saved)
    with pytest.raises(ValueError, match="other images"):
        elsewhere.load_state_dict({**saved, "data_digest": "0"})
