"""The part of FlashInfer 0.5.3 that bench.attention calls, in plain torch: its layouts and its names of arguments."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flashcore_ops import reference

CREATED: list[dict[str, Any]] = []


def _attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, window_left: int) -> Tensor:
    """One sequence: query `[Q, Hq, D]`, key and value `[S, Hkv, D]`."""
    heads = (tokens.transpose(0, 1)[None] for tokens in (query, key, value))
    # A window is the tokens before a row's own, and says nothing of those behind.
    is_causal = causal or (window_left >= 0 and len(query) == 1)
    output, _ = reference.attention_with_lse(*heads, is_causal=is_causal, window=window_left + 1)
    return output[0].transpose(0, 1)


class _Wrapper:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", **options: Any) -> None:
        assert kv_layout == "NHD"
        assert float_workspace_buffer.dtype == torch.uint8
        CREATED.append({"wrapper": type(self).__name__, **options})

    def _set(self, mask: tuple[bool, int], dtypes: tuple[torch.dtype, torch.dtype], shape: tuple[int, ...]) -> None:
        self.mask, self.dtypes, self.shape = mask, dtypes, shape

    def _run(self, query: Tensor, sequences: list[tuple[slice, Tensor, Tensor]]) -> Tensor:
        num_query_heads, num_kv_heads, head_dim = self.shape
        assert query.shape[1:] == (num_query_heads, head_dim)
        outputs = []
        for rows, key, value in sequences:
            assert (query.dtype, key.dtype) == self.dtypes
            assert key.shape[1:] == value.shape[1:] == (num_kv_heads, head_dim)
            outputs.append(_attend(query[rows], key, value, *self.mask))
        return torch.cat(outputs)


def _check_offsets(*offsets: Tensor) -> None:
    assert all(tensor.dtype == torch.int32 for tensor in offsets)


class BatchPrefillWithRaggedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        *,
        causal: bool = False,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        _check_offsets(qo_indptr, kv_indptr)
        self.offsets = qo_indptr.tolist(), kv_indptr.tolist()
        self._set((causal, window_left), (q_data_type, kv_data_type), (num_qo_heads, num_kv_heads, head_dim_qk))

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, slots = ([slice(*pair) for pair in pairwise(ends)] for ends in self.offsets)
        return self._run(q, [(row, k[slot], v[slot]) for row, slot in zip(rows, slots, strict=True)])


class _Paged(_Wrapper):
    def _set_pages(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, page_size: int) -> None:
        _check_offsets(indptr, indices, last_page_len)
        assert last_page_len.min() >= 1
        assert last_page_len.max() <= page_size
        ends = indptr.tolist()
        self.pages = [indices[first:last] for first, last in pairwise(ends)]
        self.lengths = [
            page_size * (len(pages) - 1) + last for pages, last in zip(self.pages, last_page_len.tolist(), strict=True)
        ]
        self.page_size = page_size

    def _gather(self, cache: tuple[Tensor, Tensor], query_ends: list[int]) -> list[tuple[slice, Tensor, Tensor]]:
        assert cache[0].shape[1] == self.page_size
        rows = [slice(*pair) for pair in pairwise(query_ends)]
        return [
            (row, *(half[pages].flatten(0, 1)[:length] for half in cache))
            for row, pages, length in zip(rows, self.pages, self.lengths, strict=True)
        ]


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        _check_offsets(qo_indptr)
        self.query_ends = qo_indptr.tolist()
        self._set_pages(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size)
        self._set((causal, window_left), (q_data_type, kv_data_type), (num_qo_heads, num_kv_heads, head_dim_qk))

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return self._run(q, self._gather(paged_kv_cache, self.query_ends))


class BatchDecodeWithPagedKVCacheWrapper(_Paged):
    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        self._set_pages(indptr, indices, last_page_len, page_size)
        self._set((False, window_left), (q_data_type, kv_data_type), (num_qo_heads, num_kv_heads, head_dim))

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        return self._run(q, self._gather(paged_kv_cache, list(range(len(q) + 1))))
