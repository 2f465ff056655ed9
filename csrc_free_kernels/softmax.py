"""Online softmax in the log2 domain: jit helpers shared by the attention kernels (arXiv 2205.14135, 2307.08691)."""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton import knobs

_LOG2E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True)
class ScoreScale:
    """How products of query and key become log2 weights, as the numbers a kernel takes.

    query_sign (-1, 0 or 1) is multiplied into the query, so that to_log2 is positive and the running maximum can be
    kept unscaled. With a softcap, products become `softcap * tanh(product * before_cap)`. What comes out is a score
    in units of to_natural, the factor to the exponent of e; to_log2 is the factor to the exponent of 2.
    """

    query_sign: int
    before_cap: float
    softcap: float
    to_natural: float

    @property
    def to_log2(self) -> float:
        return self.to_natural * math.log2(math.e)


def score_scale(scale: float, softcap: float) -> ScoreScale:
    """The numbers for scores `scale * product`, softcapped if softcap > 0.

    Example:
        >>> score_scale(scale=-0.5, softcap=0.0)
        ScoreScale(query_sign=-1, before_cap=0.0, softcap=0.0, to_natural=0.5)
    """
    # In float32 a smaller factor would flush to 0 and a larger one overflow: 0 * inf is NaN.
    query_sign = 0 if abs(scale) < 2.0**-120 else 1 if scale > 0 else -1
    magnitude = 1.0 if query_sign == 0 else min(abs(scale), 2.0**120)
    if softcap > 0:
        before_cap = min(magnitude / softcap, 2.0**120)
        return ScoreScale(query_sign, before_cap=before_cap, softcap=softcap, to_natural=1.0)
    return ScoreScale(query_sign, before_cap=0.0, softcap=0.0, to_natural=magnitude)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of a kernel's matrix products: the tensors' own, but float32 for bfloat16 in the interpreter.

    The interpreter runs on numpy, which has no bfloat16.
    """
    if dtype == torch.bfloat16 and knobs.runtime.interpret:
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


@triton.jit
def sign_query(b_q, QUERY_SIGN: tl.constexpr):
    if QUERY_SIGN == 1:
        return b_q
    elif QUERY_SIGN == -1:
        return -b_q
    else:
        return tl.zeros_like(b_q)


@triton.jit
def scores(b_q, b_k, before_cap, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores [BLOCK_M, BLOCK_N] in float32; times to_log2 they are log2 weights."""
    if b_q.dtype == tl.float32:
        b_s = _chunked_dot(b_q, tl.trans(b_k))
    else:
        b_s = tl.dot(b_q, tl.trans(b_k))
    if HAS_SOFTCAP:
        b_s = softcap * _tanh(b_s * before_cap)
    return b_s


@triton.jit
def _tanh(b_x):
    """tanh in float32, to 3 units of float32's machine epsilon relative to the result."""
    # 1 - 2 / (exp(2x) + 1) cancels near 0, where softcapped scores live: there a minimax polynomial (Cephes tanhf).
    b_y = b_x * b_x
    b_poly = -5.70498872745e-3 * b_y + 2.06390887954e-2
    b_poly = b_poly * b_y - 5.37397155531e-2
    b_poly = b_poly * b_y + 1.33314422036e-1
    b_poly = b_poly * b_y - 3.33332819422e-1
    b_near = b_poly * b_y * b_x + b_x
    b_far = 1.0 - 2.0 / (tl.exp2(b_x * (2.0 * _LOG2E)) + 1.0)
    return tl.where(tl.abs(b_x) < 0.625, b_near, b_far)


@triton.jit
def update(b_s, b_o, b_max, b_sum, to_log2):
    """Takes scores b_s into the running (output, max, sum); returns the weights and the new state.

    The maximum is subtracted before the factor is multiplied in: the weights that count then round least.
    """
    b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
    b_ref = finite(b_new_max)
    b_p = tl.exp2((b_s - b_ref[:, None]) * to_log2)
    b_decay = tl.exp2((b_max - b_ref) * to_log2)
    return b_p, b_o * b_decay[:, None], b_new_max, b_sum * b_decay + tl.sum(b_p, 1)


@triton.jit
def accumulate(b_o, b_p, b_v):
    """b_o + b_p @ b_v, the weights in the values' dtype."""
    if b_v.dtype == tl.float32:
        b_o += _chunked_dot(b_p, b_v)
    else:
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o)
    return b_o


@triton.jit
def _chunked_dot(b_a, b_b):
    """b_a [M, K] @ b_b [K, N] in float32, summed over chunks of K that are summed by themselves.

    One running sum over all of K rounds several times as much as the tree of sums in a library's matrix-vector product.
    """
    M: tl.constexpr = b_a.shape[0]
    K: tl.constexpr = b_a.shape[1]
    N: tl.constexpr = b_b.shape[1]
    CHUNK: tl.constexpr = 16
    # [K / CHUNK, M, CHUNK] and [K / CHUNK, CHUNK, N]
    b_a_chunks = tl.permute(tl.reshape(b_a, [M, K // CHUNK, CHUNK]), [1, 0, 2])
    b_b_chunks = tl.reshape(b_b, [K // CHUNK, CHUNK, N])
    return tl.sum(tl.dot(b_a_chunks, b_b_chunks, input_precision="ieee"), 0)


@triton.jit
def finish(b_o, b_max, b_sum, b_sink, to_natural):
    """The normalised output and the natural log of the denominator, b_sink (-inf for none) included."""
    b_scale, b_lse = output_scale(b_max, b_sum, b_sink, to_natural)
    return b_o * b_scale[:, None], b_lse


@triton.jit
def output_scale(b_max, b_sum, b_sink, to_natural):
    """What normalises each row of the output, and the natural log of its denominator."""
    b_max = b_max * to_natural
    b_all_max = tl.maximum(b_max, b_sink)
    b_ref = finite(b_all_max)
    b_decay = tl.exp(b_max - b_ref)
    b_total = b_sum * b_decay + tl.exp(b_sink - b_ref)
    return tl.div_rn(b_decay, tl.where(b_total == 0, 1.0, b_total)), b_ref + tl.log(b_total)


@triton.jit
def load_sinks(p_sinks, o_head, m_head):
    """Sinks of the given heads in float32; -inf where there are none."""
    if p_sinks is None:
        b_sink = tl.full(o_head.shape, float("-inf"), tl.float32)
    else:
        b_sink = tl.load(p_sinks + o_head, mask=m_head, other=0.0).to(tl.float32)
    return b_sink


@triton.jit
def finite(b_max):
    # A row that has seen nothing keeps -inf, and -inf - -inf is NaN.
    return tl.where(b_max == float("-inf"), 0.0, b_max)
