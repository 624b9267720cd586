"""Copies and pickles of whatever holds a sparsifier work, are inert, and say so when they are used."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch

from s2sam.detached import DetachedCopy
from s2sam.sparse.adam import BiasByAge

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import attach, copy_masks, equal_masks, make_batches, make_net, one_step, rows


def pickled(value):
    return pickle.loads(pickle.dumps(value))


class Trainer:
    """Holds all of a training, as a skorch net or a Ray actor does."""

    def __init__(self, info):
        self.net = make_net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.sparsifier = attach(info, self.net, self.optimizer)


@rows()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickled])
def test_a_copy_of_a_sparsifier_is_inert_and_the_original_goes_on(info, duplicate):
    trainer = Trainer(info)
    one_step(trainer.net, trainer.optimizer, make_batches(1)[0])
    masks = copy_masks(trainer.sparsifier)
    copied = duplicate(trainer.sparsifier)
    assert type(copied) is DetachedCopy
    copied.remove()
    copied.restore()
    for use in ("masks", "step", "state_dict", "sparsity", "verify"):
        with pytest.raises(RuntimeError, match=rf"copy of a sparsifier of method '{info.name}'.*call sparsify\(\)"):
            getattr(copied, use)
    assert equal_masks(masks, trainer.sparsifier.masks)
    for batch in make_batches(2):
        one_step(trainer.net, trainer.optimizer, batch)
    trainer.sparsifier.verify()
    assert trainer.sparsifier.step == 3


@rows("static")
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copied_training_steps_without_hooks_and_leaves_the_original_alone(info, duplicate):
    trainer = Trainer(info)
    one_step(trainer.net, trainer.optimizer, make_batches(1)[0])
    copied = duplicate(trainer)
    before = [p.detach().clone() for p in trainer.net.parameters()]
    one_step(copied.net, copied.optimizer, make_batches(1)[0])
    assert not any(torch.equal(a, b) for a, b in zip(copied.net.parameters(), before, strict=True))
    zeros = [int(sum((p == 0).sum() for p in net.parameters())) for net in (copied.net, trainer.net)]
    assert zeros[0] < 0.5 * zeros[1], "no hook masks the copy"
    assert all(torch.equal(a, b) for a, b in zip(trainer.net.parameters(), before, strict=True))
    assert trainer.sparsifier.step == 1


def test_a_detached_copy_can_be_copied_again_and_takes_no_attribute():
    one = DetachedCopy("a thing", "attach a new one")
    for again in (copy.copy(one), copy.deepcopy(one), pickled(one)):
        assert repr(again) == "<a copy of a thing, without hooks>"
        assert not hasattr(again, "__len__")
        for use in (lambda it: it.rho, lambda it: setattr(it, "frozen", True), lambda it: it._private):
            with pytest.raises(RuntimeError, match="copy of a thing, which has no hooks.*; attach a new one"):
                use(again)


def test_bias_by_age_can_be_copied_too():
    net = make_net()
    from s2sam import sparsify

    rigl = sparsify(net, torch.optim.AdamW(net.parameters()), method="rigl", sparsity=0.5, total_steps=100, delta_t=9)
    for copied in (copy.deepcopy(BiasByAge(rigl)), pickled(BiasByAge(rigl))):
        with pytest.raises(RuntimeError, match=r"copy of a BiasByAge.*call BiasByAge\(sparsifier\)"):
            copied.state_dict()
