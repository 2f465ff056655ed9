"""Patching one instance and nothing else, undoing it, and refusing what cannot be served."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cohere2Model,
    CohereModel,
    Gemma2ForSequenceClassification,
    Gemma3TextForSequenceClassification,
    Gemma3TextModel,
    GPTNeoXForTokenClassification,
    GptOssForTokenClassification,
    GraniteModel,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    MistralForSequenceClassification,
    MistralModel,
    MixtralForSequenceClassification,
    Olmo2Model,
    Phi3ForSequenceClassification,
    PreTrainedModel,
    Qwen2ForTokenClassification,
    Qwen2Model,
    Qwen3ForQuestionAnswering,
    Qwen3MoeForTokenClassification,
)

import flashcore_ops
from flashcore_ops.errors import OptionError
from flashcore_ops.integrations.transformers import is_patched, restore_attention
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.integrations.models import (
    FAMILIES,
    REFERENCES,
    error_bar,
    generate,
    implementations_of,
    make_batch,
    make_model,
    state_of,
)


@pytest.mark.parametrize(("family", "implementation"), REFERENCES)
def test_restore_puts_back_the_very_config_objects(family: str, implementation: str) -> None:
    model, batch = make_model(family, implementation=implementation), make_batch()
    logits = model(**batch).logits
    before = state_of(model)
    assert patch(model) is model
    assert is_patched(model)
    assert {name for _, name in implementations_of(model)} == {"fcore"}
    assert restore_attention(model) is model
    assert not is_patched(model)
    assert state_of(model) == before
    assert not [name for module in model.modules() for name in vars(module) if "flashcore" in name]
    assert torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_twins_and_earlier_copies_stay_as_they_were(family: str) -> None:
    model, batch = make_model(family), make_batch()
    twin, earlier = type(model)(model.config).eval(), copy.deepcopy(model)
    before = [implementations_of(other) for other in (twin, earlier)]
    logits = [other(**batch).logits for other in (twin, earlier)]
    patch(model)
    assert [implementations_of(other) for other in (twin, earlier)] == before
    assert [is_patched(other) for other in (twin, earlier)] == [False, False]
    assert all(torch.equal(other(**batch).logits, old) for other, old in zip((twin, earlier), logits, strict=True))


def test_modules_that_shared_a_config_share_the_private_one() -> None:
    model = make_model()
    shared = len({config for config, _ in implementations_of(model)})
    patch(model)
    assert shared == len({config for config, _ in implementations_of(model)}) == 1
    assert model.config is model.model.config is model.model.layers[1].self_attn.config


def test_a_deep_copy_of_a_patched_model_is_patched_and_restores() -> None:
    model, batch = patch(make_model()), make_batch()
    other = copy.deepcopy(model)
    assert is_patched(other)
    assert torch.equal(other(**batch).logits, model(**batch).logits)
    restore_attention(other)
    assert {name for _, name in implementations_of(other)} == {"sdpa"}
    assert other.config is other.model.config
    assert is_patched(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_ours_is_saved(family: str, tmp_path: Path) -> None:
    model, plain = patch(make_model(family)), make_model(family)
    model.save_pretrained(tmp_path / "patched")
    plain.save_pretrained(tmp_path / "plain")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "patched").iterdir()) == names
    for name in names:
        content = (tmp_path / "patched" / name).read_bytes()
        assert content == (tmp_path / "plain" / name).read_bytes()
        assert b"fcore" not in content
        assert b"flashcore" not in content
    implementation = plain.config._attn_implementation
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", attn_implementation=implementation)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_twice_and_restoring_twice_are_refused(family: str) -> None:
    model = patch(make_model(family))
    before = state_of(model)
    with pytest.raises(OptionError, match=r"not patched.*Call restore_attention\(model\) first"):
        patch(model)
    assert state_of(model) == before
    assert is_patched(model)
    before = state_of(restore_attention(model))
    with pytest.raises(OptionError, match="expected a patched model"):
        restore_attention(model)
    assert state_of(model) == before


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
        MixtralForSequenceClassification,
        Qwen3ForQuestionAnswering,
        Qwen3MoeForTokenClassification,
        Gemma2ForSequenceClassification,
        Gemma3TextModel,
        Gemma3TextForSequenceClassification,
        GPTNeoXForTokenClassification,
        Phi3ForSequenceClassification,
        Olmo2Model,
        GptOssForTokenClassification,
        GraniteModel,
        CohereModel,
        Cohere2Model,
    ],
)
def test_every_head_of_a_family_is_served(head: type[PreTrainedModel]) -> None:
    model_types = {make_model(family).config.model_type: family for family in reversed(FAMILIES)}
    family = model_types[head.config_class.model_type]
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
    assert {name for _, name in implementations_of(wrapped)} == {"sdpa"}
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(patch(make_model()), lora).eval()
    assert generate(wrapped, batch).tolist() == expected.tolist()
    restore_attention(wrapped)
    assert {name for _, name in implementations_of(wrapped)} == {"sdpa"}


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


def test_both_names_are_one_function() -> None:
    assert flashcore_ops.patch_model is flashcore_ops.replace_llama_attention_with_flashcore is patch


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, flashcore_ops, flashcore_ops.integrations.transformers; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
