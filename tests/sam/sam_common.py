"""Optimizers, nets, data and measures that the sharpness tests share. Not a test file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from s2sam import S2SAM


def sgd(params, **kw) -> Optimizer:
    return torch.optim.SGD(params, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2} | kw)


FACTORIES = {
    "sgd": sgd,
    "sgd-plain": lambda p: sgd(p, momentum=0.0),
    "nesterov": lambda p: sgd(p, nesterov=True),
    "sgd-foreach": lambda p: sgd(p, foreach=True),
    "sgd-fused": lambda p: sgd(p, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-2),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "muon": lambda p: torch.optim.Muon(p, lr=0.01),
}
BATTERY = ("sgd", "nesterov", "sgd-fused", "adamw", "nadam", "adafactor", "muon")
WITHOUT_MOMENTUM = ("adafactor", "sgd-plain")


def make_net(dtype: torch.dtype = torch.float64, seed: int = 0, bias: bool = False) -> nn.Sequential:
    """A small net whose parameters are all matrices (what Muon takes), the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(i, o, bias=bias) for i, o in ((6, 8), (8, 7), (7, 3))]
    net = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    return net.to(dtype)


def make_data(n: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`n` batches of 16."""
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 6, generator=g).to(dtype), torch.randint(0, 3, (16,), generator=g)) for _ in range(n)]


def snapshot(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def distance(a, b) -> float:
    """Largest absolute difference between two lists of tensors."""
    return max(float((x.detach().double() - y.detach().double()).abs().max()) for x, y in zip(a, b, strict=True))


def total(tensors) -> float:
    """l2 norm of a list of tensors, in float64."""
    return sum(float((t.detach().double() ** 2).sum()) for t in tensors) ** 0.5


def same(a, b) -> bool:
    """Bit-equal lists."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def take_step(net: nn.Module, optimizer: Optimizer, batch, set_to_none: bool = True) -> None:
    """One ordinary training step."""
    logits = net(batch[0])
    F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), batch[1]).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)


def attached(factory="sgd", dtype=torch.float64, warm=3, rho=0.3, **options):
    """(net, optimizer, sam) after `warm` steps with S2SAM."""
    net = make_net(dtype)
    optimizer = FACTORIES[factory](net.parameters())
    sam = S2SAM(optimizer, model=net, rho=rho, **options)
    for batch in make_data(warm, dtype, seed=7):
        take_step(net, optimizer, batch)
    return net, optimizer, sam


def moved(net: nn.Module, w) -> float:
    """Distance of the parameters from `w`."""
    return total([p - q for p, q in zip(net.parameters(), w, strict=True)])


def displacement(net, sam):
    """e of the next window, in float64."""
    w = snapshot(net)
    with sam.displaced():
        return [p.detach().double() - q.double() for p, q in zip(net.parameters(), w, strict=True)]


def counted(net, optimizer, sam):
    """Calls and bytes of the fourth step on fixed gradients."""
    from _counters import OpCounter  # not on the path of the fresh processes that some tests start

    for _ in range(4):
        gradients = [torch.ones_like(p) for p in net.parameters()]
        optimizer.zero_grad()
        with OpCounter() as count:
            if sam:
                sam.displace()
            for p, g in zip(net.parameters(), gradients, strict=True):
                p.grad = g
            optimizer.step()
    return count
