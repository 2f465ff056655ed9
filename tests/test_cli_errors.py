"""What `flashcore generate` says to requests that it cannot serve: one line, exit status 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from typer.testing import CliRunner

from flashcore_ops.cli import app
from flashcore_ops.commands import generate
from tests.refusals import folded, refusal
from tests.snapshots import assert_expected_inline


def error_line(*arguments: str | Path) -> str:
    """The one line that a refused request leaves."""
    words = ["generate", *(str(argument) for argument in arguments)]
    return refusal(CliRunner().invoke(app, words, env={"FORCE_COLOR": None}))


def test_bad_values() -> None:
    lines = [
        error_line(""),
        error_line("--prompt", ""),
        error_line("--max-new-tokens", "0"),
        error_line("--max-new-tokens", str(2**29 + 1)),
        error_line("--temperature", "-1"),
        error_line("--temperature", "nan"),
        error_line("--seed", "-1"),
        error_line("--dtype", "int8"),
        error_line("--device", "tpu"),
    ]
    assert_expected_inline(
        folded(lines),
        """\
error: MODEL: expected a model directory or a hub id, got an empty string. Leave it out
    for the default model.
error: --prompt: expected some text, got an empty string. Pass the text to continue.
error: --max-new-tokens: expected 1 to 536870912, got 0. Choose a number in that range.
error: --max-new-tokens: expected 1 to 536870912, got 536870913. Choose a number in that
    range.
error: --temperature: expected 0 or a positive number, got -1.0. Use 0 for greedy.
error: --temperature: expected 0 or a positive number, got nan. Use 0 for greedy.
error: --seed: expected 0 to 2**64 - 1, got -1. Choose one in that range.
error: --dtype: expected auto, float32, bfloat16, float16, got 'int8'. Use one of these.
error: --device: expected auto, cpu, cuda or cuda:N, got 'tpu'. Use one of these.""",
    )


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    absent = error_line("--device", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    beyond = error_line("--device", "cuda:2")
    assert_expected_inline(
        folded([absent, beyond]),
        """\
error: --device cuda: expected a GPU, got none that torch can see. Use --device cpu.
error: --device cuda:2: expected an index below 2, got 2. `flashcore info` lists the GPUs.""",
    )


def test_paths_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    paths = [tmp_path / "missing", tmp_path / "file", tmp_path]
    lines = [error_line(path).replace(str(tmp_path), "TMP") for path in paths]
    assert_expected_inline(
        folded(lines),
        """\
error: MODEL: expected an existing model directory or a hub id such as owner/name, got
    'TMP/missing'. Check the path.
error: MODEL: expected an existing model directory or a hub id such as owner/name, got
    'TMP/file'. Check the path.
error: MODEL: expected a directory with a config.json, got TMP, which has none. Pass a
    directory that save_pretrained wrote.""",
    )


def test_an_unsupported_model_is_refused_without_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}')
    assert_expected_inline(
        folded([error_line(tmp_path)]),
        """\
error: model: expected a Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Gemma 2, Gemma
    3, GPT-NeoX, Phi-3, OLMo 2, GPT-OSS, Granite, Cohere or Cohere 2 model of
    transformers, got GPT2LMHeadModel (model_type 'gpt2'). The model is unchanged: use it
    as it is.""",
    )


def test_an_encoder_decoder_model_is_refused_by_its_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "num_layers": 1}')
    assert_expected_inline(
        folded([error_line(tmp_path)]),
        """\
error: model: expected a decoder alone, since FlashCore's attention is causal and over one
    sequence, got T5ForConditionalGeneration (model_type 't5'), an encoder-decoder model,
    which attends to its encoder's output and in both directions. The model is unchanged:
    use it as it is.""",
    )


def hub_response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


def test_hub_problems_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [
        httpx.ConnectError("no route"),
        RepositoryNotFoundError("404", response=hub_response(404)),
        GatedRepoError("403", response=hub_response(403)),
        HfHubHTTPError("401", response=hub_response(401)),
        HfHubHTTPError("503", response=hub_response(503)),
    ]

    def raise_next(*args: Any, **kwargs: Any) -> None:
        raise problems.pop(0)

    monkeypatch.setattr(HfApi, "model_info", raise_next)
    lines = [error_line("owner/no-such-model") for _ in range(len(problems))]
    assert_expected_inline(
        folded(lines),
        """\
error: MODEL owner/no-such-model: expected a model directory, or a connection to the hub,
    got neither. Check the path or the connection, or pass a local directory.
error: MODEL owner/no-such-model: expected a model directory or a model on the hub, got
    neither. Check the name; for a private model run `hf auth login` first.
error: MODEL owner/no-such-model: expected a model that you may read, got a gated one.
    Accept its terms on its hub page, then run `hf auth login`.
error: MODEL owner/no-such-model: expected an answer from the hub, got HTTP status 401.
    Run `hf auth login` again.
error: MODEL owner/no-such-model: expected an answer from the hub, got HTTP status 503.
    Try again later, or pass a local directory.""",
    )


def out_of_memory_on_the_cpu() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**56, dtype=torch.int8)
    return caught.value


@pytest.mark.parametrize("allocator", ["gpu", "cpu"])
def test_too_little_memory_in_plain_words(monkeypatch: pytest.MonkeyPatch, allocator: str) -> None:
    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    error = on_gpu if allocator == "gpu" else out_of_memory_on_the_cpu()

    def run_out(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(generate, "load_model", run_out)
    assert_expected_inline(
        folded([error_line("owner/name", "--device", "cpu")]),
        """\
error: --device cpu: expected memory for the model and its cache, got too little. Use a
    smaller model, dtype or --max-new-tokens, or --device cpu.""",
    )
