"""The run folder: what may be replaced, and that a run that fails leaves nothing that looks finished."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from s2sam.train import TrainConfig, run
from s2sam.train.config import DataConfig
from s2sam.train.folder import RunFolder

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
