"""`s2sam eval`: the recorded number again, other images, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from s2sam.cli.main import main
from s2sam.data import load_data
from s2sam.train import TrainConfig, run
from s2sam.train.config import DataConfig, OptimConfig


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with averaged weights, and its final record."""
    folder = tmp_path_factory.mktemp("eval") / "run"
    config = TrainConfig(epochs=2, data_options=DataConfig(train_size=320), optim=OptimConfig(ema=0.8), out=str(folder))
    return folder, run(config)


@pytest.fixture
def copy(finished, tmp_path):
    import shutil

    return shutil.copytree(finished[0], tmp_path / "copy")


def measured(capsys, *argv):
    assert main(["eval", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *argv):
    assert main(["eval", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("s2sam: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_recorded_numbers_come_out_again(finished, capsys):
    folder, final = finished
    found = measured(capsys, folder)
    assert (found["loss"], found["top1"], found["images"]) == (final["test_loss"], final["test_top1"], 359)
    assert measured(capsys, folder, "--split", "val")["top1"] == final["val_top1"]
    assert measured(capsys, folder, "--weights", "ema")["top1"] == final["ema_test_top1"]
    assert final["ema_test_top1"] != final["test_top1"]
    assert main(["eval", str(folder)]) == 0
    assert f"top-1 {100 * final['test_top1']:.2f} % of 359 test images" in capsys.readouterr().out


def save(path, x, y):
    np.savez(path, train_x=x, train_y=y, test_x=x, test_y=y)
    return path


def test_other_images_are_normalised_as_the_network_learned_it(finished, tmp_path, capsys):
    data = load_data("digits", train_size=320)
    x, y = data.test_x.numpy(), data.test_y.numpy()
    found = measured(capsys, finished[0], "--data", save(tmp_path / "same.npz", x, y))
    assert (found["top1"], found["images"]) == (finished[1]["test_top1"], 359)
    dark = measured(capsys, finished[0], "--data", save(tmp_path / "dark.npz", x // 8, y))
    assert dark["top1"] < finished[1]["test_top1"] - 0.1  # by its own mean and deviation it would be as good


@pytest.mark.parametrize(
    ("shape", "classes", "sentence"),
    [((1, 8, 8), 4, "has 4 classes, the network knows 10"), ((3, 8, 8), 10, "have 3 channels, the network takes 1"),
     ((1, 9, 9), 10, "does not fit the network or the size of the images")],
)  # fmt: skip
def test_images_that_do_not_fit(finished, tmp_path, capsys, shape, classes, sentence):
    x = np.random.default_rng(0).integers(0, 255, (40, *shape), dtype=np.uint8)
    path = save(tmp_path / "x.npz", x, np.arange(40) % classes)
    assert sentence in refused(capsys, finished[0], "--data", path)


def test_what_is_no_finished_run(copy, tmp_path, capsys):
    assert "is not a run folder" in refused(capsys, tmp_path)
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-100])
    assert refused(capsys, copy).strip().endswith("model.safetensors is torn; train the run again")
    (copy / "model.safetensors").unlink()
    assert "is not there; train it again" in refused(capsys, copy)
    (copy / "env.json").write_text("{}")
    assert "does not tell how images are normalised" in refused(capsys, copy)
    (copy / "DONE").unlink()
    assert "is not a finished run" in refused(capsys, copy)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mean": "0.5"}, "env.json is damaged (mean is '0.5')"),
        ({"mean": [None]}, "env.json is damaged (mean[0] is None)"),
        ({"std": [0.0]}, "env.json is damaged (std[0] is 0.0)"),
        ({"std": [1.0, 1.0]}, "it has 1 means and 2 standard deviations"),
        ({"classes": 10}, "env.json is damaged (classes is 10)"),
        ({"data_digest": None}, "env.json is damaged (data_digest is None)"),
    ],
    ids=str,
)
def test_an_environment_that_no_run_wrote(copy, capsys, change, sentence):
    env = json.loads((copy / "env.json").read_text())
    (copy / "env.json").write_text(json.dumps(env | change))
    assert sentence in refused(capsys, copy)


def test_changed_images_and_missing_averages(copy, capsys):
    env = json.loads((copy / "env.json").read_text())
    (copy / "env.json").write_text(json.dumps({**env, "data_digest": "0"}))
    assert "are not those the run was trained on" in refused(capsys, copy)
    (copy / "env.json").write_text(json.dumps(env))
    (copy / "ema.safetensors").unlink()
    assert "the run kept no average" in refused(capsys, copy, "--weights", "ema")
    assert "invalid choice: 'tset'" in refused(capsys, copy, "--split", "tset")
