"""Tile, warp, stage and split choices: tables and pure functions of architecture, dtype and shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TypeVar

import torch


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut: rows and slots a tile, warps a program, loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class HopperTiles:
    """How Hopper's prefill is cut: rows and slots a tile, tiles of queries, and of keys and values, that shared memory
    holds at a time, and programs that fill the GPU."""

    block_m: int
    block_n: int
    num_query_slots: int
    num_slots: int
    num_programs: int = 0


T = TypeVar("T")
Table = dict[tuple[int, int], Tiles]

# Tiles by (padded head dim, bytes an element). Shared memory and registers bound them: 16-bit kernels must not spill.
# float32 products run without tensor cores, so their tiles are small.
_FLOAT32_PREFILL: Table = {
    (64, 4): Tiles(32, 16, 8, 2),
    (128, 4): Tiles(32, 16, 8, 2),
    (256, 4): Tiles(16, 16, 8, 1),
}
_PREFILL: dict[str, Table] = {
    "hopper": {(64, 2): Tiles(128, 64, 8, 3), (128, 2): Tiles(128, 64, 8, 3), (256, 2): Tiles(128, 32, 8, 3)},
    "ampere": {(64, 2): Tiles(128, 128, 8, 2), (128, 2): Tiles(128, 64, 8, 3), (256, 2): Tiles(64, 64, 8, 2)},
    "small": {(64, 2): Tiles(128, 64, 8, 2), (128, 2): Tiles(64, 32, 4, 2), (256, 2): Tiles(64, 32, 8, 1)},
}
# By the padded head dim. The scores and the output of 64 rows fill a group's registers, the tiles shared memory.
_HOPPER_PREFILL = {
    64: HopperTiles(128, 128, num_query_slots=2, num_slots=4),
    128: HopperTiles(128, 128, num_query_slots=2, num_slots=2),
    256: HopperTiles(128, 64, num_query_slots=1, num_slots=2),
}
# Of keys and values that programs of prefill read side by side: two thirds of an H100's L2, half of an A100's.
_L2_BYTES = {"hopper": 32 * 2**20, "blackwell": 32 * 2**20, "ampere": 20 * 2**20, "small": 4 * 2**20}
# Every other GPU gets the tables that fit 64 KB of shared memory.
_GENERATION = {"sm_90": "hopper", "sm_80": "ampere", "sm_100": "blackwell", "sm_103": "blackwell"}
# Tensor cores multiply no fewer rows, and no shorter ones.
MIN_DOT_SIZE = 16


def architecture(device: torch.device) -> str:
    """The GPU architecture of a CUDA or ROCm device, such as "sm_90" or "gfx942"."""
    return _device_facts(device)[0]


def is_hopper(arch: str) -> bool:
    """Whether the kernels that are written for Hopper alone run on such a GPU."""
    return _GENERATION.get(arch) == "hopper"


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device."""
    return _device_facts(device)[1]


@functools.cache
def supports_dependent_launch(arch: str) -> bool:
    """Whether kernels may overlap by programmatic dependent launch.

    Example:
        >>> [supports_dependent_launch(arch) for arch in ("sm_80", "sm_90", "gfx942")]
        [False, True, False]
    """
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90


def prefill_tiles(arch: str, dtype: torch.dtype, head_dim: int) -> Tiles:
    """Tiles of the portable prefill kernel; head_dim is the larger of D and Dv.

    Example:
        >>> prefill_tiles("sm_90", torch.bfloat16, 128)
        Tiles(block_m=128, block_n=64, num_warps=8, num_stages=3)
    """
    table = of_generation(_PREFILL, arch) | _FLOAT32_PREFILL
    return table[table_key(dtype, head_dim)]


def hopper_prefill_tiles(head_dim: int, num_multiprocessors: int) -> HopperTiles:
    """Tiles of Hopper's prefill kernel; head_dim is the larger of D and Dv.

    Example:
        >>> hopper_prefill_tiles(96, num_multiprocessors=132)
        HopperTiles(block_m=128, block_n=128, num_query_slots=2, num_slots=2, num_programs=132)
    """
    return replace(_HOPPER_PREFILL[padded_head_dim(head_dim)], num_programs=num_multiprocessors)


@functools.cache
def section_heads(arch: str, num_kv_heads: int, group: int, head_bytes: int) -> int:
    """Query heads that prefill computes at a time: those of as many KV heads as share the L2, and divide all of them.

    Args:
        num_kv_heads: of all sequences (batch * Hkv).
        group: query heads of each.
        head_bytes: keys and values of one.

    Example:
        >>> section_heads("sm_90", num_kv_heads=32, group=4, head_bytes=2 * 4096 * 256)
        64
    """
    most = max(1, of_generation(_L2_BYTES, arch) // max(head_bytes, 1))
    return group * max(number for number in range(1, num_kv_heads + 1) if number <= most and num_kv_heads % number == 0)


def of_generation(tables: dict[str, T], arch: str) -> T:
    """What holds for an architecture; where there is nothing of its own, Ampere's fits Hopper and Blackwell too."""
    generation = _GENERATION.get(arch, "small")
    return tables[generation] if generation in tables else tables["ampere"]


def _device_facts(device: torch.device) -> tuple[str, int]:
    return _facts_of(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _facts_of(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def table_key(dtype: torch.dtype, head_dim: int) -> tuple[int, int]:
    """Where a table holds the tiles of such heads.

    Example:
        >>> table_key(torch.float16, 80)
        (128, 2)
    """
    return padded_head_dim(head_dim), dtype.itemsize


def padded_head_dim(head_dim: int) -> int:
    """The size that tiles of such heads are chosen for.

    Example:
        >>> [padded_head_dim(head_dim) for head_dim in (16, 64, 80, 256)]
        [64, 64, 128, 256]
    """
    return max(64, next_power_of_2(head_dim))


def next_power_of_2(n: int) -> int:
    """As triton's, whose host function takes microseconds of each launch.

    Example:
        >>> [next_power_of_2(n) for n in (1, 5, 8)]
        [1, 8, 8]
    """
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up.

    Example:
        >>> ceil_div(9, 4)
        3
    """
    return -(-a // b)
