"""House rules that no tool checks: files, versions, pins, links, what the core imports, the Makefile's errors."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import s2sam

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "s2sam"
CORE = [SOURCE / name for name in ("tensors.py", "hooks.py", "attach.py", "registry.py", "sam", "sparse", "compact")]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
EXTRAS = {
    *("cli", "timm", "hub", "shards", "tensorboard", "wandb", "trackio", "mlflow", "onnx", "corruptions", "lightning"),
    *("transformers", "ray", "slurm", "structured", "dev", "docs"),
}


def python_files(*places: Path) -> list[Path]:
    return [f for p in places for f in (sorted(p.rglob("*.py")) if p.is_dir() else [p])]


def text_files() -> list[Path]:
    names = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "Makefile", "pyproject.toml", ".ci/run"]
    folders = [ROOT / name for name in ("src", "tests", "benchmarks", "examples", "docs")]
    suffixes = {".py", ".md", ".yaml", ".json", ".html", ".toml"}
    found = [f for folder in folders for f in folder.rglob("*") if f.suffix in suffixes]
    return [ROOT / name for name in names] + found


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """The [project] table of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def package(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower()


def test_versions_agree(project):
    assert s2sam.__version__ == project["version"]
    assert f"version: {s2sam.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_core_needs_torch_and_numpy_and_extras_are_the_agreed_ones(project):
    assert [package(r) for r in project["dependencies"]] == ["torch", "numpy"]
    assert set(project["optional-dependencies"]) == EXTRAS


def test_every_direct_dependency_of_the_two_commands_is_pinned(project):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0].lower() for line in lines if line and not line.startswith("#")}
    extras = project["optional-dependencies"]
    assert {package(r) for r in project["dependencies"] + extras["cli"] + extras["dev"]} <= pins


def test_constraints_pin_exact_versions():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.]+(; python_version >= \"3\.11\")?", line), line


@pytest.mark.parametrize("path", python_files(SOURCE, ROOT / "benchmarks"), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 600  # what a reader wants at once is usually 100 to 500 lines


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("s2sam" if node.level else str(node.module).partition(".")[0])
    return names


@pytest.mark.parametrize("path", python_files(*CORE), ids=lambda p: str(p.relative_to(SOURCE)))
def test_the_core_imports_nothing_else(path):
    assert imported(path) <= set(sys.stdlib_module_names) | {"torch", "numpy", "s2sam"}


def test_global_seeds_are_set_in_one_place_only():
    seeders = re.compile(r"torch\.(cuda\.)?manual_seed|np\.random\.seed|(?<![.\w])random\.seed\(")
    guilty = [
        p.name for p in python_files(SOURCE, ROOT / "examples", ROOT / "benchmarks") if seeders.search(p.read_text())
    ]
    assert set(guilty) <= {"seeding.py"}


def test_nothing_speaks_of_one_machine():
    paths = re.compile(r"(?<![\w.])/(home|root|Users|work|mnt)/\w")
    guilty = [str(f.relative_to(ROOT)) for f in text_files() if f != Path(__file__) and paths.search(f.read_text())]
    assert guilty == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert [link for link in links(page) if not (page.parent / link).exists()] == []


def links(page: Path) -> list[str]:
    """The files that a page links to, in text and in reference definitions; not what stands in a block of code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) + re.findall(r"^\[[^\]]+\]: ([^#\s]+)", text, re.MULTILINE)
    return [link for link in found if "://" not in link and not link.startswith("mailto:")]


def test_links_are_looked_at(tmp_path):
    assert {p.name for p in PAGES} >= {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data.md", "rigl.md"}
    assert "CONTRIBUTING.md" in links(ROOT / "README.md")
    page = tmp_path / "page.md"
    page.write_text("[a](b.md#c) [d](#e) [f](https://g)\n[h]: i.md\n```\nx[0](y)\n```\n")
    assert links(page) == ["b.md", "i.md"]


def test_the_readme_names_the_five_files_and_both_commands():
    text = (ROOT / "README.md").read_text()
    for name in ("hooks.py", "sam/single_step.py", "sam/reference.py", "sparse/base.py", "sparse/methods/rigl.py"):
        assert f"(src/s2sam/{name})" in text
    assert "make demo" in text
    assert "make test" in text


def test_the_licence_is_whole(project):
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project["license"] == "Apache-2.0"


def test_ci_is_executable_and_stops_at_the_first_failure():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    text = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in text
    assert text.index("make test") < text.index("make check")


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *args], cwd=ROOT, capture_output=True, text=True, timeout=60)


@needs_make
def test_make_help_names_every_target():
    text = make("help").stdout
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE).group(1).split()
    for target in phony:
        assert f"make {target} " in text
    assert make().stdout == text


@needs_make
@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("exit 1", "is missing or older than 3.10"),
        ('case "$2" in *venv*) exit 1;; esac', "apt install python3-venv"),
    ],
)
def test_an_unfit_python_gets_one_clear_sentence(script, sentence, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    result = make("test", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert result.returncode != 0
    assert sentence in result.stderr
    assert not (tmp_path / "venv").exists()


@needs_make
def test_another_torch_is_not_pinned_back():
    commands = make("-n", "test", "TORCH=torch==2.11.0", "VENV=no-such-folder").stdout
    assert "'torch==2.11.0'" in commands
    assert "-c constraints.txt" not in commands  # the pins used name the torch that was found


@needs_make
def test_nothing_is_installed_twice(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    for stamp in (".torch", ".pins.txt", ".cli", ".dev"):
        (venv / stamp).touch()
    commands = make("-n", "test", f"VENV={venv}").stdout
    assert "pip" not in commands
    assert "-m pytest -q" in commands
