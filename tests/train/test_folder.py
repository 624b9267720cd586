"""The run folder: what may be replaced, and that a run that fails leaves nothing that looks finished."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

from s2sam.cli.main import main
from s2sam.train import TrainConfig, run
from s2sam.train.config import DataConfig, OptimConfig
from s2sam.train.folder import SEALED, RunFolder

QUICK = TrainConfig(epochs=1, data_options=DataConfig(train_size=128))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_finished_run_is_replaced_only_on_demand(tmp_path):
    config = dataclasses.replace(QUICK, out=str(tmp_path / "run"))
    run(config)
    (tmp_path / "run" / "report.html").write_text("old")
    before = contents(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a finished run; choose another --out, or add --overwrite"):
        run(dataclasses.replace(config, seed=1))
    assert contents(tmp_path / "run") == before
    run(dataclasses.replace(config, seed=1), overwrite=True)
    after = contents(tmp_path / "run")
    assert after["model.safetensors"] != before["model.safetensors"]
    assert "report.html" not in after
    assert "DONE" in after


def test_unfinished_run_is_replaced(tmp_path):
    config = dataclasses.replace(QUICK, out=str(tmp_path / "run"))
    RunFolder(config.folder).create(config, {})
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind": "st')
    run(config)
    assert '"st\n' not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_foreign_folder_and_file_are_refused_and_untouched(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ValueError, match="files that belong to no run"):
        run(dataclasses.replace(QUICK, out=str(tmp_path / "photos")))
    with pytest.raises(ValueError, match="files that belong to no run"):
        run(dataclasses.replace(QUICK, out=str(tmp_path / "photos")), overwrite=True)
    with pytest.raises(ValueError, match="is a file"):
        run(dataclasses.replace(QUICK, out=str(tmp_path / "photos" / "cat.jpg")))
    assert contents(tmp_path) == {"photos/cat.jpg": b"cat"}


def test_overwriting_takes_done_away_first(tmp_path):
    config = dataclasses.replace(QUICK, out=str(tmp_path / "run"), lr=1e20, sharpness="none")
    run(dataclasses.replace(config, lr=0.1))
    with pytest.raises(RuntimeError, match="diverged"):
        run(config, overwrite=True)
    assert not RunFolder(config.folder).done
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "no/such/folder"},
        {"model_options": {"widht": 2.0}},
        {"sparsity": 0.99999},
        {"data_options": DataConfig(train_size=10**6)},
    ],
)
def test_what_cannot_be_built_leaves_no_folder(tmp_path, changes):
    with pytest.raises(ValueError, match=r"\w"):
        run(dataclasses.replace(QUICK, out=str(tmp_path / "run"), **changes))
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_written_as_they_are(tmp_path):
    tensors = {"w": torch.randn(3, 4).t(), "m": torch.tensor([True, False])}
    path = RunFolder(tmp_path).save_tensors("x.safetensors", tensors | {"tied": tensors["w"]})
    loaded = load_file(path)
    assert torch.equal(loaded["w"], tensors["w"])
    assert torch.equal(loaded["tied"], tensors["w"])
    assert loaded["m"].dtype == torch.bool


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with every file that DONE tells the digest of."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(dataclasses.replace(QUICK, out=str(folder), optim=OptimConfig(ema=0.9), model_options={"width": 0.125}))
    return folder


def test_done_tells_the_digests_of_the_results(finished):
    digests = json.loads((finished / "DONE").read_text())["sha256"]
    assert list(digests) == list(SEALED)
    assert digests == {name: hashlib.sha256((finished / name).read_bytes()).hexdigest() for name in SEALED}


VERBS = {
    "metrics.jsonl": ("report", "{run}", "--out", "{out}"),
    "model.safetensors": ("eval", "{run}"),
    "ema.safetensors": ("eval", "{run}", "--weights", "ema"),
    "masks.safetensors": ("surface", "{run}", "--out", "{out}", "--dims", "1", "--points", "5", "--images", "10"),
}


@pytest.mark.parametrize("name", VERBS)
def test_a_flipped_bit_in_a_result_is_noticed(finished, tmp_path, capsys, name):
    copy, out = shutil.copytree(finished, tmp_path / "run"), tmp_path / "out"
    argv = [word.format(run=copy, out=out) for word in VERBS[name]]
    content, draw = (copy / name).read_bytes(), random.Random(name)
    bits = 8 * len(content)
    for bit in (*range(0, 64, 9), *(draw.randrange(bits) for _ in range(12)), bits - 1):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        (copy / name).write_bytes(changed)
        capsys.readouterr()
        code, said = main(argv), capsys.readouterr().err
        assert code == 2, bit
        assert said.count("\n") == 1
        assert f"{copy / name} is " in said
        assert not out.exists()


def test_a_run_whose_done_tells_nothing_still_opens(finished, tmp_path, capsys):
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "DONE").write_text("")
    assert main(["eval", str(copy)]) == 0
    assert main(["report", str(copy), "--out", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b"\xff", b'{"sha256": 3}', b'{"sha256": {}}', b"[" * 100_000], ids=repr
)
def test_a_damaged_done_is_named(finished, tmp_path, capsys, content):
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "DONE").write_bytes(content)
    for argv in (["eval", str(copy)], ["report", str(copy), "--out", str(tmp_path / "page.html")]):
        assert main(argv) == 2
        assert f"{copy / 'DONE'} is damaged; put that file back" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
