"""What cannot be served is refused by name, with the reason, and left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from flashcore_ops import make_static_cache
from flashcore_ops.errors import DtypeError, GradientError, MaskError, OptionError, UnsupportedModelError
from flashcore_ops.integrations.attention import fcore_attention
from flashcore_ops.integrations.transformers import is_patched
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.integrations.models import FAMILIES, PROMPT_LEN, make_batch, make_model, state_of


def _llama(**settings: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"vocab_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    defaults = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(sizes | defaults | settings))).eval()


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=64, n_layer=1, n_head=4))


def _deepseek(config: type[PreTrainedConfig]) -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    latent = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return AutoModelForCausalLM.from_config(config(vocab_size=32, num_hidden_layers=1, **sizes, **latent, **heads))


def _deepseek_v2() -> PreTrainedModel:
    return _deepseek(DeepseekV2Config)


def _deepseek_v3() -> PreTrainedModel:
    return _deepseek(DeepseekV3Config)


def _bart() -> PreTrainedModel:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartForConditionalGeneration(BartConfig(vocab_size=32, d_model=64, **sizes, **heads))


def _gemma3_with_vision() -> PreTrainedModel:
    text = make_model("gemma3").config.to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4))


def _mistral(**settings: Any) -> PreTrainedModel:
    model = make_model("mistral")
    model.config.update(settings)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            _gpt2,
            UnsupportedModelError,
            r"a Llama, .* or Cohere 2 model.*got GPT2LMHeadModel \(model_type 'gpt2'\)",
        ),
        (_t5, UnsupportedModelError, r"got T5ForConditionalGeneration \(model_type 't5'\), an encoder-decoder model"),
        (_bart, UnsupportedModelError, "got BartForConditionalGeneration .*, an encoder-decoder model"),
        (
            _deepseek_v2,
            UnsupportedModelError,
            r"DeepseekV2.*multi-head latent attention \(MLA\)",
        ),
        (
            _deepseek_v3,
            UnsupportedModelError,
            r"DeepseekV3.*multi-head latent attention \(MLA\)",
        ),
        (_gemma3_with_vision, UnsupportedModelError, "got SiglipVisionModel"),
        (lambda: nn.Linear(2, 2), UnsupportedModelError, "Llama, Mistral, .*got Linear"),
        (lambda: nn.ModuleList([make_model(), _gpt2()]), UnsupportedModelError, "GPT2"),
        (lambda: _llama(hidden_size=32), UnsupportedModelError, "head_dim: .* multiple of 8 from 16 to 256, got 8"),
        (lambda: _llama(head_dim=20), UnsupportedModelError, "head_dim: .*, got 20"),
        (lambda: _llama(head_dim=512), UnsupportedModelError, "head_dim: .*, got 512"),
        (
            lambda: _llama(num_key_value_heads=3),
            UnsupportedModelError,
            "num_key_value_heads: .*divisor of the 4 .* got 3",
        ),
        (lambda: _llama(attention_dropout=0.1).train(), UnsupportedModelError, r"attention_dropout.*model\.eval"),
        (lambda: _llama(attn_implementation="eager", output_attentions=True), UnsupportedModelError, "output_att"),
        (lambda: _llama(sliding_window=8), UnsupportedModelError, "sliding_window: expected None for the Llama"),
        (lambda: _mistral(sliding_window=1), UnsupportedModelError, "sliding_window: .* at least 2, got 1"),
        (lambda: _mistral(layer_types=["chunked_attention"] * 2), UnsupportedModelError, "layer_types: .*chunked"),
        (lambda: _mistral(attention_chunk_size=4), UnsupportedModelError, "attention_chunk_size"),
        (lambda: _llama().double(), DtypeError, "float16, bfloat16 or float32, got float64"),
    ],
)
def test_what_cannot_be_served_is_refused_and_left_as_it_was(make: Any, error: Any, message: str) -> None:
    model = make()
    before = state_of(model)
    with pytest.raises(error, match=message):
        patch(model)
    assert state_of(model) == before
    assert not is_patched(model)


def test_attention_dropout_matters_only_in_training() -> None:
    assert is_patched(patch(_llama(attention_dropout=0.1)))
    assert is_patched(patch(_llama().train()))


SHAPE_4D = (1, 1, PROMPT_LEN, PROMPT_LEN)
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "attention weights": ({"output_attentions": True}, OptionError, r"output_attentions: .*restore_attention"),
    "malformed bounds": ({"cu_seq_lens_q": torch.tensor([0, 6, PROMPT_LEN])}, MaskError, "cu_seq_lens_q"),
    "another batch's mask": ({"attention_mask": torch.ones(2, PROMPT_LEN)}, MaskError, r"expected \[B, L\] with B = 1"),
    "a 3-D mask": ({"attention_mask": torch.ones(SHAPE_4D[1:])}, MaskError, r"expected \[B, L\] with B = 1"),
    "a 4-D mask of integers": ({"attention_mask": torch.ones(SHAPE_4D).long()}, MaskError, "dtype bool"),
    "a 4-D mask too narrow": ({"attention_mask": torch.ones(1, 1, 13, 12).bool()}, MaskError, "broadcasts to"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_bad_calls_are_refused_and_leave_the_model_as_it_was(family: str, call: str) -> None:
    model, ids = patch(make_model(family)), make_batch()["input_ids"]
    options, error, message = CALLS[call]
    # transformers leaves its recorders in place once it is asked for any output beside the logits.
    logits = model(ids, output_hidden_states=True).logits
    before = state_of(model)
    with pytest.raises(error, match=message):
        model(ids, **options)
    assert state_of(model) == before
    assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_dropout_are_refused_and_leave_the_model_as_it_was(family: str) -> None:
    model, ids = patch(make_model(family)), make_batch()["input_ids"]
    logits = model(ids).logits
    before = state_of(model)
    with torch.enable_grad(), pytest.raises(GradientError, match=r"torch\.no_grad\(\)"):
        model(ids)
    assert state_of(model) == before
    for layer in (module for module in model.modules() if hasattr(module, "attention_dropout")):
        layer.attention_dropout = 0.1
    before = state_of(model.train())
    with pytest.raises(OptionError, match=r"attention_dropout: .*0\.1 in training mode"):
        model(ids)
    assert state_of(model) == before
    assert torch.equal(model.eval()(ids).logits, logits)


def test_layers_that_are_not_causal_are_refused() -> None:
    model, batch = patch(make_model()), make_batch()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(OptionError, match="is_causal"):
        model(**batch)


def test_generate_does_not_give_attention_weights() -> None:
    model, batch = patch(make_model()), make_batch()
    model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True)
    before = state_of(model)
    with pytest.raises((OptionError, ValueError), match="output_attentions"):
        model.generate(**batch, max_new_tokens=2, return_dict_in_generate=True, output_attentions=True)
    assert state_of(model) == before


def test_models_of_other_families_cannot_borrow_the_implementation() -> None:
    """A model built with attn_implementation="fcore" may pass a bias by position, which no one checked for it."""
    query = torch.zeros(1, 2, 3, 16)
    with pytest.raises(UnsupportedModelError, match="position_bias"):
        fcore_attention(nn.Module(), query, query, query, None, position_bias=torch.zeros(1, 2, 3, 3))


@pytest.mark.parametrize("option", [{"softcap": 5.0}, {"s_aux": torch.zeros(4)}])
def test_fused_layers_are_not_told_what_their_family_does_not_use(option: dict[str, Any]) -> None:
    model, batch = patch(make_model()), make_batch()
    past = make_static_cache(model, batch_size=1, max_cache_len=16)
    model(**batch, past_key_values=past)
    with pytest.raises(UnsupportedModelError, match=next(iter(option))):
        model(batch["input_ids"][:, :1], past_key_values=past, **option)
