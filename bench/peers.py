"""FlashCore and its peers, called alike. Each declares whether it can run, and why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Protocol

from torch import Tensor
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashcore_ops
from bench.cases import Inputs


class Implementation(Protocol):
    """One way to compute causal attention."""

    @property
    def name(self) -> str:
        """As results files and tables call it."""

    def why_not(self, inputs: Inputs) -> str | None:
        """Why it cannot run on such inputs; None if it can."""

    def __call__(self, inputs: Inputs) -> Tensor:
        """The output `[B, Hq, Q, D]`."""


@dataclass(frozen=True)
class FlashCore:
    """`flashcore_ops.attention` as a patched model calls it: with the lengths on the device."""

    name: str = "flashcore"

    def why_not(self, inputs: Inputs) -> str | None:
        return None

    def __call__(self, inputs: Inputs) -> Tensor:
        return flashcore_ops.attention(inputs.query, inputs.key, inputs.value, inputs.kv_range)


BACKEND_CHECKS: dict[SDPBackend, Callable[[SDPAParams, bool], bool]] = {
    SDPBackend.CUDNN_ATTENTION: can_use_cudnn_attention,
    SDPBackend.FLASH_ATTENTION: can_use_flash_attention,
    SDPBackend.EFFICIENT_ATTENTION: can_use_efficient_attention,
}


@dataclass(frozen=True)
class Sdpa:
    """torch's scaled_dot_product_attention with one backend forced.

    repeat_heads: copies each KV head out to its query heads as part of the call, for a backend that takes no groups.
    """

    name: str
    backend: SDPBackend
    repeat_heads: bool = False

    def why_not(self, inputs: Inputs) -> str | None:
        query_len, kv_len = inputs.query.shape[2], inputs.key.shape[2]
        if 1 < query_len != kv_len:
            return "SDPA aligns its causal mask to the top left, so Q must be 1 or S"
        if self.backend not in BACKEND_CHECKS:
            return None
        check = BACKEND_CHECKS[self.backend]
        key, value = self._heads(inputs)
        params = SDPAParams(inputs.query, key, value, None, 0.0, query_len > 1, not self.repeat_heads)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if check(params, True):
                return None
        reasons = [str(warning.message).split(" (Triggered internally")[0] for warning in caught]
        return "; ".join(reasons) or f"torch.backends.cuda.{check.__name__} refuses these tensors"

    def __call__(self, inputs: Inputs) -> Tensor:
        key, value = self._heads(inputs)
        # A single token sees every slot, where SDPA's causal mask would show it the first one only.
        is_causal = inputs.query.shape[2] > 1
        with sdpa_kernel(self.backend):
            return scaled_dot_product_attention(
                inputs.query, key, value, is_causal=is_causal, enable_gqa=not self.repeat_heads
            )

    def _heads(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if not self.repeat_heads:
            return inputs.key, inputs.value
        group = inputs.query.shape[1] // inputs.key.shape[1]
        return inputs.key.repeat_interleave(group, dim=1), inputs.value.repeat_interleave(group, dim=1)


@dataclass(frozen=True)
class HuggingFaceStaticCache:
    """transformers' own sdpa function at decode over a static cache.

    The mask over the whole buffer rules out grouped heads, so transformers copies K and V out to all query heads; the
    copies are part of the call. The mask is made once a step for all layers, so it is not.
    """

    name: str = "hf_static_cache"

    def why_not(self, inputs: Inputs) -> str | None:
        return "it differs from SDPA only at decode" if inputs.mask is None else None

    def __call__(self, inputs: Inputs) -> Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        group = inputs.query.shape[1] // inputs.key.shape[1]
        layer = SimpleNamespace(num_key_value_groups=group, is_causal=True)
        output: Tensor = sdpa_attention_forward(layer, inputs.query, inputs.key, inputs.value, inputs.mask)[0]
        return output.transpose(1, 2)


FLASHCORE = FlashCore()
PEERS: tuple[Implementation, ...] = (
    Sdpa("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
    Sdpa("sdpa_flash", SDPBackend.FLASH_ATTENTION),
    Sdpa("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION, repeat_heads=True),
    HuggingFaceStaticCache(),
)
