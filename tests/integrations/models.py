"""Tiny random models of every family, and prompts for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, StaticCache

from flashcore_ops.integrations import families
from flashcore_ops.integrations.families import Feature
from tests.integrations.oracle import use_oracle

WINDOW = 8
PROMPT_LEN = 13  # longer than the window
VOCABULARY = 96

# A wide initializer makes attention sharp, so that a wrong mask moves the tokens.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_4_TO_2 = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_7_TO_1 = {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 1}
_MHA = {"hidden_size": 64, "num_attention_heads": 4}
_SLIDING = {"sliding_window": WINDOW}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], **_SLIDING}
_OWN_WINDOW = {"use_sliding_window": True, **_SLIDING}
_ROUTED = {"num_experts_per_tok": 2, "num_local_experts": 4}
# Head dim 256 is Gemma's own. Tied embeddings as large as Gemma's would make each token its own successor.
_GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 16, "tie_word_embeddings": False}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

# By the name of a test's case: the family's model_type and its settings.
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _4_TO_2),
    "mistral": ("mistral", _4_TO_2 | _SLIDING),
    "qwen2": ("qwen2", _7_TO_1),
    "qwen2-window": ("qwen2", _7_TO_1 | _OWN_WINDOW | {"max_window_layers": 1}),
    "mixtral": ("mixtral", _4_TO_2 | _SLIDING | _ROUTED),
    "qwen3": ("qwen3", _4_TO_2 | _OWN_WINDOW | {"max_window_layers": 1, "head_dim": 32}),
    "qwen3-moe": ("qwen3_moe", _4_TO_2 | _OWN_WINDOW | _ROUTED | {"num_experts": 4, "moe_intermediate_size": 32}),
    # The scores are small, and a softcap bends only what comes near it.
    "gemma2": ("gemma2", _4_TO_2 | _ALTERNATING | _GEMMA | {"attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", _4_TO_2 | _ALTERNATING | _GEMMA),
    "gpt-neox": ("gpt_neox", _MHA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}),
    "phi3": ("phi3", _4_TO_2 | _SLIDING | {"resid_pdrop": 0.0}),
    "olmo2": ("olmo2", _4_TO_2),
    "gpt-oss": ("gpt_oss", _4_TO_2 | _ALTERNATING | _ROUTED | {"head_dim": 16, "rope_parameters": _YARN}),
    "granite": ("granite", _4_TO_2 | {"attention_multiplier": 0.1}),
    "cohere": ("cohere", _4_TO_2 | {"use_qk_norm": True}),
    "cohere2": ("cohere2", _4_TO_2 | _ALTERNATING),
}
FAMILIES = tuple(_SETTINGS)
FUSED_FAMILIES = ("llama", "mistral", "qwen2", "qwen2-window")
ROUTED_FAMILIES = ("mixtral", "qwen3-moe", "gpt-oss")
WINDOW_FAMILIES = tuple(name for name, (_, settings) in _SETTINGS.items() if "sliding_window" in settings)
# torch's SDPA knows neither softcap nor sinks.
_EAGER_FAMILIES = ("gemma2", "gpt-oss")
# What a family's models are held against: Hugging Face's implementations that compute all it uses.
REFERENCES = [
    (family, implementation)
    for family in FAMILIES
    for implementation in ("sdpa", "eager")
    if implementation == "eager" or family not in _EAGER_FAMILIES
]
# What a layer tells its attention of a feature.
ARGUMENTS = {
    Feature.WINDOW: "sliding_window",
    Feature.SOFTCAP: "softcap",
    Feature.SINKS: "s_aux",
    Feature.SCALE: "scaling",
}
CACHES = ("dynamic", "static")
BATCHES = ("single", "left-padded")
ALL_BATCHES = (*BATCHES, "right-padded")


def make_config(family: str, **changes: Any) -> PreTrainedConfig:
    model_type, settings = _SETTINGS[family]
    return AutoConfig.for_model(model_type, **(_COMMON | settings | changes))


def make_model(
    family: str = "llama",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    implementation: str | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """A two-layer causal LM, with some settings changed; every call gives the same weights.

    Unless told otherwise it runs on Hugging Face's sdpa, or on eager where sdpa leaves out what the family uses.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config(family, **settings))
    model.set_attn_implementation(implementation or ("eager" if family in _EAGER_FAMILIES else "sdpa"))
    return model.to(device=device, dtype=dtype).eval()


def features_of(family: str) -> list[Feature]:
    """What the table of families says that this one uses, and its model here does."""
    model_type, settings = _SETTINGS[family]
    (row,) = [row for row in families.FAMILIES if row.package == model_type.removesuffix("_text")]
    return [feature for feature in row.features if feature != Feature.WINDOW or "sliding_window" in settings]


def implementations_of(model: nn.Module) -> list[tuple[int, str]]:
    """Each module's config, by identity, and its attention implementation."""
    held = [vars(module)["config"] for module in model.modules() if hasattr(vars(module).get("config"), "to_dict")]
    return [(id(config), config._attn_implementation) for config in held]


def state_of(model: nn.Module) -> dict[str, list[Any]]:
    """All that patching could change, to be compared: each module's class and attributes, configs, weights."""
    modules = list(model.modules())
    attributes = [(name, value) for module in modules for name, value in vars(module).items()]
    weights = list(model.state_dict(keep_vars=True).items())
    # What a module holds by name: parts, weights, hooks.
    inner = [
        (name, list(value), list(map(id, value.values()))) for name, value in attributes if isinstance(value, dict)
    ]
    return {
        "classes": [(type(module), module.forward) for module in modules],
        "attributes": [(name, id(value)) for name, value in attributes],
        "inner": inner,
        "configs": [value.to_dict() for _, value in attributes if isinstance(value, PreTrainedConfig)],
        "implementations": implementations_of(model),
        "weights": [
            (name, id(weight), weight.detach().flatten().view(torch.uint8).tolist()) for name, weight in weights
        ],
    }


def make_batch(kind: str = "single", device: str = "cpu") -> dict[str, Tensor]:
    """input_ids and attention_mask `[B, 13]`; a padded batch has rows of 13, 5 and 9 tokens."""
    lengths = (PROMPT_LEN,) if kind == "single" else (PROMPT_LEN, 5, 9)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (len(lengths), PROMPT_LEN), generator=generator)
    padding = PROMPT_LEN - torch.tensor(lengths)[:, None]
    mask = (torch.arange(PROMPT_LEN) >= padding).long()
    if kind == "right-padded":
        mask = mask.flip(1)
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


def generate(model: PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> Tensor:
    """The new tokens of a greedy run of 12."""
    defaults = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    output = model.generate(**batch, **(defaults | options))
    return output[:, batch["input_ids"].shape[1] :]


def static_cache(model: PreTrainedModel, max_cache_len: int = 40) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=max_cache_len)


def error_bar(model: PreTrainedModel, logits: Tensor, **inputs: Any) -> tuple[Tensor, float]:
    """First output of the float64 model, and how far a kernel's may be from it.

    Twice the error of Hugging Face's logits in the model's dtype, and eight roundings of the largest logit.
    """
    exact = use_oracle(copy.deepcopy(model).double())(**inputs)[0]
    error = (logits.double() - exact).abs()
    mask = inputs.get("attention_mask")
    if mask is not None and error.shape[:2] == mask.shape:
        # What stands in rows of padding has no meaning.
        error = error[mask.bool()]
    return exact, 2 * error.max().item() + 8 * torch.finfo(logits.dtype).eps * exact.abs().max().item()
