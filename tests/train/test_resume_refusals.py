"""What a run refuses to go on from, who may write where, and what a full disk leaves: one sentence each."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from s2sam.cli.main import sentence
from s2sam.track.files import FileLogger
from s2sam.train.atomic import atomic, write_text
from s2sam.train.checkpoint import load_checkpoint, save_checkpoint
from s2sam.train.config import DataConfig, SamConfig, SparseConfig, TrainConfig
from s2sam.train.environment import differences
from s2sam.train.folder import RunFolder
from s2sam.train.lock import LOCK, hold
from s2sam.train.resume import find_resume

sys.path.insert(0, str(Path(__file__).parent))
from forked import forked, killed, run, same, warm_up

TINY = TrainConfig(
    epochs=2,
    batch_size=32,
    checkpoint_every=2,
    data_options=DataConfig(train_size=128),
    model_options={"width": 0.125},
    sparse=SparseConfig(options={"delta_t": 2}),
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was killed after its 6th step, and its configuration."""
    folder = tmp_path_factory.mktemp("stopped")
    warm_up(dataclasses.replace(TINY, out=str(folder / "warm")))
    config = dataclasses.replace(TINY, out=str(folder / "run"))
    assert killed(config, 7) == -signal.SIGKILL
    return folder / "run"


@pytest.fixture
def unfinished(stopped, tmp_path):
    """A copy of it to be spoiled."""
    shutil.copytree(stopped, tmp_path / "run")
    return dataclasses.replace(TINY, out=str(tmp_path / "run"))


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(config, sentence, **options):
    """run() raises one sentence that holds `sentence`, and the folder stays as it was."""
    before = contents(config.folder)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run(config, **options)
    assert "\n" not in str(error.value)
    assert sentence in str(error.value)
    assert contents(config.folder) == before
    return str(error.value)


def test_other_settings_are_named(unfinished):
    other = dataclasses.replace(unfinished, lr=0.2, sam=SamConfig(scale="relative"))
    text = refused(other, "is of a run with other settings: ")
    assert "lr is 0.1 there and 0.2 here" in text
    assert "sam.scale is 'norm' there and 'relative' here" in text
    assert "add --resume never to train anew" in text
    run(other, resume="never")
    assert RunFolder(other.folder).done


def test_many_differences_are_counted(unfinished):
    other = dataclasses.replace(unfinished, lr=0.2, rho=0.1, seed=3, epochs=3, sparsity=0.5)
    assert "; and 2 more; " in refused(other, "other settings")


def test_where_and_how_often_is_saved_may_differ(unfinished):
    elsewhere = dataclasses.replace(unfinished, checkpoint_every=5)
    found = find_resume(RunFolder(elsewhere.folder), elsewhere, "auto")
    assert found.saved["step"] == 6
    assert found.path.name == "last.pt"


def test_a_setting_that_the_checkpoint_does_not_know_is_its_default(unfinished):
    path = unfinished.folder / "checkpoints" / "last.pt"
    saved = torch.load(path, weights_only=True)
    del saved["config"]["optim"]["ema"]
    save_checkpoint(path, saved)
    folder = RunFolder(unfinished.folder)
    assert find_resume(folder, unfinished, "auto").saved["step"] == 6
    averaged = dataclasses.replace(unfinished, optim=dataclasses.replace(unfinished.optim, ema=0.9))
    refused(averaged, "optim.ema is 0.0 there and 0.9 here")


def test_a_torn_last_checkpoint_is_passed_over(unfinished, capsys):
    from rich.console import Console

    path = unfinished.folder / "checkpoints" / "last.pt"
    path.write_bytes(path.read_bytes()[:-500])
    run(unfinished, console=Console(width=500))
    out = capsys.readouterr().out
    assert "passed over: " in out
    assert "last.pt is torn" in out
    assert "going on after step 4 of 8, from" in out


@pytest.mark.parametrize("place", ["weights", "pickle", "digest"])
@pytest.mark.parametrize("older", ["best.pt", "step-00000004.pt"])
def test_a_damaged_last_checkpoint_costs_time_and_no_bit_of_the_result(unfinished, tmp_path, older, place, capsys):
    from rich.console import Console

    whole = dataclasses.replace(unfinished, out=str(tmp_path / "whole"))
    run(whole)
    checkpoints = unfinished.folder / "checkpoints"
    (checkpoints / "best.pt").rename(checkpoints / older)
    content = bytearray((checkpoints / "last.pt").read_bytes())
    at = {"weights": len(content) // 2, "pickle": content.index(b"data.pkl") + 100, "digest": len(content) - 5}[place]
    content[at] ^= 1
    (checkpoints / "last.pt").write_bytes(content)
    run(unfinished, console=Console(width=500))
    out = capsys.readouterr().out
    assert "passed over: " in out
    assert "last.pt is damaged: its content is not what was written" in out
    assert "going on after step 4 of 8, from" in out
    a, b = contents(whole.folder), contents(unfinished.folder)
    for name in ("model.safetensors", "masks.safetensors"):
        assert a[name] == b[name]
    assert a["metrics.jsonl"].count(b"\n") == b["metrics.jsonl"].count(b"\n")
    one, other = (load_checkpoint(c.folder / "checkpoints" / "last.pt") for c in (whole, unfinished))
    for key in ("model", "optimizer", "sparsifier", "batches", "best", "rng"):
        assert same(one[key], other[key]), key


def test_a_file_of_a_newer_s2sam_is_never_passed_over(unfinished):
    spoil(unfinished.folder, lambda s: s.update(version=5))
    refused(unfinished, "upgrade s2sam")


def test_a_best_checkpoint_that_lacks_a_number_is_passed_over_or_refused(unfinished):
    checkpoints = unfinished.folder / "checkpoints"
    for name in ("best.pt", "last.pt"):
        saved = load_checkpoint(checkpoints / name)
        save_checkpoint(checkpoints / name, saved | {"best": {"epoch": 1}})
    refused(unfinished, "is damaged: its 'best' has no number 'test_top1'")
    refused(unfinished, "best.pt is damaged: its 'best' has no number", resume=str(checkpoints / "best.pt"))


def test_when_all_are_torn_nothing_is_touched(unfinished):
    for path in (unfinished.folder / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-500])
    assert "--resume never" in refused(unfinished, "is torn or no checkpoint")


def spoil(folder, change):
    path = folder / "checkpoints" / "last.pt"
    saved = torch.load(path, weights_only=True)
    change(saved)
    save_checkpoint(path, saved)
    return str(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.update(version=5), "has version 5 of the format, this s2sam reads versions 3 and 4; upgrade"),
        (lambda s: s.update(format="s2sam-checkpoint-1", version=1), "has version 1 of the format"),
        (lambda s: s.update(format="other"), "was not written by s2sam train"),
        (lambda s: s["model"].pop("classifier.bias"), "does not fit this model, its masks or its optimizer"),
        (lambda s: s["model"].update({"classifier.bias": torch.ones(3)}), "does not fit this model"),
        (lambda s: s["sparsifier"].update(method="set"), "resume with method='set'"),
        (lambda s: [mask.zero_() for mask in s["sparsifier"]["masks"].values()], "the masks do not fit the weights"),
        (lambda s: s.update(data_digest="0"), "was trained on other images"),
        (lambda s: s["batches"].update(images=3), "saved with images=3"),
        (lambda s: s["batches"].clear(), "does not fit this model, its masks or its optimizer (KeyError('images'))"),
        (lambda s: s.update(meter=torch.zeros(1)), "the meter holds 5 numbers, the saved one 1"),
        (lambda s: s.update(skipped=[1]), "does not fit this model"),
        (lambda s: s.update(rng=torch.zeros(3)), "RNG state must be"),
        (lambda s: s.pop("optimizer"), "is damaged: it has no 'optimizer'"),
        (lambda s: s.pop("meter"), "is damaged: it has no 'meter'"),
    ],
    ids=["newer", "older", "foreign", "missing", "shape", "method", "masks", "data", "sampler", "no sampler", "meter",
         "skipped", "rng", "no optimizer", "no meter"],
)  # fmt: skip
def test_what_does_not_fit_is_named(unfinished, tmp_path, change, sentence):
    path = spoil(unfinished.folder, change)
    text = refused(unfinished, sentence, resume=path)
    assert path in text
    elsewhere = dataclasses.replace(unfinished, out=str(tmp_path / "elsewhere"))
    shutil.copytree(unfinished.folder, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "DONE").write_text("")
    refused(elsewhere, sentence, resume=path, overwrite=True)  # a finished run is not given up for it either


def test_paths_that_are_no_checkpoint(unfinished, tmp_path):
    refused(unfinished, "there is no checkpoint at", resume=str(tmp_path / "no" / "last.pt"))
    refused(unfinished, "there is no checkpoint in", resume=str(tmp_path))
    refused(unfinished, "--resume takes auto, never or the path of a checkpoint, not 'atuo'; did you mean 'auto'?",
            resume="atuo")  # fmt: skip


def test_a_torn_env_json_is_written_anew(unfinished, capsys):
    from rich.console import Console

    path = unfinished.folder / "env.json"
    path.write_bytes(path.read_bytes()[:10])
    run(unfinished, console=Console(width=500))
    assert "env.json was torn or not there; it is written anew, without what was known before step 6" in (
        capsys.readouterr().out
    )
    env = json.loads(path.read_text())
    assert {"mean", "std", "classes", "data_digest"} <= env.keys()
    assert [entry["step"] for entry in env["resumed"]] == [6]


def test_another_number_of_threads_is_told(unfinished, capsys, monkeypatch):
    from rich.console import Console

    path = unfinished.folder / "env.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hardware": {"threads": 7}}))
    monkeypatch.setattr("s2sam.train.loop.environment", lambda device: {"hardware": {"threads": 5}})
    run(unfinished, console=Console(width=500))
    assert "threads were 7 and are 5 now: from here on the run is not bit by bit" in capsys.readouterr().out
    env = json.loads(path.read_text())
    assert (env["hardware"]["threads"], env["resumed"][0]["hardware"]["threads"]) == (7, 5)
    assert differences(env["resumed"][0], env["resumed"][0]) == differences({}, env) == []
    assert differences({"versions": {"torch": "2.0"}}, {"versions": {"torch": "2.1"}})[0].startswith(
        "torch was 2.0 and"
    )


def test_records_that_are_gone_are_missed(unfinished):
    path = unfinished.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:50])
    refused(unfinished, "does not hold the records up to last.pt")
    elsewhere = dataclasses.replace(unfinished, out=str(unfinished.folder.parent / "elsewhere"))
    refused(elsewhere, "does not hold the records up to last.pt", resume=str(unfinished.folder))
    assert not elsewhere.folder.exists()


def test_a_run_goes_on_in_another_folder(unfinished, tmp_path):
    source = unfinished.folder
    moved = dataclasses.replace(unfinished, out=str(tmp_path / "moved"))
    before = contents(source)
    assert forked(lambda: run(moved, resume=str(source))) == 0
    assert contents(source) == before
    assert forked(lambda: run(unfinished)) == 0
    a, b = contents(source), contents(tmp_path / "moved")
    assert a["model.safetensors"] == b["model.safetensors"]
    assert a["metrics.jsonl"].count(b"\n") == b["metrics.jsonl"].count(b"\n")
    other = dataclasses.replace(moved, lr=0.3)
    with pytest.raises(ValueError, match=r"give the settings of that run \(--config .*config\.yaml\)"):
        run(dataclasses.replace(other, out=str(tmp_path / "third")), resume=str(source))
    assert not (tmp_path / "third").exists()


def test_an_unfinished_run_is_not_lost_to_another(unfinished, tmp_path, stopped):
    mine = dataclasses.replace(unfinished, out=str(tmp_path / "mine"))
    shutil.copytree(stopped, tmp_path / "mine")
    refused(mine, "holds an unfinished run of its own", resume=str(unfinished.folder / "checkpoints" / "best.pt"))


def test_going_back_to_the_best_epoch(unfinished):
    best = unfinished.folder / "checkpoints" / "best.pt"
    step = load_checkpoint(best)["step"]
    assert killed(unfinished, 1, resume=str(best)) == -signal.SIGKILL
    assert load_checkpoint(unfinished.folder / "checkpoints" / "last.pt")["step"] == step == 4
    assert forked(lambda: run(unfinished)) == 0
    lines = (unfinished.folder / "metrics.jsonl").read_text()
    assert lines.count('"kind": "epoch"') == 2


def test_a_folder_in_use_is_refused(unfinished):
    ready, go = os.pipe(), os.pipe()

    def holding():
        with hold(unfinished.folder):
            os.write(ready[1], b"1")
            os.read(go[0], 1)

    child = os.fork()
    if child == 0:
        holding()
        os._exit(0)
    os.read(ready[0], 1)
    try:
        refused(unfinished, "is in use by another process")
    finally:
        os.write(go[1], b"1")
        os.waitpid(child, 0)
    assert forked(lambda: run(unfinished)) == 0


def test_the_lock_leaves_nothing_behind_where_nothing_was_written(tmp_path):
    with hold(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK).exists()
        with pytest.raises(ValueError, match="in use"), hold(tmp_path / "a" / "b"):
            pass
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "a"):
        (tmp_path / "a" / "file").write_text("x")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [LOCK, "file"]


def test_a_full_disk_keeps_the_checkpoint_before(unfinished):
    last = unfinished.folder / "checkpoints" / "last.pt"
    before = last.read_bytes()

    resource = pytest.importorskip("resource")

    def on_a_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
        try:
            run(unfinished)
        except RuntimeError as error:
            text = str(error)
            assert "could not be written (File too large; is the disk full?), the one before it is whole" in text
            assert "\n" not in text
            os._exit(3)

    assert forked(on_a_full_disk) == 3
    assert last.read_bytes() == before
    assert not list(last.parent.glob(".*"))
    assert forked(lambda: run(unfinished)) == 0
    assert RunFolder(unfinished.folder).done


@pytest.mark.parametrize("size", [100, 5_000])
def test_final_weights_that_do_not_fit_on_the_disk_can_be_written_later(unfinished, size):
    resource = pytest.importorskip("resource")
    path = unfinished.folder / "model.safetensors"
    read, write = os.pipe()

    def on_a_full_disk():
        save = RunFolder.save_tensors

        def limited(folder, *args):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return save(folder, *args)

        RunFolder.save_tensors = limited
        try:
            run(unfinished)
        except OSError as error:
            os.write(write, sentence(error).encode())
            os._exit(2)

    assert forked(on_a_full_disk) == 2
    os.close(write)
    with os.fdopen(read) as said:
        assert said.read() == f"{path}: File too large; make room and run the same command again"
    assert not path.exists()
    assert not RunFolder(unfinished.folder).done
    assert not list(unfinished.folder.glob(".*.tmp"))
    assert forked(lambda: run(unfinished)) == 0
    assert path.exists()
    assert RunFolder(unfinished.folder).done


def test_a_write_that_fails_is_told_with_its_place(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as error:
        write_text(tmp_path / "env.json", "{}")
    assert error.value.filename == str(tmp_path / "env.json")
    assert sentence(error.value) == (
        f"{tmp_path / 'env.json'}: No space left on device; make room and run the same command again"
    )
    log = FileLogger(tmp_path)
    log.start({}, {})
    with pytest.raises(OSError, match="No space left") as error:
        log.position()
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    log.close()
    assert sentence(PermissionError(13, "Permission denied", "x")) == "x: Permission denied"


def test_a_write_that_fails_anywhere_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(RuntimeError, match="No space left on device; is the disk full"):
                save_checkpoint(path, {"step": 2})
        assert torch.load(path, weights_only=True)["step"] == 1
        assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to name open files")
def test_file_then_name_then_folder_reach_the_disk(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda h: (order.append(Path(os.readlink(f"/proc/self/fd/{h}")).name), fsync(h)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    with atomic(tmp_path / "last.pt") as temporary:
        temporary.write_text("x")
    assert order == [temporary.name, "replace", tmp_path.name]
