"""Every mistake with a launcher is one sentence and exit code 2, and nothing is trained."""

from __future__ import annotations

import shutil
import sys
import types

import pytest
import yaml

from s2sam.cli.main import main

REFUSES = "#!/bin/sh\necho 'sbatch: error: Batch job submission failed: Invalid job array specification' >&2; exit 1\n"


@pytest.fixture
def table(small, tmp_path, monkeypatch, capsys):
    """`table(*options)` -> exit code and what was printed as an error, by `s2sam table` of the small table."""
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    monkeypatch.chdir(tmp_path)

    def call(*options):
        code = main(["table", "small.yaml", "--out", "out", *options])
        return code, capsys.readouterr().err

    return call


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """`commands(sbatch=TEXT)`: a PATH that holds these commands and a few of the system's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "git"):
        found = shutil.which(name)
        if found:
            (folder / name).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))

    def make(**texts):
        for name, text in texts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    return make


def submitit_or_skip():
    pytest.importorskip("submitit", reason="pip install 's2sam[slurm]'")


def trained(tmp_path):
    return list((tmp_path / "out").glob("runs/*"))


def test_no_slurm_is_refused_instead_of_starting_everything_here(table, commands, tmp_path):
    submitit_or_skip()
    code, error = table("--launcher", "slurm")
    assert (code, error) == (
        2,
        "s2sam: error: --launcher slurm finds no SLURM here: there is no command sbatch; start it where jobs can be "
        "submitted, or leave --launcher out to train on this machine\n",
    )
    assert not (tmp_path / "out").exists()


def test_what_sbatch_refuses_is_told_once(table, commands, tmp_path):
    submitit_or_skip()
    commands(sbatch=REFUSES, srun="#!/bin/sh\n")
    code, error = table("--launcher", "slurm")
    assert (code, error) == (
        2,
        "s2sam: error: the jobs could not be submitted: sbatch: error: Batch job submission failed: Invalid job array "
        "specification; mend the launcher options, or with array_size=100 submit fewer jobs at a time, and run the "
        "same command again\n",
    )
    assert not trained(tmp_path)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("timeoutmin=3", "does not take these launcher options: Parameter 'timeoutmin' need to be prefixed by an"),
        ("slurm_partion=gpu", "Unknown argument 'partion' for executor 'slurm' in parameter 'slurm_partion'"),
        ("timeout_min=soon", 'Parameter "timeout_min" expected type <class \'int\'> (but value: "soon"); it knows'),
        ("slurm_setup=module", "does not take these launcher options"),
        ("timeout_min=[3", "--launcher-option timeout_min takes a value in YAML, not '[3'"),
        ("slurm_time=24:00:00", "slurm_time cannot be given: give timeout_min, in minutes; leave it out"),
        ("slurm_array_parallelism=3", "--jobs says how many run at a time"),
        ("tasks_per_node=2", "a job is one process"),
        ("cluster=slrum", "unknown cluster 'slrum'; did you mean 'slurm'? (one of: slurm, local, debug)"),
        ("array_size=0", "array_size must be a whole number of at least 1, got 0"),
        ("array_size=many", "array_size must be a whole number of at least 1, got 'many'"),
    ],
)
def test_wrong_options_of_submitit_are_a_sentence(option, sentence, table, commands, tmp_path):
    submitit_or_skip()
    commands(sbatch=REFUSES, srun="#!/bin/sh\n")
    code, error = table("--launcher", "slurm", "--launcher-option", option)
    assert code == 2
    assert error.startswith("s2sam: error: ") and sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_launchers_own_options_arrive_with_those_of_submitit(table, commands, tmp_path):
    submitit_or_skip()
    options = ("cluster=debug", "array_size=3", "timeout_min=5")
    code, _ = table("--seeds", "0", "--launcher", "slurm", "--launcher-option", *options)
    assert code == 0
    assert len(trained(tmp_path)) == 2


@pytest.mark.parametrize(("option", "said"), [("num_gpu=1", "num_gpu"), ("num_cpus=many", "num_cpus")])
def test_wrong_options_of_ray_are_a_sentence(option, said, table, tmp_path):
    pytest.importorskip("ray", reason="pip install 's2sam[ray]'")
    code, error = table("--launcher", "ray", "--launcher-option", option)
    assert code == 2
    assert error.startswith("s2sam: error: Ray does not take these launcher options: ") and said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_ray_says_of_an_option_is_the_sentence(table, monkeypatch, tmp_path):
    """As above where Ray is not installed: in its place stands what refuses an option in its words."""

    def remote(num_cpus, max_retries, **unknown):
        raise ValueError(f"Invalid option keyword {', '.join(unknown)} for remote functions.\nValid ones are [...].")

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(remote=remote))
    code, error = table("--launcher", "ray", "--launcher-option", "num_gpu=1")
    assert (code, error) == (
        2,
        "s2sam: error: Ray does not take these launcher options: Invalid option keyword num_gpu for remote functions. "
        "Valid ones are [...].\n",
    )
    assert not (tmp_path / "out").exists()
