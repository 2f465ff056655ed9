"""The order of prefill's tiles: each once, sections that fit the L2, programs that end together."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest

pytest.importorskip("triton")

from csrc_free_kernels import tile_order, tuning

# The functions that are compiled, on Python's numbers.
head_and_row_tile, tile_of_turn = tile_order.head_and_row_tile.fn, tile_order.tile_of_turn.fn
NUM_PROGRAMS = 132


def tiles_of_programs(num_programs: int, num_tiles: int) -> list[list[int]]:
    """What programs that stay take, one after the other."""
    with mock.patch.object(tile_order, "tile_of_turn", tile_of_turn):
        numbers = [tile_order.num_turns.fn(i, num_programs, num_tiles) for i in range(num_programs)]
    return [[tile_of_turn(turn, i, num_programs) for turn in range(number)] for i, number in enumerate(numbers)]


@pytest.mark.parametrize("section_heads", [1, 2, 3, 6, 12])
@pytest.mark.parametrize("num_row_tiles", [1, 2, 7])
def test_every_tile_comes_once_and_sections_one_after_the_other(section_heads: int, num_row_tiles: int) -> None:
    tiles = [head_and_row_tile(i, 12 // section_heads, section_heads, num_row_tiles) for i in range(12 * num_row_tiles)]
    assert sorted(tiles) == list(itertools.product(range(12), range(num_row_tiles)))
    sections = [head // section_heads for head, _ in tiles]
    assert sections == sorted(sections)
    last = [row_tile for head, row_tile in tiles if head // section_heads == sections[-1]]
    assert last == sorted(last, reverse=True)
    rows = [row_tile for _, row_tile in tiles]
    assert all(abs(row - after) <= 1 for row, after in itertools.pairwise(rows))


@pytest.mark.parametrize("num_tiles", [1, 131, 132, 133, 263, 264, 265, 395, 396, 1000])
def test_programs_that_stay_take_every_tile_once(num_tiles: int) -> None:
    taken = tiles_of_programs(min(NUM_PROGRAMS, num_tiles), num_tiles)
    assert sorted(itertools.chain(*taken)) == list(range(num_tiles))
    assert all(taken)


@pytest.mark.parametrize(("batch", "length"), [(1, 1024), (1, 2048), (1, 4096), (4, 4096), (1, 16384), (8, 2048)])
@pytest.mark.parametrize("num_kv_heads", [8, 32])
def test_programs_end_together(num_kv_heads: int, batch: int, length: int) -> None:
    """Of causal prefill of 32 heads in tiles of 128 rows, which cost what they see and a fixed share."""
    section_heads = tuning.section_heads(
        "sm_90", num_kv_heads=batch * num_kv_heads, group=32 // num_kv_heads, head_bytes=length * 2 * 128 * 2
    )
    num_heads, num_row_tiles = 32 * batch, length // 128
    costs = [
        sum(2.2 + head_and_row_tile(i, num_heads // section_heads, section_heads, num_row_tiles)[1] for i in tiles)
        for tiles in tiles_of_programs(NUM_PROGRAMS, num_heads * num_row_tiles)
    ]
    assert max(costs) <= sum(costs) / len(costs) / 0.96


def test_sections_divide_the_heads_and_fit() -> None:
    megabyte = 2**20
    assert tuning.section_heads("sm_90", num_kv_heads=8, group=4, head_bytes=16 * megabyte) == 2 * 4
    assert tuning.section_heads("sm_90", num_kv_heads=8, group=4, head_bytes=64 * megabyte) == 4
    assert tuning.section_heads("sm_90", num_kv_heads=7, group=4, head_bytes=8 * megabyte) == 4
    assert tuning.section_heads("sm_80", num_kv_heads=32, group=1, head_bytes=2 * megabyte) == 8
    assert tuning.section_heads("gfx942", num_kv_heads=3, group=1, head_bytes=0) == 3
