"""The model families that can be patched, as data, and the checks that refuse every other model by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from flashcore_ops.checks import HEAD_DIM_RULE, SUPPORTED_DTYPES, dtype_name, is_supported_head_dim
from flashcore_ops.errors import DtypeError, UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """A model family: its name, and whether its layers take a sliding window."""

    name: str
    has_window: bool


# By the base class of all models of the family, so that each head (causal LM, classification) is covered.
FAMILIES = {
    "transformers.models.llama.modeling_llama.LlamaPreTrainedModel": Family("Llama", has_window=False),
    "transformers.models.mistral.modeling_mistral.MistralPreTrainedModel": Family("Mistral", has_window=True),
    "transformers.models.qwen2.modeling_qwen2.Qwen2PreTrainedModel": Family("Qwen2", has_window=True),
}


def check_model(model: nn.Module) -> None:
    """Raises a typed error unless every transformers model in `model` can be served with its settings.

    A wrapper such as PEFT's is served if what it wraps is.

    Raises:
        UnsupportedModelError: an unknown family, or a setting that is not served.
        DtypeError: weights of an unsupported dtype.
    """
    hosts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not hosts:
        raise _unsupported("model", expected=f"a {_names()} model of transformers", got=type(model).__name__)
    for host in hosts:
        _check_settings(host, _family_of(host))
        _check_dtype(host)


def _names() -> str:
    *first, last = (family.name for family in FAMILIES.values())
    return f"{', '.join(first)} or {last}"


def _family_of(host: PreTrainedModel) -> Family:
    for base in type(host).__mro__:
        if family := FAMILIES.get(f"{base.__module__}.{base.__qualname__}"):
            return family
    got = f"{type(host).__name__} (model_type {host.config.model_type!r})"
    raise _unsupported("model", expected=f"a {_names()} model of transformers", got=got)


def _check_settings(host: PreTrainedModel, family: Family) -> None:
    config: Any = host.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not is_supported_head_dim(head_dim):
        raise _unsupported("head_dim", expected=HEAD_DIM_RULE, got=str(head_dim))
    if host.training and config.attention_dropout > 0:
        raise _unsupported(
            "attention_dropout",
            expected="0 in training mode",
            got=str(config.attention_dropout),
            fix="Call model.eval(): FlashCore is for inference.",
        )
    if config.output_attentions:
        raise _unsupported(
            "output_attentions",
            expected="False, since no attention weights are kept",
            got="True",
            fix="Set model.config.output_attentions = False.",
        )
    # With a window of 1, transformers' sliding cache keeps every token, at slots that its mask does not tell.
    window = getattr(config, "sliding_window", None)
    if window is not None and (not family.has_window or window < 2):
        expected = "None or at least 2" if family.has_window else f"None for the {family.name} family"
        raise _unsupported("sliding_window", expected=expected, got=str(window))
    kinds = {"full_attention", "sliding_attention"} if family.has_window else {"full_attention"}
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - kinds):
        raise _unsupported("layer_types", expected=" and ".join(sorted(kinds)), got=", ".join(others))
    if getattr(config, "attention_chunk_size", None) is not None:
        raise _unsupported("attention_chunk_size", expected="None", got=str(config.attention_chunk_size))


def _check_dtype(host: PreTrainedModel) -> None:
    # The embeddings set the dtype of the hidden states; quantized layers compute in it, whatever they store.
    dtype = host.get_input_embeddings().weight.dtype
    if dtype not in SUPPORTED_DTYPES:
        raise DtypeError.explain(
            "model",
            expected="float16, bfloat16 or float32",
            got=dtype_name(dtype),
            fix="Cast it with model.to(torch.bfloat16).",
        )


def _unsupported(
    subject: str, *, expected: str, got: str, fix: str = "The model is unchanged: use it as it is."
) -> UnsupportedModelError:
    return UnsupportedModelError.explain(subject, expected=expected, got=got, fix=fix)
