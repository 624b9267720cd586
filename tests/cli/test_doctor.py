"""`s2sam doctor`: it tells what is there, and names the command for what is not."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from s2sam.cli import doctor
from s2sam.cli.main import main
from s2sam.train import precision

REQUIRES = [
    "numpy", "torch>=2.11", "rich; extra == 'cli'", "Pillow>=9; extra == 'cli'", "no-such-package; extra == 'strange'",
    "jsonargparse[signatures]>=4.49; (python_version > '3') and extra == \"cli\"",
]  # fmt: skip


def lines(monkeypatch, capsys, requires=REQUIRES):
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    code = main(["doctor"])
    found = capsys.readouterr().out.splitlines()
    return code, {line.split()[0]: " ".join(line.split()[1:]) for line in found if line}


def test_versions_devices_and_extras(monkeypatch, capsys):
    code, found = lines(monkeypatch, capsys)
    assert code == 0
    assert f"Python {platform.python_version()}" in found["s2sam"]
    assert found["torch"] == torch.__version__
    assert found["cli"] == "complete"
    assert found["strange"] == "not installed (no-such-package missing); pip install 's2sam[strange]'"
    assert "trains in fp32, bf16" in found["cpu"]
    assert f"torch uses {torch.get_num_threads()} threads" in found["cpu"]
    assert torch.cuda.is_available() == ("cuda:0" in found)


def test_what_every_use_needs_is_missed(monkeypatch, capsys):
    code, found = lines(monkeypatch, capsys, ["torch-that-is-not-there"])
    assert code == 1
    assert found["torch-that-is-not-there"] == "MISSING: pip install torch-that-is-not-there"


def test_a_precision_that_fails_is_not_promised(monkeypatch, capsys):
    def cannot(device, dtype):
        if dtype == torch.float16:
            raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(precision, "_probe", cannot)
    assert lines(monkeypatch, capsys)[1]["cpu"].endswith("trains in fp32, bf16")


def test_a_torchvision_that_does_not_load_is_no_alarm(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert doctor._torchvision().startswith("does not fit this torch (operator torchvision::nms does not exist); s2sam")
