"""What the masks do over time, as records."""

from __future__ import annotations

from typing import Any

from s2sam.sparse.base import Sparsifier

RECORDS = 1000  #: changes that a run tells of, about; some methods change their masks in every step


class TopologyLog:
    """One record at the start, and one for each change of the masks, of a run of `n_steps` steps.

    Where changes follow one another faster than every `n_steps` / 1000 steps, a record stands for those since the last:
    writing one reads the device. The last change of a run is always told.
    """

    def __init__(self, sparsifier: Sparsifier, n_steps: int) -> None:
        self.sparsifier, self._seen = sparsifier, sparsifier.updates
        self._every, self._end = max(1, n_steps // RECORDS), n_steps
        self._last = self._dropped = self._grown = 0
        self._pending = False

    def start(self, step: int) -> dict[str, Any]:
        """The record before the first step."""
        return self._record(step)

    def changed(self) -> bool:
        """Whether the masks have changed since the last call; costs nothing."""
        info = self.sparsifier.last_update
        if self.sparsifier.updates == self._seen or info is None:
            return False
        self._seen, self._pending = self.sparsifier.updates, True
        self._dropped += sum(info.dropped.values())
        self._grown += sum(info.grown.values())
        return True

    def record(self, step: int) -> dict[str, Any] | None:
        """The record after `step` finished steps, if a change is to be told of now."""
        if not self._pending or (step - self._last < self._every and step < self._end):
            return None
        return self._record(step)

    def _record(self, step: int) -> dict[str, Any]:
        dropped, grown = self._dropped, self._grown
        self._last, self._pending, self._dropped, self._grown = step, False, 0, 0
        return {
            "kind": "topology",
            "step": step,
            "density": self.sparsifier.density(),
            "dropped": dropped,
            "grown": grown,
            "survival": self.sparsifier.survival(),
            "explored": self.sparsifier.explored(),
        }
