"""The model families that can be patched, as data: what decides whether a model is served, and what the docs say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

TESTED_TRANSFORMERS = "5.17.0"


class Feature(Enum):
    """What sets a family apart from plain causal attention in layers that run as they are."""

    WINDOW = "window"
    SOFTCAP = "softcap"
    SINKS = "sinks"
    SCALE = "own scale"
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
        models: what it is released as, where that says more.
    """

    name: str
    package: str
    prefix: str
    features: tuple[Feature, ...] = ()
    models: str = ""

    @property
    def base_class(self) -> str:
        """The base class of all models of the family, so that each head (causal LM, classification) is covered."""
        return f"transformers.models.{self.package}.modeling_{self.package}.{self.prefix}PreTrainedModel"

    @property
    def title(self) -> str:
        """Its name, and what it is released as."""
        return f"{self.name} ({self.models})" if self.models else self.name

    @property
    def attention(self) -> str:
        """What its attention uses, in words."""
        return ", ".join(feature.value for feature in _OF_ATTENTION if feature in self.features) or "plain causal"

    @property
    def decode_step(self) -> str:
        """What a decode step runs, and whether a CUDA graph may hold it, in words."""
        layers = "fused layers" if Feature.FUSED in self.features else "own layers"
        return f"{layers}, CUDA graph"


FAMILIES = (
    Family("Llama", "llama", "Llama", (Feature.FUSED,), models="2, 3, 3.1, 3.2"),
    Family("Mistral", "mistral", "Mistral", (Feature.WINDOW, Feature.FUSED)),
    Family("Mixtral", "mixtral", "Mixtral", (Feature.WINDOW, Feature.EXPERTS)),
    Family("Qwen2", "qwen2", "Qwen2", (Feature.WINDOW, Feature.FUSED), models="2 and 2.5"),
    Family("Qwen3", "qwen3", "Qwen3", (Feature.WINDOW,)),
    Family("Qwen3-MoE", "qwen3_moe", "Qwen3Moe", (Feature.WINDOW, Feature.EXPERTS)),
    Family("Gemma 2", "gemma2", "Gemma2", (Feature.WINDOW, Feature.SOFTCAP, Feature.SCALE)),
    Family("Gemma 3", "gemma3", "Gemma3", (Feature.WINDOW, Feature.SCALE)),
    Family("GPT-NeoX", "gpt_neox", "GPTNeoX"),
    Family("Phi-3", "phi3", "Phi3", (Feature.WINDOW,)),
    Family("OLMo 2", "olmo2", "Olmo2"),
    Family("GPT-OSS", "gpt_oss", "GptOss", (Feature.WINDOW, Feature.SINKS, Feature.EXPERTS)),
    Family("Granite", "granite", "Granite", (Feature.SCALE,)),
    Family("Cohere", "cohere", "Cohere", models="Command R"),
    Family("Cohere 2", "cohere2", "Cohere2", (Feature.WINDOW,), models="Command R7B"),
)

_BY_BASE_CLASS = {family.base_class: family for family in FAMILIES}


def family_of(model_class: type) -> Family | None:
    """The family of a transformers model, by its class.

    Example:
        >>> from transformers import Gemma2ForCausalLM, T5Model
        >>> family_of(Gemma2ForCausalLM).attention, family_of(T5Model)
        ('window, softcap, own scale', None)
    """
    names = (f"{base.__module__}.{base.__qualname__}" for base in model_class.__mro__)
    return next((_BY_BASE_CLASS[name] for name in names if name in _BY_BASE_CLASS), None)


def reference_implementation(model_class: type) -> str:
    """Hugging Face's attention that computes all a model uses: sdpa, or eager for softcap and sinks.

    Example:
        >>> from transformers import GptOssForCausalLM, LlamaForCausalLM
        >>> reference_implementation(LlamaForCausalLM), reference_implementation(GptOssForCausalLM)
        ('sdpa', 'eager')
    """
    family = family_of(model_class)
    unknown_to_sdpa = {Feature.SOFTCAP, Feature.SINKS}
    return "sdpa" if family is None or unknown_to_sdpa.isdisjoint(family.features) else "eager"


FAMILY_COLUMNS = ("family", "attention", "decode step")


def family_rows() -> Iterable[tuple[str, ...]]:
    """The table of families as `flashcore models` and the README show it, a row for each under FAMILY_COLUMNS.

    Example:
        >>> next(iter(family_rows()))
        ('Llama (2, 3, 3.1, 3.2)', 'plain causal', 'fused layers, CUDA graph')
    """
    return ((family.title, family.attention, family.decode_step) for family in FAMILIES)
