"""The choice of images; what opening a run refuses is in the tests of the verbs that open one."""

from __future__ import annotations

import torch

from s2sam.analysis.opened import choose


def test_images_are_chosen_by_the_seed_alone():
    x, y = torch.arange(50)[:, None], torch.arange(50)
    chosen, labels = choose(x, y, 10, 0)
    assert torch.equal(chosen[:, 0], labels)
    assert len(labels.unique()) == 10 and torch.equal(labels, labels.sort().values)
    assert torch.equal(choose(x, y, 10, 0)[1], labels) and not torch.equal(choose(x, y, 10, 1)[1], labels)
    assert torch.equal(choose(x, y, None, 0)[1], y) and torch.equal(choose(x, y, 99, 0)[1], y)
