"""Compiles whatever the launchers would launch, for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from csrc_free_kernels import decode_tuning
from csrc_free_kernels.decode_tuning import DecodePlan
from csrc_free_kernels.launch import Launcher

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes one block may use: CUDA programming guide, table of technical specifications; MI300 ISA, local data share.
SHARED_MEMORY_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Bytes of stack a float32 kernel may use: its products run on registers alone.
FLOAT32_STACK_LIMIT = 64


@dataclass(frozen=True)
class CompiledKernel:
    name: str
    assembly: str
    shared_bytes: int
    stack_bytes: int
    spilled_registers: int


def decode_plans(
    arch: str, dtype: torch.dtype, head_dim: int, num_rows: int, *, has_ring: bool = False
) -> list[DecodePlan]:
    """Plans of short and long shares for one sequence, and of some and of many sequences, which are not split."""
    plans = [
        decode_tuning.plan_decode(
            *(arch, dtype, head_dim),
            num_rows=num_rows,
            num_heads=num_heads,
            kv_len=kv_len,
            num_multiprocessors=132,
            has_ring=has_ring,
        )
        for num_heads, kv_len in ((8, 4096), (8, 32768), (256, 512), (1024, 8192))
    ]
    return list(dict.fromkeys(plans))


@contextmanager
def compiled_for(arch: str) -> Iterator[list[CompiledKernel]]:
    """Every launch inside compiles for arch and does not run; the list holds what was compiled."""
    compiled: list[CompiledKernel] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(_describe(kernel))
        return kernel

    fake_driver = mock.Mock()
    fake_driver.get_current_device.return_value = arch
    fake_driver.get_current_target.return_value = TARGETS[arch]

    def always_bind(self: Launcher, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        self.kernel[grid](*arguments, **constants)

    with (
        # As users compile: with line numbers, registers are given out differently.
        knobs.compilation.scope(),
        mock.patch.object(driver, "_active", fake_driver),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(Launcher, "__call__", always_bind),
    ):
        knobs.compilation.disable_line_info = False
        yield compiled


def check_limits(arch: str, dtype: torch.dtype, compiled: list[CompiledKernel]) -> None:
    """Shared memory, spills and stack within limits, and no TF32."""
    assert compiled
    for kernel in compiled:
        assert kernel.shared_bytes <= SHARED_MEMORY_LIMIT[arch], f"{arch} {kernel.name}: shared memory"
        assert kernel.spilled_registers == 0, f"{arch} {kernel.name}: spills"
        if dtype == torch.float32:
            assert "tf32" not in kernel.assembly, f"{arch} {kernel.name}: TF32"
        if arch.startswith("sm_"):
            limit = FLOAT32_STACK_LIMIT if dtype == torch.float32 else 0
            assert kernel.stack_bytes <= limit, f"{arch} {kernel.name}: {kernel.stack_bytes} bytes of stack"


def _describe(kernel: Any) -> CompiledKernel:
    if "cubin" in kernel.asm:
        stack, spills = _cubin_stack(kernel.asm["cubin"]), 0
        assembly = kernel.asm["ptx"]
    else:
        assembly = kernel.asm["amdgcn"]
        stack = int(_search(r"\.private_segment_fixed_size:\s*(\d+)", assembly))
        spills = int(_search(r"\.vgpr_spill_count:\s*(\d+)", assembly))
    return CompiledKernel(kernel.metadata.name, assembly, kernel.metadata.shared, stack, spills)


def _cubin_stack(cubin: bytes) -> int:
    """Bytes of stack, where ptxas puts what it spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return int(_search(r"STACK:(\d+)", usage)) + int(_search(r"LOCAL:(\d+)", usage))


def _search(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern} not found")
    return match.group(1)
