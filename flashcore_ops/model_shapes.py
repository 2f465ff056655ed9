"""Shapes of public models by name, and models of any shape with random weights, for runs that need no checkpoint."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from flashcore_ops.errors import OptionError
from flashcore_ops.integrations.families import reference_implementation

if TYPE_CHECKING:
    # It takes seconds to import, which a command's help should not wait for.
    from transformers import PreTrainedConfig, PreTrainedModel


def _llama_3(rope_factor: float, **sizes: Any) -> dict[str, Any]:
    """What all models from Llama 3.1 on share, with the sizes of one of them."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": rope_factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    shared = {
        "model_type": "llama",
        "vocab_size": 128256,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": rope,
    }
    return shared | sizes


# Source: the config.json of each model on https://huggingface.co: meta-llama/Llama-3.2-1B, meta-llama/Llama-3.2-3B,
# meta-llama/Llama-3.1-8B, meta-llama/Llama-3.1-70B, mistralai/Mistral-7B-v0.3, Qwen/Qwen2.5-7B.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama_3(
        rope_factor=32.0,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": _llama_3(
        rope_factor=32.0,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _llama_3(
        rope_factor=8.0,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "llama-3.1-70b": _llama_3(
        rope_factor=8.0,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        tie_word_embeddings=False,
    ),
    "mistral-7b-v0.3": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": False,
    },
}


def shape_config(name: str, num_layers: int | None = None) -> PreTrainedConfig:
    """The transformers config of a public model's shape, made without the hub.

    Args:
        name: a key of SHAPES.
        num_layers: keep that many layers from the first on; None keeps all.

    Returns:
        A new config. Only what decides shapes and numerics is the model's; its token ids are not.

    Raises:
        OptionError: an unknown name, or num_layers below 1.

    Source: the config.json files that the models were published with.

    Example:
        >>> config = shape_config("llama-3.1-8b")
        >>> config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        (32, 32, 8, 128)
    """
    from transformers import AutoConfig

    if name not in SHAPES:
        raise OptionError.explain(
            "model shape", expected=", ".join(SHAPES), got=repr(name), fix="Use one of these names."
        )
    if num_layers is not None and num_layers < 1:
        raise OptionError.explain("num_layers", expected="1 or more", got=str(num_layers), fix="Keep a layer.")
    changes = {} if num_layers is None else {"num_hidden_layers": num_layers}
    return AutoConfig.for_model(**copy.deepcopy(SHAPES[name] | changes))


def random_model(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """A causal language model with normal random weights, made in its dtype on its device.

    No float32 copy and no copy on the host is made on the way, so that the model needs the memory of its weights and
    no more. The caller's random numbers go on as if nothing had been drawn.

    Args:
        config: of any causal language model of transformers, such as `shape_config` gives.
        dtype: of the weights.
        device: where they are drawn. On "meta" they take no memory and have no values.
        seed: decides the weights, on one kind of device.

    Returns:
        The model in evaluation mode, with Hugging Face's sdpa attention, or eager where sdpa leaves out what it uses.

    Example:
        >>> config = shape_config("llama-3.2-1b")
        >>> model = random_model(config, torch.bfloat16, torch.device("meta"))
        >>> round(model.num_parameters() / 1e9, 2), model.dtype
        (1.24, torch.bfloat16)
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_attn_implementation(reference_implementation(type(model)))
    return model.eval()
