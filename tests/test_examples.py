"""The examples a reader copies do run, and do what they say."""

import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent


def test_minimal_trains_a_sparse_network_at_the_displaced_point():
    program = [sys.executable, str(ROOT / "examples" / "minimal.py")]
    out = subprocess.run(program, capture_output=True, text=True, check=True, timeout=110).stdout
    numbers = {name: float(n) for name, n in re.findall(r"^(\w[\w ]*?)\s{2,}([\d.]+)", out, re.MULTILINE)}
    assert numbers["test accuracy"] > 0.9
    assert numbers["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert numbers["displacement"] == pytest.approx(0.05, rel=1e-2)
    assert numbers["topology updates"] > 5


@pytest.fixture(scope="module")
def own_checkpoint(tmp_path_factory):
    """The bytes of a checkpoint of that program."""
    path = tmp_path_factory.mktemp("own") / "own.pt"
    runpy.run_path(str(ROOT / "examples" / "own_loop_resume.py"))["main"](["--checkpoint", str(path)])
    return path.read_bytes()


def test_a_loop_of_ones_own_resumes_bit_by_bit(tmp_path, capsys):
    path = ROOT / "examples" / "own_loop_resume.py"
    checkpoint = tmp_path / "own.pt"
    command = [sys.executable, str(path), "--checkpoint", str(checkpoint), "--die-at", "33"]
    killed = subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(checkpoint, weights_only=True)["step"] == 30
    example = runpy.run_path(str(path))
    example["main"](["--checkpoint", str(checkpoint)])
    resumed = capsys.readouterr().out.splitlines()
    assert resumed.pop(0) == "going on after step 30"
    example["main"](["--checkpoint", str(tmp_path / "whole.pt")])
    assert capsys.readouterr().out.splitlines() == resumed
    assert resumed[:3] == ["steps     60", "sparsity  0.9000", "updates   8"]
    a, b = (torch.load(p, weights_only=True) for p in (checkpoint, tmp_path / "whole.pt"))
    for key in ("s2sam_buffer", "momentum_buffer"):
        for left, right in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True):
            assert torch.equal(left[key], right[key])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path, saved: path.write_bytes(path.read_bytes()[:-500]), r"is torn or of another program \("),
        (lambda path, saved: path.write_text(""), r"is torn or of another program \("),
        (lambda path, saved: torch.save(torch.ones(2), path), "it holds no step"),
        (lambda path, saved: torch.save(saved | {"step": "ten"}, path), "it holds no step"),
        (lambda path, saved: saved.pop("sparsifier") and torch.save(saved, path), "it holds no sparsifier"),
        (lambda path, saved: torch.save(saved | {"model": {}}, path), "Missing key"),
        (lambda path, saved: torch.save(saved | {"schedule": 5}, path), r"is torn or of another program \("),
        (lambda path, saved: saved["model"]["0.weight"].fill_(1) is not None and torch.save(saved, path), "do not fit"),
    ],
    ids=["torn", "empty", "foreign", "step", "incomplete", "model", "schedule", "masks"],
)
def test_a_loop_of_ones_own_refuses_what_it_cannot_read(tmp_path, capsys, own_checkpoint, spoil, reason):
    path = tmp_path / "own.pt"
    path.write_bytes(own_checkpoint)
    spoil(path, torch.load(path, weights_only=True))
    before = path.read_bytes()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / "own_loop_resume.py"))["main"](["--checkpoint", str(path)])
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "")
    assert err.startswith(str(path)) and err.endswith("; delete it to start\n") and err.count("\n") == 1
    assert re.search(reason, err)
    assert path.read_bytes() == before


def test_the_readme_loop_runs_as_printed(make_generator):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    generator = make_generator(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))
    before = [p.detach().clone() for p in model.parameters()]
    loader = [
        (torch.randn(8, 1, 4, 4, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(5)
    ]
    seen: list[float] = []
    names = {"model": model, "loader": loader, "T": 5}
    weight = model[1].weight
    model[1].register_forward_pre_hook(lambda *_: seen.append(float(weight.detach().norm())))
    exec(compile(blocks[0], "README.md", "exec"), names)
    assert names["sparsifier"].sparsity() == pytest.approx(0.9, abs=0.01)
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    sam = names["sam"]
    clean = [p.detach().clone() for p in model.parameters()]
    sam.displace()
    moved = torch.stack([(p.detach() - w).norm() for p, w in zip(model.parameters(), clean, strict=True)]).norm()
    assert float(moved) == pytest.approx(0.05, rel=1e-3)
    assert float((weight == 0).float().mean()) >= 0.8
    assert len(seen) == 5
