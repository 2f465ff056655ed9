"""Small cases of bench.attention for the CPU, one of each sort, and ceilings."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.cases import Case
from bench.harness import Ceilings

CEILINGS = Ceilings(copy_tbs=3.0, read_tbs=3.0, matmul_tflops=700.0, graph_kernel_us=1.25)
DECODE = Case(batch=3, query_len=1, kv_len=63, num_query_heads=6, num_kv_heads=2, head_dim=16)
PREFILL = replace(DECODE, query_len=63)
CHUNK = replace(DECODE, query_len=20)
SORTS = {
    "decode": DECODE,
    "prefill": PREFILL,
    "chunk": CHUNK,
    "speculative": replace(DECODE, query_len=5),
    "windowed decode": replace(DECODE, window=17),
    "windowed speculative": replace(DECODE, query_len=5, window=17),
    "windowed prefill": replace(PREFILL, window=17),
    "windowed chunk": replace(CHUNK, window=17),
    "padded decode": replace(DECODE, padding=40),
    "padded windowed decode": replace(DECODE, window=17, padding=50),
    "padded speculative": replace(DECODE, query_len=5, padding=40),
    "padded prefill": replace(PREFILL, padding=40),
    "padded windowed chunk": replace(CHUNK, padding=50, window=17),
    "non-causal": replace(PREFILL, is_causal=False),
    "non-causal speculative": replace(DECODE, query_len=5, is_causal=False),
    "non-causal chunk": replace(CHUNK, is_causal=False),
    "one to one": replace(PREFILL, num_kv_heads=6),
    "float16": replace(PREFILL, dtype=torch.float16),
    "head dim 96": replace(DECODE, head_dim=96),
}


def generator() -> torch.Generator:
    """The same numbers for each test, whichever ran before."""
    return torch.Generator().manual_seed(0)
