"""Sparsifier: keeps chosen weights of a model at exactly 0 while an unchanged optimizer trains the rest.

What happens in a step is told in `part.py`. A method is a subclass, of `DropGrow` perhaps, that says how it differs:

    initial_scores   which weights are active at first: the largest scores, as many as the budget gives the layer
    due              whether step t changes the topology (never, by default)
    next_masks       the masks after the change
    placement        "after": the change follows the optimizer's step; "replace": it takes the place of it
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from s2sam.detached import DetachedCopy
from s2sam.hooks import StepContext, check_optimizers, step_hooks
from s2sam.sparse import scores, state, sync
from s2sam.sparse.budget import Distribution
from s2sam.sparse.layer_counts import LayerCounts
from s2sam.sparse.masks import counts as count_true
from s2sam.sparse.measures import Measures
from s2sam.sparse.names import unknown
from s2sam.sparse.options import NoOptions, check_steps
from s2sam.sparse.part import Part
from s2sam.sparse.places import Places, check_free, claim, release, watch
from s2sam.sparse.prunable import Entry, Patterns, discover, in_optimizers
from s2sam.sparse.start import Init, check_displaced, check_init, refuse_sparse, zeros_there
from s2sam.sparse.topk import choose


@dataclass(frozen=True)
class UpdateInfo:
    """What one change of the topology did: weights dropped and grown per layer, at step `step` of its optimizer."""

    step: int
    dropped: dict[str, int]
    grown: dict[str, int]


class Sparsifier(LayerCounts, Measures):
    """Sparse training of `model` with `optimizer`, or with a list of optimizers that share the model's weights.

    Args:
        model: whose weights become sparse; compiled and DDP-wrapped models count as the module inside.
        optimizer: a torch optimizer of any kind, or several; weights that none of them holds stay dense.
        sparsity: the share of all prunable weights that is 0; with init="adopt" None means the one that is there.
        distribution: how it is spread over the layers: a name from `s2sam.sparse.budget`, a map {layer: sparsity},
            "global", by the scores over all layers together, or "auto", what the method's authors do: "global" for
            snip, grasp, synflow, lt, ac-dc and str, else "erk".
        power_scale: exponent of "erk".
        total_steps: calls of `optimizer.step()` in the whole training, for methods with a schedule.
        batches, loss_fn: data and loss, for methods that score weights with them.
        generator: a CPU `torch.Generator` for all draws, which takes over the state of rank 0's; by default a new one
            with rank 0's `torch.initial_seed()`.
        include, exclude: patterns, see :func:`s2sam.sparse.prunable.discover`.
        init: True prunes now, and refuses weights that this would prune a second time: if at least 10 % of those that
            the new masks keep are exactly 0, in layers that are not entirely 0. "adopt" takes the masks from the zeros
            that are there (rank 0's); each layer keeps its own share, and `distribution` is not used. Methods that
            prune on to a higher `sparsity` (gmp, granet, str, mest) grow nothing back where their plan begins denser,
            and thin all layers alike; any other needs the sparsity that is there. False leaves weights alone and
            expects :meth:`load_state_dict` before the first step. "anew" prunes whatever is there.
        options: the method's own.

    Raises:
        ValueError: an argument that cannot be used; the message says which and what would do.

    Cost: one byte per prunable weight, three more once the topology has changed.
    """

    method: ClassVar[str] = ""
    Options: ClassVar[type] = NoOptions
    placement: ClassVar[Literal["after", "replace"]] = "after"
    dense_state: bool = False  #: the optimizer state of pruned weights is left to the method
    needs_batches: ClassVar[bool] = False
    gradual: ClassVar[bool] = False  #: prunes on to its sparsity from whatever lower one init="adopt" finds
    cannot_adopt: ClassVar[str] = ""  #: why init="adopt" has no meaning
    zeroes_active: ClassVar[bool] = False  #: the method itself makes active weights 0, so that no one else need have
    default_distribution: ClassVar[str] = "erk"  #: what distribution="auto" means

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        *,
        sparsity: float | None,
        distribution: Distribution = "auto",
        power_scale: float = 1.0,
        total_steps: int | None = None,
        batches: Iterable[Any] | None = None,
        loss_fn: Any = None,
        generator: torch.Generator | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        init: Init = True,
        **options: Any,
    ) -> None:
        self.options: Any = self._read_options(options)
        self.total_steps = check_steps(total_steps)
        self.batches, self.loss_fn = batches, loss_fn
        if batches is not None and not self.needs_batches:
            warnings.warn(f"method {self.method!r} does not use batches; they are ignored", stacklevel=2)
        if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != "cpu"):
            raise ValueError("generator must be a CPU torch.Generator, so that every device and rank draws the same")
        init = check_init(init, sparsity)
        if init == "adopt" and distribution not in ("auto", "global"):
            warnings.warn("init='adopt' takes each layer's share as it is; distribution is not used", stacklevel=2)
        self._final_sparsity, self.power_scale = sparsity, power_scale  # type: ignore[assignment]  # set by begin()
        self.adopted: dict[str, int] = {}  #: active weights per layer that init="adopt" has found
        self.distribution: Distribution = self.default_distribution if distribution == "auto" else distribution
        self.level = self.levels = 0  #: of trainings that follow one another: this one's number, and the last one's
        self.frozen = False
        self.last_update: UpdateInfo | None = None
        self.updates = 0  #: changes of the topology so far
        self._initial: dict[str, Tensor] = {}  # masks at the first step, and the union of all since; kept
        self._explored: dict[str, Tensor] = {}  # from the first change on
        self._stayed: dict[str, Tensor] = {}  # and their intersection
        self._blank: set[str] = set()  # layers that were 0 where active when they were attached
        self._warned = False  # that something else has zeroed active weights
        self.optimizers = optimizers = check_optimizers(optimizer)
        self.entries = self.eligible(in_optimizers(discover(model, include, exclude), optimizers))
        self.weights = {e.name: e.parameter for e in self.entries if e.prunable}  #: the prunable ones
        check_free(self.weights, optimizers)
        self.places = Places(model, self.weights)
        self.generator = generator if generator is not None else torch.Generator().manual_seed(sync.shared_seed())
        drawn = self.generator.get_state()
        sync.share(self.generator)
        self._ready, self._unchecked, self._unshared = init is not False, True, True
        try:
            self.parts = self._split(optimizers)
            if init:
                check_displaced(self, "sparsify()")
            present = zeros_there(self) if init == "adopt" else {}
            self.check_options()
            if init == "adopt":
                self._set_masks(self.adopt(model, present))
            elif init:
                self._set_masks(self.initial_masks(model, self.final_sparsity, self.distribution, power_scale))
            if init is True:
                refuse_sparse(self)
            if init:
                self.apply()
            self._blank = self.mostly_zero() if init else self.all_zero()
        except BaseException:
            self.generator.set_state(drawn)
            for one in optimizers:
                step_hooks(one).retire()
            raise
        for part in self.parts:
            part.attach()
        claim(self)
        self._handles = watch(self, model, changes=type(self).due is not Sparsifier.due)

    # -- what a method overrides ------------------------------------------------------------------------------------

    def eligible(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """The entries, with a reason at those that the method cannot make sparse. Default: all as they are."""
        return entries

    def check_options(self) -> None:
        """Raise ValueError if the options, `total_steps`, `batches` and `loss_fn` do not go together."""

    def initial_scores(self, model: nn.Module) -> dict[str, Tensor]:
        """A score per weight; the largest are active at first. Default: random."""
        return {name: scores.random(w, self.generator) for name, w in self.weights.items()}

    def due(self, part: Part, t: int) -> bool:
        """Whether the `t`-th step of the part's optimizer (from 1) changes the topology. Must not read the device.

        In step `total_steps` only what the plan still has to prune: see :meth:`on_grid`.
        """
        return False

    def on_grid(self, t: int) -> bool:
        """Whether `t` is a multiple of `delta_t`, and not the last step: what changed there would never be trained."""
        return bool(t % self.options.delta_t == 0 and t != self.total_steps)

    def next_masks(self, part: Part, t: int) -> dict[str, Tensor]:
        """New masks of the part's layers that change, after its step `t`. Gradients are in `weight.grad`."""
        raise NotImplementedError(f"{type(self).__name__} is due to change its masks but does not say how")

    def target_sparsity(self, t: int) -> float:
        """The sparsity that the method means to have after step `t`; :meth:`sparsity` measures the one there is."""
        return self.final_sparsity

    def behind(self, part: Part) -> bool:
        """Whether more weights are active than the plan leaves after the part's steps so far; reads no device."""
        return False

    def look(self, part: Part) -> None:
        """See the gradients of the step to come, before those of pruned weights become 0. Default: nothing."""

    def mask_more(self) -> None:
        """Mask the gradients of what goes with the weights, whenever theirs are masked. Default: nothing."""

    def moved(self, part: Part, context: StepContext) -> None:
        """Do more to the weights after the optimizer's step, before pruned ones become 0. Default: nothing."""

    def extra_state(self) -> dict[str, Any]:
        """More to save: tensors, numbers, strings and containers of them."""
        return {}

    def load_extra_state(self, extra: Mapping[str, Any]) -> None:
        """Take back what :meth:`extra_state` gave."""

    def initial_masks(
        self, model: nn.Module, sparsity: float, distribution: Distribution, power_scale: float
    ) -> dict[str, Tensor]:
        """The masks at the start: top :meth:`initial_scores` within the :meth:`budget`."""
        budget = self.budget(sparsity, distribution, power_scale)
        return self.pick(self.initial_scores(model), budget, at_least=self.min_per_layer)

    def adopt(self, model: nn.Module, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """The masks at the start for init="adopt", from where weights are not 0. Default: just there."""
        return present

    def pick(
        self, given: Mapping[str, Tensor], budget: int | Mapping[str, int], *, at_least: int = 1
    ) -> dict[str, Tensor]:
        """Masks of the largest scores, as :func:`s2sam.sparse.topk.choose`; a method may choose several at once."""
        return choose(given, budget, at_least=at_least, min_per_filter=self.min_per_filter)

    @property
    def min_per_filter(self) -> int:
        """The option of that name: weights that each filter keeps while there are enough; 0 for methods without it."""
        return int(getattr(self.options, "min_per_filter", 0))

    # -- what a user calls ------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps of the (first) optimizer since the start of training: calls of `step()`, and :meth:`missed_step`."""
        return self.parts[0].step

    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights now, for instance before clipping by norm.

        Not in a step that will replace the gradient step (RigL): its dense gradients are growth scores, and nothing
        else is done with them. The gradients of SAM's first pass are masked, and no method looks at them.
        """
        for part in self.parts:
            if not part.replaces_next():
                if not step_hooks(part.optimizer).preview:
                    part.show_gradients()
                part.mask_gradients()

    def apply(self) -> None:
        """Zero pruned weights and their optimizer state now, for instance after loading dense weights on purpose."""
        self.check_places()
        check_displaced(self, "sparsifier.apply()")
        for part in self.parts:
            part.layers.follow_device()
            part.apply()

    def missed_step(self, optimizer: Optimizer | None = None) -> None:
        """Count a step that never reached `optimizer.step()` (of that one; None = of all); nothing else happens.

        A GradScaler that meets an overflow does not call an optimizer that is not fused, so no hook hears of the step,
        and a schedule over `total_steps` would fall behind. After `scaler.step(optimizer); scaler.update()` say
        `if sparsifier.step == before: sparsifier.missed_step()`. A prune that was due is made up for in the next step.

        Raises:
            ValueError: `optimizer` is none of the sparsifier's.
        """
        if optimizer is not None and optimizer not in self.optimizers:
            raise ValueError("missed_step() takes one of the optimizers that sparsify() was given, or none for all")
        for part in self.parts:
            if optimizer is None or part.optimizer is optimizer:
                part.missed()

    @torch.no_grad()
    def catch_up(self) -> bool:
        """Prune now what the plan wants pruned by now; True if there was something. Call it after the last step.

        Only needed if the last step may be skipped (a GradScaler, gradients that are not finite): any other is made up
        for by the next one.

        Raises:
            RuntimeError: the weights are displaced by S2SAM.
        """
        late = [] if self.frozen else [part for part in self.parts if self.behind(part)]
        if late:
            check_displaced(self, "sparsifier.catch_up()")
        self.check_ready()
        for part in late:
            part.layers.follow_device()
            self.change_topology(part)
        return bool(late)

    def freeze(self) -> None:
        """Stop changing the topology; the masks stay in force."""
        self.frozen = True

    def next_level(self) -> bool:
        """After a whole training: prepare the next one of a method that trains several times; False = it was the last.

        Only the lottery ticket (`s2sam.sparse.methods.lt`) trains more than once. Where it says True, start over with
        a fresh learning rate schedule and a fresh order of the data.
        """
        return False

    def remove(self) -> None:
        """Take all hooks away; the weights stay as sparse as they are, and nothing keeps them so any longer."""
        release(self)
        for part in self.parts:
            part.remove()
        while self._handles:
            self._handles.pop().remove()

    def __reduce_ex__(self, protocol: Any) -> tuple[type[DetachedCopy], tuple[str, str]]:
        """Pickles and deep copies hold a :class:`s2sam.detached.DetachedCopy`: hooks cannot be copied."""
        return DetachedCopy, (
            f"a sparsifier of method {self.method!r}",
            f"call sparsify() on the copied model and optimizer with method={self.method!r} and init=False, and "
            "load_state_dict() with what the original's state_dict() gives",
        )

    def state_dict(self) -> dict[str, Any]:
        """Masks as bits, counters, the generator, and what is needed to report; loads with `weights_only=True`."""
        return state.save(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take back :meth:`state_dict`. Weights are not touched: the next step checks that they fit the masks.

        Raises:
            ValueError: the state is of another method, model or format, or damaged.
        """
        state.load(self, saved)
        self._ready, self._unchecked, self._unshared = True, True, True

    # -- what a part calls ------------------------------------------------------------------------------------------

    def check_ready(self) -> None:
        """Before a step: the model holds the weights; once after a load, which one rank may do alone, they fit."""
        self.check_places()
        if self._unshared:
            self.verify()
        elif self._unchecked:
            self.check_fit()
        self._unchecked = self._unshared = False

    def change_topology(self, part: Part) -> None:
        """Replace the part's masks by :meth:`next_masks`, the same on every rank, and clear what is left behind."""
        masks = part.layers.masks
        if not self._initial:
            self._initial = {name: mask.clone() for name, mask in self.masks.items()}
            self._explored = {name: mask.clone() for name, mask in self._initial.items()}
            self._stayed = {name: mask.clone() for name, mask in self._initial.items()}
        old = {name: mask.clone() for name, mask in masks.items()}
        part.layers.set_(self.next_masks(part, part.plan_step or part.step))
        sync.broadcast_masks(masks)
        part.change(masks, old)
        for name, mask in masks.items():
            self._explored[name] = self._explored[name].to(mask.device).logical_or_(mask)
            self._stayed[name] = self._stayed[name].to(mask.device).logical_and_(mask)
        dropped = count_true({name: mask & ~masks[name] for name, mask in old.items()})
        grown = count_true({name: masks[name] & ~mask for name, mask in old.items()})
        part.kept = {name: part.kept[name] - dropped[name] + grown[name] for name in masks}
        self.last_update = UpdateInfo(part.step, dropped, grown)
        self.updates += 1

    # -- parts of __init__ ------------------------------------------------------------------------------------------

    def _read_options(self, options: Mapping[str, Any]) -> Any:
        known = [f.name for f in fields(self.Options)]
        for name in options:
            if name not in known:
                raise unknown(f"option of method {self.method!r}:", name, known)
        return self.Options(**options)

    def _split(self, optimizers: list[Optimizer]) -> list[Part]:
        parts = []
        for one in optimizers:
            ids = {id(p) for group in one.param_groups for p in group["params"]}
            mine = {name: w for name, w in self.weights.items() if id(w) in ids}
            if mine:
                parts.append(Part(self, one, mine))
        return parts

    def _set_masks(self, masks: Mapping[str, Tensor]) -> None:
        for part in self.parts:
            part.layers.set_({name: masks[name] for name in part.layers.masks})
        sync.broadcast_masks(self.masks)
        self.count_kept()

    def count_kept(self) -> None:
        """Read the number of active weights per layer from the masks."""
        for part in self.parts:
            part.kept = part.layers.kept()
