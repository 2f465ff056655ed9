"""One decode step of a patched model over its static cache: run by the host, or captured once and replayed."""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from flashcore_ops.integrations.capture import is_capturable
from flashcore_ops.integrations.masks import pack_range
from flashcore_ops.integrations.plain_stack import decode_logits, is_plain_stack

# One capture at a time, since they share a stream.
_capturing = threading.Lock()


def greedy(logits: Tensor, tokens: Tensor | None = None) -> Tensor:
    """The likeliest token of each row, the first among equals: int64 `[B, 1]` of logits `[B, V]`.

    Args:
        tokens: int64 `[B, 1]`, contiguous, to write them into; None for a new tensor.

    Example:
        >>> greedy(torch.tensor([[0.0, 2.0, 1.0, 2.0]]))
        tensor([[1]])
    """
    if tokens is None:
        tokens = torch.empty((logits.shape[0], 1), dtype=torch.int64, device=logits.device)
    if logits.is_cuda and logits.stride(-1) == 1:
        from flashcore_ops import cuda

        cuda.argmax(logits, tokens)
    else:
        torch.argmax(logits, dim=-1, keepdim=True, out=tokens)
    return tokens


class DecodeStep:
    """A greedy step that feeds itself: consumes `tokens`, appends to the cache, puts the likeliest next into `tokens`.

    Attributes:
        tokens: int64 `[B, 1]`; the step's input, then its choice and the next step's input. Write to it in place.
        start: int32 `[B]`, the first slot of each row's tokens, which is the number of padding tokens before them.
        position_offset: int64 `[B]`, slot less position: the padding too, unless positions were given by hand.
        logits: `[B, V]` of the last step in the model's dtype; overwritten by the next.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        """Prepares steps of a patched causal language model over a cache of `make_static_cache`."""
        slots: Tensor = cache.layers[0].keys
        self.cache = cache
        self.length: Tensor = cache.layers[0].cumulative_length
        with torch.inference_mode(False):
            self.tokens = torch.zeros((slots.shape[0], 1), dtype=torch.int64, device=slots.device)
            self.start = torch.zeros(slots.shape[0], dtype=torch.int32, device=slots.device)
            self.position_offset = torch.zeros(slots.shape[0], dtype=torch.int64, device=slots.device)
        self.logits = torch.empty(0)
        # What is kept for a model must not keep it alive.
        self._model = weakref.proxy(model)

    def run(self) -> None:
        """Runs one step; on a GPU nothing waits for it."""
        with torch.no_grad():
            self.logits = self._forward(self._model)

    def _forward(self, model: Any) -> Tensor:
        # Experts multiply as in `generate`'s own steps: on a GPU, without the host's asking who got how many tokens.
        with model._optimize_model_for_decode():
            logits = self._next_logits(model)
        greedy(logits, self.tokens)
        return logits

    def _next_logits(self, model: Any) -> Tensor:
        if is_plain_stack(model):
            return decode_logits(
                model,
                self.cache,
                tokens=self.tokens,
                start=self.start,
                position_offset=self.position_offset,
                length=self.length,
            )
        outputs = model(
            input_ids=self.tokens,
            attention_mask=pack_range(self.start, (self.length + 1).to(torch.int32)),
            position_ids=(self.length - self.position_offset)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        logits: Tensor = outputs.logits[:, -1]
        return logits


class DecodeGraph(DecodeStep):
    """The step as a CUDA graph: one launch, at any length of the cache.

    It stands for this cache and for weights that stay where they are in memory. Any thread may replay it, one at a
    time.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        """Captures the step. The cache is as long as before, and its tokens are untouched."""
        super().__init__(model, cache)
        self._graph = torch.cuda.CUDAGraph()
        with _capturing, torch.inference_mode(False), torch.no_grad(), torch.cuda.device(self.length.device):
            self.logits = self._capture(model)

    def run(self) -> None:
        """Queues one step."""
        self._graph.replay()

    def _capture(self, model: Any) -> Tensor:
        length = self.length.clone()
        stream = _capture_stream(self.length.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Kernels compile and libraries allocate their workspaces before the capture, which allows neither.
            self._forward(model)
            self.length.copy_(length)
            # Other threads may go on using the GPU meanwhile.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                logits = self._forward(model)
        torch.cuda.current_stream().wait_stream(stream)
        return logits


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The same for all captures: cuBLAS keeps a workspace for each stream that it has met."""
    return torch.cuda.Stream(device)


def make_decode_step(model: Any, cache: Any) -> DecodeStep:
    """The fastest step for the cache's device: a graph on a GPU, plain calls elsewhere or if no graph can stand for it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flashcore_ops import make_static_cache, replace_llama_attention_with_flashcore
        >>> sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval()
        >>> cache = make_static_cache(replace_llama_attention_with_flashcore(model), batch_size=2, max_cache_len=8)
        >>> step = make_decode_step(model, cache)
        >>> step.run()
        >>> step.logits.shape, int(step.length)
        (torch.Size([2, 64]), 1)
    """
    has_graph = cache.layers[0].keys.is_cuda and is_capturable(model)
    return DecodeGraph(model, cache) if has_graph else DecodeStep(model, cache)
