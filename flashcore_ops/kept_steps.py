"""Caches and decode steps that outlive a call, so that the next one records nothing anew."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flashcore_ops.decode_step import DecodeStep, make_decode_step
from flashcore_ops.errors import OptionError
from flashcore_ops.integrations.capture import is_capturable
from flashcore_ops.integrations.static_cache import make_static_cache
from flashcore_ops.integrations.transformers import is_patched

SMALLEST_CAPACITY = 256
MAX_KEPT = 4

Shape = tuple[int, int]


def capacity_for(num_tokens: int) -> int:
    """The rung of the ladder 256, 512, 1024, ... that holds so many tokens.

    Example:
        >>> [capacity_for(tokens) for tokens in (1, 256, 257, 5000)]
        [256, 256, 512, 8192]
    """
    return max(SMALLEST_CAPACITY, 1 << (num_tokens - 1).bit_length())


class KeptSteps:
    """One model's steps by (batch, capacity), at most `MAX_KEPT` of them; the least recently used goes first.

    Threads that decode with one model take turns: `turn` is held for a whole generation.
    """

    def __init__(self) -> None:
        self._steps: OrderedDict[Shape, DecodeStep] = OrderedDict()
        self._model_state: tuple[Any, ...] = ()
        self._lock = threading.Lock()
        self._holder: int | None = None
        self.taken: DecodeStep | None = None
        self._work_queued: torch.cuda.Event | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Holds the model's steps for the calling thread. A turn inside another of the same thread does not wait."""
        thread = threading.get_ident()
        if self._holder == thread:
            yield
            return
        # Not a reentrant lock, since an iterator's turn may end in another thread than it began in.
        with self._lock:
            self._holder = thread
            try:
                yield
            finally:
                if self.taken is not None and self.taken.tokens.is_cuda:
                    # Steps that nobody waited for may still be queued, and the next thread's stream be another.
                    self._work_queued = torch.cuda.current_stream(self.taken.tokens.device).record_event()
                self._holder = self.taken = None

    def get(self, model: Any, batch_size: int, capacity: int) -> DecodeStep:
        """The emptied step of a shape, made if it is not kept. The caller holds the turn.

        A turn takes one: whoever decodes in the midst of it gets a step of their own, which is not kept.
        """
        shape = (batch_size, capacity)
        if self.taken is not None:
            return self._make(model, shape)
        if self._work_queued is not None:
            self._work_queued.wait()
        self._drop_if_model_changed(model)
        if shape not in self._steps:
            while len(self._steps) >= MAX_KEPT:
                self._steps.popitem(last=False)
            self._steps[shape] = self._make(model, shape)
        self._steps.move_to_end(shape)
        self.taken = self._steps[shape]
        self.taken.cache.reset()
        return self.taken

    def release(self, cache: Any) -> None:
        """Forgets the step of a cache that someone else has got hold of."""
        self._steps = OrderedDict((shape, step) for shape, step in self._steps.items() if step.cache is not cache)

    def clear(self) -> None:
        """Frees all caches and graphs."""
        with self.turn():
            self._steps.clear()

    def shapes(self) -> list[Shape]:
        """(batch, capacity) of what is kept, the least recently used first."""
        return list(self._steps)

    def _make(self, model: Any, shape: Shape) -> DecodeStep:
        try:
            return make_decode_step(model, make_static_cache(model, *shape))
        except torch.OutOfMemoryError:
            if not self._steps:
                raise
        # What the turn has taken stays alive with it.
        self._steps.clear()
        torch.cuda.empty_cache()
        return make_decode_step(model, make_static_cache(model, *shape))

    def _drop_if_model_changed(self, model: nn.Module) -> None:
        """Graphs read weights by address and hold all numbers: a model that has changed since needs new ones."""
        state = _state_of(model)
        if state != self._model_state:
            self._steps.clear()
            self._model_state = state


def _state_of(model: nn.Module) -> tuple[Any, ...]:
    """What a captured step depends on: modules and their numbers, the configs' numbers, weights and where they are."""
    modules = [(type(module), _numbers_of(vars(module))) for module in model.modules()]
    configs = [_numbers_of(vars(module.config)) for module in model.modules() if hasattr(module, "config")]
    tensors = (*model.parameters(), *model.buffers())
    weights = [(tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]
    return is_capturable(model), modules, configs, weights


def _numbers_of(attributes: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in attributes.items() if isinstance(value, int | float | str)]


_kept: weakref.WeakKeyDictionary[Any, KeptSteps] = weakref.WeakKeyDictionary()
_kept_lock = threading.Lock()


def kept_steps(model: Any) -> KeptSteps:
    """The steps kept for one model instance; they go with it."""
    with _kept_lock:
        return _kept.setdefault(model, KeptSteps())


def check_is_patched(model: Any) -> None:
    """Raises OptionError for a model that does not run on FlashCore."""
    if not is_patched(model):
        raise OptionError.explain(
            "model",
            expected="a patched model",
            got=f"a {type(model).__name__} that is not",
            fix="Call patch_model(model) first.",
        )


def warmup(model: Any, batch_size: int, capacity: int) -> None:
    """Pays ahead what the first `generate` of a shape costs: kernels, cache and graph.

    Args:
        model: a patched causal language model.
        batch_size: rows of the calls to come.
        capacity: prompt and new tokens of the longest of them; rounded up to a rung of 256, 512, 1024, ...

    Raises:
        OptionError: a number is below 1, or the model is not patched.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flashcore_ops import replace_llama_attention_with_flashcore
        >>> sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval()
        >>> warmup(replace_llama_attention_with_flashcore(model), batch_size=1, capacity=300)
        >>> kept_steps(model).shapes()
        [(1, 512)]
    """
    for name, number in (("batch_size", batch_size), ("capacity", capacity)):
        if number < 1:
            raise OptionError.explain(name, expected="1 or more", got=str(number), fix="Count rows and tokens from 1.")
    check_is_patched(model)
    steps = kept_steps(model)
    with steps.turn():
        step = steps.get(model, batch_size, capacity_for(capacity))
        # A prefill, so that its kernels are compiled too.
        prompt = torch.zeros((batch_size, min(32, capacity)), dtype=torch.int64, device=step.length.device)
        with torch.no_grad():
            model(input_ids=prompt, past_key_values=step.cache, use_cache=True, logits_to_keep=1)
        step.cache.reset()


def free_kept_caches(model: Any) -> None:
    """Frees the caches and graphs that `generate` keeps for a model. The next call makes what it needs.

    Example:
        >>> free_kept_caches(torch.nn.Linear(1, 1))
    """
    kept_steps(model).clear()
