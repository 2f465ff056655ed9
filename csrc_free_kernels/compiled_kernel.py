"""Launches of what Triton has compiled, straight to its C function.

Triton's launcher handles arguments in Python first: it looks for scratch memory, which our kernels do not ask for, and
takes apart the descriptors of tiles that the copy engine reads. That costs the host more than the launch itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import triton
from torch import Tensor
from triton import knobs

# The addresses of one tensor for which encoded descriptors are kept.
_MAX_ENCODED = 256

# Makes of a tensor what a launch takes in its place.
Encode = Callable[[Tensor], Any]


class CompiledKernel:
    """What Triton has compiled. Launches take arguments of all parameters, with a placeholder for each constant."""

    def __init__(self, compiled: Any) -> None:
        """
        Args:
            compiled: as Triton returns it from a launch.
        """
        # Later Tritons unload a kernel that nobody holds.
        self._compiled = compiled
        self._run = compiled.run
        # No metadata and no hooks: a launch that is observed goes through Triton.
        self._head = compiled.function, compiled.packed_metadata, None, None, None
        self._start: Callable[..., None] | None = None
        self._descriptors: list[dict[str, Any]] = []
        if _is_known(compiled.run):
            self._start, self._descriptors = _c_function(compiled.run.launch)
            modes = compiled.run.launch_cooperative_grid, compiled.run.launch_pdl
            self._start_head = compiled.function, *modes, None, None, *self._head[1:]

    @staticmethod
    def is_observed() -> bool:
        """Whether a profiler wants to hear of launches, which it does from Triton."""
        hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        return any(getattr(hook, "calls", hook) for hook in hooks)

    def launch(self, grid: tuple[int, ...], stream: int, arguments: Sequence[Any]) -> None:
        """Launches on arguments as Triton takes them: tensors or their addresses, descriptors, numbers."""
        if self._descriptors:
            self._run(*grid, stream, *self._head, *arguments)
        else:
            self.launch_apart(grid, stream, arguments)

    def launch_apart(self, grid: tuple[int, ...], stream: int, arguments: Sequence[Any]) -> None:
        """Launches on arguments that `take_apart` has taken apart, their tensors encoded."""
        if self._start is None:
            self._run(*grid, stream, *self._head, *arguments)
        else:
            self._start(*grid, stream, *self._start_head, *arguments)

    def take_apart(self, arguments: Sequence[Any]) -> tuple[list[Any], list[tuple[int, Tensor, Encode]]]:
        """A launch's arguments without its tensors; and the place of each, the tensor, and how it is encoded."""
        apart: list[Any] = []
        places: list[tuple[int, Tensor, Encode]] = []
        descriptors = iter(self._descriptors)
        for argument in arguments:
            if isinstance(argument, Tensor):
                places.append((len(apart), argument, Tensor.data_ptr))
                apart.append(None)
            elif isinstance(base := getattr(argument, "base", None), Tensor):
                metadata = next(descriptors, None)
                encode = _Moved(argument) if metadata is None else _Encoded(argument, metadata)
                places.append((len(apart), base, encode))
                # The C function takes sizes and strides too.
                apart += [None] if metadata is None else [None, *argument.shape, *argument.strides]
            else:
                apart.append(argument)
        return apart, places


class _Moved:
    """A descriptor's tiles of other tensors with the same metadata."""

    def __init__(self, descriptor: Any) -> None:
        # Without the tensor, whose memory would not come back.
        self._descriptor = copy(descriptor)
        self._descriptor.base = None

    def __call__(self, tensor: Tensor) -> Any:
        moved = copy(self._descriptor)
        moved.base = tensor
        return moved


class _Encoded(_Moved):
    """The same as the copy engine reads them, encoded once for each address."""

    def __init__(self, descriptor: Any, metadata: dict[str, Any]) -> None:
        super().__init__(descriptor)
        self._metadata = metadata
        self._encoded: dict[int, Any] = {}

    def __call__(self, tensor: Tensor) -> Any:
        address = tensor.data_ptr()
        encoded = self._encoded.get(address)
        if encoded is None:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            if len(self._encoded) >= _MAX_ENCODED:
                self._encoded.clear()
            encoded = self._encoded[address] = make_tensordesc_arg(super().__call__(tensor), self._metadata)[0]
        return encoded


def _is_known(launcher: Any) -> bool:
    """Whether this is the launcher that was read: Triton 3.6's for CUDA, of a kernel without scratch memory."""
    is_cudas = triton.__version__.startswith("3.6.") and type(launcher).__name__ == "CudaLauncher"
    return is_cudas and launcher.global_scratch_size == launcher.profile_scratch_size == 0


def _c_function(launch: Any) -> tuple[Callable[..., None] | None, list[dict[str, Any]]]:
    """The C function behind what a launcher calls, and what is known of each descriptor that it takes."""
    if not inspect.isfunction(launch):
        return launch, []
    held = inspect.getclosurevars(launch).nonlocals
    function, descriptors = held.get("launcher"), list(held.get("tensordesc_meta") or [None])
    return (None, []) if function is None or None in descriptors else (function, descriptors)
