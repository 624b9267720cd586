"""What a step costs against the plain optimizer: from interleaved rounds where they were measured, else from the runs.

Two runs that share the cores slow each other down, so the step times inside runs compare poorly. A side-by-side pass
lets every arm take a few steps in turn, in one process, round after round; what disturbs the machine then disturbs
neighbours alike, and the ratio is taken within each round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from s2sam.report.arms import Arm, reference_of
from s2sam.report.stats import Interval, median_interval

IN_RUNS = (
    "Cost ratio: median step seconds inside the runs, against the plain arm of the same base; runs that shared the "
    "cores slowed each "
    "other down, so this is rough."
)
IN_ROUNDS = (
    "Cost ratio: whole training steps against the plain arm of the same base, measured in turn in one process, over "
    "{n} rounds; the median with its 95 % interval."
)


@dataclass(frozen=True)
class Cost:
    """One arm's step time and its ratio to the plain arm of the same base."""

    ratio: float | None  #: None where there is no plain arm to compare with
    interval: Interval | None
    step_seconds: float  #: median
    how: str

    @property
    def text(self) -> str:
        """The ratio with its interval, as in '1.05x (1.02 to 1.08)'."""
        if self.ratio is None:
            return "-"
        tail = f" ({self.interval.low:.2f} to {self.interval.high:.2f})" if self.interval else ""
        return f"{self.ratio:.2f}x{tail}"


def cost_from_runs(arms: Sequence[Arm]) -> dict[str, Cost]:
    """Cost by arm name from the `step_seconds` of the final records; the ratio is the median over the shared seeds."""
    costs = {}
    for arm in arms:
        own, reference = arm.final("step_seconds"), arm if arm.plain else reference_of(arm, arms)
        other = reference.final("step_seconds") if reference else {}
        ratios = [own[seed] / other[seed] for seed in own if other.get(seed, 0.0) > 0]
        costs[arm.name] = Cost(median(ratios) if ratios else None, None, median(own.values()), IN_RUNS)
    return costs


def cost_from_rounds(rounds: Mapping[str, Sequence[float]], arms: Sequence[Arm]) -> dict[str, Cost]:
    """Cost by arm name from seconds per step, arm name -> one number per round; ratios are taken within a round.

    Raises:
        ValueError: an arm has no rounds, or the arms have different numbers of them.
    """
    missing = [arm.name for arm in arms if not rounds.get(arm.name)]
    counts = {len(seconds) for seconds in rounds.values()}
    if missing or len(counts) != 1:
        raise ValueError(
            f"the cost measurement does not fit these runs (missing: {', '.join(missing) or 'rounds'}); measure it "
            f"again"
        )
    how = IN_ROUNDS.format(n=counts.pop())
    costs = {}
    for arm in arms:
        own, reference = rounds[arm.name], arm if arm.plain else reference_of(arm, arms)
        ratios = [a / b for a, b in zip(own, rounds[reference.name], strict=True)] if reference else []
        interval = median_interval(ratios) if ratios and not arm.plain else None
        costs[arm.name] = Cost(median(ratios) if ratios else None, interval, median(own), how)
    return costs


def save_rounds(path: Path, rounds: Mapping[str, Sequence[float]]) -> None:
    """Write the rounds as JSON."""
    path.write_text(
        json.dumps({"seconds_per_step": {k: list(v) for k, v in rounds.items()}}, indent=1) + "\n", encoding="utf-8"
    )


def load_rounds(path: str | Path) -> dict[str, list[float]]:
    """The rounds that :func:`save_rounds` wrote.

    Raises:
        ValueError: the file is missing or is not such a file; the sentence names it.
    """
    try:
        rounds = json.loads(Path(path).read_text(encoding="utf-8"))["seconds_per_step"]
        return {str(name): [float(s) for s in seconds] for name, seconds in rounds.items()}
    except FileNotFoundError:
        raise ValueError(f"there is no cost measurement at {path}; leave --cost out or measure it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(f"{path} is not a cost measurement; leave --cost out or measure it again") from None
