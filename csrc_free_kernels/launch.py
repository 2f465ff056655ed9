"""Launches past Triton's own handling of arguments, which costs the host more than the launch itself.

Triton types, specialises and hashes some thirty arguments at every launch. Here a launch goes straight to the compiled
kernel if one like it has been before, in all that Triton may have specialised it for.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from csrc_free_kernels.compiled_kernel import CompiledKernel
from csrc_free_kernels.replay import Launch, current_recording

# Triton assumes of a pointer that it is a multiple of this many bytes, or nothing.
_ALIGNMENT = 16
_PLAIN = frozenset({int, float, bool, tuple, type(None)})
# Lengths that differ from call to call would otherwise pile up.
_MAX_LAUNCHES = 4096


class Launcher:
    """A jitted kernel whose constexpr parameters stand last, called as `kernel(grid, *arguments, **constants)`."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[tuple[Any, ...], CompiledKernel] = {}
        # The same, found by the very numbers of a launch: those of one loop's steps are often all equal.
        self._launched: dict[tuple[Any, ...], CompiledKernel] = {}

    def __call__(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        """Launches on the current device and stream.

        Args:
            arguments: of all parameters that are not constexpr, in order.
            constants: of the constexpr ones, and Triton's options, in the same order at every call.
        """
        # The interpreter compiles nothing, and for AMD's GPUs Triton specialises on the sizes of tensors too.
        if torch.version.hip or not isinstance(self.kernel, JITFunction) or CompiledKernel.is_observed():
            self.kernel[grid](*arguments, **constants)
            self._record(None)
            return
        device = driver.active.get_current_device()
        key = (
            (device, *constants.values()),
            *[argument if type(argument) in _PLAIN else _key_of(argument) for argument in arguments],
        )
        compiled = self._launched.get(key)
        if compiled is None:
            kind = key[0], *[_kind_of(part) for part in key[1:]]
            compiled = self._compiled.get(kind)
            if compiled is None:
                compiled = self._compiled[kind] = CompiledKernel(self.kernel[grid](*arguments, **constants))
                self._record(Launch(compiled, device, (*grid, 1, 1)[:3], self._completed(arguments)))
                return
            if len(self._launched) >= _MAX_LAUNCHES:
                self._launched.clear()
            self._launched[key] = compiled
        launch = Launch(compiled, device, (*grid, 1, 1)[:3], self._completed(arguments))
        compiled.launch(launch.grid, driver.active.get_current_stream(device), launch.arguments)
        self._record(launch)

    def _completed(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """With a placeholder for each constant."""
        return arguments + (None,) * (len(self.kernel.params) - len(arguments))

    def _record(self, launch: Launch | None) -> None:
        recording = current_recording()
        if recording is not None and launch is not None:
            recording.launches.append(launch)
        elif recording is not None:
            recording.is_complete = False


def _key_of(argument: Any) -> Any:
    """Of a tensor, or of a descriptor of its tiles, what Triton specialises on."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNMENT == 0
    # Its layout in shared memory follows from these. As text, since `_kind_of` takes numbers for sizes.
    return argument.base.dtype, str(argument.block_shape)


def _kind_of(part: Any) -> Any:
    """What Triton may specialise on: of an integer whether it is 1, a multiple of 16, and wider than 32 bits."""
    if isinstance(part, tuple):
        return tuple(_kind_of(item) for item in part)
    if isinstance(part, int) and not isinstance(part, bool):
        return part == 1, part % 16 == 0, part.bit_length() <= 31
    return float if isinstance(part, float) else part
