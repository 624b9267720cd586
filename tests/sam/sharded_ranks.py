"""One rank of a gloo run: `python sharded_ranks.py RANK WORLD FOLDER JOB` runs the functions of JOBS[JOB]."""

from __future__ import annotations

import copy
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from sam_common import FACTORIES

from s2sam import S2SAM
from s2sam.sam.two_step import SAM

STEPS, RHO, CLASSES = 21, 0.3, 4


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
    """21 steps: two micro-batches every third, an evaluation in the window every fourth, a bad batch, on one rank."""
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
    """21 steps of two-step SAM."""
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


TABLES = {
    "fsdp": [
        ("sgd", {}),
        ("adamw", {}),
        ("adamw-fused", {}),
        ("sgd", {"direction": "momentum"}),
        ("adamw", {"direction": "ema"}),
        ("adamw", {"direction": "random"}),
        ("sgd", {"scale": "relative"}),
        ("adamw-foreach", {"scale": "asam"}),
        ("sgd", {"scale": "step"}),
        ("sgd", {"scale": "filter"}),
        ("sgd", {"scope": "norm"}),
    ],
    "tp": [  # torch's foreach and fused steps take no mixture of DTensors and others
        ("sgd", {}),
        ("adamw", {}),
        ("adamw", {"direction": "momentum"}),
        ("sgd", {"direction": "ema"}),
        ("sgd", {"direction": "random"}),
        ("sgd", {"scale": "relative"}),
        ("sgd", {"scale": "asam"}),
    ],
}
CASES = {
    f"{way}-{factory}-{'-'.join(options.values()) or 'default'}": (train, way, factory, options)
    for way, table in TABLES.items()
    for factory, options in table
}
CASES |= {
    f"sam-{way}-{factory}-{scale}": (train_sam, way, factory, {"scale": scale})
    for way, factory, scale in [
        ("fsdp", "sgd", "norm"),
        ("fsdp", "adamw", "relative"),
        ("tp", "adamw", "norm"),
        ("tp", "sgd", "asam"),
    ]
}
CASES4 = {
    "both-sgd-default": (train, "both", "sgd", {}),
    "both-adamw-random": (train, "both", "adamw", {"direction": "random"}),
    "both-sgd-asam": (train, "both", "sgd", {"scale": "asam"}),
    "hsdp-adamw-default": (train, "hsdp", "adamw", {}),
    "sam-both-sgd-norm": (train_sam, "both", "sgd", {"scale": "norm"}),
}


PARTS = {"fsdp": 2, "tp": 1, "both": 2, "hsdp": 4}  # shares of a batch
SINGLE = ("fsdp-sgd-default", "tp-adamw-default", "sam-fsdp-sgd-norm")


def case_names(table):
    """All cases in float64, and some in float32."""
    return [*table, *(f"{name}-float32" for name in SINGLE if name in table)]


def cases(rank, start, table=CASES):
    """Train the cases whose names begin like this."""
    found = {}
    for name in case_names(table):
        if name.startswith(start):
            run, way, factory, options = table[name.removesuffix("-float32")]
            dtype = torch.float32 if name.endswith("-float32") else torch.float64
            found[name] = run(way, factory, rank // 2 if way == "both" else rank, options, dtype, PARTS[way])
    return found


def fsdp_cases(rank, folder):
    return cases(rank, "fsdp")


def tp_cases(rank, folder):
    return cases(rank, "tp")


def sam_cases(rank, folder):
    return cases(rank, "sam")


def cases4(rank, folder):
    return cases(rank, "", CASES4)


# Windows


def warm(way, dtype=torch.float64, factory="sgd", steps=2, hooked=True, **wrap):
    """(net, model, optimizer, sam) after some steps; every rank has seen the same batches."""
    net = make_net(dtype)
    model = WAYS[way](net, **wrap)
    optimizer = FACTORIES[factory](net.parameters())
    sam = S2SAM(optimizer, model=model if hooked else None, rho=RHO)
    for x, y in batches(steps, dtype):
        with nullcontext() if hooked else sam.displaced():
            F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, model, optimizer, sam


def own(optimizer):
    """The weights of an optimizer, whole."""
    return [whole(p) for group in optimizer.param_groups for p in group["params"]]


def plain(values):
    """An ordinary net with these weights."""
    net = make_net(values[0].dtype)
    with torch.no_grad():
        for p, value in zip(net.parameters(), values, strict=True):
            p.copy_(value)
    return net


def evaluate(model, x):
    with torch.no_grad():
        out = model.eval()(x)
    model.train()
    return whole(out)


def looks(rank, folder):
    """Outputs at w and x, and whether the weights were there, in every order of training and evaluation forwards."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    found = {}
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, way, dtype, wrap in [
        ("fsdp", "fsdp", torch.float64, {}),
        ("bf16", "fsdp", torch.float32, {"mp_policy": half}),
        ("kept", "fsdp", torch.float64, {"reshard_after_forward": False}),
        ("tp", "tp", torch.float64, {}),
    ]:
        _net, model, optimizer, sam = warm(way, dtype, **wrap)
        x, _y = batches(5, dtype)[-1]
        w = own(optimizer)
        at_w = evaluate(model, x)
        at_x = whole(model(x))  # a forward at w went before
        moved = own(optimizer)
        look = evaluate(model, x)  # a forward at x went before
        again = whole(model(x))
        with sam.clean():
            clean = whole(model(x))
        after_clean = whole(model(x))
        try:
            evaluate(model, x[..., :5])
            raise AssertionError("a forward with a wrong shape passed")
        except RuntimeError:
            model.train()
        after_error = whole(model(x))
        sam.restore()
        back, closed = own(optimizer), evaluate(model, x)
        if way == "fsdp":
            model.unshard(async_op=True)  # a prefetch of w
            prefetched = whole(model(x))
        else:
            prefetched = whole(model(x))
        sam.restore()
        optimizer.param_groups[0]["rho"] = 2 * RHO  # the window opens at the old x, twice as far away
        model(x)
        doubled = distance(own(optimizer), w)
        sam.remove()
        evaluate(model, x)  # while its root is gathered, a model lists other parameters than its optimizer
        assert S2SAM(optimizer, model=model, scope="norm").step == 0
        found[name] = {
            "doubled": doubled,
            "w": [at_w, look, clean, closed],
            "x": [at_x, again, after_clean, after_error, prefetched],
            "distance": distance(moved, w),
            "back": distance(back, w),
            "plain": [plain(w)(x).detach(), plain(moved)(x).detach()],
        }
    return found


def without_a_model(rank, folder):
    """Nobody tells S2SAM which module gathers the weights."""
    found = {}
    for way in ("fsdp", "tp"):
        _net, model, optimizer, sam = warm(way, hooked=False)
        x, _y = batches(5)[-1]
        w, at_w = own(optimizer), evaluate(model, x)
        with sam.displaced():
            at_x = whole(model(x))
            moved = own(optimizer)
        found[way] = {
            "outputs": [at_w, at_x, evaluate(model, x)],
            "plain": [plain(v)(x).detach() for v in (w, moved, w)],
            "distance": distance(moved, w),
        }
    return found


def graphs(rank, folder):
    """Gradients of a look whose backward comes at x; and a backward that comes after its weights have moved."""
    found = {}
    for way in ("fsdp", "tp"):
        _net, model, optimizer, sam = warm(way)
        x, y = batches(5)[-1]
        w = own(optimizer)
        model(x)
        loss = F.cross_entropy(model.eval()(x), y)
        model.train()
        assert distance(own(optimizer), w) > 0.1
        loss.backward()
        at_w = plain(w)
        F.cross_entropy(at_w(x), y).backward()
        grads = [whole(p.grad) for group in optimizer.param_groups for p in group["params"]]
        expected = [p.grad for p in at_w.parameters()]
        found[way] = {"distance": distance(grads, expected)}
        optimizer.zero_grad()
        for name in ("up", "all"):  # "up" has DTensors only, also in tensor parallelism
            inputs = x.clone().requires_grad_()
            loss = F.cross_entropy(model(inputs), y)
            loss = model.up(inputs).sum() if name == "up" else loss
            sam.restore()
            try:
                loss.backward()
                found[way][name] = "nothing was raised"
            except RuntimeError as error:
                found[way][name] = str(error)
            if way == "fsdp":
                model.reset_iter_state()
    return found


def agreement(rank, folder):
    """One entry of one shard of one rank is not finite: (weights moved, steps skipped) of such a step and the next."""
    found = {}
    for way, factory, scaled in [
        ("fsdp", "sgd", False),
        ("fsdp", "adamw-fused", False),
        ("fsdp", "adamw-fused", True),
        ("fsdp", "sgd", True),
        ("tp", "adamw", False),
        ("sam", "sgd", False),
    ]:
        if way == "sam":
            net = make_net()
            model = fsdp(net)
            optimizer = FACTORIES[factory](net.parameters())
            sam = SAM(optimizer, model=model, rho=RHO)
        else:
            net, model, optimizer, sam = warm(way, factory=factory)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        x, y = batches(5)[-1]
        moved, calls = [], []

        def closure(spoil, model=model, optimizer=optimizer, scaler=scaler, calls=calls, x=x, y=y):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            calls.append(1)
            if spoil and rank == 1 and len(calls) != 1:  # with SAM, the second of its gradients
                optimizer.param_groups[0]["params"][1].grad.to_local()[0, 0] = float("nan")

        for spoil in (True, True, False):
            w = own(optimizer)
            if way == "sam":
                optimizer.step(lambda spoil=spoil, closure=closure: closure(spoil))
            else:
                calls.append(1)
                closure(spoil)
                scaler.step(optimizer)  # not fused: it does not call optimizer.step(), and the window stays open
                scaler.update()
                sam.restore()
            moved.append(distance(own(optimizer), w) > 0)
        state = all(bool(whole(t).isfinite().all()) for s in optimizer.state.values() for t in s.values())
        skipped = 2 if way == "sam" else int(sam.stats["skipped"])
        found[f"{way}-{factory}-{scaled}"] = [moved, skipped, state]
    return found


def checkpoints(rank, folder):
    """What is saved in an open window, and whether a fresh process goes on from there as the old one does."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_state_dict,
    )

    found = {}
    for name, way, factory, flat in [
        ("fsdp-sgd", "fsdp", "sgd", False),
        ("fsdp-adamw", "fsdp", "adamw", True),
        ("tp-adamw", "tp", "adamw", False),
    ]:
        for open_window in (True, False):
            options = StateDictOptions(flatten_optimizer_state_dict=flat)
            net, model, optimizer, sam = warm(way, factory=factory, steps=3)
            w, data = own(optimizer), batches(10)[4:]
            key = f"{name}-{'open' if open_window else 'closed'}"
            if open_window:
                loss = F.cross_entropy(model(data[0][0]), data[0][1])
                whole_state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
                loss.backward()
                optimizer.zero_grad()
                assert distance(own(optimizer), w) > 0.1
                found[key] = {
                    "full": distance(whole_state.values(), w),
                    "sharded": distance([whole(t) for t in model.state_dict().values()], w),
                }
            else:
                found[key] = {}
            models, optimizers = get_state_dict(model, optimizer, options=options)
            place = folder / key
            dcp.save({"model": models, "optimizer": optimizers}, checkpoint_id=place)

            def go_on(model, optimizer, data=data):
                for x, y in data:
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                return [own(optimizer), [whole(optimizer.state[p]["s2sam_buffer"]) for p in optimizer.state]]

            first = go_on(model, optimizer)
            _net, model, optimizer, sam = warm(way, factory=factory, steps=1)
            models, optimizers = get_state_dict(model, optimizer, options=options)
            state = {"model": models, "optimizer": optimizers}
            dcp.load(state, checkpoint_id=place)
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=options,
            )
            assert distance(own(optimizer), w) == 0
            second = go_on(model, optimizer)
            found[key]["weights"], found[key]["buffers"] = (
                all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
                for one, two in zip(first, second, strict=True)
            )
            found[key]["steps"] = sam.step
    return found


def refusals(rank, folder):
    """The sentence of every refusal, and that the weights and the optimizer are what they were."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Shard, distribute_tensor

    found = {}

    def refused(name, call, optimizer):
        w, groups = own(optimizer), copy.deepcopy([{**g, "params": None} for g in optimizer.param_groups])
        try:
            call()
            found[name] = "nothing was raised"
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
        assert distance(own(optimizer), w) == 0
        assert groups == [{**g, "params": None} for g in optimizer.param_groups]

    for original in (True, False):
        net = FullyShardedDataParallel(
            nn.Sequential(nn.Linear(4, 4)), use_orig_params=original, device_id=torch.device("cpu")
        )
        optimizer = FACTORIES["sgd"](net.parameters())
        refused(f"fsdp1-{original}", lambda n=net, o=optimizer: S2SAM(o, model=n), optimizer)
        refused(f"fsdp1-{original}-sam", lambda o=optimizer: SAM(o), optimizer)
        refused(f"fsdp1-{original}-alone", lambda o=optimizer: S2SAM(o), optimizer)

    net = tensor_parallel(make_net())
    optimizer = FACTORIES["sgd"](net.parameters())
    refused("filter", lambda: S2SAM(optimizer, model=net, scale="filter"), optimizer)

    one, two = DeviceMesh("cpu", [0]), DeviceMesh("cpu", [0, 1])
    params = [nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])) for mesh in (one, two)]
    try:
        S2SAM(torch.optim.SGD(params, lr=0.1))
        found["meshes"] = "nothing was raised"
    except ValueError as error:
        found["meshes"] = str(error)

    net = make_net()
    model = fsdp(net)
    optimizer = FACTORIES["sgd"](net.parameters())
    sam = S2SAM(optimizer, model=net.narrow, rho=RHO)
    for i, (x, y) in enumerate(batches(2)):
        if i == 1:
            refused("inner", lambda x=x: model(x), optimizer)
            break
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    sam.remove()
    model.reset_iter_state()

    net, model, optimizer, sam = warm("fsdp")
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state["s2sam_buffer"] = whole(state["s2sam_buffer"])
    refused("whole", sam.displace, optimizer)
    return found


def norms4(rank, folder):
    """Norms, products and finiteness of one list on several meshes, here and as one process sees them."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    from s2sam.sam.norms import all_finite, total_dot, total_norm
    from s2sam.sam.scales import SCALES

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    line = init_device_mesh("cpu", (4,))
    places = [
        (line, [Shard(0)]),
        (line, [Replicate()]),
        (mesh, [Shard(0), Shard(1)]),
        (mesh, [Replicate(), Shard(0)]),
        (mesh["b"], [Shard(1)]),
        (None, None),
    ]
    g = torch.Generator().manual_seed(0)
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        shapes = [(5, 3), (1, 4), (3, 2), (2, 3)]  # empty, uneven
        wholes = [torch.randn(shape, generator=g).to(dtype) for _ in places for shape in shapes]
        others = [torch.randn(t.shape, generator=g).to(dtype) for t in wholes]

        def spread(tensors, shapes=shapes):
            meshes = [place for place in places for _ in shapes]
            return [t if m is None else distribute_tensor(t, m, p) for t, (m, p) in zip(tensors, meshes, strict=True)]

        a, b = spread(wholes), spread(others)
        found[str(dtype)] = {
            name: [float(compute(a, b)), float(compute(wholes, others))]
            for name, compute in {
                "norm": lambda a, b: total_norm(a),
                "norm with a floor": lambda a, b: total_norm(a, floor=True),
                "product": total_dot,
                "asam": lambda a, b: SCALES["asam"].direction_norm(a, b),
                "finite": lambda a, b: all_finite(a),
                "nothing": lambda a, b: total_norm([t * 0 for t in a], floor=True),
            }.items()
        }
    if rank == 2:
        a[0].to_local()[:] = float("inf")  # this rank alone has it
    found["one infinite"] = all_finite(a)
    return found


def outside4(rank, folder):
    """Training on a mesh that half of the ranks are not in: they have nothing to do, and wait for nobody."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = DeviceMesh("cpu", [0, 1])
    p = nn.Parameter(distribute_tensor(torch.ones(4, dtype=torch.float64), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD([p], lr=0.1)
    sam = S2SAM(optimizer, rho=RHO, stats_every=1)
    for _ in range(3):
        sam.displace()
        p.grad = distribute_tensor(torch.arange(4.0, dtype=torch.float64), mesh, [Shard(0)])
        optimizer.step()
    return {"displacement": sam.stats["displacement"], "shard": p.to_local().detach()}


JOBS = {
    "fsdp": (fsdp_cases,),
    "tp": (tp_cases,),
    "sam": (sam_cases,),
    "cases4": (cases4, norms4, outside4),
    "windows": (looks, without_a_model, agreement, refusals, graphs),
    "checkpoints": (checkpoints,),
}


if __name__ == "__main__":
    rank, world, folder, job = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save({f.__name__: f(rank, folder) for f in JOBS[job]}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
