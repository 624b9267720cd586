"""accelerate(): the model for inference in which each layer is stored in the way that is fastest where it runs."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from s2sam.compact.conversion import compact_layer, obstacles, replaced, unwrapped

BLOCKS = (2, 4, 8, 16)  #: sides of the blocks that are tried
LEAST_GAIN = 1.1  #: how many times as fast as the dense layer another one must be to take its place
MOST_STORED = 0.5  #: what stores a larger share of the weight is not tried
ROUND_SECONDS = 2e-3  #: a layer is called as often as takes this long, and timed together
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  #: of the largest output; 0.05 for narrower numbers


@dataclass(frozen=True)
class LayerTimes:
    """What was measured of a layer, or of the whole model (`name` is "(model)").

    Attributes:
        name: as in `model.named_modules()`.
        layer: its class and the shape of its weight.
        zeros: the share of its weight that is 0.
        seconds: per call on the example, for "dense" and every form that was tried ("csr", "bsr4", ...).
        chosen: the form that the new model has.
        gain: dense seconds / chosen seconds, the median over the rounds.
        max_error: the largest difference from the dense outputs / the largest dense output.
        reason: why the layer stayed dense; "" where it did not.
    """

    name: str
    layer: str
    zeros: float = math.nan
    seconds: Mapping[str, float] = field(default_factory=dict)
    chosen: str = "dense"
    gain: float = 1.0
    max_error: float = 0.0
    reason: str = ""

    def __str__(self) -> str:
        times = ", ".join(f"{form} {1e3 * s:.3g} ms" for form, s in self.seconds.items())
        head = f"{self.name} ({self.layer}" + ("" if math.isnan(self.zeros) else f", {self.zeros:.1%} zeros") + ")"
        why = f", {self.reason}" if self.reason else f", {self.gain:.2f} times as fast, max error {self.max_error:.1e}"
        return f"{head}: {self.chosen}{why}" + (f" [{times}]" if times else "")


class Accelerated(NamedTuple):
    """The new model, and a row for each layer with weights; the last row is the whole model."""

    model: nn.Module
    rows: list[LayerTimes]


def accelerate(model: nn.Module, example: Any, *, rounds: int = 7, exclude: Sequence[str] = ()) -> Accelerated:
    """A copy of `model` for inference in which each layer has the form that is fastest on `example`.

    Every Linear and Conv2d with zeros is timed as it is, with single weights stored (CSR), and in square blocks of 2,
    4, 8 and 16 (BSR), on the inputs that it gets when the model runs on the example: all forms once a round, in turns.
    The fastest takes the layer's place if it is at least 1.1 times as fast and gives the same output. The copy is in
    eval mode, its outputs on the example are compared with the model's, and `model` stays as it is. Hooks that S2SAM or
    a sparsifier put on the model do nothing in the copy. Cut out pruned channels first, with `s2sam.export.slim`.

    Args:
        model: compiled and DDP-wrapped models count as the module inside. Call this inside `sam.clean()` where a window
            of S2SAM is open.
        example: as `model` takes it: a tensor, a tuple or list of arguments, or a dict of named ones, with the batch
            size and on as many threads as the model will be used with, as the choice depends on both.
        rounds: how often each form is timed.
        exclude: names of layers that stay dense.

    Raises:
        ValueError: `rounds` is not positive, or a name in `exclude` is no layer of the model.
        RuntimeError: the new model fails, or gives other outputs: one that reads the weights of its layers itself, or
            is random in eval mode. Exclude those layers.

    Cost: a pass in which each layer is called some 5 x `rounds` times, and 2 x `rounds` passes; a copy of the model.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> fast, rows = accelerate(net, torch.ones(4, 8))
    >>> print(rows[0])
    0 (Linear 8 x 8, 0.0% zeros): dense, only 0.0% of its weights are 0
    """
    model = unwrapped(model)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"rounds must be a positive whole number, got {rounds!r}")
    small = copy.deepcopy(model).eval()
    for p in small.parameters():
        p.grad = None
    reasons = obstacles(small)
    if unknown := [name for name in exclude if name not in reasons]:
        raise ValueError(f"{unknown[0]!r} in exclude is no layer with weights; these are: {', '.join(reasons)}")
    reasons |= dict.fromkeys(exclude, "excluded")
    modules = dict(small.named_modules())
    rows: dict[str, LayerTimes] = {}
    chosen: dict[str, nn.Module] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if name not in rows:
                rows[name], layer = _measure(name, module, args[0] if args else kwargs["input"], output, rounds)
                if layer is not None:
                    chosen[name] = layer

        return hook

    call = _caller(example)
    with torch.no_grad():
        try:
            for name, reason in reasons.items():
                if not reason:
                    handles.append(modules[name].register_forward_hook(watch(name), with_kwargs=True))
            call(small)
        finally:
            for handle in handles:
                handle.remove()
        for name, reason in reasons.items():
            if name not in rows:
                rows[name] = LayerTimes(name, _described(modules[name]), reason=reason or "not called on the example")
        dense = copy.deepcopy(small)
        small = replaced(small, chosen)
        whole = _compare(dense, small, call, rounds)
    return Accelerated(small, [*(rows[name] for name in reasons), whole])


def _measure(
    name: str, module: nn.Module, x: Tensor, output: Tensor, rounds: int
) -> tuple[LayerTimes, nn.Module | None]:
    """A layer's row, and what takes its place (None: nothing)."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    zeros = 1 - int(weight.count_nonzero()) / weight.numel()
    layer = _described(module)
    if 1 - zeros > MOST_STORED:
        return LayerTimes(name, layer, zeros, reason=f"only {zeros:.1%} of its weights are 0"), None
    forms: dict[str, nn.Module] = {"csr": compact_layer(module)}
    for block in BLOCKS:
        if not any(n % block for n in weight.flatten(1).shape):
            form = compact_layer(module, block=block)
            if form.values.numel() <= MOST_STORED * weight.numel():
                forms[f"bsr{block}"] = form
    times = _interleaved({"dense": lambda: module.forward(x), **_calls(forms, x)}, rounds, x.device)
    seconds = {form: statistics.median(t) for form, t in times.items()}
    best = min(forms, key=lambda form: seconds[form])
    gain = statistics.median(d / t for d, t in zip(times["dense"], times[best], strict=True))
    error = _error(output, forms[best](x))
    reason = ""
    if gain < LEAST_GAIN:
        reason = f"the fastest other form, {best}, is {gain:.2f} times as fast"
    elif not error <= _tolerance(output):
        reason = f"{best} gives another output on the example, max error {error:.1e}"
    if reason:
        return LayerTimes(name, layer, zeros, seconds, reason=reason), None
    return LayerTimes(name, layer, zeros, seconds, best, gain, error), forms[best]


def _compare(dense: nn.Module, small: nn.Module, call: Callable[[nn.Module], Any], rounds: int) -> LayerTimes:
    """The row of the whole model."""
    try:
        outputs = [[t for t in tree_leaves(call(m)) if isinstance(t, Tensor)] for m in (dense, small)]
    except AttributeError as error:
        raise RuntimeError(
            f"the model fails with compact layers ({error}); exclude the layers whose attributes it reads itself"
        ) from error
    same = [t.shape for t in outputs[0]] == [t.shape for t in outputs[1]]
    errors = [_error(a, b) for a, b in zip(*outputs, strict=True)] if same else [math.inf]
    if not same or any(not e <= _tolerance(a) for a, e in zip(outputs[0], errors, strict=True)):
        raise RuntimeError(
            f"the model with compact layers gives other outputs on the example, max error {max(errors):.1e}; it is "
            "random in eval mode, or uses the weights of its layers in another way: exclude these layers"
        )
    device = next((t.device for t in outputs[0]), torch.device("cpu"))
    times = _interleaved({"dense": lambda: call(dense), "compact": lambda: call(small)}, rounds, device)
    gain = statistics.median(d / t for d, t in zip(times["dense"], times["compact"], strict=True))
    seconds = {form: statistics.median(t) for form, t in times.items()}
    kind, largest = type(small).__name__, max(errors, default=0.0)
    return LayerTimes("(model)", kind, seconds=seconds, chosen="compact", gain=gain, max_error=largest)


def _calls(forms: Mapping[str, nn.Module], x: Tensor) -> dict[str, Callable[[], Any]]:
    return {name: (lambda form=form: form(x)) for name, form in forms.items()}  # type: ignore[misc]


def _interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call: every call once a round, in alternating order, so that what disturbs one disturbs all."""
    repeats = {name: _repeats(_seconds(call, 2, device)) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls)[:: 1 if index % 2 == 0 else -1]:
            found[name].append(_seconds(calls[name], repeats[name], device))
    return found


def _repeats(seconds: float) -> int:
    return max(1, min(100, math.ceil(ROUND_SECONDS / max(seconds, 1e-9))))


def _seconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds of a call, the mean of `repeats`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def _error(dense: Tensor, other: Tensor) -> float:
    """The largest difference / the largest entry; NaN if an entry is not finite."""
    if not dense.numel():
        return 0.0
    wide = dense.double() if dense.dtype != torch.float64 else dense
    return float((wide - other.double()).abs().max() / wide.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _tolerance(output: Tensor) -> float:
    return TOLERANCE.get(output.dtype, 0.05)


def _described(module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    shape = " x ".join(map(str, weight.shape)) if isinstance(weight, Tensor) else ""
    return f"{type(module).__name__} {shape}".strip()


def _caller(example: Any) -> Callable[[nn.Module], Any]:
    """How to call a model on the example."""
    if isinstance(example, Mapping):
        return lambda model: model(**example)
    if isinstance(example, (tuple, list)):
        return lambda model: model(*example)
    return lambda model: model(example)
