"""What a run ran on: versions, hardware, commit. Measured, for `env.json`."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import s2sam

PACKAGES = ("torch", "numpy", "jsonargparse", "rich", "safetensors", "scikit-learn", "pyarrow", "Pillow", "matplotlib")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and the git commit of the code, as plain values."""
    return {
        "versions": {"python": platform.python_version(), "s2sam": s2sam.__version__} | _versions(),
        "hardware": {
            "device": device.type,
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "platform": platform.platform(terse=True),
        },
        "git_commit": _commit(Path(__file__).parent),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In which way a run that goes on will not be bit by bit the unbroken one; empty if nothing is known against it.

    >>> differences({"hardware": {"threads": 2}}, {"hardware": {"threads": 1}})
    ['threads were 2 and are 1 now: from here on the run is not bit by bit the unbroken one']
    """
    told = []
    for group, key, verb in (
        ("hardware", "threads", "were"),
        ("hardware", "cpu", "was"),
        ("hardware", "gpu", "was"),
        ("versions", "torch", "was"),
    ):
        old, new = (dict(env.get(group) or {}).get(key) for env in (before, now))
        if old is not None and new is not None and old != new:
            told.append(f"{key} {verb} {old} and {'are' if verb == 'were' else 'is'} {new} now")
    return [f"{', '.join(told)}: from here on the run is not bit by bit the unbroken one"] if told else []


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit(folder: Path) -> str | None:
    """The commit this code is from, marked if the tree has changes; None if git does not track it."""
    commands = (
        ["ls-files", "--error-unmatch", Path(__file__).name],
        ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
    )
    try:
        for command in commands:
            done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
