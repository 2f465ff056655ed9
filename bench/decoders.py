"""Ways to run a LLaMA model, called alike. Each declares whether it can run a case, and why not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from bench.llama_cases import LlamaCase, ModelSizes
from bench.models import Layer, Models
from flashcore_ops.decode_step import make_decode_step


class Decoder(Protocol):
    """A model with a cache, made ready for one case."""

    def set_length(self, length: int) -> None:
        """Declares the first `length` slots of the shared keys and values to be the past."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Appends tokens `[B, Q]`; the last one's logits `[B, V]`, which the next call may overwrite."""

    def decode(self, num_tokens: int) -> None:
        """Queues that many greedy steps, each fed the token of the one before, and does not wait for them."""


class Implementation(Protocol):
    """One way to run a model."""

    @property
    def name(self) -> str:
        """As results files and tables call it."""

    @property
    def is_eager(self) -> bool:
        """Whether the host launches every kernel, so that a step takes long."""

    @property
    def has_own_cache(self) -> bool:
        """Whether it keeps keys and values beside the shared ones."""

    def why_not(self, case: LlamaCase) -> str | None:
        """Why it cannot run a case; None if it can."""

    def extra_bytes(self, case: LlamaCase, sizes: ModelSizes) -> int:
        """Memory that it needs besides weights and the shared keys and values."""

    def build(self, models: Models, cache: Cache) -> Decoder:
        """A decoder on the keys and values of a static cache that `make_static_cache` made for the patched model.

        The cache's length is that of the past, and slots behind it may be written.
        """


@dataclass(frozen=True)
class ModelForward:
    """The model's own forward pass and argmax, eager, or compiled as one graph with mode reduce-overhead.

    Hugging Face's eager model has a cache that grows. The others have a static one.
    """

    name: str
    is_patched: bool
    is_compiled: bool

    @property
    def is_eager(self) -> bool:
        return not self.is_compiled

    @property
    def has_own_cache(self) -> bool:
        return not (self.is_patched or self.is_compiled)

    def why_not(self, case: LlamaCase) -> str | None:
        return None

    def extra_bytes(self, case: LlamaCase, sizes: ModelSizes) -> int:
        num_bytes = sizes.cache_bytes(case)
        if self.has_own_cache:
            return num_bytes
        # Under a mask, transformers copies a layer's keys and values out to all query heads.
        return 0 if self.is_patched else sizes.group * num_bytes // sizes.num_layers

    def build(self, models: Models, cache: Cache) -> Decoder:
        model = models.patched if self.is_patched else models.plain
        layers = layers_of(cache)
        if self.has_own_cache:
            cache_of_length = partial(_growing_cache, model, layers)
        else:
            static = cache if self.is_patched else _hugging_face_cache(model, layers)
            cache_of_length = partial(_static_cache, static)
        return ForwardDecoder(model, cache_of_length, batch=layers[0][0].shape[0], is_compiled=self.is_compiled)


@dataclass(frozen=True)
class FlashCoreLoop:
    """FlashCore's own decode loop: one captured greedy step, replayed."""

    name: str = "flashcore_loop"
    is_eager: bool = False
    has_own_cache: bool = False

    def why_not(self, case: LlamaCase) -> str | None:
        return "its graph is one decode step" if case.kind == "prefill" else None

    def extra_bytes(self, case: LlamaCase, sizes: ModelSizes) -> int:
        return 0

    def build(self, models: Models, cache: Cache) -> Decoder:
        return StepDecoder(models.patched, cache)


class ForwardDecoder:
    """A decoder that calls the model."""

    def __init__(
        self, model: PreTrainedModel, cache_of_length: Callable[[int], Cache], *, batch: int, is_compiled: bool
    ) -> None:
        """
        Args:
            cache_of_length: the cache to go on with after so many tokens.
        """
        step = torch.compile(greedy_step, mode="reduce-overhead", fullgraph=True) if is_compiled else greedy_step
        self._step = partial(step, model)
        self._cache_of_length = cache_of_length
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    def set_length(self, length: int) -> None:
        self._cache = self._cache_of_length(length)

    def forward(self, tokens: Tensor) -> Tensor:
        return self._step(tokens, self._cache)[1]

    def decode(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            # A CUDA graph's outputs live until its next replay: the token moves out before that.
            self._tokens.copy_(self._step(self._tokens, self._cache)[0])


class StepDecoder:
    """A decoder that runs FlashCore's decode step, on a GPU a captured graph."""

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self._step = make_decode_step(model, cache)
        self._cache = cache

    def set_length(self, length: int) -> None:
        _static_cache(self._cache, length)

    def forward(self, tokens: Tensor) -> Tensor:
        self._step.tokens.copy_(tokens)
        self._step.run()
        return self._step.logits

    def decode(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._step.run()


def greedy_step(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    """Appends tokens `[B, Q]`; the greedy next ones `[B, 1]` and the logits `[B, V]` that they come from."""
    output: Any = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = output.logits[:, -1]
    return logits.argmax(dim=-1, keepdim=True), logits


def layers_of(cache: Cache) -> list[Layer]:
    """The whole key and value buffers `[B, Hkv, S, D]` of a static cache, layer by layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def _static_cache(cache: Cache, length: int) -> Cache:
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)
    return cache


def _hugging_face_cache(model: PreTrainedModel, buffers: Sequence[Layer]) -> Cache:
    """transformers' own static cache on given buffers."""
    cache = StaticCache(config=model.config, max_cache_len=buffers[0][0].shape[2])
    for layer, (key, value) in zip(cache.layers, buffers, strict=True):
        layer.lazy_initialization(key[:, :, :0], value[:, :, :0])
        layer.keys, layer.values = key, value
        torch._dynamo.mark_static_address(key)
        torch._dynamo.mark_static_address(value)
    return cache


def _growing_cache(model: PreTrainedModel, buffers: Sequence[Layer], length: int) -> Cache:
    """A dynamic cache that starts from views of the buffers; its first step copies them out."""
    cache = DynamicCache(config=model.config)
    for layer, (key, value) in zip(cache.layers, buffers, strict=True):
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key[:, :, :length], value[:, :, :length]
    return cache


FLASHCORE_LOOP = FlashCoreLoop()
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    ModelForward("hf_eager", is_patched=False, is_compiled=False),
    ModelForward("hf_compiled", is_patched=False, is_compiled=True),
    ModelForward("flashcore_eager", is_patched=True, is_compiled=False),
    ModelForward("flashcore_compiled", is_patched=True, is_compiled=True),
    FLASHCORE_LOOP,
)
