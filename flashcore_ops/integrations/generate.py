"""`generate` of a patched model: on a GPU, a kept static cache and a captured decode step, without being asked.

Only the patched instance behaves so, through its class. Its configs are never written to, so beams, assisted
generation, caches of the user's own and saved files stay Hugging Face's.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from flashcore_ops.decode_step import DecodeStep
from flashcore_ops.integrations.capture import capture_obstacle, is_capturable
from flashcore_ops.integrations.transformers import is_patched
from flashcore_ops.kept_steps import capacity_for, kept_steps

# What a step is made of, and what changes nothing for one token.
_SERVED_INPUTS = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}
# Settings of `generate` that ask for another cache or step, or for what a step does not return.
_UNSERVED_SETTINGS = (
    "cache_implementation",
    "prefill_chunk_size",
    "is_assistant",
    "disable_compile",
    "output_attentions",
    "output_hidden_states",
)

# The turn of the innermost `generate` of this thread, or of this asynchronous task.
_turn: ContextVar[ExitStack | None] = ContextVar("flashcore_turn", default=None)
_warned: set[str] = set()


class KeptGeneration:
    """What patching puts before a model's class in the order of resolution."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        with ExitStack() as turn:
            token = _turn.set(turn)
            try:
                result = parent.generate(*args, **kwargs)
            finally:
                _turn.reset(token)
            if isinstance(result, ModelOutput):
                # The caller may go on with this cache, so it is never used again here.
                kept_steps(self).release(result.get("past_key_values"))
        return result

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        parent: Any = super()
        turn = _turn.get()
        if turn is not None and _keeps_cache(self, generation_config, model_kwargs, generation_mode):
            steps = kept_steps(self)
            # Held until `generate` ends; other threads wait here.
            turn.enter_context(steps.turn())
            num_rows = batch_size * generation_config.num_return_sequences
            if steps.taken is not None:
                _warn_once("another generation with this model is under way in this thread, an open iterator perhaps")
            elif step := _step_or_none(self, num_rows, capacity_for(max_cache_length + 1)):
                model_kwargs["past_key_values"] = step.cache
                return None
        return parent._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """The captured step for the cache that this call has taken, the parent's compiled call for any other."""
        parent: Any = super()
        step = kept_steps(self).taken

        def call(**inputs: Any) -> Any:
            if step is None or inputs.get("past_key_values") is not step.cache:
                return parent.get_compiled_call(compile_config)(**inputs)
            start = _padding(inputs)
            if start is None:
                return self(**inputs)  # type: ignore[operator]
            step.tokens.copy_(inputs["input_ids"])
            step.start.copy_(start)
            step.position_offset.copy_(step.length - inputs["position_ids"][:, 0])
            step.run()
            return CausalLMOutputWithPast(logits=step.logits[:, None], past_key_values=step.cache)

        return call

    def __reduce_ex__(self, protocol: Any) -> Any:
        # pickle looks a class up by its name, and finds the parent.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new_instance, (type(self).__mro__[2],), *reduced[2:])


def keep_generation(model: nn.Module) -> None:
    """Swaps the class of every generating model in `model` for one that keeps caches. The name stays: it is saved."""
    for module in list(model.modules()):
        if isinstance(module, GenerationMixin) and not isinstance(module, KeptGeneration):
            parent: Any = type(module)
            module.__class__ = _kept_class(parent)


def unkeep_generation(model: nn.Module) -> None:
    """Undoes `keep_generation` and frees what was kept."""
    for module in list(model.modules()):
        if isinstance(module, KeptGeneration):
            kept_steps(module).clear()
            module.__class__ = type(module).__mro__[2]


@functools.cache
def _kept_class(parent: Any) -> Any:
    names = {"__module__": parent.__module__, "__qualname__": parent.__qualname__, "__doc__": parent.__doc__}
    return type(parent.__name__, (KeptGeneration, parent), names)


def _new_instance(parent: Any) -> Any:
    return object.__new__(_kept_class(parent))


def kept_caches_obstacle(model: Any) -> str | None:
    """Why `generate` of a patched causal language model stays Hugging Face's wherever it runs, in words, or None.

    What a call adds to the model's own generation settings, and the device, are not asked for.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flashcore_ops import patch_model
        >>> sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4)
        >>> model = patch_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)))
        >>> kept_caches_obstacle(model)
        >>> model.generation_config.num_beams = 4
        >>> kept_caches_obstacle(model)
        "beam_search, by the model's generation settings"
    """
    if obstacle := capture_obstacle(model):
        return obstacle
    settings, _ = model._prepare_generation_config(None)
    setting = _unkept_setting(settings, settings.get_generation_mode())
    return None if setting is None else f"{setting}, by the model's generation settings"


def _keeps_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: GenerationMode) -> bool:
    """Whether a call is one that a kept step serves."""
    return (
        _has_graphs(model)
        and _unkept_setting(generation_config, mode) is None
        and model_kwargs.get("past_key_values") is None
        and is_patched(model)
        and is_capturable(model)
        and not torch.is_autocast_enabled(model.device.type)
    )


def _unkept_setting(generation_config: Any, mode: GenerationMode) -> str | None:
    """The first setting that a kept cache and step do not serve."""
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return mode.value
    if not generation_config.use_cache:
        return "use_cache=False"
    values = ((name, getattr(generation_config, name)) for name in _UNSERVED_SETTINGS)
    return next((name for name, value in values if value is not None and value is not False), None)


def _step_or_none(model: Any, num_rows: int, capacity: int) -> DecodeStep | None:
    """The kept step, or None if there is no memory for a cache of the whole capacity, even with nothing kept."""
    try:
        return kept_steps(model).get(model, num_rows, capacity)
    except torch.OutOfMemoryError:
        _warn_once(f"no memory for a static cache of {num_rows} x {capacity} slots; a smaller max_length needs less")
        return None


def _warn_once(reason: str) -> None:
    """Warns, once a process for each reason, that a generation is not captured."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"FlashCore: {reason}, so generate takes Hugging Face's slower way.", stacklevel=4)


def _has_graphs(model: Any) -> bool:
    return {parameter.device.type for parameter in model.parameters()} == {"cuda"}


def _padding(inputs: dict[str, Any]) -> Tensor | None:
    """First slot `[B]` of each row's tokens, or None for inputs that the captured step does not take."""
    mask: Any = inputs.get("attention_mask")
    masks = list(mask.values()) if isinstance(mask, dict) else [mask]
    has_others = any(value is not None for name, value in inputs.items() if name not in _SERVED_INPUTS)
    is_served = (
        not has_others
        and inputs.get("input_ids") is not None
        and inputs["input_ids"].shape[1] == 1
        and inputs.get("position_ids") is not None
        and all(one is not None and one.shape[1:] == (1, 1, 2) for one in masks)
    )
    return masks[0][:, 0, 0, 0] if is_served else None
