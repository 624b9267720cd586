"""What the sparsity tests share: a small net with known gradients, optimizers, batches. Not a test file."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from s2sam import sparsify
from s2sam.registry import MethodInfo, list_methods
from s2sam.sparse.base import Sparsifier

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "muon": lambda p: torch.optim.Muon(p, lr=0.01),
}


MOVING = ("dynamic", "structured")  #: kinds of methods whose masks move


def sgd(net: nn.Module, **kw: Any) -> torch.optim.SGD:
    """SGD with momentum and weight decay."""
    return torch.optim.SGD(net.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3} | kw)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_net(seed: int = 0) -> nn.Sequential:
    """Three Linear layers without biases: all parameters are matrices, which is what Muon takes."""
    net = nn.Sequential(
        nn.Linear(6, 12, bias=False), nn.Tanh(), nn.Linear(12, 10, bias=False), nn.Tanh(), nn.Linear(10, 3, bias=False)
    )
    g = generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    return net


def make_batches(n: int, seed: int = 1, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    g = generator(seed)
    return [(torch.randn(size, 6, generator=g), torch.randint(0, 3, (size,), generator=g)) for _ in range(n)]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def one_step(net: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    loss_fn(net(batch[0]), batch[1]).backward()
    optimizer.step()


def usual(info: MethodInfo, sparsity: float = 0.7) -> float:
    """The sparsity that the battery gives a method: n of m weights can only be some."""
    return 0.5 if "m" in info.defaults or info.name == "chex" else sparsity  # CHEX's is of channels, some of them few


def usable(info: MethodInfo) -> bool:
    """Whether what the method needs is installed."""
    return info.kind != "structured" or importlib.util.find_spec("torch_pruning") is not None


def rows(*kinds: str) -> Any:
    """Parametrizes a test over the methods (of these kinds, if any are given); those that lack an extra are skipped."""
    chosen = [m for m in list_methods() if m.kind in kinds or not kinds]
    lacking = pytest.mark.skip(reason="needs torch-pruning: pip install 's2sam[structured]'")
    marked = [pytest.param(m, id=m.name, marks=() if usable(m) else lacking) for m in chosen]
    return pytest.mark.parametrize("info", marked)


def attach(
    info: MethodInfo, net: nn.Module, optimizer: Any, *, seed: int = 3, delta_t: int = 3, **kw: Any
) -> Sparsifier:
    """`info`'s method on a short schedule: 60 steps, a change every `delta_t` if it changes masks at all.

    Gradual pruning is at its target after 12 steps, AC/DC after 15; of trainings that follow one another this is the
    last.
    """
    options = {"delta_t": delta_t} if "delta_t" in info.defaults else {}
    if info.name in ("gmp", "granet", "str"):
        options |= {
            "initial_sparsity": (0.7 if kw.get("sparsity") is None else kw["sparsity"]) / 2,
            "t_start": 0.0,
            "t_end": 0.2,
        }
    if info.name == "ac-dc":  # compressed, dense, compressed, dense, and compressed from step 15 on
        options |= {"t_start": delta_t / 60, "t_end": 0.25}
    if info.name == "dsr":
        options |= {"threshold": 0.1}
    if "m" in info.defaults:  # every layer of the net divides into pairs
        options |= {"m": 2}
    if info.defaults.get("block"):
        options |= {"block": (1, 2)}
    if info.name == "deepr":
        options |= {"l1": 0.3}
    if info.kind == "structured":
        options |= {"t_end": 0.2}
    if info.name == "chase":
        options |= {"channel_delta_t": delta_t, "channel_offset": 0}
    if info.load().needs_batches:
        kw = {"batches": make_batches(2), "loss_fn": loss_fn} | kw
    common = {"method": info.name, "sparsity": usual(info), "total_steps": 60, "generator": generator(seed)}
    sparsifier = sparsify(net, optimizer, **common | options | kw)
    while kw.get("init", True) and sparsifier.next_level():
        pass
    return sparsifier


GOLDEN = {"sparsity": 0.5, "init": "anew"}  #: some of the hand-written weights are 0 already


def published(method: str) -> dict[str, Any]:
    """The option by which a method does what its authors published: filters may run empty."""
    takes = next("min_per_filter" in row.defaults for row in list_methods() if row.name == method)
    return {"min_per_filter": 0} if takes else {}


def golden(mask: list[int], weights: list[float], method: str, **options: Any) -> tuple[nn.Linear, Any, Sparsifier]:
    """Linear(4, 3) with hand-written weights and mask, a change due in the first step; as published, unless told."""
    options = published(method) | options
    layer = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights).view(3, 4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    sparsifier = sparsify(layer, optimizer, method=method, **{**GOLDEN, "generator": generator(), **options})
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights).view(3, 4))
    set_masks(sparsifier, {"weight": torch.tensor(mask, dtype=torch.bool).view(3, 4)})
    return layer, optimizer, sparsifier


def golden_pair(
    masks: dict[str, list[int]], weights: dict[str, list[float]], method: str, **options: Any
) -> tuple[nn.ModuleDict, Any, Sparsifier]:
    """Two layers Linear(4, 3), "a" and "b", as :func:`golden` has one."""
    options = published(method) | options
    net = nn.ModuleDict({name: nn.Linear(4, 3, bias=False) for name in ("a", "b")})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    sparsifier = sparsify(net, optimizer, method=method, **{**GOLDEN, "generator": generator(), **options})
    with torch.no_grad():
        for name, values in weights.items():
            net.get_parameter(f"{name}.weight").copy_(torch.tensor(values).view(3, 4))
    set_masks(sparsifier, {f"{name}.weight": torch.tensor(m).bool().view(3, 4) for name, m in masks.items()})
    return net, optimizer, sparsifier


def step_by(net: nn.Module, optimizer: Optimizer, *grads: list[float]) -> None:
    """A step with these gradients, one list for each parameter; zeros where there are none."""
    for i, p in enumerate(net.parameters()):
        given = grads[i] if i < len(grads) else []
        p.grad = torch.tensor([*given, *[0.0] * (p.numel() - len(given))]).view(p.shape)
    optimizer.step()


def set_masks(sparsifier: Sparsifier, masks: dict[str, Tensor]) -> None:
    """Put hand-written masks in, the way a checkpoint does."""
    from s2sam.sparse.masks import pack_bits

    state = sparsifier.state_dict()
    sparsifier.load_state_dict({**state, "masks": {name: pack_bits(mask) for name, mask in masks.items()}})
    sparsifier.apply()


def copy_masks(sparsifier: Sparsifier) -> dict[str, Tensor]:
    return {name: mask.clone() for name, mask in sparsifier.masks.items()}


def equal_masks(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def shaped_states(optimizer: Optimizer, weight: Tensor) -> list[Tensor]:
    return [v for v in optimizer.state[weight].values() if isinstance(v, Tensor) and v.shape == weight.shape]


# 12 weights, 8 active. |w| of the active: .1 .2 .3 .4 .5 .6 .7 .8
MASK = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
WEIGHTS = [0.5, -0.1, 0.3, -0.7, 0.2, -0.4, 0.8, -0.6, 0, 0, 0, 0]


def take_step(layer: nn.Module, optimizer: Any, grad: Tensor | None = None) -> None:
    """A step of a 3 x 4 layer with a gradient by hand, or with 0."""
    layer.weight.grad = torch.zeros(3, 4) if grad is None else grad
    optimizer.step()


def train_scaled(net: nn.Module, optimizer: Any, *, enabled: bool) -> None:
    """Two steps through a GradScaler, or without its scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
    for x, y in make_batches(2):
        optimizer.zero_grad()
        scaler.scale(loss_fn(net(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
