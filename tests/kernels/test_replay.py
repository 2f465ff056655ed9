"""Replayed: which calls repeat an earlier one's launches, on which tensors. No GPU launches anything here."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc_free_kernels import replay
from csrc_free_kernels.compiled_kernel import CompiledKernel
from csrc_free_kernels.replay import Launch, Replayed

DEVICE, STREAM = 0, 77


class Compiled:
    """Stands in for what Triton compiles, and keeps what it was launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.launched.append(arguments)


class Doubling:
    """A call that launches two kernels, the second on what the first has left."""

    def __init__(self) -> None:
        self.compiled = Compiled()
        self.num_runs = 0
        self.is_observed = False
        self.own: Tensor | None = None
        self.is_complete = True
        self.has_two_results = False

    def __call__(self, x: Tensor, factor: float = 2.0, bias: Tensor | None = None) -> Any:
        self.num_runs += 1
        if factor < 0:
            raise ValueError("a negative factor")
        scratch = replay.allocate((4,), (1,), torch.float32, x.device)
        output = replay.allocate(tuple(x.shape), x.stride(), x.dtype, x.device)
        self.launch((3,), x, bias, scratch if self.own is None else self.own, factor, (1, 2))
        self.launch((5, 6), scratch, output, None)
        recording = replay.current_recording()
        assert recording is not None
        recording.is_complete = self.is_complete
        return (output, scratch) if self.has_two_results else output

    def launch(self, grid: tuple[int, ...], *arguments: Any) -> None:
        recording = replay.current_recording()
        assert recording is not None
        kernel = CompiledKernel(self.compiled)
        kernel.is_observed = lambda: self.is_observed
        recording.launches.append(Launch(kernel, DEVICE, (*grid, 1, 1)[:3], arguments))


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> Doubling:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: DEVICE, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    return Doubling()


def test_a_call_like_one_before_is_replayed_on_its_own_tensors(doubling):
    call = Replayed(doubling)
    x = torch.zeros(2, 3)
    held = [weakref.ref(x), weakref.ref(call(x, 2.0))]
    assert (doubling.num_runs, doubling.compiled.launched) == (1, [])
    del x
    assert [reference() for reference in held] == [None, None]
    x = torch.ones(2, 3)
    result = call(x, 2.0)
    assert doubling.num_runs == 1
    assert (result.shape, result.stride(), result.dtype) == (x.shape, x.stride(), x.dtype)
    first, second = doubling.compiled.launched
    fixed = (STREAM, "function", "metadata", None, None, None)
    scratch = first[11]
    assert first == (3, 1, 1, *fixed, x.data_ptr(), None, scratch, 2.0, (1, 2))
    assert second == (5, 6, 1, *fixed, scratch, result.data_ptr(), None)


@dataclass
class Descriptor:
    """Stands in for Triton's of a tensor's tiles."""

    base: Tensor
    block_shape: list[int]


def test_a_descriptor_moves_to_the_tensor_of_the_replay(doubling):
    def described(x: Tensor) -> Tensor:
        output = replay.allocate(tuple(x.shape), x.stride(), x.dtype, x.device)
        doubling.launch((1,), Descriptor(x, [8]), Descriptor(output, [4]), 5)
        return output

    call, first, second = Replayed(described), torch.zeros(3), torch.ones(3)
    held = [weakref.ref(first), weakref.ref(call(first))]
    del first
    result = call(second)
    ((*_, read, written, number),) = doubling.compiled.launched
    assert (read.base is second, written.base is result, number) == (True, True, 5)
    assert (read.block_shape, written.block_shape) == ([8], [4])
    assert [reference() for reference in held] == [None, None]


def test_results_of_two_replays_are_apart(doubling):
    call, x = Replayed(doubling), torch.zeros(8)
    results = [call(x) for _ in range(3)]
    assert len({result.data_ptr() for result in results}) == 3


def test_several_results(doubling):
    doubling.has_two_results = True
    call, x = Replayed(doubling), torch.zeros(8)
    call(x)
    output, scratch = call(x)
    assert doubling.num_runs == 1
    first, second = doubling.compiled.launched
    assert (first[11], second[10]) == (scratch.data_ptr(), output.data_ptr())


OTHER = {
    "shape": (torch.zeros(2, 4),),
    "strides": (torch.zeros(3, 2).T,),
    "dtype": (torch.zeros(2, 3, dtype=torch.float16),),
    "alignment": (torch.zeros(7)[1:].view(2, 3),),
    "an option": (torch.zeros(2, 3), 3.0),
    "a tensor where none was": (torch.zeros(2, 3), 2.0, torch.zeros(1)),
}


@pytest.mark.parametrize("arguments", OTHER.values(), ids=OTHER)
def test_a_call_unlike_those_before_is_run(doubling, arguments):
    call = Replayed(doubling)
    call(torch.zeros(2, 3), 2.0)
    call(*arguments)
    assert doubling.num_runs == 2
    call(*arguments)
    call(torch.zeros(2, 3), 2.0)
    assert doubling.num_runs == 2


def test_grad_mode_is_part_of_a_call(doubling):
    """With it on, an input that requires a gradient is refused; with it off it is not."""
    call, x = Replayed(doubling), torch.zeros(3, requires_grad=True)
    with torch.no_grad():
        call(x)
    with torch.enable_grad():
        call(x)
    assert doubling.num_runs == 2


def test_a_failed_call_is_not_recorded(doubling):
    call, x = Replayed(doubling), torch.zeros(3)
    for _ in range(2):
        with pytest.raises(ValueError, match="negative"):
            call(x, -1.0)
    assert doubling.num_runs == 2
    assert replay.current_recording() is None


def test_profilers_and_other_devices_see_a_call_run(doubling, monkeypatch):
    call, x = Replayed(doubling), torch.zeros(3)
    call(x)
    doubling.is_observed = True
    call(x)
    doubling.is_observed = False
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: DEVICE + 1)
    call(x)
    assert doubling.num_runs == 3


def test_launches_on_tensors_of_unknown_origin_are_not_replayed(doubling):
    """Of a copy that the call itself has filled, a replay would launch on the old one."""
    doubling.own = torch.zeros(4)
    call, x = Replayed(doubling), torch.zeros(3)
    call(x)
    call(x)
    assert doubling.num_runs == 2


def test_a_tensor_passed_twice_is_not_taken_for_two(doubling):
    """As in attention(query, key, key): the next call of its kind may have a value of its own."""
    call, x, biases = Replayed(doubling), torch.zeros(8), torch.zeros(2, 8)
    call(x, 2.0, x)
    for bias in biases:
        call(x, 2.0, bias)
    first, _ = doubling.compiled.launched
    assert doubling.num_runs == 2
    assert first[9:11] == (x.data_ptr(), biases[1].data_ptr())


def test_an_incomplete_recording_is_not_replayed(doubling):
    doubling.is_complete = False
    call, x = Replayed(doubling), torch.zeros(3)
    call(x)
    call(x)
    assert doubling.num_runs == 2


def test_calls_that_launch_nothing_are_run():
    runs = []

    def empty(x: Tensor) -> Tensor:
        runs.append(x)
        return replay.allocate((0,), (1,), x.dtype, x.device)

    call, x = Replayed(empty), torch.zeros(3)
    call(x)
    call(x)
    assert len(runs) == 2


def test_no_more_calls_are_kept_than_allowed(doubling, monkeypatch):
    monkeypatch.setattr(replay, "_MAX_CALLS", 2)
    call = Replayed(doubling)
    for size in (1, 2, 3, 3, 1):
        call(torch.zeros(size))
    assert doubling.num_runs == 4
