"""`s2sam doctor`: what is installed, what is missing and how to get it, what the devices can do."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata

from s2sam import __version__
from s2sam.cli.arguments import Parser

HELP = "versions, devices, missing extras and what to install"
IMPORTED_AS = {
    "imagecorruptions-imaug": "imagecorruptions",
    "import-linter": "importlinter",
    "mlflow-skinny": "mlflow",
    "pillow": "PIL",
    "pytest-xdist": "xdist",
    "scikit-learn": "sklearn",
}


def run(argv: list[str]) -> int:
    """Print the findings.

    Returns:
        0; 1 if something that every use needs does not work.
    """
    Parser(prog="s2sam doctor", description=HELP, allow_abbrev=False).parse_args(argv)
    print(f"s2sam {__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    core = packages("")
    for name, version in core.items():
        print(f"{name:<13} {version or 'MISSING: pip install ' + name}")
    print()
    for line in extras():
        print(line)
    print()
    if core.get("torch") is None:
        return 1
    try:
        for line in devices():
            print(line)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torch does not load ({error}); install it again: pip install --force-reinstall torch")
        return 1
    return 0


def requirements() -> dict[str, list[str]]:
    """What the distribution asks for, by extra; "" = always."""
    found: dict[str, list[str]] = {"": []}
    for line in metadata.requires("s2sam") or []:
        name = re.split(r"[^\w.-]", line)[0]
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        found.setdefault(extra.group(1) if extra else "", []).append(name)
    return found


def packages(extra: str) -> dict[str, str | None]:
    """Name -> version of what an extra needs; None if it is not there or has no code."""
    return {name: _version(name) for name in sorted(requirements().get(extra, []))}


def extras() -> Iterator[str]:
    """A line for each extra: complete, or what to install for it."""
    for extra in sorted(set(requirements()) - {""}, key=lambda name: (name != "cli", name)):
        missing = [name for name, version in packages(extra).items() if version is None]
        if missing:
            yield f"{extra:<13} not installed ({', '.join(missing)} missing); pip install 's2sam[{extra}]'"
        else:
            yield f"{extra:<13} complete"


def devices() -> Iterator[str]:
    """Lines about CPU and GPUs, with the precisions in which they train."""
    import torch

    from s2sam.train.environment import environment
    from s2sam.train.precision import DTYPES, check_precision

    def precisions(device: torch.device) -> str:
        found = ["fp32"]
        for name in DTYPES:
            try:
                check_precision(device, name)
            except ValueError:
                continue
            found.append(name)
        return ", ".join(found)

    cpu = torch.device("cpu")
    hardware = environment(cpu)["hardware"]
    threads = f"torch uses {hardware['threads']} threads"
    if hardware["threads"] > (os.cpu_count() or 1):
        threads += ", more than there are cores: set OMP_NUM_THREADS"
    yield f"{'cpu':<13} {hardware['cpu']}, {hardware['cores']} cores, {threads}; trains in {precisions(cpu)}"
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        name = torch.cuda.get_device_name(device)
        yield f"{f'cuda:{index}':<13} {name}, {memory:.0f} GiB; trains in {precisions(device)}"
    if not torch.cuda.is_available():
        yield f"{'cuda':<13} {_why_no_cuda(torch.version.cuda)}"
    if _version("torchvision") is not None:
        yield f"{'torchvision':<13} {_torchvision()}"


def _why_no_cuda(built_for: str | None) -> str:
    if built_for is None:
        return "this torch was built without CUDA; see https://pytorch.org for one with it, if there is a GPU"
    return f"no device found, though torch was built for CUDA {built_for}; does nvidia-smi see one?"


def _torchvision() -> str:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        return f"does not fit this torch ({str(error).splitlines()[0]}); s2sam never needs it, other packages may"
    return "loads; s2sam never needs it"


def _version(name: str) -> str | None:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
    module = IMPORTED_AS.get(name.lower(), name.replace("-", "_"))
    return version if importlib.util.find_spec(module) is not None else None
