"""Tile, warp, stage and split choices of the split-KV kernels: tables and pure functions of architecture, dtype and
shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from csrc_free_kernels.tuning import (
    MIN_DOT_SIZE,
    Table,
    Tiles,
    ceil_div,
    is_hopper,
    next_power_of_2,
    of_generation,
    padded_head_dim,
    table_key,
)


@dataclass(frozen=True)
class RingTiles:
    """How Hopper's split-KV kernels are cut: the rows of a tile that may be taken, slots of the cache a tile, warps a
    program, and tiles that shared memory holds at a time."""

    held_rows: int
    block_n: int
    num_warps: int
    num_slots: int

    @property
    def block_m(self) -> int:
        """Rows of a tile: no fewer than tensor cores multiply."""
        return max(MIN_DOT_SIZE, self.held_rows)


# Tiles by (padded head dim, bytes an element), as in tuning.py.
_FLOAT32_DECODE: Table = {
    (64, 4): Tiles(16, 32, 4, 2),
    (128, 4): Tiles(16, 32, 8, 2),
    (256, 4): Tiles(16, 16, 8, 1),
}
_DECODE: dict[str, Table] = {
    "ampere": {(64, 2): Tiles(32, 32, 4, 4), (128, 2): Tiles(64, 32, 4, 4), (256, 2): Tiles(32, 32, 4, 3)},
    "blackwell": {(64, 2): Tiles(32, 32, 4, 4), (128, 2): Tiles(32, 32, 4, 4), (256, 2): Tiles(32, 32, 4, 3)},
    "small": {(64, 2): Tiles(64, 64, 4, 2), (128, 2): Tiles(32, 64, 4, 2), (256, 2): Tiles(32, 32, 4, 2)},
}
# On Hopper, where one wave of programs covers the GPU, one fills a processor's shared memory: smaller ones crowd onto
# some processors, and leave others without work, when they start while the kernel ahead still runs. By the length of
# their shares, more loads in flight or longer tiles pay. Where programs follow each other, several share a processor.
_HOPPER_DECODE: dict[str, Table] = {
    "short": {(64, 2): Tiles(64, 128, 4, 5), (128, 2): Tiles(64, 64, 4, 5), (256, 2): Tiles(32, 64, 8, 3)},
    "long": {(64, 2): Tiles(64, 128, 4, 5), (128, 2): Tiles(64, 128, 8, 3), (256, 2): Tiles(32, 64, 8, 3)},
    "waves": {(64, 2): Tiles(64, 128, 4, 4), (128, 2): Tiles(32, 128, 4, 2), (256, 2): Tiles(32, 32, 4, 3)},
    # Of whatever shares, for head dims that are no power of two: their masks take registers too.
    "masked": {(64, 2): Tiles(32, 64, 8, 5), (128, 2): Tiles(32, 64, 8, 5), (256, 2): Tiles(16, 32, 8, 5)},
}
# Slots a tile, warps, and tiles held of Hopper's split-KV kernels, by padded head dim: in one wave of programs, by the
# length of their shares; where two of short shares sit on each processor; where programs follow each other.
_RINGS: dict[str, dict[int, tuple[int, int, int]]] = {
    "short": {64: (64, 4, 5), 128: (64, 4, 4), 256: (64, 4, 2)},
    "long": {64: (128, 4, 4), 128: (128, 4, 3), 256: (64, 4, 2)},
    "pairs": {64: (128, 4, 3), 128: (64, 4, 3), 256: (64, 4, 2)},
    "waves": {64: (128, 4, 3), 128: (128, 4, 2), 256: (64, 4, 2)},
}
# Packed rows that a thread's registers hold there, by padded head dim, and where columns are masked.
_MAX_RING_ROWS = {64: 32, 128: 32, 256: 16}
_MAX_MASKED_RING_ROWS = {64: 32, 128: 16, 256: 8}
# Query tokens up to which the split kernel serves; beyond, prefill has enough tiles of its own.
MAX_DECODE_TOKENS = 16
# A share that is worth a program, and the least that a caller may ask for.
_MIN_SLOTS_PER_SPLIT = 64
# A second launch, to combine, takes as long as so many tiles.
_COMBINE_TILES = 4
_MIN_SLOTS_OF_A_WISH = 16
_MAX_SPLITS = 128
_LONG_SHARE, _LONG_RING_SHARE = 1024, 512
# Of a split's share, asked for ahead: all programs together no more than what memory delivers between two kernels.
_FEW_SLOTS, _MANY_SLOTS = 64, 128
# Of the next kernel's weights, what decode's attention brings into the L2 while the memory would idle.
PREFETCHED_BYTES = 8 * 2**20
# Decode's programs that a processor holds at a time, where they do not fill it.
_PROGRAMS_PER_PROCESSOR = 2
# More waves than this only add partial results; fewer are enough if they keep this share of the GPU busy.
_MAX_WAVES = 5
_BUSY_ENOUGH = 0.85


@dataclass(frozen=True)
class DecodePlan:
    """How a split-KV kernel is cut: its tiles, splits of each KV range, and of each split's slots, how many it asks the
    L2 for while the kernel ahead still runs."""

    tiles: Tiles | RingTiles
    num_splits: int
    prefetched_slots: int = _FEW_SLOTS


@functools.cache
def plan_decode(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    num_rows: int,
    num_heads: int,
    kv_len: int,
    num_multiprocessors: int,
    num_splits: int = 0,
    has_ring: bool = False,
) -> DecodePlan:
    """How a split-KV kernel is cut, from shapes alone.

    Args:
        head_dim: the larger of D and Dv.
        num_rows: packed rows of a KV head (group * query_len).
        num_heads: KV heads of all sequences (batch * Hkv).
        kv_len: S, the slots of the cache, not its current length: the host never reads that.
        num_splits: at most so many; 0 chooses.
        has_ring: whether Hopper's kernel runs, which serves num_rows up to `max_ring_rows`.

    Example:
        >>> sizes = dict(num_rows=4, kv_len=8192, num_multiprocessors=132)
        >>> plan_decode("sm_90", torch.bfloat16, 128, num_heads=8, **sizes)
        DecodePlan(tiles=Tiles(block_m=16, block_n=64, num_warps=4, num_stages=5), num_splits=16, prefetched_slots=128)
        >>> plan_decode("sm_90", torch.bfloat16, 128, num_heads=256, **sizes)
        DecodePlan(tiles=Tiles(block_m=16, block_n=128, num_warps=4, num_stages=2), num_splits=1, prefetched_slots=64)
        >>> plan_decode("sm_90", torch.bfloat16, 128, num_heads=256, **sizes, has_ring=True).tiles
        RingTiles(held_rows=4, block_n=128, num_warps=4, num_slots=2)
    """
    if has_ring:
        return _plan_ring(head_dim, num_rows, num_heads, kv_len, num_multiprocessors, num_splits)
    key = table_key(dtype, head_dim)
    is_tuned = is_hopper(arch) and dtype.itemsize == 2
    is_masked = head_dim != next_power_of_2(head_dim)
    if is_tuned:
        table = _HOPPER_DECODE["masked" if is_masked else "waves"]
    else:
        table = of_generation(_DECODE, arch) | _FLOAT32_DECODE
    block_m = min(table[key].block_m, max(MIN_DOT_SIZE, next_power_of_2(num_rows)))
    num_programs = num_heads * ceil_div(num_rows, block_m)
    num_places = num_multiprocessors * (1 if is_tuned else _PROGRAMS_PER_PROCESSOR)
    num_splits = _choose_splits(num_programs, num_places, kv_len, wish=num_splits)
    share = kv_len // num_splits
    is_one_wave = num_programs * num_splits <= num_places
    if is_tuned and is_one_wave and not is_masked:
        table = _HOPPER_DECODE["long" if share >= _LONG_SHARE else "short"]
    return DecodePlan(replace(table[key], block_m=block_m), num_splits, _slots_ahead(share, is_one_wave))


def max_ring_rows(head_dim: int) -> int:
    """Packed rows that Hopper's split-KV kernels serve.

    Example:
        >>> [max_ring_rows(head_dim) for head_dim in (96, 128)]
        [16, 32]
    """
    padded = padded_head_dim(head_dim)
    return (_MAX_RING_ROWS if head_dim == padded else _MAX_MASKED_RING_ROWS)[padded]


def ring_rows(num_rows: int) -> int:
    """Rows that those kernels take for so many packed ones.

    Example:
        >>> [ring_rows(num_rows) for num_rows in (1, 7, 16)]
        [4, 8, 16]
    """
    return max(4, next_power_of_2(num_rows))


def _plan_ring(
    head_dim: int, num_rows: int, num_heads: int, kv_len: int, num_multiprocessors: int, num_splits: int
) -> DecodePlan:
    is_wished = num_splits > 0
    num_splits = _choose_splits(num_heads, num_multiprocessors, kv_len, wish=num_splits)
    num_tiles = kv_len // _MIN_SLOTS_PER_SPLIT
    if not is_wished and num_tiles - ceil_div(num_tiles, num_splits) <= _COMBINE_TILES:
        num_splits = 1
    share = kv_len // num_splits
    is_one_wave = num_heads * num_splits <= num_multiprocessors
    is_resident = num_heads * num_splits <= _PROGRAMS_PER_PROCESSOR * num_multiprocessors
    held_rows = ring_rows(num_rows)
    if held_rows > MIN_DOT_SIZE:
        # Longer tiles of so many rows would not fit the registers.
        regime = "pairs"
    elif is_one_wave:
        regime = "long" if share >= _LONG_RING_SHARE else "short"
    else:
        regime = "pairs" if is_resident and share < _LONG_SHARE else "waves"
    tiles = RingTiles(held_rows, *_RINGS[regime][padded_head_dim(head_dim)])
    return DecodePlan(tiles, num_splits, _slots_ahead(share, is_one_wave))


def _choose_splits(num_programs: int, num_places: int, kv_len: int, *, wish: int) -> int:
    """At most as many as are wished for, or, without a wish, as fill the GPU; 1 at least."""
    if wish > 0:
        return max(1, min(wish, kv_len // _MIN_SLOTS_OF_A_WISH, _MAX_SPLITS))
    return max(1, min(_fill_waves(num_programs, num_places), kv_len // _MIN_SLOTS_PER_SPLIT, _MAX_SPLITS))


def _slots_ahead(share: int, is_one_wave: bool) -> int:
    return _MANY_SLOTS if is_one_wave and share >= 2 * _MANY_SLOTS else _FEW_SLOTS


def _fill_waves(num_programs: int, num_places: int) -> int:
    """The smallest number of splits with which whole waves of programs keep most of the GPU busy."""
    best_share, best_splits = 0.0, 1
    for num_waves in range(1, _MAX_WAVES + 1):
        num_splits = num_waves * num_places // max(num_programs, 1)
        share = num_programs * num_splits / (num_waves * num_places)
        if share >= _BUSY_ENOUGH:
            return num_splits
        if share > best_share:
            best_share, best_splits = share, num_splits
    return best_splits
