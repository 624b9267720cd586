"""What columns of a row may differ in: in mode matched the treatment, in mode tuned what a search may tune as well."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from s2sam.report.arms import flatten
from s2sam.train.config import TrainConfig

TREATMENT = ("sharpness", "rho", "sam.")  #: keys, and beginnings of keys
VARIANT = "optim.nesterov"  #: in mode matched only in a column that is declared as a baseline
TUNABLE = ("lr", "rho", "sam.", "optim.", "schedule.")  #: keys, and beginnings of keys, that a grid may hold
ADVICE = {
    "matched": f"in mode matched columns may differ in sharpness, rho and sam.* only ({VARIANT} in a column of "
    "`baselines`); use --mode tuned to give each its own learning rate, optim.* or schedule.*",
    "tuned": "in mode tuned columns may differ in sharpness, lr, rho, sam.*, optim.* and schedule.* only; give all of "
    "them the same, in base, blocks or rows",
}


def among(key: str, names: Collection[str]) -> bool:
    """True if `key` is one of `names`, or begins with one that ends in a dot.

    >>> among("lr", TUNABLE), among("sam.sign", TUNABLE), among("epochs", TUNABLE)
    (True, True, False)
    """
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in names)


def check_matched(
    configs: Mapping[str, TrainConfig], reference: str, baselines: Collection[str] = (), *, mode: str = "matched"
) -> None:
    """Raise ValueError unless the columns of a row differ from the reference only in what the mode leaves free.

    Mode matched: sharpness, rho and sam.*, so they share seed, initial weights, order of the data, learning rate,
    weight decay and epochs. A column in `baselines`, which must be one without sharpness, may set optim.nesterov as
    well. Mode tuned: lr, optim.* and schedule.* too, but neither epochs nor images nor network. Settings are
    compared. That the batches of a column with sharpness echo come twice in a row is part of its sharpness, which is
    free; :func:`s2sam.suite.result.echo_notes` says it on the table.

    >>> plain, other = TrainConfig(sharpness="none"), TrainConfig(sharpness="s2sam", lr=0.2)
    >>> check_matched({"SGD": plain, "S2-SAM": other}, "SGD", mode="tuned")
    >>> check_matched({"SGD": plain, "S2-SAM": other}, "SGD")
    Traceback (most recent call last):
    ValueError: unmatched columns: lr is 0.1 in SGD and 0.2 in S2-SAM; in mode matched columns may differ in sharpness,
    rho and sam.* only (optim.nesterov in a column of `baselines`); use --mode tuned to give each its own learning rate,
    optim.* or schedule.*
    """
    for column in baselines:
        if configs[column].sharpness != "none":
            raise ValueError(
                f"{column} in `baselines` has sharpness {configs[column].sharpness}; a baseline is another plain "
                "optimizer, so give it sharpness: none or take it out of `baselines`"
            )
    free = ("out", *TREATMENT, *(TUNABLE if mode == "tuned" else ()))
    first = flatten(configs[reference].as_dict())
    for column, config in configs.items():
        other = flatten(config.as_dict())
        for key in sorted(first.keys() | other.keys()):
            if among(key, free) or (key == VARIANT and column in baselines):
                continue
            if first.get(key) != other.get(key):
                raise ValueError(
                    f"unmatched columns: {key} is {first.get(key)!r} in {reference} and {other.get(key)!r} in "
                    f"{column}; {ADVICE[mode]}"
                )
