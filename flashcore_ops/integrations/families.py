"""The model families that can be patched, as data: what decides whether a model is served, and what the docs say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

TESTED_TRANSFORMERS = "5.17.0"


class Feature(Enum):
    """What sets a family apart from plain causal attention in layers that run as they are."""

    WINDOW = "sliding window"
    SOFTCAP = "softcap"
    SINKS = "sinks"
    SCALE = "scale of its own"
    EXPERTS = "mixture of experts"
    FUSED = "fused layers"


# What the attention op is told beyond keys, values and lengths.
_OF_ATTENTION = (Feature.WINDOW, Feature.SOFTCAP, Feature.SINKS, Feature.SCALE)


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        name: as its makers write it.
        package: its part of transformers.models.
        prefix: of the names of its classes.
        features: what its models may use. A model that uses another is refused.
    """

    name: str
    package: str
    prefix: str
    features: tuple[Feature, ...] = ()

    @property
    def base_class(self) -> str:
        """The base class of all models of the family, so that each head (causal LM, classification) is covered."""
        return f"transformers.models.{self.package}.modeling_{self.package}.{self.prefix}PreTrainedModel"

    @property
    def attention(self) -> str:
        """What its attention uses, in words."""
        return ", ".join(feature.value for feature in _OF_ATTENTION if feature in self.features) or "plain causal"

    @property
    def decode_step(self) -> str:
        """What a decode step runs, and whether a CUDA graph may hold it."""
        if Feature.FUSED in self.features:
            return "five ops a layer, captured"
        # The host chooses how the experts' products run, by the tokens that each of them gets.
        is_captured = Feature.EXPERTS not in self.features
        return f"the model's own layers, {'captured' if is_captured else 'not captured'}"


FAMILIES = (
    Family("Llama 2, 3, 3.1, 3.2", "llama", "Llama", (Feature.FUSED,)),
    Family("Mistral", "mistral", "Mistral", (Feature.WINDOW, Feature.FUSED)),
    Family("Mixtral", "mixtral", "Mixtral", (Feature.WINDOW, Feature.EXPERTS)),
    Family("Qwen2, Qwen2.5", "qwen2", "Qwen2", (Feature.WINDOW, Feature.FUSED)),
    Family("Qwen3", "qwen3", "Qwen3", (Feature.WINDOW,)),
    Family("Qwen3-MoE", "qwen3_moe", "Qwen3Moe", (Feature.WINDOW, Feature.EXPERTS)),
    Family("Gemma 2", "gemma2", "Gemma2", (Feature.WINDOW, Feature.SOFTCAP, Feature.SCALE)),
    Family("Gemma 3", "gemma3", "Gemma3", (Feature.WINDOW, Feature.SCALE)),
    Family("GPT-NeoX", "gpt_neox", "GPTNeoX"),
    Family("Phi-3", "phi3", "Phi3", (Feature.WINDOW,)),
    Family("OLMo 2", "olmo2", "Olmo2"),
    Family("GPT-OSS", "gpt_oss", "GptOss", (Feature.WINDOW, Feature.SINKS, Feature.EXPERTS)),
    Family("Granite", "granite", "Granite", (Feature.SCALE,)),
    Family("Cohere (Command R)", "cohere", "Cohere"),
    Family("Cohere 2 (Command R7B, Command A)", "cohere2", "Cohere2", (Feature.WINDOW,)),
)

_BY_BASE_CLASS = {family.base_class: family for family in FAMILIES}


def family_of(model_class: type) -> Family | None:
    """The family of a transformers model, by its class.

    Example:
        >>> from transformers import Gemma2ForCausalLM, T5Model
        >>> family_of(Gemma2ForCausalLM).attention, family_of(T5Model)
        ('sliding window, softcap, scale of its own', None)
    """
    names = (f"{base.__module__}.{base.__qualname__}" for base in model_class.__mro__)
    return next((_BY_BASE_CLASS[name] for name in names if name in _BY_BASE_CLASS), None)


HEADER = ("family", "attention", "decode step")


def family_rows() -> Iterable[tuple[str, ...]]:
    """The table of families as `flashcore models` and the README show it, a row for each under HEADER.

    Example:
        >>> next(iter(family_rows()))
        ('Llama 2, 3, 3.1, 3.2', 'plain causal', 'five ops a layer, captured')
    """
    return ((family.name, family.attention, family.decode_step) for family in FAMILIES)
