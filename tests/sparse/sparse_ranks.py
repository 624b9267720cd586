"""One rank of a gloo run: `python sparse_ranks.py RANK WORLD FOLDER` trains every method on its share of each batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from sparse_support import attach, copy_masks, make_batches, make_net, one_step, usable

from s2sam.registry import MethodInfo, list_methods
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.masks import pack_bits

STEPS = 10


def train(
    info: MethodInfo, rank: int, world: int, ddp: bool = True
) -> tuple[list[dict[str, torch.Tensor]], Sparsifier, nn.Module]:
    """The masks after every step, of training on rows rank::world of every batch; no generator is given.

    Without DDP the ranks have other weights and other gradients, and share nothing but the masks.
    """
    net = make_net(seed=0 if ddp else rank).double()
    torch.random.default_generator.manual_seed(5 + rank)  # ranks disagree; rank 0's seed counts
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    mine = {"batches": [(x[rank::world], y[rank::world]) for x, y in make_batches(2)]}
    sparsifier = attach(info, net, optimizer, generator=None, **(mine if info.load().needs_batches else {}))
    model = nn.parallel.DistributedDataParallel(net) if world > 1 and ddp else net
    path = [copy_masks(sparsifier)]
    for x, y in make_batches(STEPS, size=32):
        one_step(model, optimizer, (x[rank::world].double(), y[rank::world]))
        path.append(copy_masks(sparsifier))
    return path, sparsifier, net


def broken_ranks_are_noticed(rank: int) -> str:
    """What verify() says when this rank's masks were changed behind its back."""
    net = make_net()
    sparsifier = attach(list_methods()[0], net, torch.optim.SGD(net.parameters(), lr=0.1))
    if rank == 1:
        for mask in sparsifier.masks.values():
            mask.logical_not_()
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
    try:
        sparsifier.verify()
    except RuntimeError as error:
        return str(error)
    return ""


def own_generators(rank: int) -> list[torch.Tensor]:
    """Weights of DeepR, whose noise moves them, where each rank brings a generator of its own."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    (info,) = [row for row in list_methods() if row.name == "deepr"]
    attach(info, net, optimizer, generator=torch.Generator().manual_seed(rank), temperature=(1e-3,))
    for batch in make_batches(4):
        one_step(net, optimizer, batch)
    return [p.detach() for p in net.parameters()]


def loaded_on_one_rank(rank: int) -> int:
    """Steps done where rank 0 alone loads weights between two of them, for instance averaged ones and back."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sparsifier = attach(list_methods()[0], net, optimizer)
    for step, batch in enumerate(make_batches(3)):
        if rank == 0 and step == 1:
            net.load_state_dict({name: w.clone() for name, w in net.state_dict().items()})
        one_step(net, optimizer, batch)
    return sparsifier.step


def scored_before_ddp(name: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """The masks of a method that scores with data, attached before DDP gives all ranks rank 0's weights and buffers."""
    net = bn_net(seed=rank)
    net[0].weight.data = net[0].weight.data.t().contiguous().t()  # as channels_last: no plain order in memory
    (info,) = [row for row in list_methods() if row.name == name]
    mine = [(x[rank::world].double(), y[rank::world]) for x, y in make_batches(2)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return attach(info, net, optimizer, batches=mine, bn_mode="eval").masks


def bn_net(seed: int) -> nn.Sequential:
    """A net whose weights and BatchNorm statistics depend on the seed."""
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
        net[1].running_var.copy_(torch.rand(12, generator=g) + 0.1)
    return net


def adopted_on_ranks(rank: int) -> list[torch.Tensor]:
    """Masks from zeros that rank 0 alone has, or that are elsewhere on rank 1: rank 0's count."""
    found = []
    for elsewhere in (False, True):
        net = make_net(seed=rank)
        with torch.no_grad():
            for p in net.parameters():
                if rank == 0 or elsewhere:
                    p[:, rank::2] = 0
        made = attach(list_methods()[0], net, torch.optim.SGD(net.parameters(), lr=0.1), sparsity=None, init="adopt")
        made.verify()
        found += made.masks.values()
    return found


def sparse_on_one_rank(rank: int) -> str:
    """What sparsify() says on each rank where rank 1 alone has loaded sparse weights."""
    net = make_net()
    if rank == 1:
        with torch.no_grad():
            for p in net.parameters():
                p[:, ::2] = 0
    return told(lambda: attach(list_methods()[0], net, torch.optim.SGD(net.parameters(), lr=0.1)))


def misfit_on_one_rank(rank: int) -> list[str]:
    """What verify() and the first step say on each rank where rank 1 alone has dense weights."""
    found = []
    for use in ("verify", "step"):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        made = attach(list_methods()[0], net, optimizer)
        if rank == 1:
            with torch.no_grad():
                net[0].weight.fill_(1.0)
        found.append(told(made.verify if use == "verify" else partial(one_step, net, optimizer, make_batches(1)[0])))
    return found


def joined(name: str, rank: int, frozen: bool = False) -> str:
    """What a training inside DDP's join() says, where rank 1 has fewer batches."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    (info,) = [row for row in list_methods() if row.name == name]
    made = attach(info, net, optimizer)
    model = nn.parallel.DistributedDataParallel(net)
    if frozen:
        made.freeze()

    def train() -> None:
        with model.join():
            for batch in make_batches(6 - 2 * rank):
                one_step(model, optimizer, batch)

    return told(train)


def without_batches(name: str, rank: int) -> str:
    """What a method that scores with data says on each rank where rank 1 has none."""
    net, batches = make_net(), make_batches(2 - 2 * rank)
    (info,) = [row for row in list_methods() if row.name == name]
    return told(lambda: attach(info, net, torch.optim.SGD(net.parameters(), lr=0.1), batches=batches))


def told(function: Callable[[], object]) -> str:
    """The sentence that a call ends with, if it does."""
    try:
        function()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {}
    for method in filter(usable, list_methods()):
        path, made, model = train(method, rank, world)
        found[method.name] = {
            "path": [{name: pack_bits(mask) for name, mask in masks.items()} for masks in path],
            "generator": made.generator.get_state(),
            "weights": [p.detach() for p in model.parameters()],
        }
        path, made, model = train(method, rank, world, ddp=False)
        found[f"{method.name}-alone"] = {
            "masks": {name: pack_bits(mask) for name, mask in made.masks.items()},
            "weights": [p.detach() for p in model.parameters()],
            "backward": {name: pack_bits(mask) for name, mask in getattr(made, "backward", {}).items()},
        }
    found["own generators"] = own_generators(rank)
    found["loaded"] = loaded_on_one_rank(rank)
    found["scored"] = {name: scored_before_ddp(name, rank, world) for name in ("snip", "grasp")}
    found["without batches"] = {name: without_batches(name, rank) for name in ("snip", "grasp")}
    found["adopted"] = adopted_on_ranks(rank)
    found["sparse on one rank"] = sparse_on_one_rank(rank)
    found["misfit on one rank"] = misfit_on_one_rank(rank)
    found["joined"] = {name: joined(name, rank) for name in ("rigl", "gmp", "static")}
    found["joined, frozen"] = joined("rigl", rank, frozen=True)
    found["broken"] = broken_ranks_are_noticed(rank)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
