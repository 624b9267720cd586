"""The product of a sparse weight with a batch and its gradients, for linear layers and convolutions.

    y  = W x                             CSR or BSR times columns
    dx = W^T g                           the transposed pattern, with values[perm]
    dv = (g x^T) at the pattern          torch.sparse.sampled_addmm

A batch is a matrix with one column for each sample (linear layers) or output pixel (convolutions). It is taken a few
samples at a time, so that the columns of W x and of x stay in the cache: with thousands of columns at once the same
products take two to three times as long. MKL is fast on matrices stored by rows only, so each part is transposed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from s2sam.compact.pattern import SparsePattern

WORKING_SET = 1 << 20  #: bytes of columns that are multiplied at a time on a CPU: what a core's cache holds
FEWEST_COLUMNS = 64  #: but never fewer columns than this

with warnings.catch_warnings():  # torch says once that sparse CSR tensors are a beta feature; not in a user's training
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor(
        torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0), (1, 1)
    )


@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """Where a weight is stored: single entries (`block` = 1) or square blocks, `pattern` being that of the blocks.

    Values are (nnz,) for single entries and (nnz, block, block) for blocks.
    """

    pattern: SparsePattern
    block: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        return self.pattern.rows * self.block, self.pattern.cols * self.block

    def tensor(self, values: Tensor) -> Tensor:
        """The weight as a sparse tensor of torch, CSR or BSR, that shares the memory of `values`."""
        pattern = self.pattern
        if self.block == 1:
            return _csr(pattern, values)
        if not _multiplies_blocks(values.device.type):
            pattern, places = pattern.entries(self.block)
            return _csr(pattern, torch.empty_like(values).flatten().index_copy_(0, places.flatten(), values.flatten()))
        return torch.sparse_bsr_tensor(pattern.crow, pattern.col, values, self.shape, check_invariants=False)

    def transposed_tensor(self, values: Tensor, transposed: SparsePattern, perm: Tensor) -> Tensor:
        """The transposed weight likewise, by the pattern and the permutation of `pattern.transpose()`."""
        moved = values.index_select(0, perm)
        if self.block > 1:
            moved = moved.transpose(1, 2).contiguous()
        return SparseMatrix(transposed, self.block).tensor(moved)

    def sampler(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """A CSR tensor of zeros that `sampled_addmm` adds to, and where its entries are in the values (None: in order).

        The zeros matter: with beta = 0 `sampled_addmm` still multiplies what was there, so that NaN would stay.
        """
        pattern, places = (self.pattern, None) if self.block == 1 else self.pattern.entries(self.block)
        return _csr(pattern, torch.zeros(pattern.nnz, dtype=like.dtype, device=like.device)), places


def _csr(pattern: SparsePattern, values: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(pattern.crow, pattern.col, values, pattern.shape, check_invariants=False)


@lru_cache
def _multiplies_blocks(device: str) -> bool:
    """Whether torch multiplies BSR tensors here; a CPU without MKL multiplies CSR only. Warns the first time if not."""
    crow, col = torch.zeros(2, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    crow[1] = 1
    one = torch.sparse_bsr_tensor(crow, col, torch.ones(1, 2, 2, device=device), (2, 2), check_invariants=False)
    try:
        torch.addmm(torch.ones(2, 2, device=device), one, torch.ones(2, 2, device=device))
    except (RuntimeError, NotImplementedError):
        warnings.warn(
            f"this torch has no product of block-sparse tensors on {device} (on a CPU that takes a build with MKL); "
            "blocks are multiplied entry by entry, which gives the same results but no speed of blocks",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@dataclass(frozen=True)
class Rows:
    """How a linear layer's batch (samples, features) is a matrix: each sample is a column."""

    outputs: tuple[int, ...]  #: shape of a sample's output
    columns_each = 1  #: columns of a sample

    def columns(self, x: Tensor) -> Tensor:
        """(n, features) -> (features, n)."""
        return x.T.contiguous()

    def output(self, columns: Tensor, n: int) -> Tensor:
        """(outputs, n) -> (n, outputs)."""
        return columns.T

    def gradients(self, g: Tensor) -> Tensor:
        """The way back of :meth:`output`."""
        return g.T.contiguous()

    def input_gradient(self, columns: Tensor, n: int) -> Tensor:
        """The transpose of the linear map :meth:`columns`."""
        return columns.T


@dataclass(frozen=True)
class Windows:
    """How images are a matrix for a convolution: each output pixel is a column, the window that it sees (im2col)."""

    inputs: tuple[int, int, int]  #: channels, height, width
    outputs: tuple[int, int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def columns_each(self) -> int:
        """Output pixels of an image."""
        return self.outputs[1] * self.outputs[2]

    @property
    def pointwise(self) -> bool:
        """Whether each window is one pixel, so that nothing has to be unfolded."""
        return self.kernel_size == (1, 1) and self.padding == (0, 0)

    def columns(self, x: Tensor) -> Tensor:
        """(n, channels, height, width) -> (channels * kernel, n * output pixels)."""
        if self.pointwise:
            windows = x[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)
        else:
            windows = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)
        return windows.transpose(0, 1).flatten(1).contiguous()

    def output(self, columns: Tensor, n: int) -> Tensor:
        """(channels, n * pixels) -> (n, channels, height, width)."""
        return columns.view(-1, n, *self.outputs[1:]).transpose(0, 1)

    def gradients(self, g: Tensor) -> Tensor:
        """The way back of :meth:`output`."""
        return g.transpose(0, 1).flatten(1).contiguous()

    def input_gradient(self, columns: Tensor, n: int) -> Tensor:
        """The transpose of the linear map :meth:`columns`."""
        windows = columns.view(-1, n, self.columns_each).transpose(0, 1)
        if not self.pointwise:
            return F.fold(windows, self.inputs[1:], self.kernel_size, self.dilation, self.padding, self.stride)
        d = columns.new_zeros(n, *self.inputs)
        d[:, :, :: self.stride[0], :: self.stride[1]] = windows.view(n, *(self.inputs[0], *self.outputs[1:]))
        return d


def multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    matrix: SparseMatrix,
    geometry: Rows | Windows,
    transposed: tuple[SparsePattern, Tensor] | None = None,
) -> Tensor:
    """y = W x + b for every sample of `x`, with gradients for `x`, `values` and `bias`.

    Args:
        x: (samples, ...), of the same dtype as `values` and `bias`; bf16 and fp16 are multiplied and summed in float32
            and rounded at the end, as torch has no sparse products of them.
        values: as `matrix` says.
        bias: (rows,) or None.
        matrix: where the weights are.
        geometry: how a part of `x` is a matrix.
        transposed: `pattern.transpose()`; needed for the gradient of `x` only.

    Raises:
        RuntimeError: a backward pass with create_graph=True, as there is no second derivative.
    """
    y: Tensor = _Product.apply(x, values, bias, matrix, geometry, transposed)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    """See :func:`multiply`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        matrix: SparseMatrix,
        geometry: Rows | Windows,
        transposed: tuple[SparsePattern, Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.matrix, ctx.geometry, ctx.transposed = matrix, geometry, transposed
        dtype = _wide(x.dtype)
        weight = matrix.tensor(values.to(dtype))
        bias = None if bias is None else bias.to(dtype)
        y = x.new_empty(len(x), *geometry.outputs)
        for part in _parts(x, matrix, geometry):
            columns = geometry.columns(x[part].to(dtype))
            y[part] = geometry.output(_matmul(weight, columns, bias), len(x[part]))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a compact layer has no second derivative (backward was called with create_graph=True); convert the "
                "model with s2sam.compact.to_dense(model) to differentiate twice"
            )
        x, values = ctx.saved_tensors
        matrix, geometry = ctx.matrix, ctx.geometry
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        dtype = _wide(x.dtype)
        dx = torch.empty_like(x) if needs_x else None
        db = torch.zeros(matrix.shape[0], dtype=dtype, device=x.device) if needs_bias else None
        back = matrix.transposed_tensor(values.to(dtype), *ctx.transposed) if needs_x else None
        sampled, places = matrix.sampler(x.new_empty(0, dtype=dtype)) if needs_values else (None, None)
        for part in _parts(x, matrix, geometry):
            of_outputs = geometry.gradients(g[part].to(dtype))
            if sampled is not None:
                columns = geometry.columns(x[part].to(dtype))
                torch.sparse.sampled_addmm(sampled, of_outputs, columns.T, beta=1.0, out=sampled)
            if dx is not None and back is not None:
                dx[part] = geometry.input_gradient(_matmul(back, of_outputs, None), len(x[part]))
            if db is not None:
                db += of_outputs.sum(1)
        dv = None if sampled is None else sampled.values()
        if dv is not None and places is not None:
            dv = dv[places]
        dv = None if dv is None else dv.to(values.dtype)
        return dx, dv, None if db is None else db.to(values.dtype), None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sparse products are computed in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _columns_at_once(shape: tuple[int, int], like: Tensor) -> int:
    """How many columns are multiplied at a time: as many as the working set holds on a CPU, else all."""
    if like.device.type != "cpu":
        return 1 << 62
    return max(FEWEST_COLUMNS, WORKING_SET // (sum(shape) * _wide(like.dtype).itemsize))


def _parts(x: Tensor, matrix: SparseMatrix, geometry: Rows | Windows) -> Iterator[slice]:
    """The samples that are multiplied together, in order."""
    step = max(1, _columns_at_once(matrix.shape, x) // max(1, geometry.columns_each))
    for start in range(0, len(x), step):
        yield slice(start, start + step)


def _matmul(weight: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    """weight @ columns + bias, where one image alone has too many columns by slices of them.

    Autocast leaves calls with `out=` alone; it would cast the operands to bf16, of which torch has no sparse product.
    """
    out = columns.new_empty(weight.shape[0], columns.shape[1])
    if bias is not None:
        out[:] = bias[:, None]
    step = _columns_at_once(tuple(weight.shape), columns)  # type: ignore[arg-type]
    if columns.shape[1] < 2 * step:
        step = max(1, columns.shape[1])
    for start in range(0, columns.shape[1], step):
        place, part = out[:, start : start + step], columns[:, start : start + step]
        torch.addmm(place, weight, part, beta=0 if bias is None else 1, out=place)
    return out
