"""Tile, warp, stage and split choices: tables and pure functions of architecture, dtype and shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class LinearTiles:
    """How a linear kernel is cut: rows of the input, rows of weights and depth a tile, warps, loads in flight.

    has_ring: whether Hopper's kernel runs it, which keeps the loads in flight in a ring of so many slots.
    prefetched_bytes: of the weights, about what all programs together may ask the L2 for while the kernel ahead still
    runs; at the least a line of 128 bytes for each row of weights. Enough to keep the memory busy between two
    kernels; more delays what the kernel ahead still has to load.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    prefetched_bytes: int = 8 * 2**20
    has_ring: bool = False


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
_FLOAT32_DECODE: Table = {
    (64, 4): Tiles(16, 32, 4, 2),
    (128, 4): Tiles(16, 32, 8, 2),
    (256, 4): Tiles(16, 16, 8, 1),
}
_DECODE: dict[str, Table] = {
    "hopper": {(64, 2): Tiles(64, 32, 4, 4), (128, 2): Tiles(64, 32, 4, 4), (256, 2): Tiles(32, 32, 4, 3)},
    "ampere": {(64, 2): Tiles(64, 32, 4, 4), (128, 2): Tiles(64, 32, 4, 4), (256, 2): Tiles(32, 32, 4, 3)},
    "small": {(64, 2): Tiles(64, 64, 4, 2), (128, 2): Tiles(32, 64, 4, 2), (256, 2): Tiles(32, 32, 4, 2)},
}
# A single token's mask is its bounds, which leaves registers for more slots at a time.
_HOPPER_ROPE: Table = {(64, 2): Tiles(16, 128, 4, 2), (128, 2): Tiles(16, 128, 4, 2)}
# Linear layers of several rows, by the largest number of them: for outputs that one wave of programs covers, and wider.
_LINEAR = {
    "ampere": {16: (LinearTiles(16, 32, 256, 4, 6), LinearTiles(16, 32, 256, 4, 3)),
               32: (LinearTiles(32, 32, 256, 4, 4), LinearTiles(32, 32, 256, 4, 2))},
    "small": {16: (LinearTiles(16, 32, 128, 4, 4), LinearTiles(16, 32, 128, 4, 3)),
              32: (LinearTiles(32, 32, 128, 4, 3), LinearTiles(32, 32, 128, 4, 2))},
}  # fmt: skip
# Hopper's linear kernel: one depth and one number of warps for all, so that sums run in one order and the bits of a row
# do not depend on how many others there are.
_RING_BLOCK_K = 256
_RING_NUM_WARPS = 4
# Where one program a processor covers the output, its own loads must keep the memory busy. Elsewhere two fit on a
# processor, so that one loads while the other starts or ends.
_RING_SLOTS_OF_ONE_WAVE = 6
_RING_MAX_SLOTS = 4
_HALF_OF_SHARED_MEMORY = 113 * 1024
# Every other GPU gets the tables that fit 64 KB of shared memory.
_GENERATION = {"sm_90": "hopper", "sm_80": "ampere", "sm_100": "ampere", "sm_103": "ampere"}
# Tensor cores multiply no fewer rows, and no shorter ones.
_MIN_DOT_SIZE = 16
# Query tokens up to which the split kernel serves; beyond, prefill has enough tiles of its own.
MAX_DECODE_TOKENS = 16
# Splits share a KV range in units of this many slots.
SLOTS_PER_SHARE = 16
# Of the next kernel's weights, what decode's attention brings into the L2 while the memory would idle.
PREFETCHED_BYTES = 8 * 2**20
_MIN_SLOTS_PER_SPLIT = 64
_MAX_SPLITS = 128
_WAVES = 2
# Beyond this depth the matrix-vector kernel reads more rows at a time.
_LONG_DEPTH = 8192


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
    table = _PREFILL[_GENERATION.get(arch, "small")] | _FLOAT32_PREFILL
    return table[_table_key(dtype, head_dim)]


def hopper_prefill_tiles(head_dim: int, num_multiprocessors: int) -> HopperTiles:
    """Tiles of Hopper's prefill kernel; head_dim is the larger of D and Dv.

    Example:
        >>> hopper_prefill_tiles(96, num_multiprocessors=132)
        HopperTiles(block_m=128, block_n=128, num_query_slots=2, num_slots=2, num_programs=132)
    """
    return replace(_HOPPER_PREFILL[padded_head_dim(head_dim)], num_programs=num_multiprocessors)


@functools.cache
def decode_tiles(arch: str, dtype: torch.dtype, head_dim: int, num_rows: int) -> Tiles:
    """Tiles of the split-KV decode kernel for num_rows = group * query_len packed rows.

    Example:
        >>> decode_tiles("sm_90", torch.bfloat16, 128, num_rows=4)
        Tiles(block_m=16, block_n=32, num_warps=4, num_stages=4)
    """
    table = _DECODE[_GENERATION.get(arch, "small")] | _FLOAT32_DECODE
    largest = table[_table_key(dtype, head_dim)]
    rows = min(largest.block_m, max(_MIN_DOT_SIZE, next_power_of_2(num_rows)))
    return replace(largest, block_m=rows)


@functools.cache
def rope_decode_tiles(arch: str, dtype: torch.dtype, head_dim: int, group: int) -> Tiles:
    """Tiles of the rotating decode kernel, for one token of `group` heads a KV head.

    Example:
        >>> rope_decode_tiles("sm_90", torch.bfloat16, 128, group=4)
        Tiles(block_m=16, block_n=128, num_warps=4, num_stages=2)
    """
    key = _table_key(dtype, head_dim)
    if is_hopper(arch) and group <= _MIN_DOT_SIZE and key in _HOPPER_ROPE:
        return _HOPPER_ROPE[key]
    return decode_tiles(arch, dtype, head_dim, num_rows=group)


def is_one_row_at_a_time(num_rows: int, dtype: torch.dtype) -> bool:
    """Whether linear layers run a matrix-vector kernel for each row: tensor cores pay from two 16-bit rows on."""
    return num_rows == 1 or dtype == torch.float32


@functools.cache
def linear_tiles(
    arch: str,
    dtype: torch.dtype,
    num_rows: int,
    num_columns: int,
    depth: int,
    num_multiprocessors: int,
    is_aligned: bool,
) -> LinearTiles:
    """Tiles of the linear kernels for num_rows rows of depth elements and num_columns rows of weights.

    Args:
        is_aligned: whether rows and weights can be copied by 16 bytes.

    Example:
        >>> sizes = dict(num_columns=6144, depth=4096, num_multiprocessors=132, is_aligned=True)
        >>> linear_tiles("sm_90", torch.bfloat16, num_rows=1, **sizes).block_k
        2048
        >>> linear_tiles("sm_90", torch.bfloat16, num_rows=8, **sizes).has_ring
        True
    """
    if is_one_row_at_a_time(num_rows, dtype):
        num_warps = 8 if depth > _LONG_DEPTH else 4
        block_k = min(4096 // dtype.itemsize, next_power_of_2(depth))
        # Eight loads of 16 bytes in flight a thread.
        block_n = num_warps * 32 * (128 // dtype.itemsize) // block_k
        return LinearTiles(1, block_n, block_k, num_warps, num_stages=1, prefetched_bytes=2 * 2**20)
    generation = _GENERATION.get(arch, "small")
    if generation == "hopper" and is_aligned:
        return _ring_tiles(num_rows, ceil_div(num_columns, num_multiprocessors))
    one_wave, wider = _LINEAR["small" if generation == "small" else "ampere"][16 if num_rows <= 16 else 32]
    tiles = one_wave if num_columns <= num_multiprocessors * one_wave.block_n else wider
    return replace(tiles, block_k=min(tiles.block_k, max(_MIN_DOT_SIZE, next_power_of_2(depth))))


def _ring_tiles(num_rows: int, columns_per_multiprocessor: int) -> LinearTiles:
    block_m = 8 if num_rows <= 8 else 16 if num_rows <= 16 else 32
    block_n = 32 if columns_per_multiprocessor <= 64 else 64
    slot_bytes = (block_m + block_n) * _RING_BLOCK_K * 2
    num_slots = min(_RING_MAX_SLOTS, _HALF_OF_SHARED_MEMORY // slot_bytes)
    if columns_per_multiprocessor <= block_n:
        num_slots = _RING_SLOTS_OF_ONE_WAVE
    return LinearTiles(block_m, block_n, _RING_BLOCK_K, _RING_NUM_WARPS, num_slots, prefetched_bytes=0, has_ring=True)


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


def _device_facts(device: torch.device) -> tuple[str, int]:
    return _facts_of(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _facts_of(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count


def _table_key(dtype: torch.dtype, head_dim: int) -> tuple[int, int]:
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
