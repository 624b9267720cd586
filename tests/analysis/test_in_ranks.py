"""Processes that share the images find what one finds; one that fails or dies ends all of them with a reason."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn

from s2sam.analysis.in_ranks import in_ranks
from s2sam.analysis.ranks import LostRankError, Ranks
from s2sam.analysis.sharpness import SharpnessSettings
from s2sam.analysis.sharpness_run import Task, carry_out

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]  # processes import torch first, on a busy machine too


def task(make_generator, *, masks=None, **settings):
    """A small network with BatchNorm, 18 images in five batches of two sizes, which two ranks share unevenly."""
    torch.random.default_generator.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Softplus(), nn.Linear(4, 3),
    )  # fmt: skip
    generator = make_generator(2)
    x = torch.randint(0, 256, (18, 1, 5, 5), dtype=torch.uint8, generator=generator)
    images = x, torch.randint(0, 3, (18,), generator=generator)
    if masks is None:
        masks = {"5.weight": torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]]).bool()}
    given = {
        "steps": 2, "draws": 2, "group": 6, "eigenvalues": 1, "max_steps": 20, "queries": 6, "probes": 1,
        "density_steps": 4, "batch_size": 4, "bn": "train", "precision": "fp64",
    }  # fmt: skip
    moments = torch.tensor([0.5]), torch.tensor([0.25])
    return Task(model, masks, moments, images, images, SharpnessSettings(**given | settings))


def test_two_ranks_find_what_one_finds(make_generator):
    given = task(make_generator)
    one, told = given.carry_out(torch.device("cpu")), []
    many = in_ranks(carry_out, (given, "cpu", 2), 2, on_tell=told.append)
    assert (one["ranks"], many["ranks"]) == (1, 2)
    assert one["lambda_max"]["converged"] and one["lambda_max"]["value"] > 0.1
    for name in ("eigenvalues", "lowest_eigenvalue", "trace", "worst", "worst_adaptive", "average", "m_sharpness"):
        for a, b in zip(values(one[name]), values(many[name]), strict=True):
            assert b == pytest.approx(a, rel=1e-9, abs=1e-12), name
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-12)
    assert many["passes"] == one["passes"] and many["active_weights"] == one["active_weights"] == 53
    assert len(many["m_sharpness"]["each"]) == 3  # groups, in their order, though each rank took every second
    assert told == sorted(told) and told[-1] == given.settings.passes
    assert not multiprocessing.active_children()


def values(record):
    """All numbers in a record, in order."""
    if isinstance(record, dict):
        record = list(record.values())
    return [v for part in record for v in values(part)] if isinstance(record, list) else [float(record)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_rank_that_is_killed_or_a_ctrl_c_ends_all(make_generator, number):
    asked = []

    def on_tell(done):
        if not asked:
            asked.extend(multiprocessing.active_children())
            os.kill(asked[-1].pid if number == signal.SIGKILL else os.getpid(), number)

    given = task(make_generator, draws=100_000)  # far more than there is time for
    with pytest.raises((RuntimeError, KeyboardInterrupt)) as ended:
        in_ranks(carry_out, (given, "cpu", 2), 2, on_tell=on_tell)
    assert len(asked) == 2 and not multiprocessing.active_children()
    if number == signal.SIGKILL:
        assert "ended from outside; free some memory or take fewer --jobs" in str(ended.value)
    else:
        assert ended.type is KeyboardInterrupt


def test_what_a_rank_raises_arrives(make_generator):
    given = task(make_generator, masks={"5.weight": torch.ones(3).bool()})
    with pytest.raises(ValueError, match=r"the mask '5\.weight' fits no weight"):
        in_ranks(carry_out, (given, "cpu", 2), 2)


def test_a_broken_connection_is_one_sentence(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    ranks = Ranks()
    ranks.size, ranks.rank = 2, 1
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    for name in ("broadcast", "all_reduce", "all_gather_object"):
        monkeypatch.setattr(dist, name, broken)
    for call in (lambda: ranks.lead(torch.ones(2)), lambda: ranks.total(torch.ones(2)), lambda: ranks.gather([1])):
        with pytest.raises(LostRankError, match="rank 1 of 2 lost the others of its process group"):
            call()


def test_one_process_alone_needs_no_group():
    alone, x = Ranks(), torch.tensor([1.0, math.pi])
    assert alone.lead(x) is x and torch.equal(alone.total(x), x.double())
