"""The end of a run: final weights and masks, the final record; and which epoch was the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2sam.sparse.base import Sparsifier
from s2sam.track.base import Loggers
from s2sam.train.averages import recalibrated
from s2sam.train.evaluate import evaluate_split
from s2sam.train.folder import RunFolder
from s2sam.train.seeding import generator
from s2sam.train.state import TrainState

SAME_SPARSITY = 1e-3  #: epochs whose sparsity differs by less compete for "best"


def finish(
    state: TrainState, folder: RunFolder, log: Loggers, record: dict[str, Any], step_seconds: float
) -> dict[str, Any]:
    """Write the final weights and masks, log and return the final record.

    Beside the plain test accuracy stands that with re-estimated BatchNorm statistics (`recalibrated_test_top1`), if the
    network has such layers, and that of the averaged weights (`ema_test_top1`), if there are any. Of sparse runs also
    what is left of the first mask (`survival`) and the share of weights ever active (`explored`, R_s of ITOP).

    Args:
        state: a run after its last step.
        folder: where the files go.
        log: where the records go.
        record: that of the last epoch.
        step_seconds: median seconds of a training step.

    Raises:
        RuntimeError: a pruned weight is not exactly 0, or there are more weights than the method's plan leaves.
    """
    assert state.best is not None
    if state.sparsifier is not None:
        check_sparsity(state.sparsifier)
    paths: list[Path] = [folder.save_tensors("model.safetensors", state.model.state_dict())]
    if state.ema is not None:
        paths.append(folder.save_tensors("ema.safetensors", state.ema.module.state_dict()))
    if state.sparsifier is not None:
        paths.append(folder.save_tensors("masks.safetensors", state.sparsifier.masks))
    parameters, active = state.parameter_counts()
    final = {
        "kind": "final", "test_top1": record["test_top1"], "test_loss": record["test_loss"],
        "val_top1": record["val_top1"], "best_epoch": state.best["epoch"], "best_val_top1": state.best["val_top1"],
        "best_test_top1": state.best["test_top1"], "sparsity": record["sparsity"], "parameters": parameters,
        "active_parameters": active, "step_seconds": step_seconds, "train_images": len(state.data.train_x),
        "test_images": len(state.data.test_x), "n_steps": state.step, "data_digest": state.data.digest,
    }  # fmt: skip
    final |= {key: value for key, value in record.items() if key.startswith("ema_")}
    if state.sparsifier is not None:
        final |= {"survival": state.sparsifier.survival(), "explored": state.sparsifier.explored()}
    twin = recalibrated(
        state.model, state.batches.data_x, state.config.batch_size, state.augment,
        generator(state.config.seed, "recalibrate"),
    )  # fmt: skip
    if twin is not None:
        loss, top1 = evaluate_split(twin, state.data, "test", state.augment)
        final |= {"recalibrated_test_loss": loss, "recalibrated_test_top1": top1}
    log.scalars(final)
    for path in paths:
        log.artifact(path)
    return final


def check_sparsity(sparsifier: Sparsifier) -> None:
    """Raise RuntimeError if a pruned weight is not exactly 0, or if more weights are left than the plan leaves."""
    sparsifier.verify()
    sparsifier.count_kept()
    if not sparsifier.frozen and any(sparsifier.behind(part) for part in sparsifier.parts):
        raise RuntimeError(
            f"the run ends at sparsity {sparsifier.sparsity():.4f} and method {sparsifier.method!r} means "
            f"{sparsifier.target_sparsity(sparsifier.step):.4f}, as no step was left to prune in; train longer, or let "
            "the pruning end earlier (sparse.options t_end or phases)"
        )


def beats(record: dict[str, Any], best: dict[str, Any] | None) -> bool:
    """True if an epoch is the new best: sparser than the best so far, or as sparse and better on validation images."""
    if best is None or record["sparsity"] > best["sparsity"] + SAME_SPARSITY:
        return True
    return bool(record["sparsity"] > best["sparsity"] - SAME_SPARSITY and record["val_top1"] > best["val_top1"])
