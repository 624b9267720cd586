"""What the masks do over time, as records."""

from __future__ import annotations

from typing import Any

from s2sam.sparse.base import Sparsifier


class TopologyLog:
    """One record at the start, and one for every change of the masks since."""

    def __init__(self, sparsifier: Sparsifier) -> None:
        self.sparsifier, self._seen = sparsifier, sparsifier.updates

    def start(self, step: int) -> dict[str, Any]:
        """The record before the first step."""
        return self._record(step, 0, 0)

    def change(self, step: int) -> dict[str, Any] | None:
        """The record after `step` finished steps if the masks changed in the last one; asking costs nothing."""
        info = self.sparsifier.last_update
        if self.sparsifier.updates == self._seen or info is None:
            return None
        self._seen = self.sparsifier.updates
        return self._record(step, sum(info.dropped.values()), sum(info.grown.values()))

    def _record(self, step: int, dropped: int, grown: int) -> dict[str, Any]:
        return {
            "kind": "topology",
            "step": step,
            "density": self.sparsifier.density(),
            "dropped": dropped,
            "grown": grown,
            "survival": self.sparsifier.survival(),
            "explored": self.sparsifier.explored(),
        }
