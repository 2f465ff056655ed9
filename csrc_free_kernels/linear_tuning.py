"""How the linear kernels are cut: tables and pure functions of architecture, dtype and shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from csrc_free_kernels.tuning import MIN_DOT_SIZE, ceil_div, is_hopper, next_power_of_2, of_generation


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


# Linear layers of several rows, by the largest number of them: for outputs that one wave of programs covers, and wider.
_LINEAR = {
    "ampere": {16: (LinearTiles(16, 32, 256, 4, 6), LinearTiles(16, 32, 256, 4, 3)),
               32: (LinearTiles(32, 32, 256, 4, 4), LinearTiles(32, 32, 256, 4, 2))},
    # At 256 deep ptxas puts 8 bytes of the down projection's kernel on the stack.
    "blackwell": {16: (LinearTiles(16, 32, 128, 4, 8), LinearTiles(16, 32, 128, 4, 4)),
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
# Beyond this depth the matrix-vector kernel reads more rows at a time.
_LONG_DEPTH = 8192


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
    if is_hopper(arch) and is_aligned:
        return _ring_tiles(num_rows, ceil_div(num_columns, num_multiprocessors))
    one_wave, wider = of_generation(_LINEAR, arch)[16 if num_rows <= 16 else 32]
    tiles = one_wave if num_columns <= num_multiprocessors * one_wave.block_n else wider
    return replace(tiles, block_k=min(tiles.block_k, max(MIN_DOT_SIZE, next_power_of_2(depth))))


def _ring_tiles(num_rows: int, columns_per_multiprocessor: int) -> LinearTiles:
    block_m = 8 if num_rows <= 8 else 16 if num_rows <= 16 else 32
    block_n = 32 if columns_per_multiprocessor <= 64 else 64
    slot_bytes = (block_m + block_n) * _RING_BLOCK_K * 2
    num_slots = min(_RING_MAX_SLOTS, _HALF_OF_SHARED_MEMORY // slot_bytes)
    if columns_per_multiprocessor <= block_n:
        num_slots = _RING_SLOTS_OF_ONE_WAVE
    return LinearTiles(block_m, block_n, _RING_BLOCK_K, _RING_NUM_WARPS, num_slots, prefetched_bytes=0, has_ring=True)
