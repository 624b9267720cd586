"""How masks begin: drawn now, taken from the zeros that are there ("adopt"), or loaded later; and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from s2sam.hooks import step_hooks
from s2sam.sparse import sync
from s2sam.sparse.masks import counts
from s2sam.sparse.names import unknown

if TYPE_CHECKING:
    from s2sam.sparse.base import Sparsifier

Init = bool | Literal["adopt", "anew"]
SPARSE = 0.1  #: the share of zeros from which on weights are sparse already; random draws in bfloat16 have 1 in 256
ROUNDING = 1e-3  #: a sparsity may differ by so much, or by one weight a layer, from the one that is there


def check_init(init: Init, sparsity: float | None) -> Init:
    """`init`, if it is one of the four values and goes with `sparsity`."""
    if isinstance(init, str) and init not in ("adopt", "anew"):
        raise unknown("init", init, ("adopt", "anew"))
    if not isinstance(init, str) and init not in (True, False):
        raise ValueError(f"init must be True, False, 'adopt' or 'anew', got {init!r}")
    if sparsity is None and init != "adopt":
        raise ValueError("sparsity=None means the one that is there, for init='adopt' alone; give a number from 0 to 1")
    return init if isinstance(init, str) else bool(init)


def refuse_sparse(sparsifier: Sparsifier) -> None:
    """Raise ValueError, on every rank, if the new masks, not applied yet, would prune sparse weights a second time.

    That is so if at least 10 % of the weights that they keep are exactly 0. Layers that are entirely 0 do not count:
    they were initialised so. Masks that keep the weights that are left, the largest say, prune on from there.
    """
    blank, (zero, kept) = sparsifier.all_zero(), sparsifier.zeros_in(sparsifier.masks)
    total = sum(n for name, n in kept.items() if name not in blank)
    share = sync.largest(sum(n for name, n in zero.items() if name not in blank) / total if total else 0.0)
    if share >= SPARSE:
        raise ValueError(
            f"the model is sparse already, and would be pruned a second time: {share:.1%} of the weights that new "
            "masks would keep are exactly 0; give init='adopt' to take the masks from its zeros, init=False to load "
            "saved masks with load_state_dict(), or init='anew' to prune all the same (after dirac_ or eye_, say)"
        )


def check_displaced(sparsifier: Sparsifier, what: str) -> None:
    """Raise RuntimeError if S2SAM has displaced the weights."""
    if any(getattr(step_hooks(one).sharpness, "is_displaced", False) for one in sparsifier.optimizers):
        raise RuntimeError(f"the weights are displaced; call sam.restore() before {what}")


def zeros_there(sparsifier: Sparsifier) -> dict[str, Tensor]:
    """For init="adopt" the masks of the weights that are not 0 on rank 0; sets `adopted` and the sparsity there is.

    Raises:
        ValueError: the weights are not as they are to be adopted; on every rank alike.
    """
    method, asked, weights = sparsifier.method, sparsifier.final_sparsity, sparsifier.weights
    if sparsifier.cannot_adopt:
        raise ValueError(
            f"method {method!r} cannot take its masks from zeros: {sparsifier.cannot_adopt}; load the state of its own "
            "run with init=False, or begin with these weights by init='anew'"
        )
    present = {name: w.detach() != 0 for name, w in weights.items()}
    sync.broadcast_masks(present)
    kept = counts(present)
    for name, n in kept.items():
        if not n:
            raise ValueError(
                f"{name!r} is entirely 0, which does not say whether it is pruned or was initialised so; leave it "
                f"dense with exclude={name!r}, or begin with init='anew'"
            )
    total = sum(w.numel() for w in weights.values())
    share, near = 1 - sum(kept.values()) / total, max(ROUNDING, len(weights) / total)
    if asked is None and share < SPARSE:
        raise ValueError(
            f"only {share:.1%} of the weights are exactly 0, so there is no sparse model to adopt; load its weights "
            "first, or give a sparsity and init=True to prune now"
        )
    if asked is not None and (share > asked + near or (share < asked - near and not sparsifier.gradual)):
        more = " or more" if sparsifier.gradual else ""
        raise ValueError(
            f"the weights have a sparsity of {share:.6g}, and sparsity={asked:g} was asked for, which method "
            f"{method!r} cannot make of them; give sparsity={share:.6g}{more}, or None for the one that is there"
        )
    if asked is None or share > asked - near:
        sparsifier._final_sparsity = share
    sparsifier.adopted = kept
    return present
