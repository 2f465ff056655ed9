"""CompiledKernel: its launches are Triton's own, past Triton's Python. No GPU launches anything here."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from csrc_free_kernels import compiled_kernel
from csrc_free_kernels.compiled_kernel import CompiledKernel

GRID, STREAM = (3, 2, 1), 77
METADATA = {"swizzle": 3, "elem_size": 2, "elem_type": 7, "block_size": [8, 16], "fp4_padded": False}
SIGNATURE = {"p_x": "*fp32", "d_y": "tensordesc<fp16[8, 16]>", "n": "i32", "d_z": "tensordesc<fp16[8, 16]>", "N": "c"}


class Encoded:
    """Stands in for what the driver makes of a descriptor."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Encoded) and self.arguments == other.arguments


class Compiled:
    """What Triton would return, with its own launcher around a C function that only keeps what it is called with."""

    function, packed_metadata = 5, (1, 2)

    def __init__(self, signature: dict[str, str], scratch_bytes: int = 0) -> None:
        self.started: list[tuple[Any, ...]] = []
        start: Callable[..., None] = mock.Mock(side_effect=lambda *arguments: self.started.append(arguments))
        self.run: Any = object.__new__(CudaLauncher)
        self.run.launch = wrap_handle_tensordesc(start, signature, [METADATA] * str(signature).count("tensordesc"))
        self.run.global_scratch_size, self.run.profile_scratch_size = scratch_bytes, 0
        self.run.global_scratch_align = self.run.profile_scratch_align = self.run.num_ctas = 1
        self.run.launch_cooperative_grid, self.run.launch_pdl = False, True

    def launch_through_triton(self, *arguments: Any) -> tuple[Any, ...]:
        self.run(*GRID, STREAM, self.function, self.packed_metadata, None, None, None, *arguments)
        return self.started.pop()


@pytest.fixture(autouse=True)
def encode() -> Iterator[mock.Mock]:
    fake_driver = mock.Mock()
    fake_driver.utils.fill_tma_descriptor.side_effect = Encoded
    with mock.patch.object(driver, "_active", fake_driver):
        yield fake_driver.utils.fill_tma_descriptor


def described(first: float) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(torch.full((64, 16), first, dtype=torch.float16), [8, 16])


def launch_apart(kernel: CompiledKernel, *arguments: Any) -> None:
    apart, places = kernel.take_apart(arguments)
    for place, tensor, encode in places:
        apart[place] = encode(tensor)
    kernel.launch_apart(GRID, STREAM, apart)


def test_the_c_function_gets_what_triton_gives_it() -> None:
    compiled, arguments = Compiled({"p_x": "*fp32", "n": "i32", "N": "constexpr"}), (1234, 8, None)
    expected = compiled.launch_through_triton(*arguments)
    with mock.patch.object(CudaLauncher, "__call__", side_effect=AssertionError("through Triton")):
        kernel = CompiledKernel(compiled)
        kernel.launch(GRID, STREAM, arguments)
        launch_apart(kernel, *arguments)
    assert compiled.started == [expected, expected]


def test_descriptors_are_taken_apart_as_triton_does() -> None:
    compiled, x = Compiled(SIGNATURE), torch.zeros(4)
    first, second = described(1.0), described(2.0)
    expected = compiled.launch_through_triton(x.data_ptr(), first, 8, second, None)
    kernel = CompiledKernel(compiled)
    with mock.patch.object(CudaLauncher, "__call__", side_effect=AssertionError("through Triton")):
        launch_apart(kernel, x, first, 8, second, None)
    # Whole, they go through Triton.
    kernel.launch(GRID, STREAM, (x.data_ptr(), first, 8, second, None))
    assert compiled.started == [expected, expected]


def test_the_kernel_stays_loaded() -> None:
    compiled = Compiled({"p_x": "*fp32"})
    held, kernel = weakref.ref(compiled), CompiledKernel(compiled)
    del compiled
    assert held() is not None
    launch_apart(kernel, 1234)


def test_descriptors_are_encoded_once_for_each_address(encode: mock.Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_kernel, "_MAX_ENCODED", 2)
    _, [(_, own, of_place), _] = CompiledKernel(Compiled(SIGNATURE)).take_apart((1, described(0.0), 8, described(0.0)))
    others = [torch.zeros_like(own) for _ in range(3)]
    assert [of_place(tensor).arguments[0] for tensor in (own, *others, own)] == [
        tensor.data_ptr() for tensor in (own, *others, own)
    ]
    assert encode.call_count == 5
    of_place(own)
    assert encode.call_count == 5


@pytest.mark.parametrize("signature", [SIGNATURE, SIGNATURE | {"d_y": "*fp16", "d_z": "*fp16"}])
def test_no_tensor_is_held(signature: dict[str, str]) -> None:
    """By a launch past Triton or, where there are no descriptors to encode, through it."""
    kernel, x, tiles = CompiledKernel(Compiled(signature)), torch.zeros(4), described(1.0)
    held = [weakref.ref(x), weakref.ref(tiles.base)]
    apart, places = kernel.take_apart((x, tiles, 8))
    encodes = [encode for _, _, encode in places]
    del x, tiles, places
    assert [tensor() for tensor in held] == [None, None]
    assert (apart[0], len(encodes)) == (None, 2)


def test_other_launchers_are_triton_s_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of kernels with scratch memory, and of Tritons whose C function takes something else."""
    with mock.patch.object(CudaLauncher, "__call__") as through_triton:
        launch_apart(CompiledKernel(Compiled({"p_x": "*fp32"}, scratch_bytes=8)), 1234)
        monkeypatch.setattr(triton, "__version__", "3.7.0")
        tiles = described(1.0)
        launch_apart(CompiledKernel(Compiled(SIGNATURE)), 1234, tiles, 8)
    plain, with_tiles = (call.args for call in through_triton.call_args_list)
    head = (*GRID, STREAM, 5, (1, 2), None, None, None)
    assert plain == (*head, 1234)
    assert with_tiles[:10] == (*head, 1234)
    assert with_tiles[10].base is tiles.base
