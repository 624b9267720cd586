"""A run that is killed before any of its file operations starts again by the same command and ends at the same bits."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from s2sam.train.checkpoint import load_checkpoint
from s2sam.train.config import DataConfig, SparseConfig, TrainConfig
from s2sam.train.folder import RunFolder

sys.path.insert(0, str(Path(__file__).parent))
from forked import forked, killed, run, same, warm_up

TINY = TrainConfig(
    epochs=1, batch_size=32, sparse=SparseConfig(options={"delta_t": 1}),
    data_options=DataConfig(train_size=64), model_options={"width": 0.125},
)  # fmt: skip
pytestmark = pytest.mark.timeout(400)  # on a machine that does much else
KILLED = 99
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
TIMES = {"seconds", "images_per_second", "step_seconds"}


def dies_at(number: int, work) -> int:
    """Run `work` in a child that ends, without any cleaning up, before its `number`-th change of a file; exit code."""

    def watched():
        count = 0

        def hook(event, args):
            nonlocal count
            if event in CHANGES or (event == "open" and (args[2] or 0) & WRITING and isinstance(args[0], str)):
                count += 1
                if count == number:
                    os._exit(KILLED)

        sys.addaudithook(hook)
        work()

    return forked(watched)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of the undisturbed run."""
    config = dataclasses.replace(TINY, out=str(tmp_path_factory.mktemp("whole") / "run"))
    warm_up(config)
    return config.folder


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in (".lock", "notes.txt")
    }


def records(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_same(folder, whole):
    """All that the undisturbed run left is there and equal, times aside, and nothing else."""
    assert RunFolder(folder).done
    a, b = contents(whole), contents(folder)
    assert a.keys() == b.keys()
    for name in ("model.safetensors", "masks.safetensors"):
        assert a[name] == b[name]
    assert records(folder) == records(whole)
    for name in ("last.pt", "best.pt"):
        one, other = (load_checkpoint(path / "checkpoints" / name) for path in (whole, folder))
        for key in ("epoch", "step", "model", "optimizer", "sparsifier", "batches", "best", "data_digest"):
            assert same(one[key], other[key]), key


def again(config, **options) -> None:
    """The command once more: it ends well, or a run that had just finished is refused as one."""
    if RunFolder(config.folder).done and not options.get("overwrite"):
        with pytest.raises(ValueError, match="holds a finished run"):
            run(config, **options)
    else:
        assert forked(lambda: run(config, **options)) == 0


def every_event(work, check, *, least: int, before=lambda number: None) -> None:
    """Kill `work(n)` at its first, second, ... change of a file until it ends by itself; `check(n)` after each kill."""
    for number in itertools.count(1):
        before(number)
        code = dies_at(number, lambda n=number: work(n))
        if code != KILLED:
            break
        check(number)
    assert code == 0
    assert number > least


def test_a_start(tmp_path, whole):
    ways = ({}, {"overwrite": True}, {"resume": "never"})  # each of these must find its way

    def config(number):
        return dataclasses.replace(TINY, out=str(tmp_path / f"run{number}"))

    def check(number):
        again(config(number), **ways[number % 3])
        assert_same(config(number).folder, whole)
        shutil.rmtree(config(number).folder)

    every_event(lambda number: run(config(number)), check, least=30)


def test_an_overwrite(tmp_path, whole):
    finished = dataclasses.replace(TINY, seed=1, out=str(tmp_path / "finished"))
    run(finished)
    (finished.folder / "notes.txt").write_text("of a user")
    before = contents(finished.folder)

    def config(number):
        return dataclasses.replace(TINY, out=str(tmp_path / f"run{number}"))

    def check(number):
        folder = config(number).folder
        if RunFolder(folder).done:  # at its end it is the new run's
            assert contents(folder) == before or records(folder) == records(whole)
        again(config(number), overwrite=True)
        assert_same(folder, whole)
        assert (folder / "notes.txt").read_text() == "of a user"
        shutil.rmtree(folder)

    every_event(
        lambda number: run(config(number), overwrite=True), check, least=40,
        before=lambda number: shutil.copytree(finished.folder, config(number).folder),
    )  # fmt: skip


def test_going_on_with_another_run(tmp_path):
    longer = dataclasses.replace(TINY, epochs=2)
    source = dataclasses.replace(longer, out=str(tmp_path / "source"))
    run(dataclasses.replace(longer, out=str(tmp_path / "whole")))
    assert killed(source, 4) == -signal.SIGKILL
    before, refused = contents(source.folder), []

    def config(number):
        return dataclasses.replace(longer, out=str(tmp_path / f"run{number}"))

    def go_on(number):
        run(config(number), resume=str(source.folder))

    def check(number):
        folder = config(number).folder
        own = (
            contents(folder).get("checkpoints/last.pt", before["checkpoints/last.pt"]) != before["checkpoints/last.pt"]
        )
        if own and not RunFolder(folder).done:
            with pytest.raises(ValueError, match=r"unfinished run of its own; go on with that one \(--resume auto\)"):
                go_on(number)
            refused.append(number)
        again(config(number), **({} if own else {"resume": str(source.folder)}))
        assert_same(folder, tmp_path / "whole")
        assert contents(source.folder) == before
        shutil.rmtree(folder)

    every_event(go_on, check, least=40)
    assert refused == list(range(refused[0], refused[0] + len(refused)))  # from its first own checkpoint on
