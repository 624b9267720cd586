"""Work in fresh processes: results by key, exceptions in their futures, and an orderly end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing

import pytest
import torch

from s2sam.train import processes
from s2sam.train.processes import in_processes, terminable


def test_results_and_exceptions_come_with_their_keys():
    tasks = {"a": (7, 2), "b": (1, 0), "c": (9, 4)}
    found = {key: future.exception() or future.result() for key, future in in_processes(divmod, tasks, 2)}
    assert (found["a"], found["c"]) == ((3, 1), (2, 1))
    assert isinstance(found["b"], ZeroDivisionError)
    assert list(in_processes(divmod, {}, 2)) == []


def test_every_process_begins_with_what_is_given(tmp_path):
    begun = in_processes(os.getcwd, dict.fromkeys(range(3), ()), 2, begin=os.chdir, given=(str(tmp_path),))
    assert {os.path.realpath(future.result()) for _, future in begun} == {os.path.realpath(tmp_path)}
    assert os.path.realpath(os.getcwd()) != os.path.realpath(tmp_path)


def test_of_several_gpus_each_process_sees_one_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-b,7")  # the last does not exist
    assert processes.visible_gpus() == ["3", "GPU-b"]
    found = in_processes(together, {i: (tmp_path, i, 3) for i in range(3)}, 3)
    assert sorted(future.result() for _, future in found) == ["3", "3", "GPU-b"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert processes.visible_gpus() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [future.result() for _, future in in_processes(os.getenv, {0: ("CUDA_VISIBLE_DEVICES",)}, 1)] == [None]


def together(folder, place, count):
    """Which GPU this process sees, once `count` of them have come here."""
    (folder / f"{place}").touch()
    for _ in range(6000):
        if len(list(folder.iterdir())) == count:
            return os.environ["CUDA_VISIBLE_DEVICES"]
        time.sleep(0.01)
    raise TimeoutError


def test_an_exception_ends_the_processes_before_it_is_seen():
    strangers = set(multiprocessing.active_children())
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), closing(in_processes(time.sleep, {0: (0,), 1: (600,)}, 2)) as done:
        for _ in done:
            assert len(set(multiprocessing.active_children()) - strangers) == 2
            raise KeyboardInterrupt
    assert not set(multiprocessing.active_children()) - strangers
    assert time.monotonic() - began < 60  # not the ten minutes of the task


def test_a_process_that_dies_breaks_the_rest_and_says_so():
    found = [future.exception() for _, future in in_processes(os._exit, {0: (1,), 1: (1,)}, 1)]
    assert [type(error) for error in found] == [BrokenProcessPool] * 2


def test_ctrl_c_in_a_process_does_nothing():
    masks = in_processes(signal.pthread_sigmask, {0: (signal.SIG_BLOCK, [])}, 1)
    assert [signal.SIGINT in future.result() for _, future in masks] == [True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_terminable_makes_sigterm_an_exception_for_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, terminable():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    inside = []

    def elsewhere():
        with terminable():  # only the main thread may ask for signals
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert inside == [before]
