"""Where runs come from: which code, which machine, which images; and what they ended at. Sentences for a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from s2sam.report.read import Run
from s2sam.suite.plan import Planned

GAP = 0.005  #: of a sparsity from the one asked for, above which it is said
DIRTY = "-dirty"  #: how a commit ends whose tree had changes


def provenance(runs: Mapping[Planned, Run]) -> list[str]:
    """One sentence for each way in which the runs do not come from one code, one machine and one set of images."""
    notes = made_by([run.env for run in runs.values()])
    blocks: dict[str, list[str]] = {}
    for planned, run in runs.items():
        blocks.setdefault(planned.cell.block, []).append(digest_of(run)[:12])
    for block, digests in blocks.items():
        if len(set(digests)) > 1:
            notes.append(
                f"The runs of {block} were trained on {len(set(digests))} different sets of images: "
                f"{_listed(digests, ', ')}."
            )
    return notes


def made_by(environments: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which versions of the code, and if it is not one, which machines; by the env.json of each run."""
    environments = list(environments)
    codes, places = ([text(env) for env in environments] for text in (_code, _place))
    notes = []
    if len(set(codes)) > 1:
        notes.append(f"The runs were made by {len(set(codes))} versions of the code: {_listed(codes)}.")
    elif codes:
        notes.append(f"All runs were made by {codes[0]}.")
    if any(DIRTY in code for code in codes):
        notes.append(
            f"A commit marked {DIRTY} does not say which code ran: its tree had changes that are in no commit, and two "
            "such trees look alike here; commit before runs that are to count."
        )
    if len(set(places)) > 1:
        notes.append(
            f"The runs were made on {len(set(places))} kinds of machine, which round differently: {_listed(places)}."
        )
    return notes


def image_notes(runs: Mapping[Planned, Run]) -> list[str]:
    """A sentence if validation images were kept back: how many images were trained on, and how many were not."""
    found: dict[str, dict[str, None]] = {}
    for planned, run in runs.items():
        options, trained = planned.config.data_options, int(run.final["train_images"])
        if options.val_fraction == 0:
            continue
        kept = f"{100 * options.val_fraction:g} % of all"  # with train_size the record does not say how many there are
        if options.train_size is None:
            kept = f"{held_out(trained, options.val_fraction):,} ({kept})"
        text = f"{trained:,} for training and {kept} kept for validation"
        found.setdefault(text, {})[planned.cell.block] = None
    if not found:
        return []
    listed = "; ".join(f"{text} in {', '.join(blocks)}" for text, blocks in found.items())
    return [
        f"Images: {listed}. Published numbers normally come from training on all of them (here with "
        "data_options.val_fraction 0, which leaves none to choose an epoch or a setting on)."
    ]


def held_out(trained: int, fraction: float) -> int:
    """How many validation images round(fraction * N) are, if the rest of the N images are the training images.

    >>> held_out(45_000, 0.1), held_out(1_293, 0.1)
    (5000, 144)
    """
    return round(trained * fraction / (1 - fraction))


def sparsity_notes(runs: Mapping[Planned, Run]) -> list[str]:
    """A sentence if runs ended at another sparsity than that of their cell."""
    found: dict[str, None] = {}
    for planned, run in runs.items():
        if planned.config.method != "dense" and abs(run.final["sparsity"] - planned.cell.sparsity) > GAP:
            found[f"{planned.cell.label}, {planned.column}: {100 * run.final['sparsity']:.2f} %"] = None
    return [f"Ended at another sparsity than that of their cell: {'; '.join(found)}."] if found else []


def code_of(run: Run) -> str:
    """Versions and commit of a run, as in "s2sam 0.1.0, torch 2.13.0, commit 1a2b3c4d"."""
    return _code(run.env)


def digest_of(run: Run) -> str:
    """The digest of the images that a run was trained on."""
    return str(run.final.get("data_digest", run.env.get("data_digest", "unknown")))


def _code(env: Mapping[str, Any]) -> str:
    return _told(env, _one_code)


def _place(env: Mapping[str, Any]) -> str:
    return _told(env, _one_place)


def _told(env: Mapping[str, Any], text: Any) -> str:
    """Of the run, and of each time it went on if that was elsewhere."""
    return ", then ".join(dict.fromkeys(text(part) for part in (env, *(env.get("resumed") or ()))))


def _one_code(env: Mapping[str, Any]) -> str:
    versions = env.get("versions") or {}
    commit = str(env.get("git_commit") or "unknown")
    short = commit.removesuffix(DIRTY)[:12] + (DIRTY if commit.endswith(DIRTY) else "")
    return f"s2sam {versions.get('s2sam', '?')}, torch {versions.get('torch', '?')}, commit {short}"


def _one_place(env: Mapping[str, Any]) -> str:
    hardware = env.get("hardware") or {}
    return str(hardware.get("gpu") or hardware.get("cpu") or "unknown")


def _listed(texts: Iterable[str], between: str = "; ") -> str:
    return between.join(f"{text} ({count} runs)" for text, count in Counter(texts).items())
