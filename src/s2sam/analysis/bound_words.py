"""What the bounds of a network say, in sentences that go no further than the numbers do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]

#: what every right side is compared with: a key of "measured", and what that is
BESIDE = {
    "theorem 1": ("test_loss", "the run's mean test loss"),
    "theorem 1, own decay": ("test_loss", "the run's mean test loss"),
    "corollary": ("train_loss", "the run's mean training loss, as logged and with F* in it,"),
}
ALL = (
    "what was seen bounds L, B and sigma^2 from below, mu and F* from above (the corollary's sigma^2 is a mean over "
    "the points seen, on no side; where masks moved, F* is the lowest and mu the smallest of all masks); so "
    "each term is at most the term with the true constants of F: a bound that is vacuous here is vacuous, one that is "
    "not proves nothing",
    "F: mean cross entropy over fixed batches of the images chosen, not augmented, with each batch's own BatchNorm "
    "statistics, on the active weights; F(w_0), F*, mu and the corollary with weight decay, L, B and sigma^2 without",
    "neither bound knows a direction: they hold for any displacement that is known before its batch is drawn, and the "
    "corollary's is smallest at rho = 0; so they can show that S2-SAM does little harm, not that it helps",
    "a network with ReLU has no L at its kinks, B and PL hold together only within B / mu of the minimisers, and an "
    "epoch draws its batches without replacement: no run meets the assumptions exactly",
)


def factors(result: Result) -> dict[str, float | None]:
    """How many times what was measured each right side is, at least; None where nothing was measured.

    >>> factors({"terms": {n: {"total": 3.0} for n in BESIDE}, "measured": {"test_loss": 1.5, "train_loss": None}})
    {'theorem 1': 2.0, 'theorem 1, own decay': 2.0, 'corollary': None}
    """
    found: dict[str, float | None] = {}
    for name, (key, _) in BESIDE.items():
        value = result["measured"][key]
        found[name] = result["terms"][name]["total"] / value if value else None
    return found


def verdicts(result: Result) -> list[str]:
    """A sentence for each of the bounds."""
    guess = math.log(result["classes"])
    lines = []
    for name, (key, what) in BESIDE.items():
        total, value, factor = result["terms"][name]["total"], result["measured"][key], factors(result)[name]
        largest = max(("start", "noise", "radius", "generalisation"), key=lambda term: result["terms"][name][term])
        proved = " (not proved for this run)" if biased(result) else ""
        line = f"{name}{proved}: at least {total:.3g} nats, most of it {largest}"
        tested, epochs = (result["measured"][count] for count in ("tested_epochs", "epochs"))
        if key == "test_loss" and tested < epochs:
            what += f" ({tested} of {epochs} epochs)"
        if factor is not None:
            line += f"; {what} was {value:.3g}" + (f", {factor:.3g} times less" if factor >= 1.01 else "")
        if total > guess:
            line += f"; vacuous: guessing costs {guess:.3g}"
        else:
            line += f"; less than the {guess:.3g} of guessing, so not shown to be vacuous"
        lines.append(line)
    return lines


def premises(result: Result) -> list[str]:
    """What the run does that the bounds do not allow, as far as it is known."""
    condition, lines = result["step_condition"], []
    broken = "so the corollary's proof does not apply" if condition > 1 else "which is not shown to break the 1 allowed"
    lines.append(f"learning rate: eta (L + lambda) reaches at least {condition:.3g}, {broken}")
    share = f"at most {result['decay_share']:.2g} of the 2L that theorem 1 demands"
    lines.append(f"weight decay {result['weight_decay']:g}: {share}")
    if result["constants"]["pl"] is None:
        lines.append(
            "mu: no point is known to lie above the lowest loss on its masks, so terms with mu are 0, the least they "
            "can be"
        )
    lines += _masks(result)
    if result["optimizer"] != "sgd":
        lines.append(f"optimizer: both bounds are about SGD, this run used {result['optimizer']}")
    elif result["momentum"]:
        times = 1 / (1 - result["momentum"])
        lines.append(
            f"momentum {result['momentum']:g}: both bounds are without; it makes steps up to {times:.3g} times as long"
        )
    lines.append(_displacement(result))
    for probe in result["probes"]:
        if probe["stopped"]:
            lines.append(
                f"the loss was not finite {len(probe['losses'])} steps after {probe['at']}; nothing beyond counts"
            )
    return lines


def unsided(result: Result) -> bool:
    """Whether mu may be below the true one: a result of before masks were told apart, of a network that is not dense.

    >>> unsided({"method": "rigl", "probes": [{"at": "start"}]}), unsided({"probes": [{"mask": "0f"}]})
    (True, False)
    """
    told = all("mask" in probe for probe in result.get("probes", ()))
    return not told and result.get("method", "dense") != "dense"


def _masks(result: Result) -> list[str]:
    """What masks that moved change; nothing if they did not."""
    probes = result["probes"]
    if unsided(result):
        return ["mu: taken over all masks together, so it is on no side if they moved; run `s2sam bound` again"]
    within = sum(bool(probe["moved_masks"]) for probe in probes)
    lines = []
    if within or len({probe.get("mask") for probe in probes}) > 1:
        lines.append(
            "mu: masks moved, so F is compared with the lowest on the same masks, and the smallest mu is taken"
        )
    if within:
        lines.append(
            f"masks changed between steps of {within} of {len(probes)} probes: differences of gradients across a "
            "change are left out, and mu is taken from the other probes"
        )
    return lines


def biased(result: Result) -> bool:
    """Whether a step's gradient depends on its batch in a second way, so that neither bound is proved for the run.

    Echo's does even with rho = 0: its second visits begin where the first step on the same batch has led.

    >>> [biased({"sharpness": kind, "squared_radius": 0.0}) for kind in ("sam", "echo", "s2sam")]
    [False, True, False]
    """
    kind = result.get("sharpness")
    return kind == "echo" or (kind == "sam" and bool(result.get("squared_radius")))


def _displacement(result: Result) -> str:
    squared, kind = result["squared_radius"], result["sharpness"]
    if kind == "echo":
        return (
            f"displacement {math.sqrt(squared):.3g} (root mean square, first visits, which have none, included); echo "
            "takes its direction from the same batch, so the gradients of second visits are biased and neither bound "
            "applies; what is proved for its pairs of steps instead is in docs/theory.md"
        )
    if kind == "none" or squared == 0:
        return "no displacement: the radius term is 0, and the corollary's bound is SGD's"
    total, radius = (result["terms"]["corollary"][name] for name in ("total", "radius"))
    line = f"displacement {math.sqrt(squared):.3g} (root mean square): without it the corollary is {total - radius:.3g}"
    if kind == "sam":
        line += "; two-step SAM takes its direction from the same batch, so its gradient is biased and neither applies"
    return line


def sentences(results: Sequence[Result]) -> list[str]:
    """All of it, for runs side by side; the name of a run stands before what is its own."""
    lines = [f"{r['run']}: {line}" for r in results for line in [*verdicts(r), *premises(r)]]
    return [*lines, *ALL]
