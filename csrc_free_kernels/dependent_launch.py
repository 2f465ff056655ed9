"""Programmatic dependent launch: a kernel starts while the one before it ends (Hopper and later).

A kernel launched so runs up to `wait` beside others before it, ours or any that let their dependents start early, and
must until then neither write nor read what one of these may write: activations, caches, and every tensor that a caller
has not declared constant. Prefetching into L2 is always safe: it fetches no value.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# What one prefetch asks for.
LINE_BYTES = tl.constexpr(128)


def launch_options(is_dependent: bool) -> dict[str, bool]:
    """The launch options of a kernel; backends without the feature do not know the option."""
    return {"launch_pdl": True} if is_dependent else {}


@triton.jit
def launch_dependents(IS_DEPENDENT: tl.constexpr):
    """Lets the next kernel start as soon as every program of this one has come here."""
    if IS_DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait(IS_DEPENDENT: tl.constexpr):
    """Returns once all earlier kernels have ended and what they wrote can be seen."""
    if IS_DEPENDENT:
        gdc_wait()


@triton.jit
def prefetch_rows(p_row, D: tl.constexpr):
    """Asks for D elements from each of the addresses [N, 1] on."""
    LINE: tl.constexpr = LINE_BYTES // (p_row.dtype.element_ty.primitive_bitwidth // 8)
    o_d = tl.arange(0, triton.next_power_of_2(triton.cdiv(D, LINE))) * LINE
    if D % LINE != 0:
        o_d = tl.minimum(o_d, D - 1)
    prefetch_l2(p_row + o_d[None, :])


@triton.jit
def prefetch_l2(p_lines):
    """Asks for the 128-byte lines at a tensor of addresses."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0",
        "=r,l",
        [p_lines.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
