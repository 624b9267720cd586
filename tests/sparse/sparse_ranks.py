"""One rank of a gloo run: `python sparse_ranks.py RANK WORLD FOLDER` trains every method on its share of each batch."""

from __future__ import annotations

import os
import sys
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
    found["broken"] = broken_ranks_are_noticed(rank)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
