"""sparsify(): the one call that makes training sparse."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from s2sam.registry import find, list_methods

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

    from s2sam.sparse.base import Sparsifier
    from s2sam.sparse.budget import Distribution
    from s2sam.sparse.prunable import Patterns
    from s2sam.sparse.start import Init


def sparsify(
    model: nn.Module,
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    method: str | type[Sparsifier],
    sparsity: float | None,
    distribution: Distribution = "auto",
    total_steps: int | None = None,
    batches: Iterable[Any] | None = None,
    loss_fn: Any = None,
    generator: torch.Generator | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    init: Init = True,
    **method_options: Any,
) -> Sparsifier:
    """Make the training of `model` with `optimizer` sparse from now on; the training loop does not change.

    `method` is a name from :func:`s2sam.registry.list_methods` or a class of your own; the other arguments are those of
    :class:`s2sam.sparse.base.Sparsifier`. Whether S2SAM is attached before or after makes no difference.

    >>> import torch
    >>> from s2sam import sparsify
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> sparsifier = sparsify(model, optimizer, method="rigl", sparsity=0.75, total_steps=1000)
    >>> model(torch.randn(2, 8)).sum().backward()
    >>> optimizer.step()
    >>> sparsifier.sparsity()
    0.75

    Raises:
        ValueError: an unknown method or option (the nearest name is given), an impossible sparsity (the largest
            feasible one is given), an optimizer that shares no parameter with the model, or weights that are sparse.
    """
    cls = find(list_methods(), method, "method").load() if isinstance(method, str) else method
    made: Sparsifier = cls(
        model,
        optimizer,
        sparsity=sparsity,
        distribution=distribution,
        total_steps=total_steps,
        batches=batches,
        loss_fn=loss_fn,
        generator=generator,
        include=include,
        exclude=exclude,
        init=init,
        **method_options,
    )
    if init and (idle := _idle(made)):
        warnings.warn(idle, stacklevel=2)
    return made


def _idle(made: Sparsifier) -> str | None:
    """What to say of a training that ends before `delta_t` has come once; the defaults are those of long trainings."""
    interval, steps = getattr(made.options, "delta_t", None), made.total_steps
    if not interval or interval == 1 or not steps or not made.final_sparsity:
        return None
    if any(made.due(part, t) for part in made.parts for t in range(interval, steps, interval)):
        return None
    if getattr(made, "nothing_to_drop", bool)():
        return (
            f"method {made.method!r} changes no mask: at sparsity {made.final_sparsity} the filters keep all weights "
            f"with min_per_filter={made.min_per_filter}; give a lower sparsity, or min_per_filter=0 for empty filters"
        )
    return (
        f"method {made.method!r} with delta_t={interval} changes no mask on its way through {steps} steps; give a "
        f"smaller delta_t, for instance {max(1, steps // 25)}"
    )
