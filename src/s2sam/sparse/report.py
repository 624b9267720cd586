"""What is sparse and what is not, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from s2sam.sparse.masks import counts
from s2sam.sparse.prunable import Entry


@dataclass(frozen=True)
class ReportRow:
    """One parameter. `kept` counts its active weights, `nonzero` those of all its weights that are not exactly 0.

    `reason` says why it is not prunable ("" if it is).
    """

    name: str
    layer: str
    shape: tuple[int, ...]
    numel: int
    kept: int
    nonzero: int
    reason: str

    @property
    def prunable(self) -> bool:
        """Whether the parameter takes part in sparse training."""
        return not self.reason

    @property
    def sparsity(self) -> float:
        """The share of its weights that are pruned."""
        return 1 - self.kept / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Report:
    """The rows of all parameters; iterate over it, or `str(report)` for a table."""

    rows: tuple[ReportRow, ...]

    def __iter__(self) -> Iterator[ReportRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sparsity(self) -> float:
        """The share of the prunable weights that are pruned."""
        return _share([row for row in self.rows if row.prunable])

    @property
    def total_sparsity(self) -> float:
        """The share of all parameters that are pruned."""
        return _share(self.rows)

    def __str__(self) -> str:
        head = ("parameter", "layer", "shape", "kept", "nonzero", "of", "sparsity", "")
        lines: list[tuple[str, ...]] = [head]
        for r in self.rows:
            shape, numbers = "x".join(map(str, r.shape)), [str(n) for n in (r.kept, r.nonzero, r.numel)]
            lines.append((r.name, r.layer, shape, *numbers, f"{r.sparsity:.4f}", r.reason))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        left = (True, True, True, False, False, False, False, True)
        table = []
        for line in lines:
            cells = zip(line, widths, left, strict=True)
            table.append("  ".join(c.ljust(w) if side else c.rjust(w) for c, w, side in cells).rstrip())
        total = f"sparsity {self.sparsity:.4f} of the prunable weights, {self.total_sparsity:.4f} of all parameters"
        return "\n".join([*table, total])


def make_report(entries: Sequence[Entry], masks: Mapping[str, Tensor]) -> Report:
    """The report of a model's parameters under `masks`; pruned is what is masked *and* exactly 0 in the weights."""
    plain = {e.name: e.parameter.detach() for e in entries if not hasattr(e.parameter, "placements")}
    zero = {name: w == 0 for name, w in plain.items()}
    pruned = {
        f"pruned {name}": zero[name] & ~mask.to(zero[name].device) for name, mask in masks.items() if name in zero
    }
    found = counts({**zero, **pruned})
    rows = []
    for e in entries:
        n = e.parameter.numel()
        kept, nonzero = n - found.get(f"pruned {e.name}", 0), n - found.get(e.name, 0)
        rows.append(ReportRow(e.name, e.layer, tuple(e.parameter.shape), n, kept, nonzero, e.reason))
    return Report(tuple(rows))


def _share(rows: Sequence[ReportRow]) -> float:
    total = sum(row.numel for row in rows)
    return 1 - sum(row.kept for row in rows) / total if total else 0.0
