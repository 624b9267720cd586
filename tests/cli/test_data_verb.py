"""`s2sam data`: tables, findings and exit codes; downloads only from files."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s2sam import registry
from s2sam.cli.main import main
from s2sam.data import fetch, load_data


def blocks(out: str) -> dict[str, list[list[str]]]:
    """The tables of a plain output by title, without their headers."""
    return {
        block.splitlines()[0]: [line.split("\t") for line in block.splitlines()[2:]] for block in out.split("# ")[1:]
    }


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """20 training and 6 test images in two classes."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (26, 1, 4, 6), dtype=np.uint8)
    y = np.arange(26) % 2
    file = tmp_path / "own.npz"
    np.savez(file, train_x=x[:20], train_y=y[:20], test_x=x[20:], test_y=y[20:], classes=["cat", "dog"])
    return file


def test_list_shows_forms_and_archives(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    found = blocks(capsys.readouterr().out)
    assert [row[0] for row in found["data"]] == [row.name for row in registry.list_data()]
    assert {"digits", "cifar", "images", "parquet", "npz"} == {row[0] for row in found["data"]}
    assert [(row[0], row[2], row[3]) for row in found["archives"]] == [
        (a.name, " ".join(a.checksum), a.url) for a in fetch.ARCHIVES
    ]


def test_check_prints_what_is_there(npz: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(npz)]) == 0
    found = blocks(capsys.readouterr().out)
    facts = dict(found["data"])
    data = load_data(npz, val_fraction=0.0)
    assert facts["name"] == "own.npz"
    assert facts["form"] == "npz"
    assert facts["images"].startswith("1 channels, 4x6 pixels")
    assert facts["train"].startswith("20 images")
    assert facts["test"] == "6 images"
    assert facts["digest"] == data.digest
    assert float(facts["mean"]) == pytest.approx(data.mean.item(), abs=1e-4)
    assert found["classes"] == [["cat", "10", "3"], ["dog", "10", "3"]]
    assert "problems" not in found
    assert "remarks" not in found


def test_check_of_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "digits"]) == 0
    found = blocks(capsys.readouterr().out)
    assert len(found["classes"]) == 10
    assert sum(int(row[1]) for row in found["classes"]) == 1797 - 359


def test_problems_are_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = np.random.default_rng(0).integers(0, 256, (8, 1, 4, 4), dtype=np.uint8)
    np.savez(
        tmp_path / "a.npz", train_x=x[:4], train_y=[0, 0, 1, 1], test_x=x[3:6], test_y=[0, 1, 1], classes=list("abc")
    )
    assert main(["data", "check", str(tmp_path / "a.npz")]) == 2
    captured = capsys.readouterr()
    found = blocks(captured.out)
    assert found["problems"] == [["no training image in 1 of 3 classes: c"]]
    assert ["1 test images are also among the training images"] in found["remarks"]
    assert captured.err == ""


def test_a_broken_image_is_one_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.full((9, 7, 3), ord(name), np.uint8)).save(tmp_path / split / name / "1.png")
    assert main(["data", "check", str(tmp_path)]) == 0
    assert blocks(capsys.readouterr().out)["classes"] == [["a", "1", "1"], ["b", "1", "1"]]
    assert main(["data", "check", str(tmp_path), "--resize", "4"]) == 0
    assert "3 channels, 4x4 pixels" in capsys.readouterr().out
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"no image")
    assert main(["data", "check", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "train/b/1.png is not a readable image" in err
    assert err.count("\n") == 1


def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny CIFAR-10 in place of the real one; returns its address."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for i, name in enumerate([f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]):
            pixels = np.random.default_rng(i).integers(0, 256, (10, 3072), dtype=np.uint8)
            records = np.concatenate([np.arange(10, dtype=np.uint8)[:, None], pixels], axis=1).tobytes()
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(records)
            tar.addfile(info, io.BytesIO(records))
    file = tmp_path / "cifar.tar.gz"
    file.write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    row = fetch.Archive("cifar10", "https://example.invalid/x", len(buffer.getvalue()), digest, "cifar-10-batches-bin")
    monkeypatch.setattr(fetch, "ARCHIVES", (row,))
    return file.as_uri()


def test_get_then_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    url = archive(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["data", "get", "cifar10", "--url", url]) == 0
    assert capsys.readouterr().out == "data/cifar10\n"
    assert main(["data", "check", "data/cifar10"]) == 0
    found = blocks(capsys.readouterr().out)
    assert found["classes"] == [[str(i), "5", "1"] for i in range(10)]
    assert dict(found["data"])["form"] == "cifar"
    assert main(["data", "get", "cifar10", "--url", url]) == 2
    assert "data/cifar10 exists" in capsys.readouterr().err
    assert main(["data", "get", "cifar10", "--url", url, "--out", "other"]) == 0
    assert (tmp_path / "other" / "test_batch.bin").is_file()


def test_a_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = archive(tmp_path, monkeypatch)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["data", "get", "cifar10", "--url", url, "--out", str(tmp_path / "x")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'x'}\n"


def test_the_help_says_how_a_file_goes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "get", "--help"])
    assert "--url file:///PATH/cifar-10-python.tar.gz" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["data"], "the following arguments are required: list|check|get"),
        (["data", "chek"], "unknown data action 'chek'; did you mean 'check'"),
        (["data", "check"], "the following arguments are required: NAME|PATH"),
        (["data", "check", "digitz"], "unknown data 'digitz'; did you mean 'digits'"),
        (["data", "check", "cifar10"], "there is no folder cifar10: `s2sam data get cifar10` gets it"),
        (["data", "check", "no/such"], "there is no data at no/such"),
        (["data", "check", "digits", "--labels", "fine"], "unknown option of digits data 'labels'"),
        (["data", "check", "digits", "--labels", "all"], "invalid choice: 'all'"),
        (["data", "get", "imagenet"], "unknown archive 'imagenet'"),
        (
            ["data", "get", "cifar10", "--url", "file:///no/such/file", "--out", "{tmp}/x"],
            "could not be read after 0 bytes",
        ),
        (["data", "get", "cifar10", "--url", "javascript:0", "--out", "{tmp}/x"], "is no address to download from"),
    ],
)
def test_wrong_use_is_a_sentence(
    argv: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([word.format(tmp=tmp_path) for word in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("s2sam: error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert list(tmp_path.iterdir()) == []


def test_listing_loads_no_torch() -> None:
    code = "import sys; from s2sam.cli.main import main; main(['data', 'list']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
