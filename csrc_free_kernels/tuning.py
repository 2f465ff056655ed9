"""Tile, warp, stage and split choices: tables and pure functions of architecture, dtype and shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton.language as tl
from triton import knobs


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut: rows and slots a tile, warps a program, loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By (largest head dim, bytes an element): (block_m, block_n, num_warps, num_stages).
_PREFILL = {
    (64, 2): Tiles(128, 64, 4, 3),
    (128, 2): Tiles(128, 64, 8, 3),
    (256, 2): Tiles(128, 64, 8, 2),
    (64, 4): Tiles(64, 32, 8, 2),
    (128, 4): Tiles(32, 32, 8, 2),
    (256, 4): Tiles(16, 32, 8, 2),
}
_DECODE = {
    (64, 2): Tiles(16, 64, 4, 3),
    (128, 2): Tiles(16, 64, 4, 3),
    (256, 2): Tiles(16, 32, 4, 3),
    (64, 4): Tiles(16, 32, 4, 3),
    (128, 4): Tiles(16, 32, 4, 2),
    (256, 4): Tiles(16, 16, 4, 2),
}
# Packed query rows up to which the split kernel serves; beyond, prefill has enough tiles of its own.
MAX_DECODE_TOKENS = 16
_MAX_DECODE_ROWS = 64
# Splits share a KV range in units of this many slots.
SLOTS_PER_SHARE = 16
_MIN_SLOTS_PER_SPLIT = 64
_MAX_SPLITS = 128
_WAVES = 2


def architecture(device: torch.device) -> str:
    """The GPU architecture of a CUDA or ROCm device, such as "sm_90" or "gfx942"."""
    return _device_facts(device.index if device.index is not None else torch.cuda.current_device())[0]


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device."""
    return _device_facts(device.index if device.index is not None else torch.cuda.current_device())[1]


def prefill_tiles(arch: str, dtype: torch.dtype, head_dim: int) -> Tiles:
    """Tiles of the portable prefill kernel; head_dim is the larger of D and Dv.

    Example:
        >>> prefill_tiles("sm_90", torch.bfloat16, 128)
        Tiles(block_m=128, block_n=64, num_warps=8, num_stages=3)
    """
    return _look_up(_PREFILL, dtype, head_dim)


def decode_tiles(arch: str, dtype: torch.dtype, head_dim: int, num_rows: int) -> Tiles:
    """Tiles of the split-KV decode kernel for num_rows = group * query_len packed rows."""
    tiles = _look_up(_DECODE, dtype, head_dim)
    rows = min(_MAX_DECODE_ROWS, max(tiles.block_m, _next_power_of_2(num_rows)))
    return Tiles(rows, tiles.block_n, tiles.num_warps, tiles.num_stages)


def choose_num_splits(num_programs: int, kv_len: int, num_multiprocessors: int) -> int:
    """Splits of each KV range, from shapes alone: enough programs to fill the GPU, shares worth a launch.

    Args:
        num_programs: programs that one split would give (batch * KV heads * row tiles).
        kv_len: S, the slots of the cache, not its current length: the host never reads that.

    Example:
        >>> choose_num_splits(num_programs=8, kv_len=8192, num_multiprocessors=132)
        33
    """
    wanted = (_WAVES * num_multiprocessors) // max(num_programs, 1)
    return max(1, min(wanted, kv_len // _MIN_SLOTS_PER_SPLIT, _MAX_SPLITS))


def bound_num_splits(num_splits: int, kv_len: int) -> int:
    """At most num_splits, and no more than there are shares to give."""
    return max(1, min(num_splits, kv_len // SLOTS_PER_SHARE, _MAX_SPLITS))


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of a kernel's matrix products: the tensors' own, but float32 for bfloat16 in the interpreter.

    The interpreter runs on numpy, which has no bfloat16.
    """
    if dtype == torch.bfloat16 and knobs.runtime.interpret:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


@functools.cache
def _device_facts(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def _look_up(table: dict[tuple[int, int], Tiles], dtype: torch.dtype, head_dim: int) -> Tiles:
    padded = max(64, _next_power_of_2(head_dim))
    return table[padded, dtype.itemsize]


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
