r"""The loss of a network as a function on its active weights: value, gradient and products with its Hessian.

A point is a flat vector e of as many numbers as there are active weights (pruned ones have no coordinate, so that
nothing measured here can leave the sparse subspace), counted from the network's weights w:

    L(w + e) = (1/N) sum_i loss(f(x_i; w + e), y_i)

Everything happens on a copy. The network that was given is read once and never moved, whatever happens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from s2sam.analysis.hessian_graphs import Gradient, Graphs
from s2sam.analysis.ranks import Ranks
from s2sam.hooks import check_number
from s2sam.sparse.names import unknown

BN_MODES = ("eval", "train")


def batch_sizes(images: int, most: int) -> list[int]:
    """As few batches of at most `most` images as hold them all, as equal as can be.

    >>> batch_sizes(260, 250), batch_sizes(10, 4)
    ([130, 130], [4, 3, 3])
    """
    count = math.ceil(images / most)
    return [images // count + (i < images % count) for i in range(count)]


class ActiveLoss:
    """Mean cross entropy over fixed images, on the active weights of a copy of a network.

    Args:
        model: at the weights w, on the device where it is to run. It is copied and then left alone.
        x: images as stored (N, C, H, W), on that device.
        y: labels (N,), or probabilities (N, classes), there as well.
        prepare: turns stored images into what the model takes; nothing random.
        masks: True = active, by the name of the parameter; one without a mask is dense.
        bn: eval = BatchNorm takes the running statistics; train = those of each batch, of `batch_size` images, and its
            derivatives go through them. All else is in eval mode.
        dtype: of weights and images: float32, or float64 at about twice the time.
        batch_size: images that pass the network at once; with bn = train the loss depends on it.
        label_smoothing: of the cross entropy.
        process_group: of torch.distributed, whose ranks all make this object from the same network and images and call
            the same methods: each takes every so many-th batch, and all get the result. None = this process alone.
        keep: bytes that graphs may take between one product and the next; None = 1 GiB, on CUDA at least a quarter of
            the free memory.

    Sums over batches are taken in float64, so that the number of ranks changes their last bits only.

    Raises:
        ValueError: no images, no active weights, or a mask that does not fit.

    Cost: a copy of the weights, and one more of them to come back to; what is kept of graphs. With ranks a sum of n
    numbers for each gradient, and for each row of a product a broadcast and a sum.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> loss = ActiveLoss(model, torch.eye(2), torch.tensor([0, 1]), masks={"weight": torch.eye(2) > 0})
        >>> loss.size, loss.gradient()[1].shape, loss.product(torch.ones(3, 2)).shape
        (2, torch.Size([2]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        prepare: Callable[[Tensor], Tensor] = lambda x: x,
        masks: Mapping[str, Tensor] | None = None,
        *,
        bn: str = "eval",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 250,
        label_smoothing: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
        keep: int | None = None,
    ) -> None:
        if bn not in BN_MODES:
            raise unknown("BatchNorm mode", bn, BN_MODES)
        if len(x) == 0:
            raise ValueError("sharpness needs images, and there are none; choose another split")
        check_number("batch_size", batch_size, 1)
        self.x, self.y, self.prepare, self.dtype = x, y, prepare, dtype
        self.batch_size, self.label_smoothing = int(batch_size), label_smoothing
        self.model = copy.deepcopy(model).to(dtype)
        self.model.eval()
        for module in self.model.modules():
            if bn == "train" and isinstance(module, _BatchNorm):
                module.train()
        self._check_batches()
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        masks = masks or {}
        for name, mask in masks.items():
            if name not in named or named[name].shape != mask.shape:
                raise ValueError(f"the mask {name!r} fits no weight of the network; take the masks of the same run")
        self.parameters = list(named.values())
        self._weights = [p.detach() for p in self.parameters]
        self._origin = [p.clone() for p in self._weights]
        self._dense = [p.numel() for p in self.parameters]
        where = [masks[name].to(p.device) if name in masks else torch.ones_like(p).bool() for name, p in named.items()]
        active = torch.cat([mask.flatten() for mask in where]) if where else torch.zeros(0, dtype=torch.bool)
        self._index = None if active.all() else active.nonzero()[:, 0]  # of the active weights among all, if not all
        self.size = len(active) if self._index is None else len(self._index)  #: n, the number of active weights
        self.passes = {"loss": 0, "gradient": 0, "product": 0}  #: over all images, so far
        if self.size == 0:
            raise ValueError("the network has no active weights to move")
        self.ranks, self.keep = Ranks(process_group), keep
        self._moves = [0]  # how often the copy was moved; shared with the parts
        self._graphs = Graphs(self._origin[0].device, keep)

    @property
    def weights(self) -> Tensor:
        """w (n,), a copy."""
        return self.flat(self._origin)

    def flat(self, tensors: list[Tensor]) -> Tensor:
        """The active entries of one tensor for each parameter, as one vector (n,)."""
        whole = torch.cat([t.flatten() for t in tensors])
        return whole if self._index is None else whole[self._index]

    def spread(self, vector: Tensor) -> list[Tensor]:
        """A vector (n,) as one tensor for each parameter, 0 where it is pruned."""
        if self._index is not None:
            vector = vector.new_zeros(sum(self._dense)).index_copy_(0, self._index, vector)
        return [part.view_as(p) for part, p in zip(vector.split(self._dense), self._weights, strict=True)]

    def split(self, images: int) -> list[ActiveLoss]:
        """The loss over each `images` images by themselves, on the same copy; what is left over at the end is dropped.

        Fewer images than that are one part. A part belongs to this process alone.
        """
        parts = []
        for i in range(max(1, len(self.x) // images)):
            part = copy.copy(self)
            part.ranks, part._graphs = Ranks(), Graphs(self._graphs.device, self.keep)
            rows = slice(i * images, (i + 1) * images)
            part.x, part.y, part.passes = self.x[rows], self.y[rows], dict.fromkeys(self.passes, 0)
            part.batch_size = min(self.batch_size, images)
            part._check_batches()
            parts.append(part)
        return parts

    @torch.no_grad()
    def loss(self, e: Tensor | None = None) -> float:
        """L(w + e), reduced in float64; NaN or infinite where the outputs are."""
        self.passes["loss"] += 1
        with self._at(e):
            mine = [self._part(*batch) for batch in self._batches()]
        return float(self.ranks.total(torch.stack([self._zero(), *mine]).sum()))

    @torch.enable_grad()
    def gradient(self, e: Tensor | None = None) -> tuple[float, Tensor]:
        """L(w + e) and its gradient there (n,)."""
        self.passes["gradient"] += 1
        found = self._zero(1 + self.size)
        with self._at(e):
            for batch in self._batches():
                part = self._part(*batch)
                found[0] += part.detach()
                found[1:] += self.flat(list(torch.autograd.grad(part, self.parameters, materialize_grads=True)))
        found = self.ranks.total(found)
        return float(found[0]), found[1:].to(self.dtype)

    @torch.enable_grad()
    def product(self, vectors: Tensor) -> Tensor:
        """H v at w, for each row v of a (k, n) tensor: the :data:`~s2sam.analysis.lanczos.Operator` of this loss.

        With ranks, the vectors are those of rank 0.

        Cost: for each batch a forward and a backward, unless the last product has left their graph, and about two more
        of these for each row; k n numbers in float64.
        """
        vectors = self.ranks.lead(vectors.detach())
        found = self._zero(*vectors.shape)
        directions = [self.spread(row) for row in vectors]
        self.passes["product"] += len(directions)
        self._graphs.begin(self._moves[0])
        for number, batch in enumerate(self._batches()):
            gradients, kept = self._graphs.get(number, partial(self._slope, *batch), self._weights)
            reached = [i for i, g in enumerate(gradients) if g.requires_grad]
            for row, direction in enumerate(directions):
                bent = torch.autograd.grad(
                    [gradients[i] for i in reached], self.parameters, [direction[i] for i in reached],
                    retain_graph=kept or row + 1 < len(directions), materialize_grads=True,
                )  # fmt: skip
                found[row] += self.flat(list(bent))
        return self.ranks.total(found).to(vectors.dtype)

    @contextmanager
    def _at(self, e: Tensor | None) -> Iterator[None]:
        """The copy is at w + e within the block and at w, bit for bit, after it."""
        try:
            if e is not None:
                self._moves[0] += 1
                torch._foreach_add_(self._weights, self.spread(e))
            yield
        finally:
            if e is not None:
                torch._foreach_copy_(self._weights, self._origin)

    def _batches(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Those of this rank."""
        sizes = batch_sizes(len(self.x), self.batch_size)
        return self.ranks.share(list(zip(self.x.split(sizes), self.y.split(sizes), strict=True)))

    def _check_batches(self) -> None:
        least = min(batch_sizes(len(self.x), self.batch_size))
        if least < 2 and any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules()):
            raise ValueError(
                f"BatchNorm takes the statistics of each batch here, and {len(self.x)} images in batches of at most "
                f"{self.batch_size} leave one of a single image; take more images or another batch size"
            )

    def _part(self, x: Tensor, y: Tensor) -> Tensor:
        """The share of a batch in the mean loss: those of all batches add up to it."""
        logits = self.model(self.prepare(x).to(self.dtype)).double()  # so that small differences of losses are seen
        target = y.double() if y.is_floating_point() else y
        mean = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        return mean * (len(x) / len(self.x))

    def _slope(self, x: Tensor, y: Tensor) -> Gradient:
        """The gradient of this share, with its graph."""
        return torch.autograd.grad(self._part(x, y), self.parameters, create_graph=True, materialize_grads=True)

    def _zero(self, *shape: int) -> Tensor:
        """In float64, on the device."""
        return torch.zeros(shape, dtype=torch.float64, device=self._weights[0].device)
