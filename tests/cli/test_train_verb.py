"""`s2sam train`: flags to folder, and bad input to one sentence, exit code 2 and nothing that looks finished."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from s2sam.cli.main import main
from s2sam.train.config_files import load_config

QUICK = ["--epochs", "1", "--data-options.train-size", "128"]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def parquet(tmp_path):
    """`parquet(labels)` writes a folder of 4x4 images with two classes and returns it."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    def image(value):
        file = io.BytesIO()
        Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    features = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["dark", "bright"]}}

    def write(labels):
        folder = tmp_path / "images"
        folder.mkdir()
        for split in ("train", "test"):
            table = pa.table({"img": [image(200 * (y % 2) + i) for i, y in enumerate(labels)], "label": labels})
            metadata = {"huggingface": json.dumps({"info": {"features": features}})}
            pq.write_table(table.replace_schema_metadata(metadata), folder / f"{split}.parquet")
        return folder

    return write


def refused(argv, capsys, out):
    """Runs the command in this process; returns its one line on stderr."""
    assert main(["train", "--out", str(out), *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("s2sam: error: ")
    assert captured.err.count("error:") == 1
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
    assert not (out / "DONE").exists()
    return captured.err


def test_flags_reach_the_run_and_its_folder(out, capsys):
    argv = [
        "--method",
        "set",
        "--sparsity",
        "0.8",
        "--sharpness",
        "sam",
        "--rho",
        "0.1",
        "--batch-size",
        "32",
        "--lr",
        "0.05",
    ]
    nested = ["--sam.scale", "relative", "--optim.weight-decay", "1e-3", "--sparse.options.delta-t=3", "--seed", "4"]
    assert main(["train", *QUICK, *argv, *nested, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(out)
    assert any(line.startswith("epoch 1/1 ") for line in lines)
    config = load_config(out / "config.yaml")
    assert (config.method, config.sparsity, config.sharpness, config.rho) == ("set", 0.8, "sam", 0.1)
    assert (config.batch_size, config.lr, config.seed, config.sam.scale) == (32, 0.05, 4, "relative")
    assert (config.optim.weight_decay, config.method_options) == (1e-3, {"delta_t": 3})
    final = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["sparsity"] == pytest.approx(0.8, abs=1e-4)
    assert (out / "DONE").exists()


def test_default_folder_is_named_after_the_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *QUICK, "--config", "digits", "--seed", "2"]) == 0
    assert (tmp_path / "runs" / "digits-mlp-rigl90-s2sam-seed2" / "DONE").exists()


def test_saved_configuration_repeats_the_run(out, tmp_path, capsys):
    assert main(["train", *QUICK, "--out", str(out)]) == 0
    again = tmp_path / "again"
    assert main(["train", "--config", str(out / "config.yaml"), "--out", str(again)]) == 0
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_images_of_ones_own_train(out, parquet, capsys):
    folder = parquet([0, 1] * 20)
    assert (
        main(
            [
                "train",
                "--data",
                str(folder),
                "--epochs",
                "20",
                "--batch-size",
                "8",
                "--method",
                "dense",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    final = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert (final["train_images"], final["test_images"]) == (36, 40)
    assert final["test_top1"] > 0.9


@pytest.mark.parametrize("sparsity", ["1.5", "1.0", "-0.1", "nan", "90%"])
def test_impossible_sparsity(sparsity, capsys, out):
    assert "sparsity must be a number" in refused([f"--sparsity={sparsity}"], capsys, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--method", "rigel"], "did you mean 'rigl'"),
        (["--model", "mpl"], "did you mean 'mlp'"),
        (["--data", "digit"], "did you mean 'digits'"),
        (["--config", "cifar10-resnet21"], "did you mean 'cifar10-resnet20'"),
        (["--sharpness", "s2-sam"], "did you mean 's2sam'"),
        (["--sparsity_level", "0.9"], "did you mean 'sparsity'"),
        (["--sparse.options.delta", "4"], "did you mean 'delta_t'"),
        (["--model-options.widht", "2"], "did you mean 'width'"),
        (["--rho", "nan"], "rho must be a number"),
        (["--rho", "-1"], "rho must be"),
        (["--epochs", "0"], "epochs must be"),
        (["--sparsity", "0.99999"], "the largest"),
        (["--sparse.options.drop-fraction", "2"], "drop_fraction"),
        (["--sparse.include", "[nothing]"], "unknown name or module class in include: 'nothing'"),
        (["--sparse.include", "nothing"], "unknown name or module class in include: 'nothing'"),
        (["--sparse.exclude", "clasifier"], "did you mean 'classifier.bias'"),
        (["--model-options", "5"], "model_options must be a mapping, as in --model_options.NAME VALUE, got 5"),
        (["--schedule.milestones", "5"], "schedule.milestones must be a list, as in"),
        (["--data", "no/such/folder"], "there is no data at no/such/folder"),
        (["--data", "./nowhere"], "there is no data at ./nowhere: no such path exists"),
        (
            ["--data-options.options.resize", "5"],
            "unknown option of digits data 'resize': it has none, leave this one out",
        ),
        (["--data-options.cutout", "100"], "data_options.cutout 100 is larger than the images of 8x8 pixels; lower it"),
        (
            [
                "--method",
                "lt",
                "--epochs",
                "2",
                "--batch-size",
                "64",
                "--data-options.train-size",
                "128",
                "--sparse.options.rewind-step",
                "4",
            ],
            "rewind_step 4 is not inside the first training, which has 4 steps; lower it, or train longer",
        ),
        (["--method", "mest", "--sparse.options.phases", "0.5"], "phases must be a list such as [0.5, 0.75], got 0.5"),
        (["--method", "lt", "--sparse.options.rewind_step", "a"], "rewind_step must be a whole number of at least 0"),
        (["--config", "no/such.yaml"], "no configuration file at no/such.yaml"),
        (["--data-options.train-size", "5000"], "train_size must be a whole number from 1 to"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_bad_input_names_what_would_do(argv, sentence, capsys, out):
    assert sentence in refused(argv, capsys, out)
    assert not out.exists()


def test_an_option_that_the_method_does_not_have_is_told_once(capsys, out):
    argv = ["train", "--epochs", "1", "--data-options.train-size", "128", "--method", "static", "--out", str(out)]
    assert main([*argv, "--sparse.options.drop_fraction", "0.2"]) == 0
    said = "s2sam: warning: method static has no option drop_fraction; left aside, see `s2sam list methods`\n"
    assert capsys.readouterr().err == said
    assert main([*argv, "--overwrite"]) == 0
    assert capsys.readouterr().err == "", "delta_t is a default of the configuration, not the user's wish"


def test_unknown_key_in_a_file(tmp_path, capsys, out):
    path = tmp_path / "c.yaml"
    path.write_text("epochs: 1\noptim: {weight_decya: 0.1}\n")
    assert "unknown key 'optim.weight_decya' in" in refused(["--config", str(path)], capsys, out)
    assert not out.exists()


def test_truncated_parquet(parquet, capsys, out):
    path = parquet([0, 1] * 20) / "train.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert "train.parquet" in refused(["--data", str(path.parent)], capsys, out)
    assert not out.exists()


def test_labels_out_of_range(parquet, capsys, out):
    folder = parquet([0, 1] * 20 + [7])
    assert "label 7" in refused(["--data", str(folder)], capsys, out)
    assert not out.exists()


def test_images_that_are_not_numbers(tmp_path, capsys, out):
    x, y = np.random.default_rng(0).random((20, 1, 4, 4)), np.arange(20) % 2
    x[3, 0, 1, 1] = np.nan
    np.savez(tmp_path / "x.npz", train_x=x, train_y=y, test_x=x, test_y=y)
    assert "row 3" in refused(["--data", str(tmp_path / "x.npz")], capsys, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.arange(19) % 2, "but there are 20 images and 19 labels"),
        (np.arange(20) % 2 - 1, "has the label -1"),
        (np.arange(20) % 2 * 0.5, "must hold integers"),
        (np.arange(20).astype(str), "must be an array of numbers, got <U"),
        (np.arange(20) * 10**9, "the label 19000000000 cannot be a class number"),
        (np.zeros((20, 1), np.int64), "int64 of shape (20,)"),
    ],
    ids=["length", "negative", "float", "text", "huge", "shape"],
)
def test_wrong_labels_name_the_file(tmp_path, capsys, out, labels, sentence):
    x = np.zeros((20, 1, 4, 4), np.uint8)
    np.savez(tmp_path / "mine.npz", train_x=x, train_y=labels, test_x=x, test_y=np.arange(20) % 2)
    err = refused(["--data", str(tmp_path / "mine.npz")], capsys, out)
    assert "mine.npz: " in err
    assert sentence in err
    assert not out.exists()


def test_one_name_is_a_list_of_one(out, capsys):
    assert main(["train", *QUICK, "--method", "static", "--sparse.exclude", "classifier", "--out", str(out)]) == 0
    from safetensors.torch import load_file

    assert "classifier.weight" not in load_file(out / "masks.safetensors")
    assert load_config(out / "config.yaml").sparse.exclude == "classifier"


def test_the_help_names_every_kind_of_data(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for kind in ("digits", "CIFAR", "binary or Python", "train/CLASS/", "train.parquet", ".npz"):
        assert kind in text


def test_finished_run_stays(out, capsys):
    assert main(["train", *QUICK, "--out", str(out)]) == 0
    before = (out / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["train", *QUICK, "--out", str(out)]) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before
    assert main(["train", *QUICK, "--seed", "1", "--out", str(out), "--overwrite"]) == 0
    assert load_config(out / "config.yaml").seed == 1


def test_divergence_is_a_sentence(capsys, out):
    err = refused([*QUICK, "--sharpness", "none", "--lr", "1e20"], capsys, out)
    assert "training diverged" in err
    assert not (out / "model.safetensors").exists()


def test_as_a_process(out):
    command = [sys.executable, "-m", "s2sam", "train", "--out", str(out)]
    bad = subprocess.run([*command, "--sparsity", "1.5"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr == "s2sam: error: sparsity must be a number at least 0 and below 1, got 1.5\n"
    good = subprocess.run([*command, *QUICK], capture_output=True, text=True, check=False)
    told = "changes no mask on its way through 2 steps; give a smaller delta_t, for instance 1"
    assert (good.returncode, good.stderr) == (0, f"s2sam: warning: method 'rigl' with delta_t=20 {told}\n")
    assert (out / "DONE").exists()


def test_the_same_command_goes_on_with_a_stopped_run(out, capsys, monkeypatch):
    from s2sam.train import loop

    argv = ["train", *QUICK, "--epochs", "2", "--checkpoint-every", "2", "--out", str(out)]
    assert main([*argv, "--out", str(out.with_name("whole"))]) == 0
    step, calls = loop.train_step, iter(range(100))

    def interrupted(*args):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(loop, "train_step", interrupted)
    assert main(argv) == 130
    monkeypatch.setattr(loop, "train_step", step)
    capsys.readouterr()
    assert main([*argv, "--lr", "0.2"]) == 2
    assert "lr is 0.1 there and 0.2 here" in capsys.readouterr().err
    assert main([*argv, "--resume", "nevr"]) == 2
    assert "did you mean 'never'?" in capsys.readouterr().err
    assert main(argv) == 0
    assert "going on after step 2 of" in capsys.readouterr().out
    whole = out.with_name("whole") / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == whole.read_bytes()
    assert main([*argv, "--resume=never"]) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_lists_and_free_options_are_flags(out):
    from s2sam.train.config_files import parse, parse_flags

    config = parse(
        ["--schedule.name", "step", "--schedule.milestones", "[0.3, 0.6]", "--data-options.options.resize", "8"]
    )
    assert config.schedule.milestones == [0.3, 0.6]
    assert config.data_options.options == {"resize": 8}
    assert parse_flags(["--resume", "x/last.pt"])[1] == {
        "resume": "x/last.pt",
        "overwrite": False,
        "print_config": False,
    }


def test_sigterm_saves_and_says_so(out, capsys, monkeypatch):
    from s2sam.train import loop

    step = loop.train_step

    def ended(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    monkeypatch.setattr(loop, "train_step", ended)
    with pytest.raises(SystemExit) as end:
        main(["train", *QUICK, "--out", str(out)])
    assert end.value.code == 143
    assert f"the same command goes on in {out}" in capsys.readouterr().err
    monkeypatch.setattr(loop, "train_step", step)
    assert main(["train", *QUICK, "--out", str(out)]) == 0
    assert "going on after step 1 of" in capsys.readouterr().out
