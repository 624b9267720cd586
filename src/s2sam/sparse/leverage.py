"""Which columns of a matrix matter: leverage scores, and what the others have that the kept ones lack. Pure functions.

W is (channels, entries): a row for each channel, so that the channels are the columns of the matrix of the papers.

Source: Hou et al. 2022, CHEX, arXiv:2203.15794; zejiangh/Filter-GaP:CLS/image_classification/prune_utils.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from s2sam.sparse.topk import topk_mask


def leverage(w: Tensor, k: int) -> Tensor:
    """l_j = ||row j of V_k||, V_k the first k singular vectors over channels; column subset selection keeps the most.

    w^T = U S V^T;  sum_j l_j^2 = min(k, rank of w);  0 <= l_j <= 1. With fewer entries than channels the scores are
    L1 norms instead, as in the authors' code. A channel that is 0 scores 0.

    >>> leverage(torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), 1).tolist()
    [1.0, 0.0, 0.0]
    """
    w = torch.nan_to_num(w.detach().double())
    if w.shape[1] < w.shape[0]:
        return w.abs().sum(1)
    v, s, _ = torch.linalg.svd(w, full_matrices=False)
    v = v[:, :k][:, s[:k] > s[0] * 1e-12]
    found: Tensor = v.norm(dim=1).masked_fill(~w.any(1), 0.0)
    return found


def residual(w: Tensor, keep: Tensor) -> Tensor:
    """r_j = ||w_j - P w_j||, P the orthogonal projection onto the span of the channels `keep`; 0 for these.

    >>> residual(torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([True, False])).tolist()
    [0.0, 3.0]
    """
    w = torch.nan_to_num(w.detach().double())
    keep = keep.to(w.device)
    if not bool(keep.any()):
        everything: Tensor = w.norm(dim=1)
        return everything
    _, s, basis = torch.linalg.svd(w[keep], full_matrices=False)
    basis = basis[s > s[0] * 1e-12]
    missing: Tensor = (w - (w @ basis.T) @ basis).norm(dim=1)
    return missing.masked_fill(keep, 0.0)


def draw(logits: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """A mask of exactly `n` places, drawn one after the other without replacement, p = softmax(logits); -inf: never.

    By Gumbel's trick: the n largest of logits + G are such a draw. On the CPU, so that every device draws the same.

    >>> draw(torch.tensor([0.0, -torch.inf, 50.0, 0.0]), 1, torch.Generator().manual_seed(0)).tolist()
    [False, False, True, False]
    """
    logits = logits.double().cpu()
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-300, 1 - 1e-16)
    return topk_mask(logits - torch.log(-torch.log(uniform)), n)
