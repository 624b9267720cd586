"""Few threads for little work, as many as there were for much, and always put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2sam.analysis import bound_threads
from s2sam.analysis.bound_threads import enough_threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_goes_by_the_work_of_a_batch(two_threads, monkeypatch):
    model, x = nn.Linear(30, 20), torch.zeros(8, 30)  # 4,800 multiply-accumulates
    for least, expected in [(4801, 1), (4800, 2)]:
        monkeypatch.setattr(bound_threads, "SMALL", least)
        with enough_threads(model, x) as threads:
            assert threads == torch.get_num_threads() == expected
        assert torch.get_num_threads() == 2


def test_an_exception_brings_the_threads_back(two_threads):
    with pytest.raises(KeyboardInterrupt), enough_threads(nn.Linear(3, 2), torch.zeros(4, 3)):
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 2
