"""Scoring weights by gradients before training: what SNIP, GraSP and SynFlow share.

Scores are taken on a copy of the model, in float32 or wider and without autocast, so that scoring leaves no trace:
weights, buffers, gradients, training flags and random states stay bit by bit what they are, and hooks of an attached
S2SAM, of DDP or of torch.compile see nothing; forward hooks of the user's own run on the copy. The copy has the weights
that will be trained; nothing is drawn anew.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2sam.sparse import sync
from s2sam.sparse.base import Sparsifier
from s2sam.sparse.names import unknown
from s2sam.sparse.options import check_batches, check_whole
from s2sam.sparse.prunable import unwrap

BN_MODES = ("train", "eval")
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class SaliencyOptions:
    """`min_per_layer`: weights that a "global" choice leaves each layer at least (all of a smaller one).

    `min_per_filter`: weights that each filter keeps at least, while there are enough; 0: as published.
    """

    min_per_layer: int = 1
    min_per_filter: int = 0

    def __post_init__(self) -> None:
        check_whole("min_per_layer", self.min_per_layer)
        check_whole("min_per_filter", self.min_per_filter, 0)


@dataclass(frozen=True)
class BatchOptions(SaliencyOptions):
    """`bn_mode`: statistics of the batch ("train") or the running ones ("eval"); `num_batches`: None = all there are.

    All modules but BatchNorm are in eval mode: no dropout.
    """

    bn_mode: str = "train"
    num_batches: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bn_mode not in BN_MODES:
            raise unknown("bn_mode", str(self.bn_mode), BN_MODES)
        if self.num_batches is not None:
            check_whole("num_batches", self.num_batches)


class Saliency(Sparsifier):
    """A mask that is chosen once, by a score of each weight, over all layers together unless told otherwise."""

    needs_batches = True
    default_distribution = "global"
    Options: ClassVar[type] = SaliencyOptions
    options: Any

    @property
    def min_per_layer(self) -> int:
        """The option of that name."""
        return int(self.options.min_per_layer)

    def check_options(self) -> None:
        """Batches and loss that cannot be any."""
        check_batches(self.batches)
        if not callable(self.loss_fn) and self.loss_fn is not None:
            raise ValueError(f"loss_fn must be a function of output and target, got {type(self.loss_fn).__name__}")

    def called(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function`, which is the user's, makes of a batch.

        Raises:
            ValueError: it fails: images of another shape, labels that are no classes of the model.
        """
        try:
            return function(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            shapes = ", ".join(str(tuple(t.shape)) for t in _leaves([args, kwargs]) if isinstance(t, Tensor))
            raise ValueError(
                f"method {self.method!r}: {what} fails on what it is scored with ({reason}), of shape {shapes}; give "
                "inputs and targets as in training"
            ) from error

    def read_batches(self, weight: Tensor) -> Iterator[Batch]:
        """The batches to score with, one after the other, where and as wide as `weight` is.

        Raises:
            ValueError: there are none, fewer than `num_batches`, or no (input, target) pairs.
        """
        if self.batches is None:
            raise ValueError(
                f"method {self.method!r} scores weights with data: give batches=, a few (input, target) pairs"
            )
        n, count = self.options.num_batches, 0
        for count, pair in enumerate(itertools.islice(self.batches, n), 1):  # noqa: B007
            yield Batch.read(pair, weight)
        if count < (n or 1):
            raise ValueError(
                f"method {self.method!r} needs {n or 'some'} batches and got {count}; give as many as it is to score "
                "with (an iterator that was used before is empty)"
            )

    def loss(self, output: Any, target: Any) -> Tensor:
        """`loss_fn(output, target)`; cross-entropy if there is none and the target holds classes.

        Raises:
            ValueError: it is no single number, or there is none and the target holds no classes.
        """
        loss_fn: Loss | None = self.loss_fn
        if loss_fn is None:
            if not isinstance(target, Tensor) or target.is_floating_point():
                raise ValueError(f"method {self.method!r} needs loss_fn=, as the targets are no tensor of classes")
            loss_fn = F.cross_entropy
        loss = self.called("the loss", loss_fn, output, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("loss_fn(output, target) must return the mean loss of the batch, a tensor with one number")
        return loss.reshape(())


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch for scoring: what the model is called with, the target, and the number of samples."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    target: Any
    size: int

    @classmethod
    def read(cls, pair: Any, weight: Tensor) -> Batch:
        """From an (input, target) pair; the input is a tensor, a tuple of arguments, or a dict of named ones."""
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise ValueError(f"batches must hold (input, target) pairs, got a {type(pair).__name__}")
        inputs, target = (_move(part, weight) for part in pair)
        tensors = [t for t in _leaves(inputs) if isinstance(t, Tensor) and t.dim()]
        if not tensors:
            raise ValueError(f"the input of a batch must hold tensors, got a {type(inputs).__name__}")
        if isinstance(inputs, Mapping):
            return cls((), inputs, target, len(tensors[0]))
        args = tuple(inputs) if isinstance(inputs, list) else (inputs,)
        return cls(args, {}, target, len(tensors[0]))


@contextmanager
def scoring_copy(
    model: nn.Module, names: Iterable[str], *, bn_mode: str = "eval", dtype: torch.dtype = torch.float32
) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """A copy of `model` to score with, and its weights called `names`; gradients are on, random states are put back.

    On several ranks it is a copy of rank 0's weights and buffers, which DistributedDataParallel will give to all.

    Floating-point numbers are at least `dtype`. All modules are in eval mode but BatchNorm, which follows `bn_mode`.

    Raises:
        ValueError: the model cannot be copied.
    """
    inner = unwrap(model)
    try:
        twin = copy.deepcopy(inner)
    except (RuntimeError, TypeError, copy.Error) as error:
        raise ValueError(
            f"this model cannot be copied, and weights are scored on a copy ({error}); sparsify it before adding what "
            "cannot be copied"
        ) from error
    sync.broadcast([*twin.parameters(), *twin.buffers()])
    held = dict(twin.named_parameters(remove_duplicate=False))
    if torch.float64 in {dtype, *(p.dtype for p in held.values())}:
        twin.double()
    else:
        twin.float()
    twin.eval()
    for module in twin.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(bn_mode == "train")
    held = dict(twin.named_parameters(remove_duplicate=False))
    for p in held.values():
        p.grad = None
    weights: dict[str, Tensor] = {name: held[name] for name in names}
    devices = {p.device for p in held.values()}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([d.index for d in devices if d.type == "cuda"]))
        for kind in {d.type for d in devices}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # the others have no second derivative
        stack.enter_context(torch.enable_grad())
        yield twin, weights


def gradients(output: Tensor, weights: Mapping[str, Tensor], *, create_graph: bool = False) -> dict[str, Tensor]:
    """d output / d w for each weight; 0 for those that the output does not depend on."""
    if not output.requires_grad:
        return {name: torch.zeros_like(w) for name, w in weights.items()}
    found = torch.autograd.grad(
        output, list(weights.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(weights, found, strict=True))


def add_(total: dict[str, Tensor], more: Mapping[str, Tensor], factor: float) -> None:
    """total <- total + factor * more, in place."""
    for name, value in more.items():
        value = value.detach()
        if name in total:
            total[name].add_(value, alpha=factor)
        else:
            total[name] = value * factor


def checked(scores: dict[str, Tensor], method: str, hint: str = "") -> dict[str, Tensor]:
    """The scores, if they tell weights apart.

    Raises:
        ValueError: a score is not finite, or all are zero.
    """
    bad = [name for name, s in scores.items() if not bool(s.isfinite().all())]
    if bad:
        raise ValueError(
            f"method {method!r}: the scores of {bad[0]!r} are not finite; look for NaN or infinity in the batches and "
            "the weights, or for a model so deep that float numbers overflow"
        )
    if not any(bool(s.any()) for s in scores.values()):
        raise ValueError(
            f"method {method!r}: all scores are zero, so they say nothing about the weights; look for a layer that is "
            f"all zero (a zero-initialised classifier, say) or a loss that does not depend on the weights{hint}"
        )
    return scores


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _move(value: Any, weight: Tensor) -> Any:
    """The tensors in `value` on the device of `weight`, floating ones in its dtype."""
    if isinstance(value, Tensor):
        return value.to(weight.device, weight.dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: _move(part, weight) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [_move(part, weight) for part in value]
    return value
