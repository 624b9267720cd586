"""`s2sam list` and `s2sam config`: tables for people and for programs, whole-run YAML."""

from __future__ import annotations

import sys

import pytest
import yaml

from s2sam import registry
from s2sam.cli.main import main
from s2sam.train.config import TrainConfig
from s2sam.train.config_files import load_config


def test_lists_are_the_registries(capsys):
    assert main(["list"]) == 0
    blocks = capsys.readouterr().out.split("# ")[1:]
    found = {b.splitlines()[0]: [line.split("\t")[0] for line in b.splitlines()[2:]] for b in blocks}
    assert found == {
        "methods": ["dense", *(r.name for r in registry.list_methods())],
        "models": [r.name for r in registry.list_models()],
        "data": [r.name for r in registry.list_data()],
        "recipes": [r.name for r in registry.list_recipes()],
        "tables": ["1", "2", "3", "4", "5", "6", "A.1"],
    }


def test_options_of_methods_are_listed_with_defaults(capsys):
    main(["list", "methods"])
    rigl = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("rigl"))
    assert {"drop_fraction=0.3", "delta_t=100", "t_end=0.75", "regrow_dropped=true"} <= set(rigl.split("\t")[2].split())


def test_a_terminal_gets_a_table(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["list", "recipes"]) == 0
    out = capsys.readouterr().out
    assert "\t" not in out
    assert "cifar10-resnet32-rigl90-s2sam" in out


@pytest.mark.parametrize("name", [r.name for r in registry.list_recipes()])
def test_show_prints_the_whole_run(name, capsys, tmp_path):
    assert main(["config", "show", name]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# ")
    assert set(yaml.safe_load(text)) == set(TrainConfig().as_dict())
    path = tmp_path / "shown.yaml"
    path.write_text(text)
    assert load_config(path) == load_config(name)


def test_cp_writes_a_file_once(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    assert main(["config", "cp", "digits", str(path)]) == 0
    assert load_config(path) == TrainConfig()
    path.write_text("mine now\n")
    assert main(["config", "cp", "digits", str(path)]) == 2
    assert path.read_text() == "mine now\n"
    assert main(["config", "cp", "digits", str(tmp_path)]) == 0
    assert (tmp_path / "digits.yaml").exists()


def test_config_list(capsys):
    assert main(["config", "list"]) == 0
    assert "\ndigits\t" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["list", "methds"], "unknown list 'methds'; did you mean 'methods'"),
        (["list", "methods", "models"], "unrecognized arguments: models"),
        (["config"], "the following arguments are required"),
        (["config", "shw", "digits"], "did you mean 'show'"),
        (["config", "show"], "use `s2sam config list`"),
        (["config", "show", "digitz"], "unknown recipe 'digitz'; did you mean 'digits'"),
        (["config", "cp", "digits"], "use `s2sam config list`"),
        (["config", "list", "digits"], "use `s2sam config list`"),
        (["config", "cp", "digits", "no/such/folder/x.yaml"], "No such file or directory"),
    ],
)
def test_wrong_use_is_a_sentence(argv, sentence, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("s2sam: error: ")
    assert err.count("\n") == 1
    assert sentence in err


def test_brackets_in_a_cell_are_shown_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from s2sam.cli.list import show

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    show("a title", ["name"], [["pip install s2sam[cli]"]])
    assert "s2sam[cli]" in capsys.readouterr().out
