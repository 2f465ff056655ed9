"""The models that bench.llama times: a plain and a patched tree of modules over one set of weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicLayer, PreTrainedModel

from bench.llama_cases import ModelSizes
from flashcore_ops import replace_llama_attention_with_flashcore
from flashcore_ops.model_shapes import random_model, shape_config

LLAMA_3_1_8B = "llama-3.1-8b"

# Keys and values of one layer.
Layer = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Models:
    """One model twice, sharing its weights, so that compiled code of both stays valid side by side.

    plain runs on Hugging Face's sdpa, patched on FlashCore.
    """

    name: str
    plain: PreTrainedModel
    patched: PreTrainedModel
    sizes: ModelSizes

    @property
    def device(self) -> torch.device:
        return self.plain.device


def make_models(path: Path | None, layers: int | None, device: torch.device) -> Models:
    """A bf16 model from a checkpoint's directory, or of LLaMA-3.1-8B's shape with random weights.

    layers: keep that many from the first on; None keeps all.
    """
    if path is None:
        return share(LLAMA_3_1_8B, random_model(shape_config(LLAMA_3_1_8B, layers), torch.bfloat16, device))
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if layers is not None:
        config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_pretrained(
        path, config=config, dtype=torch.bfloat16, attn_implementation="sdpa", local_files_only=True
    )
    return share(path.resolve().name, model.to(device).eval())


def share(name: str, plain: PreTrainedModel) -> Models:
    """Adds the patched twin of a plain model."""
    patched = replace_llama_attention_with_flashcore(_copy_modules(plain))
    return Models(name, plain=plain, patched=patched, sizes=ModelSizes.of(plain))


@torch.no_grad()
def logits_after(model: PreTrainedModel, tokens: Tensor, past: Sequence[Layer], num_logits: int) -> Tensor:
    """Logits `[B, num_logits, V]` of the last of `tokens` `[B, Q]` that follow `past`, which is left as it is."""
    cache = Cache(layers=[_Past(key, value) for key, value in past])
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=num_logits).logits


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The same model computing in float32. Its weights stay in their own dtype, and are converted as they are used."""
    exact = _copy_modules(model)
    inner = exact.model
    inner.embed_tokens = _InFloat32(inner.embed_tokens)
    inner.layers = nn.ModuleList(_InFloat32(layer) for layer in inner.layers)
    inner.norm = _InFloat32(inner.norm)
    exact.lm_head = _InFloat32(exact.lm_head)
    return exact


class _InFloat32(nn.Module):
    """Runs a module on a float32 copy of its weights that lives for one call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return copy.deepcopy(self.module).float()(*args, **kwargs)


class _Past(DynamicLayer):
    """A cache layer that hands out its tokens and the new ones, and keeps none of the new."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = key, value, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Layer:
        return torch.cat((self.keys, key_states), dim=2), torch.cat((self.values, value_states), dim=2)


def _copy_modules(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a tree of modules and its configs over the same parameters and buffers."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
