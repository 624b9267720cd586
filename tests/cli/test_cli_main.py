"""The command itself: help, verbs, exit codes, and which errors are sentences."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from s2sam import __version__
from s2sam.cli import main as cli
from s2sam.cli.main import VERBS, main


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"s2sam {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_follows_the_protocol(verb):
    module = importlib.import_module(f"s2sam.cli.{verb}")
    assert isinstance(module.HELP, str)
    assert "\n" not in module.HELP
    assert callable(module.run)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"usage: s2sam {verb}" in capsys.readouterr().out


#: an option of each verb, what comes before it, and a slip of the fingers
TYPOS = {
    "train": ([], "--epochs", "--epocsh"), "eval": (["run"], "--split", "--splt"), "list": ([], "--help", "--hlep"),
    "data": (["get", "cifar10"], "--url", "--urll"), "config": (["list"], "--help", "--hepl"),
    "report": (["run"], "--surfaces", "--surface"), "surface": ([], "--points", "--pionts=5"),
    "sharpness": (["run"], "--eigenvalues", "--eigenvalue"), "robust": (["run"], "--severities", "--severity"),
    "bound": (["run"], "--examples", "--exampels"), "theory": (["check"], "--momentum", "--momentun"),
    "demo": ([], "--epochs", "--epoch"),
    "table": (["name"], "--budget", "--bugdet"), "doctor": ([], "--help", "--halp"),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_typo_in_an_option_names_the_nearest(verb, capsys):
    before, option, typo = TYPOS[verb]
    assert main([verb, *before, typo, "5"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("s2sam: error: ") and error.count("\n") == 1
    assert typo.partition("=")[0].lstrip("-") in error
    assert re.search(rf"did you mean '?(--)?{option.lstrip('-')}\b", error)


def test_what_is_no_option_has_no_nearest(capsys):
    for argv, sentence in (
        (["report", "run", "--zzzzzz"], "there is no option --zzzzzz (see `s2sam report --help`)"),
        (["data", "check", "digits", "more"], "unrecognized arguments: more (see `s2sam data check --help`)"),
        (["eval", "run", "-7"], "there is no option -7 (see `s2sam eval --help`)"),
    ):
        assert main(argv) == 2
        assert capsys.readouterr().err == f"s2sam: error: {sentence}\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["list"],
        ["list", "models"],
        ["config", "show", "digits"],
        ["theory"],
        ["theory", "check", "--help"],
        ["train", "--help"],
        ["train", "--print-config"],
    ],
    ids=" ".join,
)
def test_help_and_lists_load_no_torch(argv):
    code = f"""
import sys
from s2sam.cli.main import main
try:
    code = main({argv!r})
except SystemExit as end:
    code = end.code
assert code == 0, code
heavy = [m for m in ("torch", "matplotlib", "sklearn", "pyarrow", "PIL") if m in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def verb(monkeypatch):
    """Makes `s2sam train` run a given function."""

    def replace(function):
        module = type(sys)("s2sam.cli.fake")
        module.HELP, module.run = "fake", function
        monkeypatch.setattr(cli, "load", lambda name: module)

    return replace


def test_faults_of_the_program_keep_their_traceback(verb, monkeypatch):
    monkeypatch.delenv("S2SAM_DEBUG", raising=False)
    for fault in (lambda argv: int("x"), lambda argv: [][0], lambda argv: len(3)):
        verb(fault)
        with pytest.raises((ValueError, IndexError, TypeError)):
            main(["train"])


def test_debug_shows_all_tracebacks(monkeypatch):
    monkeypatch.setenv("S2SAM_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown verb"):
        main(["trian"])


def test_files_are_the_users_matter(verb, capsys):
    verb(lambda argv: Path("no/such/file").read_text())
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "s2sam: error: no/such/file: No such file or directory\n"


def test_missing_package_is_named(verb, capsys):
    verb(lambda argv: importlib.import_module("package_that_is_not_there"))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (
        "s2sam: error: this needs the package package_that_is_not_there; pip install 's2sam[cli]'\n"
    )


def test_interruption_is_130(verb, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    verb(interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "s2sam: interrupted\n"


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m s2sam list | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "# methods\n"
    assert "Traceback" not in done.stderr
