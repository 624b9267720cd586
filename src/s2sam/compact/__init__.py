"""Layers that store, train and multiply their active weights only, for real speed and memory from sparsity on a CPU."""

from s2sam.compact.by_timing import Accelerated, LayerTimes, accelerate
from s2sam.compact.conversion import dense_state, from_dense, to_dense
from s2sam.compact.layers import SparseConv2d, SparseLinear, sparse_linear
from s2sam.compact.pattern import SparsePattern

__all__ = [
    "Accelerated",
    "LayerTimes",
    "SparseConv2d",
    "SparseLinear",
    "SparsePattern",
    "accelerate",
    "dense_state",
    "from_dense",
    "sparse_linear",
    "to_dense",
]
