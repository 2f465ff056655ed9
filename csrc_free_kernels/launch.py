"""Launches past Triton's own handling of arguments, which costs the host more than the launch itself.

Triton types, specialises and hashes some thirty arguments at every launch. Here a launch goes straight to the compiled
kernel if one like it has been before: tensors of the same dtypes and alignment, and otherwise equal arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# Triton assumes of a pointer that it is a multiple of this many bytes, or nothing.
_ALIGNMENT = 16
# Lengths that differ from call to call would otherwise pile up.
_MAX_LAUNCHES = 4096


class Launcher:
    """A jitted kernel whose constexpr parameters stand last, called as `kernel(grid, *arguments, **constants)`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launches on the current device and stream.

        Args:
            arguments: of all parameters that are not constexpr, in order.
            constants: of the constexpr ones, and Triton's options, in the same order at every call.
        """
        if not isinstance(self.kernel, JITFunction):
            # The interpreter compiles nothing.
            self.kernel[grid](*arguments, **constants)
            return
        device = driver.active.get_current_device()
        key = (
            device,
            *[
                (argument.dtype, argument.data_ptr() % _ALIGNMENT == 0)
                if isinstance(argument, torch.Tensor)
                else argument
                for argument in arguments
            ],
            *constants.values(),
        )
        compiled = self._compiled.get(key)
        if compiled is None or _is_observed():
            self._remember(key, self.kernel[grid](*arguments, **constants))
            return
        first, second, third = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        placeholders = (None,) * (len(self.kernel.params) - len(arguments))
        compiled.run(
            *(first, second, third, stream, compiled.function, compiled.packed_metadata, None, None, None),
            *arguments,
            *placeholders,
        )

    def _remember(self, key: tuple[Any, ...], compiled: Any) -> None:
        if len(self._compiled) >= _MAX_LAUNCHES:
            self._compiled.clear()
        self._compiled[key] = compiled


def _is_observed() -> bool:
    """Whether a profiler wants to hear of launches, which it does from Triton."""
    hook = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))
