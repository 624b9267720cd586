"""Checkpoints: whole or refused, plain values only, and enough to go on from."""

from __future__ import annotations

import dataclasses
import random
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from s2sam.track.base import Loggers
from s2sam.train.checkpoint import CONTENT, FORMAT, VERSION, TornError, load_checkpoint, save_checkpoint
from s2sam.train.config import OptimConfig, SamConfig, SparseConfig, TrainConfig
from s2sam.train.folder import RunFolder
from s2sam.train.loop import Trainer
from s2sam.train.state import build

sys.path.insert(0, str(Path(__file__).parent))
from forked import same

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


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The last.pt of a real run after its first epoch, as bytes, and what it holds."""
    folder = tmp_path_factory.mktemp("written")
    config = dataclasses.replace(CONFIG, model_options={"width": 0.125}, optim=OptimConfig(ema=0.9))
    first = trainer(config, folder)
    first.record = first.epoch()
    first.keep(first.record)
    path = folder / "checkpoints" / "last.pt"
    return path.read_bytes(), load_checkpoint(path)


def flipped(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_the_digest_is_the_comment_of_a_zip_archive_that_torch_reads(tmp_path, written):
    content, state = written
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment == content[-77:]
        assert archive.comment.startswith(b"s2sam sha256 ")
    assert same(torch.load(path, weights_only=True), state)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path, written):
    content, _ = written
    path, draw, bits = tmp_path / "last.pt", random.Random(0), 8 * len(content)
    pickled = 8 * content.index(b"data.pkl")
    chosen = [*range(0, 64 * 8, 37), *range(bits - 8 * 77 - 22 * 8, bits, 11)]
    chosen += [draw.randrange(pickled, pickled + 8 * 4096) for _ in range(100)]
    chosen += [draw.randrange(bits) for _ in range(150)]
    for bit in chosen:
        path.write_bytes(flipped(content, bit))
        with pytest.raises(TornError, match=r"last\.pt is (damaged|torn or no checkpoint).*delete it and use an older"):
            load_checkpoint(path)


def unsigned(state, path):
    """Written as version 3 wrote it: without a digest."""
    torch.save({**state, "version": 3}, path)


def test_a_version_without_a_digest_loads_and_its_damage_is_one_sentence(tmp_path, written):
    path, draw = tmp_path / "last.pt", random.Random(1)
    unsigned(written[1], path)
    assert same(load_checkpoint(path), {**written[1], "version": 3})
    content, refused = path.read_bytes(), 0
    start = content.index(b"data.pkl")
    for place in range(150):
        bit = draw.randrange(8 * start, 8 * (start + 6000)) if place % 2 else draw.randrange(8 * len(content))
        path.write_bytes(flipped(content, bit))
        sentence = ""
        try:
            load_checkpoint(path)
        except ValueError as error:  # anything else fails the test
            sentence = str(error)
            refused += 1
        assert not sentence or (str(path) in sentence and "\n" not in sentence)
    assert refused > 20


@pytest.mark.parametrize("kind", [IndexError, KeyError, AssertionError, struct.error, MemoryError, RecursionError])
def test_whatever_the_reader_of_damaged_bytes_stumbles_over_is_that_sentence(tmp_path, monkeypatch, written, kind):
    def stumble(*_, **__):
        raise kind("somewhere")

    path = tmp_path / "last.pt"
    unsigned(written[1], path)
    monkeypatch.setattr(torch, "load", stumble)
    with pytest.raises(TornError, match=rf"last\.pt is torn or no checkpoint \({kind.__name__}\); delete it"):
        load_checkpoint(path)
    path.write_bytes(written[0])  # not damaged: an older one would not help
    with pytest.raises(RuntimeError, match=r"last\.pt is whole and cannot be loaded .*make memory free"):
        load_checkpoint(path)


def test_without_its_digest_a_file_of_this_version_is_damaged(tmp_path, written):
    torch.save(written[1], tmp_path / "last.pt")
    with pytest.raises(TornError, match=r"last\.pt is torn or no checkpoint \(no digest\)"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("sign", [True, False], ids=["signed", "unsigned"])
def test_a_file_of_a_newer_s2sam_is_not_passed_over(tmp_path, written, sign):
    newer = {**written[1], "version": VERSION + 1}
    (save_checkpoint if sign else lambda path, state: torch.save(state, path))(tmp_path / "last.pt", newer)
    with pytest.raises(ValueError, match="this s2sam reads versions 3 and 4; upgrade s2sam") as error:
        load_checkpoint(tmp_path / "last.pt")
    assert not isinstance(error.value, TornError)


@pytest.mark.parametrize(
    ("name", "key"), [*(("best", k) for k in ("epoch", "val_top1", "test_top1", "sparsity")), ("record", "test_loss")]
)
def test_what_the_best_epoch_and_the_record_lack_is_named(tmp_path, written, name, key):
    state = {**written[1], name: {k: v for k, v in written[1][name].items() if k != key}}
    save_checkpoint(tmp_path / "best.pt", state)
    with pytest.raises(TornError, match=rf"best\.pt is damaged: its '{name}' has no number '{key}'; delete it"):
        load_checkpoint(tmp_path / "best.pt")
    save_checkpoint(tmp_path / "best.pt", {**written[1], "best": None})
    with pytest.raises(TornError, match=r"best\.pt is damaged: it has no 'best' epoch"):
        load_checkpoint(tmp_path / "best.pt")


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
    with pytest.raises(ValueError, match=r"has version .* of the format, this s2sam reads .* 3 and 4; continue it"):
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
