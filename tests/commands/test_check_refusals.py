"""What `flashcore check` says of models that are not served, and of what it cannot read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import HfApi

from flashcore_ops.commands.check import CheckRequest, make_report
from flashcore_ops.errors import UnsupportedModelError
from flashcore_ops.integrations.transformers import patch_model
from tests.commands.checked import run, shown, write_config, write_llama
from tests.integrations.models import make_model
from tests.refusals import folded, refusal
from tests.snapshots import assert_expected_inline

REFUSED: dict[str, dict[str, Any]] = {
    "encoder-decoder": {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    "latent attention": {"model_type": "deepseek_v3", "num_hidden_layers": 1},
    "unknown family": {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2},
    "no language model": {"model_type": "vit", "num_hidden_layers": 1},
    "head dim": {"model_type": "llama", "num_hidden_layers": 1, "head_dim": 20},
    "window of 1": {"model_type": "mistral", "num_hidden_layers": 1, "sliding_window": 1},
}


def test_what_is_not_served_and_why(tmp_path: Path) -> None:
    texts = []
    for settings in REFUSED.values():
        result = run(write_config(tmp_path, **settings))
        assert result.exit_code == 1, result.output
        texts.append(shown(result, tmp_path))
    assert_expected_inline(
        "\n".join(texts),
        """\
MODEL
  not served: T5ForConditionalGeneration
  model: expected a decoder alone, since FlashCore's attention is causal and over one sequence, got
  T5ForConditionalGeneration (model_type 't5'), an encoder-decoder model, which attends to its
  encoder's output and in both directions. The model is unchanged: use it as it is.
MODEL
  not served: DeepseekV3ForCausalLM
  model: expected keys and values that each KV head caches as they are, got DeepseekV3ForCausalLM
  (model_type 'deepseek_v3'), whose multi-head latent attention (MLA) makes them anew from one
  latent for all heads. The model is unchanged: use it as it is.
MODEL
  not served: GPT2LMHeadModel
  model: expected a Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Gemma 2, Gemma 3, GPT-NeoX,
  Phi-3, OLMo 2, GPT-OSS, Granite, Cohere or Cohere 2 model of transformers, got GPT2LMHeadModel
  (model_type 'gpt2'). The model is unchanged: use it as it is.
MODEL
  not served: ViTModel
  model: expected a Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Gemma 2, Gemma 3, GPT-NeoX,
  Phi-3, OLMo 2, GPT-OSS, Granite, Cohere or Cohere 2 model of transformers, got ViTModel
  (model_type 'vit'). The model is unchanged: use it as it is.
MODEL
  not served: Llama (LlamaForCausalLM)
  head_dim: expected a multiple of 8 from 16 to 256, got 20. The model is unchanged: use it as it
  is.
MODEL
  not served: Mistral (MistralForCausalLM)
  sliding_window: expected None or at least 2, got 1. The model is unchanged: use it as it is.""",
    )


def test_the_reason_is_the_one_that_patching_gives(tmp_path: Path) -> None:
    model = make_model("llama")
    model.config.attention_chunk_size = 4
    with pytest.raises(UnsupportedModelError) as refused:
        patch_model(model)
    model.config.save_pretrained(tmp_path)
    report = make_report(CheckRequest(str(tmp_path)))
    assert report.refusal == str(refused.value)
    assert report.groups == ()


def test_what_cannot_be_read_or_asked(tmp_path: Path) -> None:
    model = write_llama(tmp_path)
    (tmp_path / "empty").mkdir()
    lines = [refusal(run(tmp_path / "missing")), refusal(run(tmp_path / "empty"))]
    lines += [refusal(run(model, "--gpu", "H100")), refusal(run(model, "--dtype", "int8")), refusal(run(""))]
    assert_expected_inline(
        folded([line.replace(str(tmp_path), "TMP") for line in lines]),
        """\
error: MODEL: expected an existing model directory or a hub id such as owner/name, got
    'TMP/missing'. Check the path.
error: MODEL: expected a directory with a config.json, got TMP/empty, which has none. Pass
    a directory that save_pretrained wrote.
error: --gpu: expected an architecture such as sm_90 or gfx942, got 'H100'. `flashcore
    info` names those of the GPUs here.
error: --dtype: expected auto, float32, bfloat16, float16, got 'int8'. Use one of these.
error: MODEL_OR_CONFIG: expected a model directory, a config.json, a hub id such as
    owner/name, or one of llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b,
    mistral-7b-v0.3, qwen2.5-7b, got ''. Check the name or the path.""",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{ this is not", "a config that transformers can load, got OSError"),
        ("[1]", "a config that transformers can load, got TypeError"),
        ("{}", "a config that transformers can load, got ValueError (Unrecognized model"),
        ('{"model_type": "nonesuch"}', "a config that transformers can load, got ValueError (The checkpoint"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "got ZeroDivisionError"),
        ('{"model_type": "llama", "hidden_act": "nonesuch"}', "a model that transformers can build, got KeyError"),
        ('{"model_type": "llama", "pad_token_id": -99999}', "a model that transformers can build, got AssertionError"),
        ('{"model_type": "llama", "dtype": "nonesuch"}', "got AttributeError"),
    ],
)
def test_a_damaged_config_in_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    result = run(tmp_path)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    # transformers may warn before it fails.
    line = result.stderr.rstrip("\n").splitlines()[-1]
    assert line.startswith(f"error: MODEL {tmp_path}: expected ")
    assert message in line


def test_a_hub_id_without_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(HfApi, "model_info", fail)
    assert_expected_inline(
        folded([refusal(run("owner/no-such-model"))]),
        """\
error: MODEL owner/no-such-model: expected a model directory, or a connection to the hub,
    got neither. Check the path or the connection, or pass a local directory.""",
    )
