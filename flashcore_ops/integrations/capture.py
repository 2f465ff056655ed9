"""Whether a CUDA graph may stand for a model's decode step: what the host decides in it must not change."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from flashcore_ops.integrations.decoder_layer import is_hooked
from flashcore_ops.integrations.families import Feature, family_of


def is_capturable(model: nn.Module) -> bool:
    """Whether a step always runs the same kernels: an adapter, say, can be switched off between two calls."""
    return not any(
        type(module).__module__.partition(".")[0] not in ("torch", "transformers", "flashcore_ops")
        or is_hooked(module)
        or chooses_frequencies(module)
        or routes_experts(module)
        for module in model.modules()
    ) and all(type(weight) in (Tensor, nn.Parameter) for weight in model.parameters())


def chooses_frequencies(module: nn.Module) -> bool:
    """Whether a rotary embedding chooses its frequencies on the host, by the positions of each call."""
    # Where windowed layers rotate otherwise than full ones, it is a dict of both.
    rope_type = str(getattr(module, "rope_type", ""))
    return "dynamic" in rope_type or "longrope" in rope_type


def routes_experts(module: nn.Module) -> bool:
    """Whether the host may choose how experts run, by the tokens that each of them gets."""
    family = family_of(type(module)) if isinstance(module, PreTrainedModel) else None
    return family is not None and Feature.EXPERTS in family.features
