"""SparseLinear and SparseConv2d: layers that store, train and multiply their active weights only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2sam.compact.pattern import SparsePattern
from s2sam.compact.product import Rows, SparseMatrix, Windows, multiply
from s2sam.private_torch import is_tracing, is_transforming


class StoredLayer(nn.Module):
    """What both layers share: values, pattern, bias, the dense form and the state; not for use by itself."""

    values: nn.Parameter
    bias: nn.Parameter | None
    crow: Tensor
    col: Tensor
    dense_shape: Tensor
    _crow_t: Tensor
    _col_t: Tensor
    _perm: Tensor | None

    def __init__(self, pattern: SparsePattern, values: Tensor, bias: Tensor | None, shape: Sequence[int]) -> None:
        super().__init__()
        if not values.is_floating_point() or values.dim() not in (1, 3) or len(values) != pattern.nnz:
            raise ValueError(
                f"a pattern of {pattern.nnz} entries takes as many real values (blocks of values for a pattern of "
                f"blocks), got {values.dtype} of shape {tuple(values.shape)}"
            )
        block = 1 if values.dim() == 1 else values.shape[1]
        size = (pattern.rows * block, pattern.cols * block)
        if size != (shape[0], math.prod(shape[1:])) or (values.dim() == 3 and values.shape[1] != values.shape[2]):
            raise ValueError(
                f"the pattern and values of shape {tuple(values.shape)} make a matrix of {size[0]} x {size[1]}, which "
                f"is no weight of shape {tuple(shape)}; blocks must be square"
            )
        if bias is not None and (bias.shape != shape[:1] or bias.dtype != values.dtype):
            raise ValueError(
                f"the bias must be a row of {shape[0]} {values.dtype}, got {bias.dtype} of shape {tuple(bias.shape)}"
            )
        self._size, self._blocks = tuple(shape), (pattern.rows, pattern.cols)
        self.values = values if isinstance(values, nn.Parameter) else nn.Parameter(values)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)
        self.register_buffer("crow", pattern.crow)
        self.register_buffer("col", pattern.col)
        self.register_buffer("dense_shape", torch.tensor(shape, device=pattern.col.device))
        for name in ("_crow_t", "_col_t", "_perm"):  # the transposed pattern, made when a gradient first needs it
            self.register_buffer(name, None, persistent=False)

    @property
    def block(self) -> int:
        """The side of the square blocks that are stored, 1 for single weights."""
        return 1 if self.values.dim() == 1 else self.values.shape[1]

    @property
    def pattern(self) -> SparsePattern:
        """Where the weights are (the blocks, if blocks are stored)."""
        return SparsePattern(*self._blocks, self.crow, self.col)

    @property
    def sparsity(self) -> float:
        """The share of the dense weight that is not stored."""
        return 1 - self.values.numel() / math.prod(self._size)

    def dense_weight(self) -> Tensor:
        """The weight as a dense tensor with zeros, of the dense layer's shape; differentiable in the values.

        Cost: memory for the whole weight. Exported programs and torch.func transforms compute with it.
        """
        nnz = len(self.values)
        # the row of each entry as a sum of ones, which every exporter knows: the rows that have ended before it
        ended = torch.zeros(nnz + 1, dtype=torch.int64, device=self.col.device)
        one = torch.ones(1, dtype=torch.int64, device=self.col.device)
        row = ended.index_put((self.crow[1:-1].long(),), one, accumulate=True)[:nnz].cumsum(0)
        col, width = self.col.long(), math.prod(self._size[1:])
        if self.block > 1:
            inside = torch.arange(self.block, device=col.device)
            row = row[:, None, None] * self.block + inside[:, None]
            col = col[:, None, None] * self.block + inside
        places = (row * width + col).flatten()
        dense = torch.zeros(math.prod(self._size), dtype=self.values.dtype, device=self.values.device)
        return dense.index_put((places,), self.values.flatten()).view(self._size)

    def _multiply(self, x: Tensor, geometry: Rows | Windows) -> Tensor:
        if torch.compiler.is_dynamo_compiling():
            return _multiply_outside_graphs(self, x, geometry)  # type: ignore[no-any-return]
        transposed = self._transposed() if x.requires_grad and torch.is_grad_enabled() else None
        matrix = SparseMatrix(self.pattern, self.block)
        bias = None if self.bias is None else self.bias.to(x.dtype)  # another dtype than its own under autocast
        return multiply(x, self.values.to(x.dtype), bias, matrix, geometry, transposed)

    def _transposed(self) -> tuple[SparsePattern, Tensor]:
        perm = self._perm
        if perm is None:
            pattern, perm = self.pattern.transpose()
            self._crow_t, self._col_t, self._perm = pattern.crow, pattern.col, perm
        rows, cols = self._blocks
        return SparsePattern(cols, rows, self._crow_t, self._col_t), perm

    def _as_computed(self, x: Tensor) -> Tensor:
        """The input in the dtype it is multiplied in: autocast's, as for a dense layer, or else that of the values."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(kind))
        if x.dtype != self.values.dtype:
            raise TypeError(
                f"{type(self).__name__} has values of {self.values.dtype} and got an input of {x.dtype}; convert one"
            )
        return x

    def _computes_densely(self) -> bool:
        """Whether operations are recorded or transformed, which takes those of the dense layer."""
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            return False  # torch.compile calls the sparse product outside of its graphs
        return is_tracing() or is_transforming() or self.values.is_meta

    def _dense(self, layer: nn.Module) -> Any:
        """Give `layer`, which is on the meta device, this layer's weight, bias and mode."""
        layer.weight = nn.Parameter(self.dense_weight().detach(), self.values.requires_grad)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return layer.train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load values of the same pattern, or a dense weight that is 0 outside of it; anything else is refused."""
        errors: list[str] = args[-1]
        weight = state_dict.pop(prefix + "weight", None)
        if weight is not None:
            values = self._values_of(weight)
            if values is None:
                errors.append(
                    f"{prefix}weight, a dense weight of shape {tuple(weight.shape)}, is of another shape or not 0 "
                    f"outside of the pattern of this {type(self).__name__}; make the layer from it with from_dense()"
                )
                return
            own = {"values": values, **{name: getattr(self, name) for name in ("crow", "col", "dense_shape")}}
            state_dict.update({prefix + name: t for name, t in own.items()})
        elif prefix + "values" in state_dict:
            for name in ("dense_shape", "crow", "col"):
                given, own_tensor = state_dict.get(prefix + name), getattr(self, name)
                if given is None or not torch.equal(given.to(own_tensor.device), own_tensor):
                    errors.append(
                        f"{prefix}values belong to another sparse pattern than that of this {type(self).__name__} "
                        f"({prefix}{name} differs); make the layer from the state with s2sam.compact.dense_state()"
                    )
                    return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _values_of(self, weight: Tensor) -> Tensor | None:
        """What this layer stores of a dense weight, None if that is not all of it."""
        if weight.shape != self._size:
            return None
        matrix = weight.detach().to(self.col.device).flatten(1)
        values = _stored(matrix, self.pattern, self.block)
        return values if values.count_nonzero() == matrix.count_nonzero() else None

    def _described(self) -> str:
        block = f", block={self.block}" if self.block > 1 else ""
        return f"sparsity={self.sparsity:.4g}, bias={self.bias is not None}{block}"


#: torch.compile multiplies between two graphs
_multiply_outside_graphs = torch.compiler.disable(  # type: ignore[no-untyped-call]
    StoredLayer._multiply,
    reason="a compact layer multiplies sparse tensors, which no graph holds; leave out fullgraph=True",
)


class SparseLinear(StoredLayer):
    """A linear layer that stores its active weights only: y = W x + b with W in compressed sparse rows, or blocks.

    `values` is the only weight parameter, so gradients, optimizer state and everything else of a parameter's size
    shrink with it; the pattern is in the buffers `crow` and `col`. Build it with :meth:`from_dense`, or with
    :func:`sparse_linear` where the dense layer would not fit into memory.

    Shapes: (..., in_features) -> (..., out_features); values (nnz,) in the order of rows, or (blocks, b, b) with the
    pattern of a matrix of b x b blocks. float32 and float64 are multiplied as they are; bf16, fp16 and what autocast
    makes of float32 are multiplied in float32 and rounded, as torch's sparse kernels know no other.

    Cost: a multiplication and an addition per weight and sample in the forward pass, twice that in the backward pass;
    4 bytes per weight beside the value, 12 once the gradient of the input has been asked for.

    Args:
        pattern: where the weights are, or the blocks.
        values: the weights, or blocks of them.
        bias: (out_features,) or None.

    Raises:
        ValueError: values or bias do not fit the pattern.
        TypeError: at a call, an input of another dtype than the values, outside of autocast.
        RuntimeError: at a backward pass with create_graph=True; see :func:`s2sam.compact.to_dense`.

    >>> layer = SparseLinear.from_dense(nn.Linear(4, 2), torch.eye(2, 4).bool())
    >>> layer
    SparseLinear(in_features=4, out_features=2, sparsity=0.75, bias=True)
    >>> layer(torch.ones(3, 4)).shape, sorted(name for name, _ in layer.named_parameters())
    (torch.Size([3, 2]), ['bias', 'values'])
    """

    def __init__(self, pattern: SparsePattern, values: Tensor, bias: Tensor | None = None) -> None:
        block = values.shape[1] if values.dim() == 3 else 1
        self.out_features, self.in_features = pattern.rows * block, pattern.cols * block
        super().__init__(pattern, values, bias, (self.out_features, self.in_features))

    @classmethod
    def from_dense(cls, layer: nn.Linear, mask: Tensor | None = None, block: int = 1) -> SparseLinear:
        """The layer with those weights of `layer` that `mask` keeps, in memory of its own; without a mask those not 0.

        With `block` > 1 every block that holds one of them is stored, and trained, whole. Hooks of `layer` are not
        carried over.

        Raises:
            ValueError: `layer` cannot be converted (:func:`obstacle` says why), the mask is of another shape, or the
                block divides a side of the weight not.
        """
        return cls(*_converted(cls, layer, mask, block)).train(layer.training)

    def to_dense(self) -> nn.Linear:
        """The dense layer with the same weights and zeros, in memory of its own."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return self._dense(layer)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if self._computes_densely():
            return F.linear(x, self.dense_weight(), self.bias)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"this layer takes inputs of {self.in_features} features, got shape {tuple(x.shape)}")
        x = self._as_computed(x)
        y = self._multiply(x.reshape(-1, self.in_features), Rows((self.out_features,)))
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """For repr()."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._described()}"


class SparseConv2d(StoredLayer):
    """A convolution that stores its active weights only: windows as columns (im2col), times W as in `SparseLinear`.

    A 1x1 convolution multiplies the pixels as they are. A larger one writes out its windows, k x k times the image, a
    few images at a time and again in the backward pass; it is faster than the dense one only where the channels are
    many and the weights few (:func:`s2sam.compact.accelerate` measures it).

    Shapes: (N, C, H, W) or (C, H, W), as `nn.Conv2d`; the weight is a matrix of out_channels x (C * k * k). Everything
    else is as in :class:`SparseLinear`. Groups, and padding with anything but zeros, are refused.

    >>> layer = SparseConv2d.from_dense(nn.Conv2d(2, 4, 3, padding=1), torch.rand(4, 2, 3, 3) > 0.9)
    >>> layer(torch.ones(5, 2, 8, 8)).shape
    torch.Size([5, 4, 8, 8])
    """

    def __init__(
        self,
        pattern: SparsePattern,
        values: Tensor,
        bias: Tensor | None = None,
        *,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> None:
        block = values.shape[1] if values.dim() == 3 else 1
        self.out_channels = pattern.rows * block
        self.in_channels = pattern.cols * block // math.prod(kernel_size)
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        super().__init__(pattern, values, bias, (self.out_channels, self.in_channels, *kernel_size))

    @classmethod
    def from_dense(cls, layer: nn.Conv2d, mask: Tensor | None = None, block: int = 1) -> SparseConv2d:
        """As :meth:`SparseLinear.from_dense`; the mask has the shape of the convolution's weight."""
        parts = _converted(cls, layer, mask, block)
        kernel_size, stride, dilation = (_pair(v) for v in (layer.kernel_size, layer.stride, layer.dilation))
        made = cls(*parts, kernel_size=kernel_size, stride=stride, padding=_padding(layer), dilation=dilation)
        return made.train(layer.training)

    def to_dense(self) -> nn.Conv2d:
        """The dense convolution with the same weights and zeros, in memory of its own."""
        layer = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            bias=self.bias is not None, device="meta",
        )  # fmt: skip
        return self._dense(layer)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H', W'), or the same without N."""
        if self._computes_densely():
            return F.conv2d(x, self.dense_weight(), self.bias, self.stride, self.padding, self.dilation)
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(f"this layer takes images of {self.in_channels} channels, got shape {tuple(x.shape)}")
        if x.dim() == 3:
            y: Tensor = self(x[None])
            return y[0]
        x = self._as_computed(x)
        sides = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        if min(sides) < 1:
            raise ValueError(f"images of {x.shape[2]} x {x.shape[3]} pixels are smaller than this layer's kernel")
        windows = Windows(
            (self.in_channels, x.shape[2], x.shape[3]), (self.out_channels, sides[0], sides[1]),
            self.kernel_size, self.stride, self.padding, self.dilation,
        )  # fmt: skip
        return self._multiply(x, windows)

    def extra_repr(self) -> str:
        """For repr()."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, {self._described()}"
        )


def sparse_linear(
    in_features: int, out_features: int, sparsity: float, generator: torch.Generator, bias: bool = True
) -> SparseLinear:
    """A new :class:`SparseLinear` that never exists densely: pattern and values are drawn directly.

    round((1 - sparsity) n) of the n weights are active, uniformly at random (:meth:`SparsePattern.random`, before the
    values). They are W ~ N(0, 2 / in_features), biases 0: the initial weights of this library's own networks
    (`s2sam.models`), whose fan-in is that of the dense layer and which no sparse method rescales after pruning. So the
    layer begins as the masked one does, and its outputs are smaller by sqrt(1 - sparsity) than a dense layer's; a
    normalisation behind it, or `layer.values.data /= (1 - sparsity) ** 0.5`, makes up for that.

    Memory: proportional to the number of active weights. Source of the initial values: He et al. 2015, equation 10.

    >>> layer = sparse_linear(200_000, 64, 0.999, torch.Generator().manual_seed(0))
    >>> layer.values.numel(), layer(torch.ones(2, 200_000)).shape
    (12800, torch.Size([2, 64]))

    Raises:
        ValueError: a size is not positive, or the sparsity is outside [0, 1) or leaves no weight.
        TypeError: `generator` is no torch.Generator of the CPU.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be from 0 to below 1, got {sparsity!r}")
    for name, n in (("in_features", in_features), ("out_features", out_features)):
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"{name} must be a positive whole number, got {n!r}")
    total = in_features * out_features
    count = round((1 - sparsity) * total)
    if count == 0:
        raise ValueError(f"sparsity {sparsity} leaves none of {total} weights; give at most {1 - 1 / total:.9g}")
    pattern = SparsePattern.random(out_features, in_features, count, generator)
    values = torch.empty(count).normal_(0.0, math.sqrt(2.0 / in_features), generator=generator)
    return SparseLinear(pattern, values, torch.zeros(out_features) if bias else None)


def obstacle(module: nn.Module) -> str:
    """Why `module` cannot become a compact layer; "" if it can.

    >>> obstacle(nn.Conv2d(4, 4, 3, groups=2))
    'it has 2 groups'
    """
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"its class is {type(module).__name__}, not Linear or Conv2d itself"
    if "weight" not in module._parameters:
        return "its weight is computed from other tensors"
    if not module.weight.is_floating_point():  # type: ignore[operator]
        return f"its weight is {module.weight.dtype}"
    if isinstance(module, nn.Conv2d):
        if module.groups != 1:
            return f"it has {module.groups} groups"
        if module.padding_mode != "zeros":
            return f"it pads with {module.padding_mode!r}, not zeros"
        if module.padding == "same" and any(
            d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ):
            return "it pads one side more than the other"
    return ""


def _converted(
    kind: type[StoredLayer], layer: nn.Module, mask: Tensor | None, block: int
) -> tuple[SparsePattern, nn.Parameter, nn.Parameter | None]:
    """Pattern, values and bias of a dense layer as a compact one of this kind."""
    wanted = nn.Linear if issubclass(kind, SparseLinear) else nn.Conv2d
    reason = obstacle(layer) or ("" if type(layer) is wanted else f"its class is {type(layer).__name__}")
    if reason:
        raise ValueError(f"this layer cannot become a {kind.__name__}: {reason}")
    assert isinstance(layer, (nn.Linear, nn.Conv2d))
    weight = layer.weight.detach()
    mask = weight != 0 if mask is None else mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
        got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"the mask must be a bool tensor of the weight's shape {tuple(weight.shape)}, got {got}")
    mask = mask.to(weight.device)
    matrix, kept = weight.flatten(1), mask.flatten(1)
    if isinstance(block, bool) or not isinstance(block, int) or block < 1 or any(n % block for n in matrix.shape):
        raise ValueError(f"blocks of side {block!r} do not divide a weight of {matrix.shape[0]} x {matrix.shape[1]}")
    tiles = kept if block == 1 else _tiles(kept, block).flatten(2).any(2)
    pattern = SparsePattern.from_mask(tiles)
    values = nn.Parameter(_stored(torch.where(kept, matrix, 0), pattern, block), layer.weight.requires_grad)
    bias = layer.bias
    return pattern, values, None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)


def _tiles(matrix: Tensor, block: int) -> Tensor:
    """(rows, cols) -> (rows / block, cols / block, block, block)."""
    rows, cols = matrix.shape
    return matrix.view(rows // block, block, cols // block, block).transpose(1, 2)


def _stored(matrix: Tensor, pattern: SparsePattern, block: int) -> Tensor:
    """The values of a dense matrix at the pattern, a copy."""
    row, col = pattern.row_of_each().long(), pattern.col.long()
    return (matrix if block == 1 else _tiles(matrix, block))[row, col].contiguous()


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    """The zeros on either side."""
    if layer.padding == "valid":
        return (0, 0)
    if layer.padding == "same":
        both = [d * (k - 1) // 2 for d, k in zip(_pair(layer.dilation), _pair(layer.kernel_size), strict=True)]
        return (both[0], both[1])
    return _pair(layer.padding)  # type: ignore[arg-type]
