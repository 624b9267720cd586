"""Echo: every batch twice in a row, so that S2SAM can displace the second visit by the first one's gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Echo(Generic[T]):
    """Iterates over `loader` and gives every batch twice in a row; with `accumulate` = k every group of k batches.

    A step on the same batch again costs no loading and no augmentation: both visits get the very same objects. An epoch
    is as many distinct batches as `loader` has, hence twice as many steps; halve the epochs to keep the number of
    gradients. Known as data echoing (Choi et al. 2019, arXiv:1907.05550), where it hides the cost of input.

    Args:
        loader: a DataLoader or any other iterable of batches.
        accumulate: batches a step of the optimizer; the whole step repeats, so these are held in memory.

    Raises:
        ValueError: `accumulate` is no whole number of at least 1.

    Example:
        >>> list(echo(["a", "b"])), len(echo(["a", "b"]))
        (['a', 'a', 'b', 'b'], 4)
        >>> list(echo(["a", "b", "c"], accumulate=2))
        ['a', 'b', 'a', 'b', 'c', 'c']
    """

    def __init__(self, loader: Iterable[T], accumulate: int = 1) -> None:
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ValueError(f"accumulate must be a whole number of at least 1, got {accumulate!r}")
        self.loader, self.accumulate = loader, accumulate

    def __iter__(self) -> Iterator[T]:
        batches = iter(self.loader)
        while group := list(islice(batches, self.accumulate)):
            yield from group
            yield from group

    def __len__(self) -> int:
        return 2 * len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """What else the loader has: its sampler, for instance, with `set_epoch`."""
        if name.startswith("__") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)


def echo(loader: Iterable[T], accumulate: int = 1) -> Echo[T]:
    """`loader` with every batch twice in a row; see :class:`Echo` and `S2SAM.echo`.

    Example:
        >>> import torch
        >>> from s2sam import S2SAM
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sam = S2SAM.echo(optimizer, model=model)
        >>> loader = torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4)
        >>> for x in echo(loader):
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> sam.step
        4
    """
    return Echo(loader, accumulate)
