"""DetachedCopy: what a pickle or a deep copy holds in the place of an object that lives on hooks."""

from __future__ import annotations

from typing import Any


class DetachedCopy:
    """Stands where the copied object held hooks on a model or an optimizer: a copy of hooks would fire for neither.

    It can be pickled and copied again, `remove()` and `restore()` do nothing, and every other use raises.

    Args:
        what: what the original is, such as "a sparsifier of method 'rigl'".
        remedy: how to attach a new one to the copied model and optimizer; the sentence ends with it.

    Raises:
        RuntimeError: whatever else is read from the copy or set on it.

    >>> copied = DetachedCopy("an S2SAM", "call S2SAM(optimizer, model=model) on the copied model and optimizer")
    >>> copied.remove()
    >>> copied.step
    Traceback (most recent call last):
    ...
    RuntimeError: 'step' was asked of a copy of an S2SAM, which has no hooks and changes nothing; call S2SAM(optimizer,
    model=model) on the copied model and optimizer
    """

    def __init__(self, what: str, remedy: str) -> None:
        vars(self).update(_what=what, _remedy=remedy)

    def remove(self) -> None:
        """Do nothing: there are no hooks to remove."""

    def restore(self) -> None:
        """Do nothing: this has displaced no weights."""

    def __reduce__(self) -> tuple[type[DetachedCopy], tuple[str, str]]:
        return DetachedCopy, (self._what, self._remedy)

    def __repr__(self) -> str:
        return f"<a copy of {self._what}, without hooks>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # copy, pickle and inspect ask for these and expect no
            raise AttributeError(name)
        raise self._refusal(name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise self._refusal(name)

    def _refusal(self, name: str) -> RuntimeError:
        return RuntimeError(
            f"{name!r} was asked of a copy of {self._what}, which has no hooks and changes nothing; {self._remedy}"
        )
