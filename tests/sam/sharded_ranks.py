"""One rank of a gloo run: `python sharded_ranks.py RANK WORLD FOLDER JOB` runs the functions of JOBS[JOB]."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from sam_common import FACTORIES

from s2sam import S2SAM
from s2sam.sam.two_step import SAM

STEPS, RHO, CLASSES = 22, 0.3, 4


class Net(nn.Module):
    """Batch x sequence in; it has a layer of one unit, so that a shard along dim 0 is empty on some rank."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(6, 8), nn.Linear(8, 4), nn.LayerNorm(4)
        self.narrow, self.head, self.shift = nn.Linear(4, 1), nn.Linear(4, CLASSES), nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x):
        x = self.norm(torch.tanh(self.down(torch.tanh(self.up(x)))))
        return (self.head(x) * (1 + torch.tanh(self.narrow(x))) + self.shift).mean(1)


def make_net(dtype=torch.float64):
    """The same weights on every rank."""
    net = Net()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4)
    return net.to(dtype)


def batches(n, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 4, 6, generator=g).to(dtype), torch.randint(0, CLASSES, (16,), generator=g)) for _ in range(n)
    ]


# Ways to shard


def fsdp(net, **options):
    """Two parts of their own, the rest belongs to the root, which stays gathered after a forward."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(net.up, **options)
    fully_shard(net.narrow, **options)
    return fully_shard(net, **options)


def tensor_parallel(net, mesh=None):
    """Along dim 0, dim 1, replicated with a gradient that is Partial, and parameters that are no DTensors."""
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(use_local_output=False),
    }
    parallelize_module(net, mesh or init_device_mesh("cpu", (2,)), plan)
    net.norm.register_forward_hook(
        lambda module, args, out: out.redistribute(placements=[Replicate()]).to_local(grad_placements=[Replicate()])
    )
    return net


def both(net):
    """FSDP2 over tensor parallelism, on 2 x 2 ranks."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    return fully_shard(tensor_parallel(net, mesh["tp"]), mesh=mesh["dp"])


def hsdp(net):
    """Sharded over one dim of the mesh, replicated over the other."""
    from torch.distributed.tensor import init_device_mesh

    return fsdp(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


WAYS = {"none": lambda net: net, "fsdp": fsdp, "tp": tensor_parallel, "both": both, "hsdp": hsdp}


def whole(t):
    """The full tensor of a DTensor, as a plain one of its own."""
    t = t.detach()
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()


def weights(net):
    return [whole(p) for p in net.parameters()]


def distance(a, b):
    """||a - b|| of two lists of plain tensors."""
    return sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True)) ** 0.5


# Training


def train(way, factory, rank, options, dtype=torch.float64, parts=1):
    """22 steps: two micro-batches every third, an evaluation in the window every fourth, a bad batch, on one rank."""
    net = make_net(dtype)
    model = WAYS[way](net)
    optimizer = FACTORIES[factory](net.parameters())
    generator = torch.Generator().manual_seed(3) if options.get("direction") == "random" else None
    sam = S2SAM(optimizer, model=model, rho=RHO, stats_every=1, generator=generator, **options)
    share = slice(None) if parts == 1 else slice(rank % parts * 16 // parts, (rank % parts + 1) * 16 // parts)
    radii, stats, outputs, data = [], [], [], iter(batches(2 * STEPS, dtype))
    for step in range(STEPS):
        look = step % 5 == 2  # gathering whole weights takes its time
        w = weights(net) if look else []
        micro = 1 + (step % 3 == 0)
        for _ in range(micro):
            x, y = (t[share] for t in next(data))
            if step == 7 and rank == parts - 1:
                x = x * float("nan")
            (F.cross_entropy(model(x), y) / micro).backward()
        if step % 4 == 0:
            with torch.no_grad():
                outputs.append(whole(model.eval()(x)))
            model.train()
        if look:
            radii.append(distance([whole(p) for p in optimizer.param_groups[0]["params"]], w))
        optimizer.step()
        optimizer.zero_grad()
        stats.append(sam.stats)
        assert not look or (distance(weights(net), w) == 0) == (step == 7)
    states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    buffers = [whole(state["s2sam_buffer"]) for state in states if "s2sam_buffer" in state]
    return {"weights": weights(net), "radii": radii, "stats": stats, "buffers": buffers, "outputs": outputs}


def train_sam(way, factory, rank, options, dtype=torch.float64, parts=1):
    """22 steps of two-step SAM."""
    net = make_net(dtype)
    model = WAYS[way](net)
    optimizer = FACTORIES[factory](net.parameters())
    SAM(optimizer, model=model, rho=RHO, **options)
    share = slice(None) if parts == 1 else slice(rank % parts * 16 // parts, (rank % parts + 1) * 16 // parts)
    points = []
    for step, batch in enumerate(batches(STEPS, dtype)):
        x, y = (t[share] for t in batch)
        look = step % 5 == 2
        w, calls = weights(net) if look else [], []

        def closure(x=x, y=y, calls=calls, step=step, look=look):
            optimizer.zero_grad()
            calls.append([whole(p) for p in optimizer.param_groups[0]["params"]] if look else [])
            loss = F.cross_entropy(model(x * float("nan") if step == 7 and rank == parts - 1 else x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        if look:
            points.append(distance(calls[-1], w))
        assert not look or (distance(weights(net), w) == 0) == (step == 7)
    return {"weights": weights(net), "radii": points}


COMMON = [
    ("sgd", {}),
    ("adamw", {}),
    ("sgd", {"direction": "momentum"}),
    ("adamw", {"direction": "momentum"}),
    ("sgd", {"direction": "ema"}),
    ("adamw", {"direction": "random"}),
    ("sgd", {"scale": "relative"}),
    ("sgd", {"scale": "asam"}),
]
FSDP_ONLY = [
    ("sgd-foreach", {}),  # these steps of torch take no mixture of DTensors and others, nor fused SGD a DTensor
    ("adamw-fused", {}),
    ("adamw-foreach", {"scale": "asam"}),
    ("sgd", {"scale": "step"}),
    ("sgd", {"scale": "filter"}),
    ("sgd", {"scope": "weights"}),
    ("sgd", {"scope": "norm"}),
]
CASES = {
    f"{way}-{factory}-{'-'.join(options.values()) or 'default'}": (train, way, factory, options)
    for way, table in (("fsdp", COMMON + FSDP_ONLY), ("tp", COMMON))
    for factory, options in table
}
CASES |= {
    f"sam-{way}-{factory}-{scale}": (train_sam, way, factory, {"scale": scale})
    for way in ("fsdp", "tp")
    for factory, scale in [("sgd", "norm"), ("adamw", "norm"), ("sgd", "relative"), ("sgd", "asam")]
}
CASES4 = {
    "both-sgd-default": (train, "both", "sgd", {}),
    "both-adamw-random": (train, "both", "adamw", {"direction": "random"}),
    "both-sgd-asam": (train, "both", "sgd", {"scale": "asam"}),
    "hsdp-adamw-default": (train, "hsdp", "adamw", {}),
    "sam-both-sgd-norm": (train_sam, "both", "sgd", {"scale": "norm"}),
}


PARTS = {"fsdp": 2, "tp": 1, "both": 2, "hsdp": 4}  # shares of a batch
SINGLE = ("fsdp-sgd-default", "fsdp-adamw-default", "tp-sgd-default", "tp-adamw-default", "sam-fsdp-sgd-norm")


def case_names(table):
    """All cases in float64, and some in float32."""
    return [*table, *(f"{name}-float32" for name in SINGLE if name in table)]


def cases(rank, world, folder, table=CASES):
    """Train every case."""
    found = {}
    for name in case_names(table):
        run, way, factory, options = table[name.removesuffix("-float32")]
        dtype = torch.float32 if name.endswith("-float32") else torch.float64
        found[name] = run(way, factory, rank // 2 if way == "both" else rank, options, dtype, PARTS[way])
    return found


def cases4(rank, world, folder):
    return cases(rank, world, folder, CASES4)


JOBS = {"cases": (cases,), "cases4": (cases4,)}


if __name__ == "__main__":
    rank, world, folder, job = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save({f.__name__: f(rank, world, folder) for f in JOBS[job]}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
