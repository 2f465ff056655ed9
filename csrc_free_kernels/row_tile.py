"""Row tiles of prefill on Hopper: one group of warps finds out what they are, and tells the others.

The others have products to start, and the divisions among them would stand between.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from csrc_free_kernels import masks, tile_order

# What is told of a row tile, in this order.
BATCH, HEAD, TILE, FIRST_COLUMN, LOW, HIGH, NUM_KV_TILES = (gl.constexpr(i) for i in range(7))


@gluon.jit
def find(
    i_turn, sizes, p_range, stride_range, num_before,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """What the program computes in a turn: (batch, head, tile of its rows, first row's column, low, high, KV tiles,
    end): some row of the tile sees the slots [low, high) of the sequence, which ends at `end`.

    A window hides all but num_before slots before a row's own.
    """
    num_sections, section_heads, Hq, _, Q, S = sizes
    i_tile = tile_order.tile_of_turn(i_turn, gl.program_id(0), gl.num_programs(0))
    i_head, i_m = tile_order.head_and_row_tile(i_tile, num_sections, section_heads, gl.cdiv(Q, BLOCK_M))
    i_b = i_head // Hq
    start, end = masks.load_kv_range(p_range, stride_range, i_b.to(gl.int64), S)
    first_column = end - Q + i_m * BLOCK_M
    low = start
    high = end
    if IS_CAUSAL:
        high = gl.minimum(end, first_column + BLOCK_M)
    if HAS_WINDOW:
        low = gl.maximum(start, first_column - num_before)
    high = gl.maximum(low, high)
    # One at least, so that neither side has to do without: it is masked as a whole.
    return i_b, i_head % Hq, i_m, first_column, low, high, gl.maximum(gl.cdiv(high - low, BLOCK_N), 1), end


@gluon.jit
def tell(facts, scalars):
    """Stores up to eight scalars for the other groups, in the order given: at once, as each store has its barrier."""
    layout: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    o_scalar = gl.arange(0, 8, layout=layout)
    b_scalars = gl.zeros_like(o_scalar)
    for i in gl.static_range(len(scalars)):
        b_scalars = gl.where(o_scalar == i, scalars[i], b_scalars)
    facts.store(b_scalars)


@gluon.jit
def told(facts, i: gl.constexpr):
    """Number i of the scalars of a row tile, the same for every thread."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.sum(facts.slice(i, 1).load(layout), 0)
