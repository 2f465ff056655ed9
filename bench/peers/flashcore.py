"""FlashCore: as it is called, and what a part of it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import flashcore_ops
from bench.cases import Inputs
from bench.peers.implementation import Call
from csrc_free_kernels import tuning


@dataclass(frozen=True)
class FlashCore:
    """`flashcore_ops.attention` as a patched model calls it: with the lengths on the device.

    has_range: without, the op sees every slot and reads no length. The difference is what reading it costs.
    """

    name: str = "flashcore"
    has_range: bool = True

    def why_not(self, inputs: Inputs) -> str | None:
        return "padding needs a kv_range" if inputs.case.padding and not self.has_range else None

    def prepare(self, sets: Sequence[Inputs]) -> list[Call]:
        return [partial(self._attend, inputs) for inputs in sets]

    def _attend(self, inputs: Inputs) -> Tensor:
        return flashcore_ops.attention(
            inputs.query,
            inputs.key,
            inputs.value,
            inputs.kv_range if self.has_range else None,
            is_causal=inputs.case.is_causal,
            window=inputs.case.window,
        )


@dataclass(frozen=True)
class FlashCorePortable:
    """The portable prefill kernel, on GPUs too for which the op has one of their own."""

    name: str = "flashcore_portable"

    def why_not(self, inputs: Inputs) -> str | None:
        if inputs.case.is_decode:
            return "few query tokens are decode's"
        return None if inputs.query.is_cuda else "Triton needs a GPU"

    def prepare(self, sets: Sequence[Inputs]) -> list[Call]:
        return [partial(self._attend, inputs) for inputs in sets]

    def _attend(self, inputs: Inputs) -> Tensor:
        # Triton is not everywhere that this module is.
        from csrc_free_kernels.prefill import prefill_attention
        from flashcore_ops import cuda

        case, query = inputs.case, inputs.query
        # The layout that the op gives.
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        prefill_attention(
            query,
            inputs.key,
            inputs.value,
            output,
            lse=None,
            kv_range=inputs.kv_range,
            sinks=None,
            scale=case.head_dim**-0.5,
            is_causal=case.is_causal,
            window=case.window,
            softcap=0.0,
            cu_seqlens=None,
            tiles=tuning.prefill_tiles(tuning.architecture(query.device), query.dtype, case.head_dim),
            section_heads=cuda.section_heads(query, inputs.key, inputs.value),
        )
        return output
