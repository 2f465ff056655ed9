"""Patching one instance and nothing else, undoing it, and refusing what cannot be served."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MistralForSequenceClassification,
    MistralModel,
    PreTrainedModel,
    Qwen2ForTokenClassification,
    Qwen2Model,
    T5Config,
    T5ForConditionalGeneration,
)

from flashcore_ops.errors import DtypeError, GradientError, OptionError, UnsupportedModelError
from flashcore_ops.integrations.transformers import is_patched, restore_attention
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.integrations.models import error_bar, generate, make_batch, make_model


def _implementations(model: nn.Module) -> list[tuple[int, str]]:
    """Each module's config, by identity, and its attention implementation."""
    held = [vars(module)["config"] for module in model.modules() if hasattr(vars(module).get("config"), "to_dict")]
    return [(id(config), config._attn_implementation) for config in held]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_restore_puts_back_the_very_config_objects(implementation: str) -> None:
    model, batch = make_model(), make_batch()
    model.set_attn_implementation(implementation)
    before, logits = _implementations(model), model(**batch).logits
    assert patch(model) is model
    assert is_patched(model)
    assert {name for _, name in _implementations(model)} == {"fcore"}
    assert restore_attention(model) is model
    assert not is_patched(model)
    assert _implementations(model) == before
    assert not [name for module in model.modules() for name in vars(module) if "flashcore" in name]
    assert torch.equal(model(**batch).logits, logits)


def test_twins_and_earlier_copies_stay_as_they_were() -> None:
    model, batch = make_model(), make_batch()
    twin, earlier = type(model)(model.config).eval(), copy.deepcopy(model)
    before = [_implementations(other) for other in (twin, earlier)]
    logits = [other(**batch).logits for other in (twin, earlier)]
    patch(model)
    assert [_implementations(other) for other in (twin, earlier)] == before
    assert [is_patched(other) for other in (twin, earlier)] == [False, False]
    assert all(torch.equal(other(**batch).logits, old) for other, old in zip((twin, earlier), logits, strict=True))


def test_modules_that_shared_a_config_share_the_private_one() -> None:
    model = make_model()
    shared = len({config for config, _ in _implementations(model)})
    patch(model)
    assert shared == len({config for config, _ in _implementations(model)}) == 1
    assert model.config is model.model.config is model.model.layers[1].self_attn.config


def test_a_deep_copy_of_a_patched_model_is_patched_and_restores() -> None:
    model, batch = patch(make_model()), make_batch()
    other = copy.deepcopy(model)
    assert is_patched(other)
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    restore_attention(other)
    assert {name for _, name in _implementations(other)} == {"sdpa"}
    assert other.config is other.model.config
    assert is_patched(model)


def test_nothing_of_ours_is_saved(tmp_path: Path) -> None:
    model, plain = patch(make_model()), make_model()
    model.save_pretrained(tmp_path / "patched")
    plain.save_pretrained(tmp_path / "plain")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "patched").iterdir()) == names
    for name in names:
        content = (tmp_path / "patched" / name).read_bytes()
        assert content == (tmp_path / "plain" / name).read_bytes()
        assert b"fcore" not in content
        assert b"flashcore" not in content
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert not is_patched(loaded)
    assert torch.equal(loaded(**make_batch()).logits, plain(**make_batch()).logits)


def test_a_part_of_a_model_can_be_patched() -> None:
    """The base model alone: the head's own config is not touched, and generate still gives sdpa's tokens."""
    model, batch = make_model(), make_batch("left-padded")
    expected = generate(model, batch)
    patch(model.model)
    assert model.config._attn_implementation == "sdpa"
    assert generate(model, batch).tolist() == expected.tolist()
    with pytest.raises(OptionError, match="restore_attention"):
        patch(model)
    restore_attention(model)
    assert model.model.config is model.config


def test_patching_twice_and_restoring_twice_are_refused() -> None:
    model = patch(make_model())
    with pytest.raises(OptionError, match=r"not patched.*Call restore_attention\(model\) first"):
        patch(model)
    assert is_patched(model)
    restore_attention(model)
    with pytest.raises(OptionError, match="expected a patched model"):
        restore_attention(model)


def test_another_implementation_set_later_counts_as_not_patched() -> None:
    model = patch(make_model())
    original = model._flashcore_original_config
    model.set_attn_implementation("eager")
    assert not is_patched(model)
    assert restore_attention(model).config is original


@pytest.mark.parametrize(
    "head",
    [
        LlamaModel,
        LlamaForSequenceClassification,
        LlamaForQuestionAnswering,
        LlamaForTokenClassification,
        MistralModel,
        MistralForSequenceClassification,
        Qwen2Model,
        Qwen2ForTokenClassification,
    ],
)
def test_every_head_of_a_family_is_served(head: type[PreTrainedModel]) -> None:
    family = "".join(name for name in ("llama", "mistral", "qwen2") if head.__name__.lower().startswith(name))
    model, batch = head(make_model(family).config).eval(), make_batch("left-padded")
    exact, bar = error_bar(model, model(**batch)[0], **batch)
    actual = patch(model)(**batch)[0]
    rows = batch["attention_mask"].bool() if actual.shape[:2] == batch["input_ids"].shape else slice(None)
    assert (actual - exact)[rows].abs().max() <= bar


class Wrapper(nn.Module):
    """Holds the config of what it wraps, as PEFT's models do."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config


def test_wrappers_are_patched_and_restored_with_their_model() -> None:
    model = make_model()
    config = model.config
    wrapper = patch(Wrapper(model))
    assert is_patched(wrapper)
    assert wrapper.config is model.config is not config
    restore_attention(wrapper)
    assert wrapper.config is model.config is config
    later = restore_attention(Wrapper(patch(model)))
    assert later.config is model.config is config


def test_peft_models_are_served_patched_before_or_after() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    batch = make_batch("left-padded")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(make_model(), lora).eval()
    expected = generate(wrapped, batch)
    assert generate(patch(wrapped), batch).tolist() == expected.tolist()
    restore_attention(wrapped)
    assert {name for _, name in _implementations(wrapped)} == {"sdpa"}
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(patch(make_model()), lora).eval()
    assert generate(wrapped, batch).tolist() == expected.tolist()
    restore_attention(wrapped)
    assert {name for _, name in _implementations(wrapped)} == {"sdpa"}


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_models_are_served(place: str, tmp_path: Path) -> None:
    """accelerate's hooks bring each layer's weights when it runs, and move the masks with them."""
    accelerate = pytest.importorskip("accelerate")
    model, batch = make_model(), make_batch("left-padded")
    expected = generate(model, batch)
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    assert generate(patch(model), batch).tolist() == expected.tolist()
    restore_attention(model)
    assert generate(model, batch).tolist() == expected.tolist()


def test_quantized_layers_are_served() -> None:
    """Weights in int8 with a scale, computed in float32: what quantizers put in the place of nn.Linear."""

    class Int8Linear(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127
            self.register_buffer("scale", scale)
            self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ (self.weight * self.scale).T

    model, batch = make_model(), make_batch("left-padded")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Int8Linear(getattr(layer.self_attn, name)))
    expected = generate(model, batch)
    assert generate(patch(model), batch).tolist() == expected.tolist()


def _llama(**settings: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"vocab_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    defaults = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(sizes | defaults | settings))).eval()


def _neox() -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=32, num_hidden_layers=1, **sizes))


def _t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4))


def _mistral(**settings: Any) -> PreTrainedModel:
    model = make_model("mistral")
    model.config.update(settings)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (_neox, UnsupportedModelError, r"Llama, Mistral or Qwen2.*got GPTNeoXForCausalLM \(model_type 'gpt_neox'\)"),
        (_t5, UnsupportedModelError, "got T5ForConditionalGeneration"),
        (lambda: nn.Linear(2, 2), UnsupportedModelError, "Llama, Mistral or Qwen2.*got Linear"),
        (lambda: nn.ModuleList([make_model(), _neox()]), UnsupportedModelError, "GPTNeoX"),
        (lambda: _llama(hidden_size=32), UnsupportedModelError, "head_dim: .* multiple of 8 from 16 to 256, got 8"),
        (lambda: _llama(head_dim=20), UnsupportedModelError, "head_dim: .*, got 20"),
        (lambda: _llama(head_dim=512), UnsupportedModelError, "head_dim: .*, got 512"),
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
    before = _implementations(model)
    with pytest.raises(error, match=message):
        patch(model)
    assert _implementations(model) == before
    assert not is_patched(model)


def test_attention_dropout_matters_only_in_training() -> None:
    assert is_patched(patch(_llama(attention_dropout=0.1)))
    assert is_patched(patch(_llama().train()))


def test_options_of_a_call_are_refused() -> None:
    model, batch = patch(make_model()), make_batch()
    with pytest.raises(OptionError, match=r"output_attentions: .*restore_attention"):
        model(**batch, output_attentions=True)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(OptionError, match=r"attention_dropout: .*0\.1 in training mode"):
        model.train()(**batch)
    model.eval()
    with torch.enable_grad(), pytest.raises(GradientError, match=r"torch\.no_grad\(\)"):
        model(**batch)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(OptionError, match="is_causal"):
        model(**batch)


def test_models_of_other_families_cannot_borrow_the_implementation() -> None:
    """Gemma 2 built with attn_implementation="fcore" passes a softcap, which no one checked for it."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    patch(make_model())
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    config = Gemma2Config(vocab_size=96, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="fcore").eval()
    with pytest.raises(UnsupportedModelError, match="softcap"):
        model(**make_batch())


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, flashcore_ops, flashcore_ops.integrations.transformers; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
