"""The order in which prefill computes its tiles: jit helpers, plain arithmetic, that both of its kernels share."""

import triton
import triton.language as tl  # noqa: F401 the interpreter asks for it


@triton.jit
def head_and_row_tile(i_tile, num_sections, section_heads, num_row_tiles):
    """(head of all sequences, tile of its rows) of tile number i_tile of num_sections * section_heads heads.

    Heads come in sections, whose keys and values stay in the L2 together (as in FlashAttention-3, arXiv 2407.08608).
    The last section begins with its last rows, which see most: the longest tiles first, so that all programs end
    together. The section before it ends with them, and so on, so that neighbours in the order are alike.
    """
    section_tiles = section_heads * num_row_tiles
    i_section = i_tile // section_tiles
    i_within = i_tile % section_tiles
    i_rank = i_within // section_heads
    is_from_bottom = (num_sections - i_section) % 2
    i_row_tile = i_rank + is_from_bottom * (num_row_tiles - 1 - 2 * i_rank)
    return i_section * section_heads + i_within % section_heads, i_row_tile


@triton.jit
def tile_of_turn(i_turn, i_program, num_programs):
    """The tile that a program which stays takes in a turn: back and forth, for who gets the shorter one comes first."""
    is_back = i_turn % 2
    return i_turn * num_programs + i_program + is_back * (num_programs - 1 - 2 * i_program)


@triton.jit
def num_turns(i_program, num_programs, num_tiles):
    """How many tiles such a program takes."""
    num_full = num_tiles // num_programs
    return num_full + (tile_of_turn(num_full, i_program, num_programs) < num_tiles)
