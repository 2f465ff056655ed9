"""Launcher: what goes straight to a compiled kernel, and what goes through Triton. No GPU launches anything here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_free_kernels import launch, replay
from csrc_free_kernels.launch import Launcher


@triton.jit
def _copy_kernel(p_x, p_y, p_bias, stride, N: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o * stride, mask=o < N), mask=o < N)


class Recorder:
    """Stands in for Triton's binding of arguments and for what it compiles, and keeps what each was called with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.bound: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def bind(self, kernel: Any, *arguments: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> Recorder:
        self.bound.append((*arguments, grid, constants))
        return self

    def run(self, *arguments: Any) -> None:
        self.launched.append(arguments)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    fake_driver = mock.Mock()
    fake_driver.get_current_device.return_value = 0
    fake_driver.get_current_stream.return_value = "stream"
    with (
        mock.patch.object(driver, "_active", fake_driver),
        mock.patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: recorder.bind(kernel, *args, **kwargs)),
    ):
        yield recorder


def test_the_second_launch_goes_straight_to_the_compiled_kernel(recorder: Recorder) -> None:
    kernel = Launcher(_copy_kernel)
    for _ in range(3):
        x, y = torch.zeros(64), torch.zeros(64)
        kernel((4, 2), x, y, None, 1, N=7, BLOCK=8, num_warps=2)
    assert len(recorder.bound) == 1
    assert recorder.bound[0][3:] == (1, (4, 2), {"N": 7, "BLOCK": 8, "num_warps": 2})
    assert len(recorder.launched) == 2
    *fixed, first, second, bias, stride, _, _ = recorder.launched[-1]
    assert fixed == [4, 2, 1, "stream", "function", "metadata", None, None, None]
    assert first is x
    assert second is y
    assert (bias, stride) == (None, 1)


CHANGES: dict[str, Any] = {
    "dtype": lambda x, y, bias, stride: (x.half(), y, bias, stride),
    "alignment": lambda x, y, bias, stride: (x[1:], y, bias, stride),
    "a number": lambda x, y, bias, stride: (x, y, bias, 2),
    "a multiple of 16": lambda x, y, bias, stride: (x, y, bias, 32),
    "a wide number": lambda x, y, bias, stride: (x, y, bias, 2**31),
    "a tensor where none was": lambda x, y, bias, stride: (x, y, x, stride),
}


@pytest.mark.parametrize("change", CHANGES)
def test_triton_sees_what_it_may_specialise_on(change: str, recorder: Recorder) -> None:
    kernel, arguments = Launcher(_copy_kernel), (torch.zeros(64), torch.zeros(64), None, 1)
    kernel((1,), *arguments, N=7, BLOCK=8)
    kernel((1,), *CHANGES[change](*arguments), N=7, BLOCK=8)
    assert len(recorder.bound) == 2
    kernel((1,), *arguments, N=7, BLOCK=16)
    assert len(recorder.bound) == 3
    kernel((1,), *arguments, N=7, BLOCK=8)
    assert len(recorder.bound) == 3


def test_descriptors_share_a_compiled_kernel_if_their_tiles_are_alike(recorder: Recorder) -> None:
    def described(dtype: torch.dtype, rows: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(torch.zeros(64, 16, dtype=dtype), [rows, 16])

    kernel, x = Launcher(_copy_kernel), torch.zeros(64)
    for dtype, rows, num_bound in (
        (torch.float16, 8, 1),
        (torch.float16, 8, 1),
        (torch.float16, 16, 2),
        (torch.float16, 32, 3),
        (torch.float32, 8, 4),
        (torch.float16, 8, 4),
    ):
        kernel((1,), described(dtype, rows), x, None, 1, N=7, BLOCK=8)
        assert len(recorder.bound) == num_bound


@pytest.mark.parametrize("hook_name", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_hear_of_every_launch(hook_name: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Launcher(_copy_kernel), torch.zeros(64)
    hook = mock.Mock(calls=[print])
    monkeypatch.setattr(knobs.runtime, hook_name, hook)
    for _ in range(3):
        kernel((1,), x, x, None, 1, N=7, BLOCK=8)
    assert len(recorder.bound) == 3


def test_numbers_that_differ_share_a_compiled_kernel_and_do_not_pile_up(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_MAX_LAUNCHES", 8)
    kernel, x = Launcher(_copy_kernel), torch.zeros(64)
    for stride in range(2, 15):
        kernel((1,), x, x, None, stride, N=7, BLOCK=8)
        assert len(kernel._launched) <= 8
    assert len(recorder.bound) == 1
    assert [launched[12] for launched in recorder.launched] == list(range(3, 15))


def test_launches_are_recorded_for_replays(recorder: Recorder) -> None:
    kernel, recordings = Launcher(_copy_kernel), []

    def call(x: torch.Tensor) -> None:
        recording = replay.current_recording()
        assert recording is not None
        kernel((4,), x, x, None, 1, N=7, BLOCK=8)
        recordings.append(recording)

    x = torch.zeros(64)
    replay.Replayed(call)(x)
    replay.Replayed(call)(x)
    for recording in recordings:
        (recorded,) = recording.launches
        assert (recorded.arguments, recording.is_complete) == ((x, x, None, 1, None, None), True)
