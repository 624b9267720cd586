"""Echo: the second visit of every batch is displaced by the gradient of the first, and is SAM's step."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from sam_common import FACTORIES, distance, make_data, make_net, moved, same, snapshot

from s2sam import S2SAM, SAM, sparsify
from s2sam.data import echo
from s2sam.sam.single_step import ECHO_RHO, ECHO_SCALE

RHO = 0.3


def train(net, optimizer, batches, check=None):
    for visit, (x, y) in enumerate(batches):
        w = snapshot(net)
        F.cross_entropy(net(x), y).backward()
        if check is not None:
            check(visit, w)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["sgd", "nesterov", "sgd-fused", "adamw"])
def test_first_visits_are_plain_and_second_visits_are_displaced_by_their_own_gradient(name):
    net = make_net()
    optimizer = FACTORIES[name](net.parameters())
    S2SAM.echo(optimizer, model=net, rho=RHO, scale="norm")
    first = {}

    def check(visit, w):
        e = [p.detach() - q for p, q in zip(net.parameters(), w, strict=True)]
        if visit % 2 == 0:
            assert all(not t.any() for t in e)
            first["g"] = [p.grad.clone() for p in net.parameters()]
        else:
            length = sum(float(g.square().sum()) for g in first["g"]) ** 0.5
            assert distance(e, [RHO * g / length for g in first["g"]]) < 1e-12

    train(net, optimizer, echo(make_data(4)), check)


def test_with_a_learning_rate_of_0_on_first_visits_it_is_sam():
    """If first visits move nothing, the second ones take exactly SAM's steps: its mechanism, a gradient at a time."""
    nets = [make_net(), make_net()]
    ours = torch.optim.SGD(nets[0].parameters(), lr=0.1)
    S2SAM.echo(ours, model=nets[0], rho=RHO, scale="norm")
    theirs = torch.optim.SGD(nets[1].parameters(), lr=0.1)
    SAM(theirs, model=nets[1], rho=RHO)
    for visit, (x, y) in enumerate(echo(make_data(5))):
        ours.param_groups[0]["lr"] = 0.1 * (visit % 2)
        F.cross_entropy(nets[0](x), y).backward()
        ours.step()
        ours.zero_grad()
        if visit % 2:

            def closure(x=x, y=y):
                loss = F.cross_entropy(nets[1](x), y)
                loss.backward()
                return loss

            theirs.step(closure)
            theirs.zero_grad()
    assert distance(nets[0].parameters(), nets[1].parameters()) < 1e-12


def test_rho_zero_is_the_plain_optimizer_on_each_batch_twice():
    weights = []
    for attach in (False, True):
        net = make_net()
        optimizer = FACTORIES["sgd"](net.parameters())
        if attach:
            S2SAM.echo(optimizer, model=net, rho=0.0)
        train(net, optimizer, echo(make_data(4)))
        weights.append(snapshot(net))
    assert same(*weights)


def test_it_resumes_between_the_two_visits_bit_for_bit():
    batches = list(echo(make_data(6)))
    net = make_net()
    optimizer = FACTORIES["sgd"](net.parameters())
    S2SAM.echo(optimizer, model=net, rho=RHO)
    train(net, optimizer, batches[:5])
    saved, model = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    train(net, optimizer, batches[5:])
    again = make_net(seed=9)
    again.load_state_dict(model)
    resumed = FACTORIES["sgd"](again.parameters())
    S2SAM.echo(resumed, model=again, rho=RHO)
    resumed.load_state_dict(saved)
    train(again, resumed, batches[5:])
    assert same(net.parameters(), again.parameters())


def test_an_accumulated_step_repeats_as_a_whole():
    net = make_net()
    optimizer = FACTORIES["sgd"](net.parameters())
    S2SAM.echo(optimizer, model=net, rho=RHO, scale="norm")
    radii, seen = [], []
    for number, (x, y) in enumerate(echo(make_data(4), accumulate=2)):
        if number % 2 == 0:
            w = snapshot(net)
        F.cross_entropy(net(x), y).backward()
        radii.append(moved(net, w))
        seen.append(float(x.sum()))
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert radii == pytest.approx([0.0, 0.0, RHO, RHO] * 2, rel=1e-9)
    assert seen[:2] == seen[2:4] and seen[4:6] == seen[6:] and seen[0] != seen[4]


@pytest.mark.parametrize("delta_t", [4, 5])
@pytest.mark.parametrize("method", ["rigl", "set", "rigl-itop", "snfs", "granet"])
def test_masks_change_in_first_visits_as_often_as_without_echo(method, delta_t):
    """Growth by gradient then sees the gradient at w."""
    changes = []
    for with_echo in (False, True):
        net = make_net(torch.float32)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        options = {"t_end": 1.0} if method == "rigl" else {}
        sparsifier = sparsify(
            net, optimizer, method=method, sparsity=0.5, total_steps=60, delta_t=delta_t, distribution="uniform",
            generator=torch.Generator().manual_seed(0), min_per_filter=0, **options,
        )  # fmt: skip
        if with_echo:
            S2SAM.echo(optimizer, model=net, rho=RHO, scale="norm")
        found = []
        for step, (x, y) in enumerate(itertools.islice(echo(make_data(30, torch.float32)), 60), 1):
            before = sparsifier.updates
            w = snapshot(net)
            F.cross_entropy(net(x), y).backward()
            far = moved(net, w)
            optimizer.step()
            optimizer.zero_grad()
            if sparsifier.updates > before:
                found.append((step, far))
        sparsifier.verify()
        changes.append(found)
    plain, ours = changes
    assert len(ours) == len(plain) > 3
    assert all(step % 2 == 1 and far == 0 for step, far in ours)
    assert all(0 <= ours[i][0] - plain[i][0] <= 1 for i in range(len(plain)))


def test_presets_say_what_they_are():
    net = make_net()
    optimizer = FACTORIES["sgd"](net.parameters())
    sam = S2SAM.momentum(optimizer, model=net, rho=0.1, stats_every=1)
    train(net, optimizer, make_data(3))
    assert sam.stats["relative"] == pytest.approx(0.1, rel=1e-6)
    sam.remove()
    sam = S2SAM.noise(optimizer, model=net, rho=0.01, stats_every=1)
    train(net, optimizer, make_data(3))
    active = sum(int((p != 0).sum()) for p in net.parameters())
    assert sam.stats["displacement"] == pytest.approx(0.01 * active**0.5, rel=1e-6)
    sam.remove()
    sam = S2SAM.echo(optimizer, model=net, stats_every=1)
    train(net, optimizer, echo(make_data(2)))
    w = sum(float(p.square().sum()) for p in net.parameters()) ** 0.5  # all are matrices: no filter is left out
    assert ECHO_SCALE == "filter" and sam.stats["relative"] == pytest.approx(ECHO_RHO, rel=1e-6) and w > 0
    sam.remove()
    train(net, optimizer, make_data(1))  # nothing is left that would call for two visits
    from s2sam.hooks import step_hooks

    assert step_hooks(optimizer).visits == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sign": -1}, "S2SAM.echo means sign=1"),
        ({"direction": "momentum"}, "S2SAM.echo means direction='gradient'"),
        ({"rho": lambda step: 0.1}, "schedule of its own"),
        ({"rho": -1.0}, "rho must be"),
        ({"scale": "filtr"}, "scale must be one of"),
        ({"period": 0}, "total_steps must be a whole number"),
    ],
)
def test_what_it_does_not_take(options, words):
    net = make_net()
    with pytest.raises(ValueError, match=words):
        S2SAM.echo(FACTORIES["sgd"](net.parameters()), model=net, **options)


@pytest.mark.parametrize("accumulate", [0, 1.5, True, "2"])
def test_accumulate_is_a_whole_number(accumulate):
    with pytest.raises(ValueError, match="accumulate must be a whole number"):
        echo([1, 2], accumulate=accumulate)


def test_a_loader_keeps_its_length_and_its_sampler():
    data = torch.utils.data.TensorDataset(torch.arange(10.0))
    sampler = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(data, batch_size=3, sampler=sampler)
    twice = echo(loader)
    assert len(twice) == 8 and twice.sampler is sampler
    seen = [x.tolist() for (x,) in twice]
    assert seen[::2] == seen[1::2] and sorted(itertools.chain(*seen[::2])) == list(range(10))
    assert list(echo(iter("ab"))) == ["a", "a", "b", "b"]
