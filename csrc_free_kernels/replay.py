"""Calls like one before: the same launches on other tensors, without working them out again.

The host spends far more on an eager call's checks, plan and arguments than on its launches. All of these follow from
the tensors' metadata and the options. So a call is recorded once, and replayed for every call of equal metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Lengths that differ from call to call would otherwise pile up.
_MAX_CALLS = 4096


class Launch:
    """A compiled kernel's launch, on whatever arguments."""

    def __init__(self, compiled: Any, device: int, grid: tuple[int, ...], is_observed: Callable[[], bool]) -> None:
        """
        Args:
            compiled: Triton's kernel.
            is_observed: says whether a profiler wants to hear of launches, and of their arguments.
        """
        self.device = device
        self.is_observed = is_observed
        self._run = compiled.run
        self._grid = (*grid, 1, 1)[:3]
        # No metadata and no hooks: a launch that is observed goes through Triton.
        self._kernel = compiled.function, compiled.packed_metadata, None, None, None

    def run(self, stream: int, arguments: Sequence[Any]) -> None:
        """Launches with arguments of all parameters: a placeholder for each constant, pointers perhaps for tensors."""
        self._run(*self._grid, stream, *self._kernel, *arguments)


@dataclass
class Recording:
    """What a call has allocated, and launched on which arguments. A launch that cannot be replayed is not in it."""

    allocations: list[Tensor] = field(default_factory=list)
    launches: list[tuple[Launch, Sequence[Any]]] = field(default_factory=list)
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
        kind = (torch.is_grad_enabled(), *[_kind_of(argument) for argument in arguments])
        call = self._calls.get(kind)
        if call is not None and call.can_be_replayed():
            return call.replay(arguments)
        with _recorded() as recording:
            result = self._function(*arguments)
        if call is None:
            self._keep(kind, recording, arguments, result)
        return result

    def _keep(self, kind: tuple[Any, ...], recording: Recording, arguments: tuple[Any, ...], result: Any) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)] + recording.allocations
        results = result if isinstance(result, tuple) else (result,)
        used = [tensor for _, items in recording.launches for _, tensor, _ in _tensors_of(items)]
        # Of a tensor that was passed twice, a launch does not tell which of the two it means.
        is_told_apart = len({id(tensor) for tensor in tensors}) == len(tensors)
        is_known = is_told_apart and _all_among([*used, *results], tensors)
        if not recording.is_complete or not recording.launches or not is_known:
            return
        if len(self._calls) >= _MAX_CALLS:
            self._calls.clear()
        self._calls[kind] = _Call(recording, tensors, result)


class _Call:
    """A recorded call. Tensors are known by number: the arguments first, then the allocations."""

    def __init__(self, recording: Recording, tensors: list[Tensor], result: Any) -> None:
        first, _ = recording.launches[0]
        self._device, self._is_observed = first.device, first.is_observed
        self._allocations = [(item.size(), item.stride(), item.dtype, item.device) for item in recording.allocations]
        self._launches = [(launch.run, *_split(items, tensors)) for launch, items in recording.launches]
        self._has_several_results = isinstance(result, tuple)
        self._results = [_number(item, tensors) for item in (result if self._has_several_results else (result,))]

    def can_be_replayed(self) -> bool:
        """Whether the launches' device is the current one, and nobody watches them."""
        return torch.cuda.current_device() == self._device and not self._is_observed()

    def replay(self, arguments: tuple[Any, ...]) -> Any:
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        for size, stride, dtype, device in self._allocations:
            tensors.append(torch.empty_strided(size, stride, dtype=dtype, device=device))
        pointers = [tensor.data_ptr() for tensor in tensors]
        for run, numbers, places in self._launches:
            filled = numbers.copy()
            for place, number, descriptor in places:
                filled[place] = pointers[number] if descriptor is None else _move(descriptor, tensors[number])
            run(stream, filled)
        if self._has_several_results:
            return tuple([tensors[number] for number in self._results])
        return tensors[self._results[0]]


@contextmanager
def _recorded() -> Iterator[Recording]:
    recording = Recording()
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)


def _kind_of(argument: Any) -> Any:
    """What a call's checks, plan and launches may follow from."""
    if isinstance(argument, Tensor):
        # Kernels are compiled for pointers that are multiples of 16, or for any.
        is_aligned = argument.data_ptr() % 16 == 0
        return argument.shape, argument.stride(), argument.dtype, argument.device, argument.requires_grad, is_aligned
    return argument


def _tensors_of(arguments: Sequence[Any]) -> list[tuple[int, Tensor, Any]]:
    """The place of each tensor in a launch, and the descriptor of its tiles if that is passed in its stead."""
    found: list[tuple[int, Tensor, Any]] = []
    for place, item in enumerate(arguments):
        if isinstance(item, Tensor):
            found.append((place, item, None))
        elif isinstance(base := getattr(item, "base", None), Tensor):
            found.append((place, base, item))
    return found


def _split(arguments: Sequence[Any], tensors: Sequence[Tensor]) -> tuple[list[Any], list[tuple[int, int, Any]]]:
    """The arguments without their tensors, and the place, number and descriptor of each.

    Nothing of them holds a tensor, whose memory would not come back for as long as the call is kept.
    """
    places = [
        (place, _number(tensor, tensors), None if item is None else _move(item, None))
        for place, tensor, item in _tensors_of(arguments)
    ]
    numbers = list(arguments)
    for place, _, _ in places:
        numbers[place] = None
    return numbers, places


def _move(descriptor: Any, base: Tensor | None) -> Any:
    """The same tiles of another tensor of equal metadata, or of none."""
    moved = copy(descriptor)
    moved.base = base
    return moved


def _all_among(wanted: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
    return all(any(item is tensor for tensor in tensors) for item in wanted)


def _number(wanted: Tensor, tensors: Sequence[Tensor]) -> int:
    return next(number for number, tensor in enumerate(tensors) if tensor is wanted)
