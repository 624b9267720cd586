"""What this library reads of torch that torch does not document: all of it, each with a test that notices a change."""

from __future__ import annotations

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def is_fsdp1_parameter(parameter: Tensor) -> bool:
    """Whether FullyShardedDataParallel has flattened the parameter, or made it a view of a flat one."""
    return bool(getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False))


def in_ddp_join() -> bool:
    """Whether a forward of DistributedDataParallel is under way inside `with model.join()`."""
    active = DistributedDataParallel._active_ddp_module
    return active is not None and bool(active._join_config.enable)
