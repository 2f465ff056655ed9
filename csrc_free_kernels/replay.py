"""Calls like one before: the same launches on other tensors, without working them out again.

The host spends far more on an eager call's checks, plan and arguments than on its launches. All of these follow from
the tensors' metadata and the options. So a call is recorded once, and replayed for every call of equal metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    # It imports triton, and the ops are there without it too.
    from csrc_free_kernels.compiled_kernel import CompiledKernel, Encode

# Lengths that differ from call to call would otherwise pile up, with their descriptors for each layer's cache.
_MAX_CALLS = 1024
# What is no tensor: asking for these is faster.
_PLAIN = frozenset({int, float, bool, type(None)})


class Launch(NamedTuple):
    """One launch. Its arguments are those of all parameters, with a placeholder for each constant."""

    kernel: CompiledKernel
    device: int
    grid: tuple[int, ...]
    arguments: Sequence[Any]


@dataclass
class Recording:
    """What a call has allocated and launched. A launch that cannot be replayed is not in it."""

    allocations: list[Tensor] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    is_complete: bool = True


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


def current_recording() -> Recording | None:
    """That of the call under way, if one is recorded."""
    return _recording.get()


def allocate(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty_strided`, and again at each replay."""
    tensor = torch.empty_strided(size, stride, dtype=dtype, device=device)
    recording = _recording.get()
    if recording is not None:
        recording.allocations.append(tensor)
    return tensor


class Replayed:
    """A function that is run once for each kind of call, and replayed from then on.

    All that it launches goes through `launch.Launcher`, all that it returns or launches on is an argument or comes
    from `allocate`, and it does nothing else. Otherwise its calls are run each time.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._calls: dict[tuple[Any, ...], _Call] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The function's result.

        Raises:
            whatever the function raises: a call that has failed is not recorded.
        """
        kind = _kind_of(arguments)
        call = self._calls.get(kind)
        if call is not None and call.can_be_replayed():
            return call.replay(arguments)
        with _recorded() as recording:
            result = self._function(*arguments)
        if call is None:
            self._keep(kind, recording, arguments, result)
        return result

    def _keep(self, kind: tuple[Any, ...], recording: Recording, arguments: tuple[Any, ...], result: Any) -> None:
        if not recording.is_complete or not recording.launches:
            return
        call = _Call.of(recording, arguments, result if isinstance(result, tuple) else (result,))
        if call is None:
            return
        if len(self._calls) >= _MAX_CALLS:
            self._calls.clear()
        self._calls[kind] = call


@dataclass
class _Call:
    """A recorded call. Tensors are known by number: the arguments first, then the allocations."""

    device: int
    is_observed: Callable[[], bool]
    # Which arguments are tensors.
    inputs: list[int]
    allocations: list[tuple[Callable[..., Tensor], tuple[Any, ...]]]
    # The kernel's launch, its grid and arguments; and for each tensor its place, its number and how it is encoded.
    launches: list[tuple[CompiledKernel, tuple[int, ...], list[Any], list[tuple[int, int, Encode]]]]
    results: list[int]

    @staticmethod
    def of(recording: Recording, arguments: tuple[Any, ...], results: tuple[Any, ...]) -> _Call | None:
        """What can be replayed of a recording, or None if that is not all. No tensor is held."""
        inputs = [place for place, argument in enumerate(arguments) if isinstance(argument, Tensor)]
        tensors = [*(arguments[place] for place in inputs), *recording.allocations]
        numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        # Of a tensor that was passed twice, a launch does not tell which of the two it means.
        if len(numbers) < len(tensors) or any(id(result) not in numbers for result in results):
            return None
        launches = []
        for launch in recording.launches:
            apart, places = launch.kernel.take_apart(launch.arguments)
            if any(id(tensor) not in numbers for _, tensor, _ in places):
                return None
            numbered = [(place, numbers[id(tensor)], encode) for place, tensor, encode in places]
            launches.append((launch.kernel, launch.grid, apart, numbered))
        first = recording.launches[0]
        return _Call(
            first.device,
            first.kernel.is_observed,
            inputs,
            allocations=[
                (_allocator(item.device), (tuple(item.shape), item.stride(), item.dtype))
                for item in recording.allocations
            ],
            launches=launches,
            results=[numbers[id(result)] for result in results],
        )

    def can_be_replayed(self) -> bool:
        """Whether the launches' device is the current one, and nobody watches them."""
        return torch._C._cuda_getDevice() == self.device and not self.is_observed()

    def replay(self, arguments: tuple[Any, ...]) -> Any:
        """The result of the call on these arguments."""
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        tensors = [arguments[place] for place in self.inputs]
        for make, metadata in self.allocations:
            tensors.append(make(*metadata))
        for kernel, grid, apart, places in self.launches:
            filled = apart.copy()
            for place, number, encode in places:
                filled[place] = encode(tensors[number])
            kernel.launch_apart(grid, stream, filled)
        if len(self.results) == 1:
            return tensors[self.results[0]]
        return tuple([tensors[number] for number in self.results])


def _allocator(device: torch.device) -> Callable[..., Tensor]:
    """What makes a tensor of a size, strides and dtype on the current device."""
    if device.type == "cuda":
        # That of Inductor's code: a quarter of the host's time.
        allocator: Callable[..., Tensor] = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
        return allocator
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


@contextmanager
def _recorded() -> Iterator[Recording]:
    recording = Recording()
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)


def _kind_of(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call's checks, plan and launches may follow from."""
    has_gradients = torch.is_grad_enabled()
    # Kernels are compiled for pointers that are multiples of 16, or for any.
    kinds = [
        item
        if type(item) in _PLAIN
        else (
            *(item.shape, item.stride(), item.dtype, item.get_device(), item.data_ptr() % 16 == 0),
            has_gradients and item.requires_grad,
        )
        for item in arguments
    ]
    return tuple(kinds)
