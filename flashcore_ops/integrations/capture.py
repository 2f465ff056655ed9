"""Whether a CUDA graph may stand for a model's decode step: what the host decides in it must not change."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from flashcore_ops.integrations.decoder_layer import is_hooked
from flashcore_ops.integrations.families import Feature, family_of


def is_capturable(model: nn.Module) -> bool:
    """Whether a step always runs the same kernels: an adapter, say, can be switched off between two calls."""
    return capture_obstacle(model) is None


def capture_obstacle(model: nn.Module) -> str | None:
    """What in a model may make one step run other kernels than the next, in words, or None."""
    for module in model.modules():
        if type(module).__module__.partition(".")[0] not in ("torch", "transformers", "flashcore_ops"):
            return f"{type(module).__name__}, which is not transformers' own"
        if is_hooked(module):
            return f"a hook on {type(module).__name__}"
        if chooses_frequencies(module):
            return "rotary frequencies that the host chooses by the length"
        if routes_experts(module):
            return "experts that the host runs one by one, by their tokens"
    if any(type(weight) not in (Tensor, nn.Parameter) for weight in model.parameters()):
        return "weights that bring their own products"
    return None


def chooses_frequencies(module: nn.Module) -> bool:
    """Whether a rotary embedding chooses its frequencies on the host, by the positions of each call."""
    # Where windowed layers rotate otherwise than full ones, it is a dict of both.
    rope_type = str(getattr(module, "rope_type", ""))
    return "dynamic" in rope_type or "longrope" in rope_type


def routes_experts(module: nn.Module) -> bool:
    """Whether the host chooses which experts run, by the tokens that each of them gets."""
    if not isinstance(module, PreTrainedModel):
        return False
    family = family_of(type(module))
    # One product for all experts, or what transformers puts in its place for decoding.
    has_one_product = module.config._experts_implementation in ("grouped_mm", "batched_mm")
    return family is not None and Feature.EXPERTS in family.features and not has_one_product
