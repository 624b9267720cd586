"""Runs in forked children, so that a real SIGKILL costs no new interpreter: torch and the images are loaded."""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable

import pytest
import torch

from s2sam import data
from s2sam.train import loop
from s2sam.train import state as state_module
from s2sam.train import step as step_module
from s2sam.train.loop import run

if not hasattr(os, "fork"):
    pytest.skip("this system does not fork", allow_module_level=True)

load_data = functools.cache(data.load_data)  # as the children see it


def warm_up(config) -> None:
    """Import what a run imports at its first use, and load the images, before the children fork."""
    options = config.data_options
    load_data(config.data, train_size=options.train_size, val_fraction=options.val_fraction, seed=options.split_seed)
    run(config)


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child; its exit code as subprocess gives it: negative for a signal, 70 for an exception."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            state_module.load_data = load_data
            loop.environment = lambda device: {}
            os.fsync = lambda handle: None  # a kill loses nothing that was written; only a power cut would
            work()
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(config, at: int, signal_number: int = signal.SIGKILL, **options) -> int:
    """Run in a child that sends itself a signal at the `at`-th micro-batch forward; returns the exit code."""

    def work():
        forward, calls = step_module.autocast, 0

        def counting(*args):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal_number)
            return forward(*args)

        step_module.autocast = counting
        run(config, **options)

    return forked(work)


def same(a, b) -> bool:
    """Bit-equality of nested tensors and plain values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and _bits(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _bits(a, b) -> bool:
    return a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
