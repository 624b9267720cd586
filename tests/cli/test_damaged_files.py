"""Settings, tables, images and labels that are damaged: every reader ends in its sentence, none in a traceback."""

from __future__ import annotations

import io
import json
import pickle
import random
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from s2sam.suite.schema import tables
from s2sam.train.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutations import changed, damaged, ends_well

LAUGHS = "\n".join(
    ["model_options:", "  a: &a [x, x, x, x, x, x, x, x, x]"]
    + [f"  {b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("data: null", "data must be a text, got None"),
        ("epochs: null", "epochs"),
        ("channels_last: null", "channels_last must be true or false, got None"),
        ("sparse: {options: null}", "sparse.options must be `name: value` pairs, got None"),
        ("lr: 1.0e+300", "lr must be a number at least 0 and at most 1e+38, got 1e+300"),
        ("seed: 9223372036854775808", "seed must be a whole number below 2 to the power of 63"),
        ("model_options: {width: " + "1" + "0" * 400 + "}", "width must be a number"),
        ("a: &a [*a]", "nested deeper than 60 levels, or contains itself"),
        ("model_options: &a {x: *a}", "nested deeper than 60 levels, or contains itself"),
        ("model_options: {x: " + "[" * 5000 + "]" * 5000 + "}", "is not valid YAML (RecursionError"),
        (LAUGHS, "holds more than 3,000,000 values"),
        ("1: 2", "its key 1 is no text"),
        ("lr: [\n", "is not valid YAML (line 2)"),
    ],
)
def test_settings_that_no_run_can_have(tmp_path, capsys, text, sentence):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    from s2sam.cli.main import main

    assert main(["train", "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", range(4))
def test_damaged_settings(tmp_path, capsys, seed):
    draw, whole, path = random.Random(seed), TrainConfig().as_dict(), tmp_path / "c.yaml"
    refused = 0
    for turn in range(20):
        content = yaml.safe_dump(changed(whole, draw), sort_keys=False).encode()
        path.write_bytes(content if turn % 3 else damaged(yaml.safe_dump(whole).encode(), draw))
        refused += not ends_well(capsys, "train", "--config", path, "--print_config")
    assert refused


@pytest.mark.parametrize("seed", range(2))
def test_damaged_tables(tmp_path, capsys, seed):
    draw, path = random.Random(seed), tmp_path / "t.yaml"
    text = tables()["1"].read_text()
    refused = 0
    path.write_text(text)
    assert ends_well(capsys, "table", path, "--budget", "smoke", "--dry-run", "--out", tmp_path / "out")
    for turn in range(10):
        content = yaml.safe_dump(changed(yaml.safe_load(text), draw), sort_keys=False).encode()
        path.write_bytes(content if turn % 3 else damaged(text.encode(), draw))
        refused += not ends_well(capsys, "table", path, "--budget", "smoke", "--dry-run", "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert refused


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 255, (24, 3, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def npz(pixels):
    file, y = io.BytesIO(), np.arange(24) % 3
    np.savez(file, train_x=pixels, train_y=y, test_x=pixels, test_y=y, classes=np.array(list("abc")))
    return file.getvalue()


def test_damaged_npz(tmp_path, capsys, npz):
    draw, path = random.Random(0), tmp_path / "a.npz"
    entry = npz.index(b"PK\x01\x02")  # where the directory says how each array is compressed
    kinds = [npz[: entry + 10] + bytes([kind]) + npz[entry + 11 :] for kind in (1, 9, 99, 255)]
    for content in (*kinds, npz[:-30], npz[:1000], *(damaged(npz, draw) for _ in range(30))):
        path.write_bytes(content)
        ends_well(capsys, "data", "check", path)
    for content in kinds:
        path.write_bytes(content)
        assert not ends_well(capsys, "data", "check", path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"train_y": np.full(24, 2**64 - 1, np.uint64)}, {"train_x": np.zeros((24, 3, 8, 8), ">f4")},
        {"train_x": np.zeros((24, 3, 8, 8), complex)}, {"train_y": np.zeros((24, 2), int)},
        {"train_y": np.full(24, 2**62)}, {"train_y": np.zeros(24, "M8[s]")}, {"train_x": np.array(3)},
    ],
    ids=lambda arrays: str([(a.dtype, a.shape) for a in arrays.values()]),
)  # fmt: skip
def test_arrays_of_other_kinds(tmp_path, capsys, pixels, arrays):
    y = np.arange(24) % 3
    np.savez(tmp_path / "a.npz", **({"train_x": pixels, "train_y": y, "test_x": pixels, "test_y": y} | arrays))
    assert not ends_well(capsys, "data", "check", tmp_path / "a.npz")


def test_members_that_are_no_arrays(tmp_path, capsys):
    for suffix in ("", ".npy"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for name in ("train_x", "train_y", "test_x", "test_y"):
                archive.writestr(name + suffix, b"hello")
        assert not ends_well(capsys, "data", "check", tmp_path / "a.npz")


def png(pixels):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path, pixels, labels, metadata=None, kind=None):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pa.array([{"bytes": png(one), "path": None} for one in pixels],
                      pa.struct([("bytes", kind or pa.binary()), ("path", pa.string())]))  # fmt: skip
    table = pa.table({"img": images, "label": pa.array(labels, pa.uint64())})
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, path)


@pytest.mark.parametrize(
    ("labels", "metadata", "sentence"),
    [
        ([2**64 - 1] * 24, None, "give labels that number the classes"),
        ([0, 1] * 12, {"huggingface": "[" * 100_000}, "does not describe column 'label'"),
        ([0, 1] * 12, {"huggingface": '{"info": {"features": {"label": {"names": 5}}}}'}, "does not describe column"),
        ([0, 1] * 12, {"huggingface": '{"info": {"features": {"label": {"names": [[1]]}}}}'}, "does not describe"),
    ],
    ids=["label", "nested", "number", "list"],
)
def test_parquet_that_means_nothing(tmp_path, capsys, pixels, labels, metadata, sentence):
    write_parquet(tmp_path / "train.parquet", pixels, labels, metadata)
    write_parquet(tmp_path / "test.parquet", pixels, [0, 1] * 12)
    from s2sam.cli.main import main

    assert main(["data", "check", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/train.parquet" in said
    assert sentence in said
    assert said.count("\n") == 1


def test_damaged_parquet(tmp_path, capsys, pixels):
    draw = random.Random(0)
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}.parquet", pixels, [0, 1] * 12)
    whole = (tmp_path / "train.parquet").read_bytes()
    refused = 0
    for _ in range(30):
        (tmp_path / "train.parquet").write_bytes(damaged(whole, draw))
        refused += not ends_well(capsys, "data", "check", tmp_path)
    assert refused


def test_damaged_cifar(tmp_path, capsys):
    draw = random.Random(0)
    batch = {b"data": np.zeros((5, 3072), np.uint8), b"labels": [0, 1, 2, 3, 4]}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"%d" % i for i in range(10)]}))
    refused = 0
    for turn in range(40):
        path = tmp_path / ("batches.meta" if turn % 2 else "data_batch_1")
        whole = path.read_bytes()
        head = damaged(whole[:200], draw) if turn % 3 else damaged(whole, draw)
        path.write_bytes(head + whole[200:] if turn % 3 else head)
        refused += not ends_well(capsys, "data", "check", tmp_path)
        path.write_bytes(whole)
    assert refused


def test_damaged_image_files(tmp_path, capsys, pixels):
    from PIL import Image

    draw, files = random.Random(0), []
    for split, kind in ((s, k) for s in ("train", "test") for k in "ab"):
        (tmp_path / split / kind).mkdir(parents=True)
        for i, suffix in enumerate(("png", "jpg", "bmp", "gif", "tiff", "ppm")):
            files.append(tmp_path / split / kind / f"{i}.{suffix}")
            Image.fromarray(pixels[i].transpose(1, 2, 0)).save(files[-1])
    refused = 0
    for _ in range(40):
        path = draw.choice(files)
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, draw))
        refused += not ends_well(capsys, "data", "check", tmp_path)
        path.write_bytes(whole)
    assert refused


def test_a_damaged_cost_measurement(tmp_path, capsys):
    draw, path, whole = random.Random(0), tmp_path / "cost.json", {"seconds_per_step": {"a": [0.1, 0.2]}}
    from s2sam.report.cost import load_rounds

    path.write_text(json.dumps(whole))
    assert load_rounds(path) == whole["seconds_per_step"]
    for _ in range(40):
        path.write_text(json.dumps(changed(whole, draw)))
        try:
            rounds = load_rounds(path)
        except ValueError as error:  # anything else fails the test
            assert "is not a cost measurement" in str(error)  # noqa: PT017
        else:
            assert all(type(one) in (int, float) and one > 0 for row in rounds.values() for one in row)
