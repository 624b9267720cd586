"""What this library uses of torch although torch keeps it private. tests/test_private_torch.py has a test for each."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor

FSDP1_MARK = "_fsdp_flattened"  #: the attribute that FSDP1 (FullyShardedDataParallel) sets on the parameters it manages


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
