"""Wrong bounds of packed sequences, each with its error and text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashcore_ops.errors import DtypeError, FlashCoreError, ShapeError


def sequence_arguments() -> dict[str, Any]:
    return {
        "query": torch.zeros(1, 4, 8, 32),
        "key": torch.zeros(1, 2, 8, 32),
        "value": torch.zeros(1, 2, 8, 32),
        "cu_seqlens_q": torch.tensor([0, 3, 8], dtype=torch.int32),
    }


# (what is wrong, what is passed instead, the error, its text)
SEQUENCE_CASES: list[tuple[str, Callable[[], dict[str, Any]], type[FlashCoreError], str]] = [
    (
        "cu_seqlens_q rank",
        lambda: {"cu_seqlens_q": torch.zeros(1, 3, dtype=torch.int32)},
        ShapeError,
        "cu_seqlens_q: expected shape [N + 1] for N sequences, got [1, 3]. "
        "Pass each sequence's first row, and the end of the last.",
    ),
    (
        "cu_seqlens_q of nothing",
        lambda: {"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)},
        ShapeError,
        "cu_seqlens_q: expected shape [N + 1] for N sequences, got [0]. "
        "Pass each sequence's first row, and the end of the last.",
    ),
    (
        "cu_seqlens_q dtype",
        lambda: {"cu_seqlens_q": torch.tensor([0, 3, 8])},
        DtypeError,
        "cu_seqlens_q: expected int32, got int64. Cast it with .to(dtype).",
    ),
    (
        "packed batch",
        lambda: {name: tensor.expand(2, -1, -1, -1) for name, tensor in list(sequence_arguments().items())[:3]},
        ShapeError,
        "query: expected a batch of 1 beside cu_seqlens_q, got 2. "
        "Pack the sequences one behind the other, as [1, Hq, T, D].",
    ),
    (
        "packed slots",
        lambda: {"query": torch.zeros(1, 4, 5, 32)},
        ShapeError,
        "key: expected query's 5 tokens beside cu_seqlens_q without kv_range, got 8. "
        "Pass kv_range, the slots (start, end) of each sequence.",
    ),
    (
        "packed kv_range",
        lambda: {"kv_range": torch.zeros(1, 2, dtype=torch.int32)},
        ShapeError,
        "kv_range: expected shape [2, 2], got [1, 2]. Pass kv_range as [2, 2].",
    ),
]
