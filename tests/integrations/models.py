"""Tiny random models of every family, and prompts for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

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
_BUILDERS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON, **_4_TO_2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_COMMON, **_4_TO_2, sliding_window=WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_COMMON, **_7_TO_1)),
    "qwen2-window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**_COMMON, **_7_TO_1, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
}
FAMILIES = tuple(_BUILDERS)
CACHES = ("dynamic", "static")
BATCHES = ("single", "left-padded")


def make_model(family: str = "llama", device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A two-layer causal LM that runs on Hugging Face's sdpa; every call gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _BUILDERS[family]()
    model.set_attn_implementation("sdpa")
    return model.to(device=device, dtype=dtype).eval()


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
    """First output of the float64 model, and how far a kernel's may be from them.

    Twice the error of Hugging Face's sdpa in the model's dtype, and eight roundings of the largest logit.
    """
    exact = copy.deepcopy(model).double()(**inputs)[0]
    sdpa_error = (logits.double() - exact).abs().max().item()
    return exact, 2 * sdpa_error + 8 * torch.finfo(logits.dtype).eps * exact.abs().max().item()
