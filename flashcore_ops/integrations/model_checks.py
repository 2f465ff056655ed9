"""Which models can be patched: every other one is refused by name, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from flashcore_ops.checks import HEAD_DIM_RULE, SUPPORTED_DTYPES, dtype_name, is_supported_head_dim
from flashcore_ops.errors import DtypeError, UnsupportedModelError
from flashcore_ops.integrations.families import FAMILIES, Family, Feature, family_of
from flashcore_ops.kv_memory import KVShape


def check_model(model: nn.Module) -> None:
    """Raises a typed error unless every transformers model in `model` can be served with its settings.

    A wrapper such as PEFT's is served if what it wraps is.

    Raises:
        UnsupportedModelError: an unknown family, or a setting that is not served.
        DtypeError: weights of an unsupported dtype.
    """
    hosts = list(hosts_in(model))
    if not hosts:
        raise _unsupported("model", expected=_names(), got=type(model).__name__)
    for host in hosts:
        _check_settings(host, _served_family_of(host))
        check_dtype(host)


def hosts_in(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Every transformers model that a module is or holds."""
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _names() -> str:
    *first, last = (family.name for family in FAMILIES)
    return f"a {', '.join(first)} or {last} model of transformers"


def _served_family_of(host: PreTrainedModel) -> Family:
    config = _decoder_config(host)
    got = f"{type(host).__name__} (model_type {host.config.model_type!r})"
    if host.config.is_encoder_decoder:
        raise _unsupported(
            "model",
            expected="a decoder alone, since FlashCore's attention is causal and over one sequence",
            got=f"{got}, an encoder-decoder model, which attends to its encoder's output and in both directions",
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise _unsupported(
            "model",
            expected="keys and values that each KV head caches as they are",
            got=f"{got}, whose multi-head latent attention (MLA) makes them anew from one latent for all heads",
        )
    if family := family_of(type(host)):
        return family
    raise _unsupported("model", expected=_names(), got=got)


def _decoder_config(host: PreTrainedModel) -> Any:
    """The host's config, or of a multimodal model's its language model's."""
    return host.config.get_text_config(decoder=True)


def _check_settings(host: PreTrainedModel, family: Family) -> None:
    config = _decoder_config(host)
    shape = KVShape.of(config)
    head_dim = shape.head_dim
    if config.num_attention_heads % shape.num_kv_heads != 0:
        raise _unsupported(
            "num_key_value_heads",
            expected=f"a divisor of the {config.num_attention_heads} query heads",
            got=str(shape.num_kv_heads),
        )
    if not is_supported_head_dim(head_dim):
        raise _unsupported("head_dim", expected=HEAD_DIM_RULE, got=str(head_dim))
    if host.training and config.attention_dropout:
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
    _check_windows(config, family)


def _check_windows(config: Any, family: Family) -> None:
    has_window = Feature.WINDOW in family.features
    # With a window of 1, transformers' sliding cache keeps every token, at slots that its mask does not tell.
    window = getattr(config, "sliding_window", None)
    if window is not None and (not has_window or window < 2):
        expected = "None or at least 2" if has_window else f"None for the {family.name} family"
        raise _unsupported("sliding_window", expected=expected, got=str(window))
    kinds = {"full_attention", "sliding_attention"} if has_window else {"full_attention"}
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - kinds):
        raise _unsupported("layer_types", expected=" and ".join(sorted(kinds)), got=", ".join(others))
    if getattr(config, "attention_chunk_size", None) is not None:
        raise _unsupported("attention_chunk_size", expected="None", got=str(config.attention_chunk_size))


def check_dtype(host: PreTrainedModel) -> None:
    """Raises DtypeError if the kernels do not compute in a model's dtype."""
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
