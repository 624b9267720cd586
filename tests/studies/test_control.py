"""The vectorised runner of studies/control takes the library's own steps, for every arm, with and without BatchNorm."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import batched
from s2sam import S2SAM, SAM, sparsify
from s2sam.data import echo
from s2sam.data.augment import normalise
from s2sam.data.images import ImageData
from s2sam.data.loader import Batches
from s2sam.train.config import DataConfig, ScheduleConfig, SparseConfig, TrainConfig
from s2sam.train.schedule import make_scheduler
from s2sam.train.seeding import generator
from s2sam.train.state import build

STEPS, DELTA_T, DOUBLE = 42, 6, torch.float64
RHO = {"norm": 0.3, "relative": 0.03, "rms": 0.004, "filter": 0.03}
ARMS = {
    "sgd": batched.Arm(),
    "nesterov": batched.Arm(nesterov=True),
    "twice": batched.Arm(visits=2),
    "sam": batched.Arm("sam"),
    "sam rms": batched.Arm("sam", scale="rms"),
    "sam-independent": batched.Arm("batch", scale="relative"),
    "+g": batched.Arm("gradient"),
    "+g relative": batched.Arm("gradient", scale="relative"),
    "-m": batched.Arm("momentum", sign=-1, scale="relative"),
    "noise": batched.Arm("random", scale="rms"),
    **{f"echo {scale}": batched.Arm("echo", scale=scale, visits=2) for scale in RHO},
}
RUNS = [(4, 0.1, 5e-4, 1.0), (7, 0.03, 5e-3, 2.0)]  # seed, lr, weight decay, rho over RHO


@pytest.fixture
def noise_images(monkeypatch):
    """Images of noise in place of the digits.

    Some pixels of the digits are the same in every image. A filter whose mask leaves it nothing else has a variance of
    0, BatchNorm divides rounding by it, and the order of a sum then decides which weights are exactly 0 (scale rms,
    noise) and which of two equal scores grows (RigL): no two ways of computing agree there.
    """

    @functools.lru_cache
    def images_of(count, noise, seed):
        draws = torch.Generator().manual_seed(seed)

        def part(n):
            images = torch.randint(256, (n, 1, 8, 8), generator=draws, dtype=torch.uint8)
            return images, torch.randint(10, (n,), generator=draws)

        return ImageData.build("noise", part(count), part(50), part(60), [str(i) for i in range(10)])

    monkeypatch.setattr(batched, "images_of", images_of)


def by_the_library(cell, arm, run):
    """The same training with the library's own model, optimizer, sparsifier and sharpness, in its plain loop."""
    model = batched.build(cell, run.seed).to(DOUBLE)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=run.lr, momentum=0.9, weight_decay=run.weight_decay, nesterov=arm.nesterov
    )
    if cell.sparsity:
        options = {"delta_t": DELTA_T, "min_per_filter": 1} if cell.method == "rigl" else {}
        sparsify(
            model, optimizer, method=cell.method, sparsity=cell.sparsity, total_steps=batched.steps_of(cell, arm),
            generator=generator(run.seed, "sparsify"), **options,
        )  # fmt: skip
    options = {"model": model, "rho": run.rho, "scale": arm.scale}
    if arm.gradients == 2:
        SAM(optimizer, **options)
    elif arm.displace == "echo":
        S2SAM.echo(optimizer, **options)
    elif arm.displace:
        draws = generator(run.seed, "sharpness") if arm.displace == "random" else None
        S2SAM(optimizer, direction=arm.displace, sign=arm.sign, generator=draws, **options)
    total = batched.steps_of(cell, arm)
    scheduler = make_scheduler(optimizer, ScheduleConfig(), total, 1)
    data = batched.data(cell, run.seed)
    x = normalise(data.train_x, data.mean, data.std).to(DOUBLE)
    batches = Batches(x, data.train_y, cell.batch_size, generator(run.seed, "data"))
    stream = itertools.chain.from_iterable(itertools.repeat(batches))
    stream = iter(echo(stream) if arm.visits == 2 else stream)
    model.train()
    for _ in range(STEPS):
        taken = [next(stream) for _ in range(arm.batches)]

        def gradient(taken=taken):
            images, labels = taken.pop(0) if len(taken) > 1 else taken[0]
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        if arm.gradients == 2:
            optimizer.step(gradient)
        else:
            gradient()
            optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model


@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "no norm"])
@pytest.mark.parametrize("method", ["dense", "static", "rigl"])
@pytest.mark.parametrize("name", ARMS)
@pytest.mark.usefixtures("noise_images")
def test_the_runner_takes_the_librarys_steps(name, method, norm):
    arm, sparsity = ARMS[name], 0.0 if method == "dense" else 0.9
    cell = batched.Cell(
        sparsity=sparsity, norm=norm, method=method, width=0.125, images=100, batch_size=24, epochs=20,
        delta_t=DELTA_T * arm.gradients, split_seed=None,
    )  # fmt: skip
    runs = [batched.Run(seed, lr, wd, rho * RHO[arm.scale]) for seed, lr, wd, rho in RUNS]
    networks = batched.train(cell, arm, runs, dtype=DOUBLE, steps=STEPS)
    whole, found = networks.dense(networks.w), batched.accuracies(cell, networks, runs)
    for i, run in enumerate(runs):
        data = batched.data(cell, run.seed)
        model = by_the_library(cell, arm, run)
        expected = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert expected.isfinite().all()
        torch.testing.assert_close(whole[i], expected, atol=1e-8, rtol=1e-8)
        if norm:
            for layer, bn in enumerate((model.body.bn1, model.body.bn2)):
                torch.testing.assert_close(networks.means[layer][i], bn.running_mean, atol=1e-8, rtol=1e-8)
                torch.testing.assert_close(networks.variances[layer][i], bn.running_var, atol=1e-8, rtol=1e-8)
        logits = model.eval()(normalise(data.test_x, data.mean, data.std).to(DOUBLE))
        assert found[i]["test"] == pytest.approx(float((logits.argmax(1) == data.test_y).double().mean()))


@pytest.mark.parametrize("method", ["dense", "static", "rigl"])
def test_images_wrong_labels_weights_and_order_are_those_of_a_run_of_the_library(method):
    sparsity, share = 0.0 if method == "dense" else 0.95, 0.4
    cell = batched.Cell(noise=share, sparsity=sparsity, method=method, width=0.5, split_seed=None)
    for arm, sharpness in ((batched.Arm(), "none"), (batched.Arm("echo", scale="relative", visits=2), "echo")):
        config = TrainConfig(
            method=method, sparsity=sparsity, sharpness=sharpness, seed=3, batch_size=32, epochs=100, device="cpu",
            model_options={"width": 0.5}, sparse=SparseConfig(options={"delta_t": 50}),
            data_options=DataConfig(
                train_size=600, val_fraction=batched.VAL_FRACTION, split_seed=3, label_noise=share, augment="none"
            ),
        )  # fmt: skip
        state = build(config)
        data = batched.data(cell, 3)
        assert data.digest == state.data.digest
        assert len(data.train_y) == 600
        assert len(data.val_y) == 719
        networks = batched.Networks(cell, [3], torch.float32)
        assert torch.equal(
            networks.dense(networks.w)[0], torch.cat([p.detach().flatten() for p in state.model.parameters()])
        )
        assert batched.steps_of(cell, arm) == config.epochs * len(state.batches)
        order = batched.order(cell, arm, 3)
        for _ in range(3):
            for x, y in state.batches:
                rows = next(order)
                assert torch.equal(y, data.train_y[rows])
                assert torch.equal(x, normalise(data.train_x[rows], data.mean, data.std))


def test_arms_differ_and_a_displacement_is_seen():
    """The comparison above could not tell arms apart if none moved the weights."""
    cell = batched.Cell(norm=False, method="dense", width=0.125, images=100, batch_size=24, epochs=20)
    plain = batched.train(cell, batched.Arm(), [batched.Run(0, 0.1, 5e-4)], dtype=DOUBLE, steps=STEPS).w
    for name, arm in ARMS.items():
        if name != "sgd":
            run = batched.Run(0, 0.1, 5e-4, RHO[arm.scale])
            assert float((batched.train(cell, arm, [run], dtype=DOUBLE, steps=STEPS).w - plain).abs().max()) > 1e-4
