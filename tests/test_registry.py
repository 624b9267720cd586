"""The registry: rows that load, names that are suggested, and a listing that needs no torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from s2sam import registry
from s2sam.registry import MethodInfo, find, list_data, list_methods, list_models, list_recipes
from s2sam.sparse.base import Sparsifier


def test_methods():
    rows = list_methods()
    assert {"static", "magnitude", "set", "rigl"} <= {row.name for row in rows}
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert issubclass(row.load(), Sparsifier)
        assert row.kind in ("static", "dynamic", "structured", "iterative")


def test_models_and_data_load():
    for rows in (list_models(), list_data()):
        assert rows
        assert all(callable(row.load()) for row in rows)


def test_recipes_exist_and_are_described():
    for row in list_recipes():
        assert row.path.endswith(f"{row.name}.yaml")
        assert row.description


def test_every_method_has_a_recipe():
    text = "\n".join(Path(row.path).read_text() for row in list_recipes())
    used = set(re.findall(r"^method: (\S+)", text, re.MULTILINE))
    alone = {"magnitude"}  # prunes trained weights, which no recipe can bring along
    assert {row.name for row in list_methods()} - used == alone


def test_find_names_the_nearest():
    assert find(list_methods(), "set", "method").name == "set"
    with pytest.raises(
        ValueError, match=r"unknown method 'RigL'; did you mean 'rigl'\? \(one of: static, magnitude, set, rigl"
    ):
        find(list_methods(), "RigL", "method")
    with pytest.raises(ValueError, match="unknown thing 'x'$"):
        find((), "x", "thing")


def test_rows_are_frozen_and_hashable():
    row = list_methods()[0]
    with pytest.raises(AttributeError):
        row.name = "other"
    assert isinstance(hash(MethodInfo("a", "b:c", "", "static", {"x": 1})), int)


def test_listing_methods_loads_no_torch():
    listing = "import sys, s2sam.registry as r; r.list_methods(); r.list_recipes(); "
    code = listing + "print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"


def test_descriptions_come_from_the_first_comment_line(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text("# Dense SGD on digits.\nepochs: 3\n")
    assert registry._description(file) == "Dense SGD on digits."
    file.write_text("epochs: 3\n")
    assert registry._description(file) == ""
