"""Finished runs are read, everything else is refused by name."""

from __future__ import annotations

import json

import pytest

from s2sam.report.read import read_run, read_runs


def edit_records(folder, change):
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r) + "\n" for r in change(records)))


def test_a_finished_run_is_read(make_run):
    run = read_run(make_run("rigl", "s2sam", 3, top1=0.75))
    assert (run.seed, run.final["test_top1"], len(run.epochs)) == (3, 0.75, 8)
    assert run.epochs[-1]["epoch"] == 8
    assert run.topology[-1]["density"]["body.fc2"] == 0.08
    assert run.steps[1]["displacement"] == 0.05
    assert run.env["versions"]["torch"] == "2.13.0"


def test_a_folder_of_runs_stands_for_them(make_run):
    first, second = make_run(seed=0), make_run(seed=1)
    assert [run.folder for run in read_runs([first.parent])] == [first, second]
    assert [run.folder for run in read_runs([second, first])] == [second, first]
    with pytest.raises(ValueError, match="no run to report"):
        read_runs([])


def unfinished(folder):
    (folder / "DONE").unlink()


def foreign(folder):
    (folder / "config.yaml").unlink()


def torn(folder):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-40])


def not_records(folder):
    (folder / "metrics.jsonl").write_text("[1, 2]\n")


def no_metrics(folder):
    (folder / "metrics.jsonl").unlink()


def no_final(folder):
    edit_records(folder, lambda records: [r for r in records if r["kind"] != "final"])


def two_finals(folder):
    edit_records(folder, lambda records: [*records, records[-1]])


def final_without_result(folder):
    edit_records(
        folder,
        lambda records: [{k: v for k, v in r.items() if k != "test_top1" or r["kind"] != "final"} for r in records],
    )


def lost_epoch(folder):
    edit_records(folder, lambda records: [r for r in records if r["kind"] != "epoch" or r["epoch"] != 4])


def repeated_epoch(folder):
    edit_records(folder, lambda records: [*records[:-1], records[-2], records[-1]])


def bad_yaml(folder):
    (folder / "config.yaml").write_text("a: [1")


def no_seed(folder):
    (folder / "config.yaml").write_text("lr: 0.1\n")


def binary_environment(folder):
    (folder / "env.json").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (unfinished, "is not a finished run"),
        (foreign, "is not a run folder"),
        (torn, "is torn at line"),
        (not_records, "is torn at line 1"),
        (no_metrics, "metrics.jsonl is missing"),
        (no_final, "0 final records"),
        (two_finals, "2 final records"),
        (final_without_result, "lacks test_top1"),
        (lost_epoch, "epochs 1 to 8 once each"),
        (repeated_epoch, "epochs 1 to 8 once each"),
        (bad_yaml, "damaged file"),
        (no_seed, "holds no seed"),
        (binary_environment, "damaged file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_runs_are_refused_by_name(make_run, damage, sentence):
    folder = make_run("rigl")
    damage(folder)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_run(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_unfinished_run_spoils_the_folder(make_run):
    make_run(seed=0)
    unfinished(make_run(seed=1))
    with pytest.raises(ValueError, match="not a finished run"):
        read_runs([make_run(seed=2).parent])
