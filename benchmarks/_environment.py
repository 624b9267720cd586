"""What a measurement ran on: versions, hardware, command. No host names, no paths of this machine."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import torch

import s2sam

ROOT = Path(__file__).resolve().parent.parent


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and the command, as plain data."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {
            "s2sam": s2sam.__version__,
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "python": platform.python_version(),
        },
        "hardware": {
            "device": device.type,
            "gpu": gpu,
            "cuda": torch.version.cuda if gpu else None,
            "cpu": _cpu(),
            "logical_cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def slug(device: torch.device) -> str:
    """Short name of the hardware for a file name.

    >>> slug(torch.device("cpu")).startswith("cpu-")
    True
    """
    text = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{_cpu()}-{torch.get_num_threads()}t"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def rounded(value: Any) -> Any:
    """Five significant digits are more than a clock has.

    >>> rounded({"seconds": [0.123456789, 2]})
    {'seconds': [0.12346, 2]}
    """
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def write_result(result: dict[str, Any], out: Path | None, kind: str, device: torch.device) -> Path:
    """Write a result, rounded, to `out` or else to results/KIND_HARDWARE.json; returns the path."""
    path = out or ROOT / "benchmarks" / "results" / f"{kind}_{slug(device)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(result), indent=2) + "\n")
    return path


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit measured, with a + if the library, the benchmarks or both differ from it; None outside a checkout."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
