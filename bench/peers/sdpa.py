"""torch's scaled_dot_product_attention, by backend and as transformers calls it for a static cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from bench.cases import Case, Inputs
from bench.peers.implementation import Call
from flashcore_ops.reference import visible_slots

BACKEND_CHECKS: dict[SDPBackend, Callable[[SDPAParams, bool], bool]] = {
    SDPBackend.CUDNN_ATTENTION: can_use_cudnn_attention,
    SDPBackend.FLASH_ATTENTION: can_use_flash_attention,
    SDPBackend.EFFICIENT_ATTENTION: can_use_efficient_attention,
}


def dense_mask(inputs: Inputs) -> Tensor:
    """Which slots each row may see: bool `[B, 1, Q, S]`, or `[1, 1, Q, S]` where all sequences are alike."""
    case = inputs.case
    kv_range = inputs.kv_range if case.padding else inputs.kv_range[:1]
    return visible_slots(case.query_len, case.kv_len, kv_range, case.is_causal, case.window)[:, None]


@dataclass(frozen=True)
class Arguments:
    """What one call passes on: query, key and value, the mask that they need, and whether rows align to the top left.

    mask: what is added to the scores `[B, 1, Q, S]`, torch's own object for rows aligned to the bottom right, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool


@dataclass(frozen=True)
class Sdpa:
    """scaled_dot_product_attention with one backend forced, and the cheapest way to say what rows may see.

    A mask is the last resort: a full cache needs none at decode, a window at decode is a slice, and `is_causal` is
    right where Q is S.

    repeats_heads: copies each KV head out to its query heads as part of the call, for a backend that takes no groups.
    has_lower_right: whether torch has rows aligned to the bottom right for the backend, without a mask in memory.
    is_packed: the queries of a KV head's group become rows of one head, so that K and V are read once for all.
    """

    name: str
    backend: SDPBackend
    repeats_heads: bool = False
    has_lower_right: bool = False
    is_packed: bool = False

    def why_not(self, inputs: Inputs) -> str | None:
        case = inputs.case
        if self.is_packed and not (case.is_decode and case.group > 1):
            return "packing is for few query tokens of several heads a KV head"
        if self.backend not in BACKEND_CHECKS:
            return None
        check = BACKEND_CHECKS[self.backend]
        (arguments,) = self._arguments([inputs])
        key, value = self._heads(arguments, case.group)
        # Rows aligned to the bottom right are the backend's own affair, not a mask in memory.
        mask = None if isinstance(arguments.mask, CausalBias) else arguments.mask
        params = SDPAParams(arguments.query, key, value, mask, 0.0, arguments.is_causal, self._is_grouped(case))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if check(params, True):
                return None
        reasons = [str(warning.message).split(" (Triggered internally")[0] for warning in caught]
        return "; ".join(reasons) or f"torch.backends.cuda.{check.__name__} refuses these tensors"

    def prepare(self, sets: Sequence[Inputs]) -> list[Call]:
        case = sets[0].case
        return [partial(self._attend, case, arguments) for arguments in self._arguments(sets)]

    def _attend(self, case: Case, arguments: Arguments) -> Tensor:
        key, value = self._heads(arguments, case.group)
        with sdpa_kernel(self.backend):
            output = scaled_dot_product_attention(
                arguments.query,
                key,
                value,
                attn_mask=arguments.mask,
                is_causal=arguments.is_causal,
                enable_gqa=self._is_grouped(case),
            )
        return output.unflatten(2, (case.group, case.query_len)) if self.is_packed else output

    def _is_grouped(self, case: Case) -> bool:
        return case.group > 1 and not (self.repeats_heads or self.is_packed)

    def _heads(self, arguments: Arguments, group: int) -> tuple[Tensor, Tensor]:
        if not self.repeats_heads or group == 1:
            return arguments.key, arguments.value
        return arguments.key.repeat_interleave(group, dim=1), arguments.value.repeat_interleave(group, dim=1)

    def _arguments(self, sets: Sequence[Inputs]) -> list[Arguments]:
        case = sets[0].case
        mask, is_causal = self._rows(sets[0])
        # A cache of a windowed model keeps no slots that its next token does not see.
        is_sliced = case.window > 0 and mask is None
        first_slot = case.kv_len - case.window if is_sliced else 0
        return [
            Arguments(
                inputs.query.reshape(case.batch, case.num_kv_heads, -1, case.head_dim)
                if self.is_packed
                else inputs.query,
                inputs.key[:, :, first_slot:],
                inputs.value[:, :, first_slot:],
                mask,
                is_causal,
            )
            for inputs in sets
        ]

    def _rows(self, inputs: Inputs) -> tuple[Tensor | None, bool]:
        """The mask and `is_causal` that give the case's rows."""
        case = inputs.case
        is_single = case.query_len == 1
        if not case.padding and (is_single or not case.is_causal):
            return None, False
        if not case.padding and not case.window and not self.is_packed:
            if case.query_len == case.kv_len:
                return None, True
            if self.has_lower_right:
                return causal_lower_right(case.query_len, case.kv_len), False
        visible = dense_mask(inputs)
        if self.is_packed:
            visible = visible.repeat(1, 1, case.group, 1)
        # A bool mask would be turned into this one at each call.
        added = inputs.query.new_zeros(visible.shape).masked_fill(~visible, -torch.inf)
        return added.expand(case.batch, -1, -1, -1), False


@dataclass(frozen=True)
class HuggingFaceStaticCache:
    """transformers' own sdpa function over a static cache.

    The mask over the whole buffer rules out grouped heads, so transformers copies K and V out to all query heads; the
    copies are part of the call. The mask is made once a step for all layers, so it is not.
    """

    name: str = "hf_static_cache"

    def why_not(self, inputs: Inputs) -> str | None:
        return None if inputs.case.is_causal else "a cache is causal"

    def prepare(self, sets: Sequence[Inputs]) -> list[Call]:
        mask = dense_mask(sets[0]).expand(sets[0].case.batch, -1, -1, -1)
        return [partial(self._attend, inputs, mask) for inputs in sets]

    def _attend(self, inputs: Inputs, mask: Tensor) -> Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        layer = SimpleNamespace(num_key_value_groups=inputs.case.group, is_causal=True)
        output: Tensor = sdpa_attention_forward(layer, inputs.query, inputs.key, inputs.value, mask)[0]
        return output.transpose(1, 2)
