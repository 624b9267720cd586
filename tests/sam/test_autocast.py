"""An open autocast context keeps casts of the weights over several forwards; none may outlive a move of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from s2sam import S2SAM, SAM

X, Y = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 3
RHO = 5.0


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X).float(), Y)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def displaced() -> tuple[nn.Module, torch.optim.Optimizer, S2SAM]:
    """After one step, so that the next forward is displaced, and far."""
    model, optimizer = network()
    sam = S2SAM(optimizer, model=model, rho=RHO)
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, sam


def looked_first(model: nn.Module) -> None:
    """Evaluation with gradients enabled, which is what fills the cache."""
    model.eval()
    model(X)
    model.train()


@pytest.mark.parametrize("look", [lambda model: None, looked_first], ids=["alone", "after an evaluation"])
def test_the_training_forward_sees_x(look: Callable[[nn.Module], None]) -> None:
    model, _, _ = displaced()
    reference = loss_of(displaced()[0]).item()
    clean = loss_of(copy.deepcopy(network()[0])).item()
    with bf16():
        look(model)
        loss = loss_of(model).item()
    assert loss == pytest.approx(reference, rel=0.02)
    assert abs(reference - clean) > 1  # so that w would be told from x


def test_evaluation_between_forward_and_backward_sees_w() -> None:
    model, _, sam = displaced()
    twin = copy.deepcopy(model)
    with bf16(), torch.no_grad():
        wanted = twin(X)
    with bf16():
        loss = loss_of(model)
        model.eval()
        with torch.no_grad():
            seen = model(X)
        with sam.clean(), torch.no_grad():
            also = model(X)
        loss.backward()
    torch.testing.assert_close(seen, wanted)
    torch.testing.assert_close(also, wanted)


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_sam_with_autocast_around_the_step_is_sam_with_autocast_in_the_closure(rho: float) -> None:
    def trained(*, around: bool) -> Tensor:
        model, optimizer = network()
        SAM(optimizer, model=model, rho=rho)

        def closure() -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=True):
                loss = loss_of(model)
            loss.backward()
            return loss

        for _ in range(3):
            if around:
                with bf16():
                    optimizer.step(closure)
            else:
                optimizer.step(closure)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(trained(around=True), trained(around=False), rtol=0, atol=0)
    if rho:
        model, optimizer = network()
        for _ in range(3):
            optimizer.zero_grad()
            with bf16():
                loss = loss_of(model)
            loss.backward()
            optimizer.step()
        plain = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert (trained(around=True) - plain).norm() > 0.01


def test_a_window_in_the_capture_of_a_whole_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, sam = displaced()
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capture forward and backward only"):
        loss_of(model)
    assert not sam.is_displaced
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)
