"""Run folders that are damaged: `s2sam report` makes its page, or refuses with one sentence and writes nothing."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import yaml

from s2sam.report.read import read_run

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutations import changed, damaged, ends_well


def another(whole: bytes, name: str, draw: random.Random) -> bytes:
    """The content of a file of a run, damaged."""
    if draw.random() < 0.2:
        return damaged(whole, draw)
    if name == "config.yaml":
        return yaml.safe_dump(changed(yaml.safe_load(whole), draw), sort_keys=False).encode()
    if name == "env.json":
        return json.dumps(changed(json.loads(whole), draw)).encode()
    lines = whole.decode().splitlines()
    others = [i for i, line in enumerate(lines) if '"kind": "step"' not in line]
    at = draw.choice(others) if draw.random() < 0.7 else draw.randrange(len(lines))
    lines[at] = json.dumps(changed(json.loads(lines[at]), draw))
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize("name", ["config.yaml", "env.json", "metrics.jsonl"])
@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_run(make_run, tmp_path, capsys, name, seed):
    draw, folder, out = random.Random(f"{name}{seed}"), make_run("rigl", "s2sam", epochs=2), tmp_path / "out"
    whole = (folder / name).read_bytes()
    refused = 0
    for _ in range(12 if name == "metrics.jsonl" else 6):
        (folder / name).write_bytes(another(whole, name, draw))
        made = ends_well(capsys, "report", folder, "--out", out / "page.html")
        refused += not made
        assert out.exists() == made
        if made:
            (out / "page.html").unlink()
            out.rmdir()
    assert refused or name == "env.json"


@pytest.mark.parametrize("name", ["config.yaml", "env.json", "metrics.jsonl"])
def test_a_damaged_file_is_named(make_run, name):
    """Many more, without drawing the page of what is whole."""
    draw, folder = random.Random(name), make_run("rigl", "s2sam", epochs=2)
    whole = (folder / name).read_bytes()
    for _ in range(150):
        (folder / name).write_bytes(another(whole, name, draw))
        sentence = ""
        try:
            read_run(folder)
        except ValueError as error:  # anything else fails the test
            sentence = str(error)
        assert not sentence or (str(folder) in sentence and "\n" not in sentence)


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("topology", {"density": {}}, "do not tell of the same layers"),
        ("topology", {"survival": None}, "survival is None"),
        ("topology", {"density": {"body.fc1": 1.5}}, "density.body.fc1 is 1.5"),
        ("epoch", {"test_top1": "0.9"}, "test_top1 is '0.9'"),
        ("epoch", {"step": -1}, "step is -1"),
        ("epoch", {"train_loss": 10**400}, "is none that was measured"),
        ("final", {"test_images": 0}, "test_images is 0"),
        ("step", {"displacement": [1]}, "displacement is [1]"),
    ],
    ids=str,
)
def test_records_that_no_run_writes(make_run, tmp_path, capsys, kind, change, sentence):
    folder = make_run("rigl", "s2sam")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    at = next(i for i, record in enumerate(records) if record["kind"] == kind)
    records[at] |= change
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    from s2sam.cli.main import main

    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    said = capsys.readouterr().err
    assert str(folder) in said
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
