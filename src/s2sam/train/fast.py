"""What makes the same training quicker: the network compiled, and the quickest convolution kernels on a GPU."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

BACKEND = "inductor"  #: of torch.compile


class CompiledForward:
    """Takes the place of `module.forward`: compiled in training mode, as it was in eval mode.

    Module, parameters, state_dict names and hooks stay what they were. `module(x)` runs its hooks outside the compiled
    region, so S2SAM's window opens before it and masks that change in place are no reason to compile again. Evaluation
    is not compiled: what is reported comes from the same code whatever `compile` says. Each batch size is a graph of
    its own, compiled once. Copies and pickles of the module have their own plain forward.

    Args:
        module: the network; a reference cycle with it is made.
        mode: as torch.compile takes it.
    """

    def __init__(self, module: nn.Module, mode: str) -> None:
        self.module, self.mode = module, mode
        self.plain: Callable[..., Any] = module.forward
        own = own_code(type(module).forward)
        self.compiled: Callable[..., Any] = torch.compile(own, mode=mode, dynamic=False, backend=BACKEND)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward."""
        if self.module.training:
            return self.compiled(self.module, *args, **kwargs)
        return self.plain(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[nn.Module], Callable[..., Any]], tuple[nn.Module]]:
        return plain_forward, (self.module,)


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward of its class, bound to `module`."""
    return types.MethodType(type(module).forward, module)


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A twin of a Python function with a code object of its own.

    torch keeps graphs by code object, and gives up compiling after eight of them: with one code object for all
    networks of a class, the later runs of a long suite would silently be plain.
    """
    if not isinstance(function, types.FunctionType):
        return function
    twin = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def compile_network(model: nn.Module, mode: str) -> None:
    """Compile the training forward (and so the backward) of `model` in place; "none" does nothing.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> compile_network(model, "default")  # nothing is compiled before the first training forward
        >>> list(model.state_dict()), model.eval()(torch.ones(1, 3)).shape
        (['weight', 'bias'], torch.Size([1, 2]))
    """
    if mode != "none":
        model.forward = CompiledForward(model, mode)  # type: ignore[method-assign]


def check_compile(device: torch.device, mode: str) -> None:
    """Compile a sum of two numbers.

    Raises:
        ValueError: nothing can be compiled here: no C++ compiler (CPU) or Triton (GPU), or a platform torch does not
            compile for.
    """
    if mode == "none":
        return
    try:
        probe: Callable[..., Any] = torch.compile(own_code(_sum), backend=BACKEND)
        probe(torch.ones(2, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        needed = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler"
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"--compile {mode} needs {needed}, and torch cannot compile for this {device.type.upper()} ({reason}); "
            "use --compile none"
        ) from error


@contextmanager
def quickest_convolutions(device: torch.device) -> Iterator[None]:
    """Within the block cuDNN tries its kernels on every new shape and keeps the quickest; on a CPU nothing changes.

    The setting is one of the process; it is put back.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _sum(x: torch.Tensor) -> torch.Tensor:
    return x + x.sum()
