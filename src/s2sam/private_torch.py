"""What torch keeps to itself and this library needs, in one place; tests/test_private_torch.py has a canary for each.

A canary fails when a new torch has renamed or changed the thing, before a user's weights show it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import stateless
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack


def is_tracing() -> bool:
    """True while operations are recorded instead of computed, so that no training step can be under way.

    That is torch.export, torch.jit.trace, make_fx, FakeTensorMode, functional tensors (AOTAutograd). Modes that only
    watch real tensors, such as FlopCounterMode, do not count.
    """
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return any(getattr(mode, "_mode_key", None) is not None for mode in _get_current_dispatch_mode_stack())


def is_transforming() -> bool:
    """True inside a torch.func transform: vmap, grad, vjp, jvp, jacrev and the like."""
    return peek_interpreter_stack() is not None


@contextmanager
def computing() -> Iterator[None]:
    """Inside, operations on real tensors happen at once and are recorded by nobody.

    Dispatch modes are off only where :func:`is_tracing` says that one of them records; torch.func transforms (vmap,
    grad, jvp), which refuse to change tensors from outside themselves, are set aside always.
    """
    if not is_tracing():
        if not is_transforming():
            yield
        else:
            with temporarily_clear_interpreter_stack():
                yield
        return
    recording = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes(), temporarily_clear_interpreter_stack(), torch._C.DisableTorchFunction():
            yield
    finally:
        torch._C._set_tracing_state(recording)  # type: ignore[attr-defined]


def is_in_backward() -> bool:
    """True while the autograd engine runs a backward on this thread."""
    return torch._C._current_graph_task_id() != -1


def is_in_functional_call() -> bool:
    """True inside `torch.func.functional_call`, which puts other tensors in the place of parameters for one call.

    It walks the callers of this function, so ask only where something is odd already.
    """
    code, frame = stateless._functional_call.__code__, sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def is_fsdp1_parameter(parameter: Tensor) -> bool:
    """Whether FullyShardedDataParallel has flattened the parameter, or made it a view of a flat one."""
    return bool(getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False))


def in_ddp_join() -> bool:
    """Whether a forward of DistributedDataParallel is under way inside `with model.join()`."""
    active = DistributedDataParallel._active_ddp_module
    return active is not None and bool(active._join_config.enable)


def fsdp_groups(parameters: Iterable[Tensor]) -> list[Any]:
    """The parameter groups of FSDP2 (`fully_shard`) that manage one of these sharded parameters.

    torch gives no public way from a parameter to the module that gathers it, and the module need not be known here.
    """
    states = sys.modules.get("torch.distributed._composable_state")
    if states is None:
        return []
    wanted = {id(p) for p in parameters}
    found: dict[int, Any] = {}
    for reference in list(states._module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # older versions of torch have one group per module
            groups = [g for g in (getattr(state, "_fsdp_param_group", None),) if g is not None]
        found.update((id(g), g) for g in groups if any(id(part.sharded_param) in wanted for part in g.fsdp_params))
    return list(found.values())


def fsdp_in_forward(group: Any) -> bool:
    """True if a forward of the module that this group belongs to has begun and not ended (or was interrupted)."""
    return bool(group._training_state.name == "FORWARD")


def fsdp_forget_gathered(group: Any) -> None:
    """Free the gathered copies of the weights, a prefetched one as well; the next forward or backward gathers again.

    `FSDPModule.reshard()` is this too, but it does nothing inside a forward or while a prefetch is under way.
    """
    if group._all_gather_result is not None:
        group.wait_for_unshard()
    group._to_sharded()


def fsdp_gathered(group: Any) -> list[Tensor]:
    """The parameters that stand in for the sharded ones while those are gathered; they keep their version counters."""
    return [part._unsharded_param for part in group.fsdp_params if hasattr(part, "_unsharded_param")]


def root_mesh(mesh: Any) -> Any:
    """The DeviceMesh that `mesh` is a slice of, or `mesh` itself."""
    return mesh._get_root_mesh()
