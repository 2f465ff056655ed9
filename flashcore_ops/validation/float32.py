"""A model's exact answer without a second set of weights."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """The same model computing in float32. Its weights stay in their own dtype, and are converted as they are used."""
    exact: Any = copy_modules(model)
    inner = exact.model
    inner.embed_tokens = _InFloat32(inner.embed_tokens)
    inner.layers = nn.ModuleList(_InFloat32(layer) for layer in inner.layers)
    inner.norm = _InFloat32(inner.norm)
    exact.lm_head = _InFloat32(exact.lm_head)
    computing: PreTrainedModel = exact
    return computing


def copy_modules(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a tree of modules and its configs over the same parameters and buffers."""
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class _InFloat32(nn.Module):
    """Runs a module on a float32 copy of its weights that lives for one call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return copy.deepcopy(self.module).float()(*args, **kwargs)
