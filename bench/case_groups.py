"""The cases of bench.attention, in groups that can be measured one by one: each aspect at one or two telling shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.cases import Case


def decode(batch: int, kv_len: int) -> Case:
    """One new token of each of `batch` sequences against a cache of kv_len slots."""
    return Case(batch=batch, query_len=1, kv_len=kv_len)


def prefill(length: int, num_tokens: int = 16384) -> Case:
    """Sequences of one length, as many as make up num_tokens in all, and at least one."""
    return Case(batch=max(1, num_tokens // length), query_len=length, kv_len=length)


DECODE = (
    *(decode(batch=1, kv_len=kv_len) for kv_len in (512, 2048, 8192, 32768, 131072)),
    *(decode(batch=8, kv_len=kv_len) for kv_len in (512, 2048, 8192)),
    *(decode(batch=32, kv_len=kv_len) for kv_len in (2048, 8192)),
    *(decode(batch=batch, kv_len=2048) for batch in (64, 128)),
)
PREFILL = tuple(prefill(length) for length in (512, 1024, 2048, 4096, 8192, 16384, 32768))
# One bound by latency, one by bytes, one by arithmetic.
_TELLING = (decode(batch=1, kv_len=8192), decode(batch=32, kv_len=2048), prefill(4096))
HEAD_DIMS = tuple(replace(case, head_dim=head_dim) for head_dim in (64, 96, 256) for case in _TELLING)
RATIOS = tuple(
    replace(case, num_query_heads=num_query_heads, num_kv_heads=num_kv_heads)
    for num_query_heads, num_kv_heads in ((32, 32), (28, 4), (64, 8))
    for case in _TELLING
)
SPECULATIVE = tuple(
    replace(case, query_len=query_len)
    for case in (decode(batch=1, kv_len=8192), decode(batch=8, kv_len=2048))
    for query_len in (2, 4, 8, 16)
)
CHUNKED = tuple(Case(batch=1, query_len=2048, kv_len=kv_len) for kv_len in (8192, 32768))
# Each beside the same case without its window or padding, as the marks compare the two within one run.
WINDOWED = (
    decode(batch=8, kv_len=8192),
    replace(decode(batch=8, kv_len=8192), window=1024),
    prefill(16384),
    *(replace(prefill(16384), window=window) for window in (4096, 1024)),
)
PADDED = tuple(
    replace(case, padding=padding) for case in (decode(batch=8, kv_len=2048), prefill(2048)) for padding in (0, 1024)
)
NON_CAUSAL = tuple(
    replace(case, is_causal=False) for case in (prefill(1024), prefill(8192), Case(batch=4, query_len=512, kv_len=8192))
)
FLOAT16 = tuple(replace(case, dtype=torch.float16) for case in (*_TELLING, prefill(16384)))
GROUPS: Mapping[str, tuple[Case, ...]] = {
    "decode": DECODE,
    "prefill": PREFILL,
    "head_dims": HEAD_DIMS,
    "ratios": RATIOS,
    "speculative": SPECULATIVE,
    "chunked": CHUNKED,
    "windowed": WINDOWED,
    "padded": PADDED,
    "non_causal": NON_CAUSAL,
    "float16": FLOAT16,
}
QUICK = {
    "decode": (decode(batch=1, kv_len=512), decode(batch=1, kv_len=8192), decode(batch=32, kv_len=2048)),
    "prefill": (prefill(1024), prefill(4096)),
}


def is_among(cases: Sequence[Case]) -> Callable[[Mapping[str, Any]], bool]:
    """A test of whether a results file's case is one of these.

    Example:
        >>> is_among(DECODE)(decode(batch=1, kv_len=512).to_json()), is_among(DECODE)(prefill(512).to_json())
        (True, False)
    """
    wanted = [case.to_json() for case in cases]
    return lambda case: case in wanted
