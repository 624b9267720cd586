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

from s2sam.outside import Number, fit, parse_json, reading
from s2sam.report.arms import Arm, reference_of
from s2sam.report.stats import Interval, median_interval
from s2sam.train.atomic import write_text

IN_RUNS = (
    "Step times: median step seconds inside the runs, against the plain arm on the same network (a sparse one is "
    "compared with sparse, not with dense training) and on the dense network; runs that shared the cores slowed each "
    "other down, so this is rough."
)
IN_ROUNDS = (
    "Step times: whole training steps against the plain arm on the same network (a sparse one is compared with sparse, "
    "not with dense training) and on the dense network, measured in turn in one process, over {n} rounds; the median "
    "with its 95 % interval."
)


@dataclass(frozen=True)
class Cost:
    """One arm's step time, its ratio to the plain arm of the same base, and that to the plain dense arm."""

    ratio: float | None  #: None where there is no plain arm to compare with
    interval: Interval | None
    step_seconds: float  #: median
    how: str
    dense: float | None = None  #: None where there is no plain dense arm
    dense_interval: Interval | None = None

    @property
    def text(self) -> str:
        """The ratio with its interval, as in '1.05x (1.02 to 1.08)'."""
        return ratio_text(self.ratio, self.interval)

    @property
    def dense_text(self) -> str:
        """As `text`, against the plain dense arm."""
        return ratio_text(self.dense, self.dense_interval)


def ratio_text(ratio: float | None, interval: Interval | None) -> str:
    """A ratio with its interval, if there is one; a dash for None.

    >>> ratio_text(1.05, Interval(1.02, 1.08, 0.95)), ratio_text(2, None), ratio_text(None, None)
    ('1.05x (1.02 to 1.08)', '2.00x', '-')
    """
    if ratio is None:
        return "-"
    return f"{ratio:.2f}x" + (f" ({interval.low:.2f} to {interval.high:.2f})" if interval else "")


def cost_from_runs(arms: Sequence[Arm]) -> dict[str, Cost]:
    """Cost by arm name from the `step_seconds` of the final records; ratios are medians over the shared seeds."""
    seconds = {arm.name: arm.final("step_seconds") for arm in arms}

    def ratio(arm: Arm, other: Arm | None) -> float | None:
        theirs = seconds[other.name] if other else {}
        found = [mine / theirs[seed] for seed, mine in seconds[arm.name].items() if theirs.get(seed, 0.0) > 0]
        return median(found) if found else None

    dense = plain_dense(arms)
    return {
        arm.name: Cost(
            ratio(arm, plain_of(arm, arms)), None, median(seconds[arm.name].values()), IN_RUNS, ratio(arm, dense)
        )
        for arm in arms
    }


def plain_of(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The plain arm of the same base: `arm` itself, perhaps."""
    return arm if arm.plain else reference_of(arm, arms)


def plain_dense(arms: Sequence[Arm]) -> Arm | None:
    """The plain arm on the dense network, if there is one."""
    return next((arm for arm in arms if arm.plain and arm.dense), None)


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
    dense = plain_dense(arms)

    def ratio(arm: Arm, other: Arm | None) -> tuple[float | None, Interval | None]:
        if other is None:
            return None, None
        found = [a / b for a, b in zip(rounds[arm.name], rounds[other.name], strict=True)]
        return median(found), None if arm is other else median_interval(found)

    return {
        arm.name: Cost(*ratio(arm, plain_of(arm, arms)), median(rounds[arm.name]), how, *ratio(arm, dense))
        for arm in arms
    }


def save_rounds(path: Path, rounds: Mapping[str, Sequence[float]]) -> None:
    """Write the rounds as JSON."""
    write_text(path, json.dumps({"seconds_per_step": {k: list(v) for k, v in rounds.items()}}, indent=1) + "\n")


def load_rounds(path: str | Path) -> dict[str, list[float]]:
    """The rounds that :func:`save_rounds` wrote.

    Raises:
        ValueError: the file is missing or is not such a file; the sentence names it.
    """
    try:
        with reading(path, "not a cost measurement", "leave --cost out or measure it again"):
            content = parse_json(Path(path).read_bytes())
            fit(content, {"seconds_per_step": {...: [Number(1e-12)]}})
    except FileNotFoundError:
        raise ValueError(f"there is no cost measurement at {path}; leave --cost out or measure it first") from None
    rounds: dict[str, list[float]] = content["seconds_per_step"]
    return rounds
