"""FlashInfer where it is installed (its calls as of 0.5.3): a paged cache at decode, ragged batches at prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, Inputs
from bench.peers.implementation import Call

PAGE_SIZE = 16
HEAD_DIMS = (64, 128, 256)
# From this many query heads a KV head on, its serving engines choose tensor cores at decode.
TENSOR_CORE_GROUP = 4
# Splits of large batches need more than the 128 MB that its documentation recommends.
WORKSPACE_BYTES = 384 * 2**20


def why_not_flashinfer(inputs: Inputs) -> str | None:
    """Why FlashInfer cannot run at all; None if it can."""
    if find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    if inputs.case.head_dim not in HEAD_DIMS:
        return f"it has kernels for head dims of {', '.join(map(str, HEAD_DIMS))}"
    return None if inputs.query.is_cuda else "it needs a GPU"


@dataclass(frozen=True)
class FlashInferPaged:
    """The few query tokens of decode over a paged cache, whose pages lie in order and hold no padding.

    The plan is made anew for each step of a model and serves all its layers, so it is not part of the call.
    """

    name: str = "flashinfer_paged"

    def why_not(self, inputs: Inputs) -> str | None:
        return why_not_flashinfer(inputs) if inputs.case.is_decode else "it is measured at decode"

    def prepare(self, sets: Sequence[Inputs]) -> list[Call]:
        case, device = sets[0].case, sets[0].query.device
        run = (_plan_decode if case.query_len == 1 else _plan_append)(case, device)
        return [partial(_run, run, case, _tokens(inputs.query), _pages(inputs)) for inputs in sets]


@dataclass(frozen=True)
class FlashInferRagged:
    """Prefill of contiguous tokens by its FlashAttention-3 backend."""

    name: str = "flashinfer_fa3"

    def why_not(self, inputs: Inputs) -> str | None:
        if inputs.case.is_decode:
            return "it is measured at prefill"
        if inputs.case.padding:
            return "a ragged batch has no padding to compare"
        reason = why_not_flashinfer(inputs)
        if reason is None and torch.cuda.get_device_capability(inputs.query.device) != (9, 0):
            reason = "its FlashAttention-3 backend needs a Hopper GPU"
        return reason

    def prepare(self, sets: Sequence[Inputs]) -> list[Call]:
        import flashinfer

        case, device = sets[0].case, sets[0].query.device
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), "NHD", backend="fa3")
        wrapper.plan(
            _offsets([case.query_len] * case.batch, device),
            _offsets([case.kv_len] * case.batch, device),
            case.num_query_heads,
            case.num_kv_heads,
            case.head_dim,
            **_mask_options(case),
        )
        tensors = [tuple(map(_tokens, (inputs.query, inputs.key, inputs.value))) for inputs in sets]
        return [partial(_run, wrapper.run, case, *tokens) for tokens in tensors]


def _plan_decode(case: Case, device: torch.device) -> Callable[..., Tensor]:
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(device), "NHD", use_tensor_cores=case.group >= TENSOR_CORE_GROUP
    )
    options = _mask_options(case)
    # One token sees all that its window holds.
    del options["causal"]
    heads = (case.num_query_heads, case.num_kv_heads, case.head_dim)
    wrapper.plan(*_page_table(case, device), *heads, PAGE_SIZE, **options)
    return wrapper.run


def _plan_append(case: Case, device: torch.device) -> Callable[..., Tensor]:
    import flashinfer

    # Its FlashAttention-3 backend does not split a cache, so few tokens are faster on the other.
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(device), "NHD", backend="fa2")
    heads = (case.num_query_heads, case.num_kv_heads, case.head_dim)
    query_offsets = _offsets([case.query_len] * case.batch, device)
    wrapper.plan(query_offsets, *_page_table(case, device), *heads, PAGE_SIZE, **_mask_options(case))
    return wrapper.run


def _mask_options(case: Case) -> dict[str, Any]:
    # Its window counts the tokens before a row's own.
    return {
        "causal": case.is_causal,
        "window_left": case.window - 1,
        "q_data_type": case.dtype,
        "kv_data_type": case.dtype,
    }


def _run(run: Callable[..., Tensor], case: Case, *tensors: Any) -> Tensor:
    return run(*tensors).view(case.batch, case.query_len, case.num_query_heads, case.head_dim).transpose(1, 2)


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _tokens(heads: Tensor) -> Tensor:
    """`[B, H, T, D]` as `[B * T, H, D]`."""
    return heads.transpose(1, 2).flatten(0, 1)


def _offsets(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Where each of some sequences begins, and where the last ends: int32, one more than there are."""
    return torch.tensor([0, *sizes], device=device).cumsum(0).to(torch.int32)


def _page_table(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Where each sequence's pages begin, the pages in order, and the tokens in each sequence's last page; int32."""
    lengths = [case.kv_len - start for start in case.starts]
    num_pages = [-(-length // PAGE_SIZE) for length in lengths]
    last = [length - PAGE_SIZE * (pages - 1) for length, pages in zip(lengths, num_pages, strict=True)]
    pages = torch.arange(sum(num_pages), dtype=torch.int32, device=device)
    return _offsets(num_pages, device), pages, torch.tensor(last, dtype=torch.int32, device=device)


def _pages(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Keys and values in pages, each `[pages, PAGE_SIZE, Hkv, D]`."""

    def paged(heads: Tensor) -> Tensor:
        sequences = []
        for row, start in zip(heads, inputs.case.starts, strict=True):
            tokens = row[:, start:].transpose(0, 1)
            tokens = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, -len(tokens) % PAGE_SIZE))
            sequences.append(tokens.unflatten(0, (-1, PAGE_SIZE)))
        return torch.cat(sequences)

    return paged(inputs.key), paged(inputs.value)
