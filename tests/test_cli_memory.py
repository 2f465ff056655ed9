"""The `flashcore memory` command: its tables, where its model and its GPU come from, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from click.testing import Result
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError
from rich.console import Console
from typer.testing import CliRunner

from flashcore_ops.cli import app
from flashcore_ops.commands.byte_sizes import GPU_GB, parse_bytes, resolve_gpu_memory
from flashcore_ops.commands.memory import LENGTHS, MemoryRequest, make_report
from flashcore_ops.commands.memory_tables import render_memory
from flashcore_ops.errors import OptionError
from flashcore_ops.kept_steps import capacity_for
from flashcore_ops.kv_memory import RESERVE_BYTES, format_bytes
from flashcore_ops.model_shapes import SHAPES, shape_config
from tests.refusals import folded, refusal
from tests.snapshots import assert_expected_inline


def run(*arguments: str | Path) -> Result:
    words = ["memory", *(str(argument) for argument in arguments)]
    return CliRunner().invoke(app, words, env={"FORCE_COLOR": None, "COLUMNS": "80"})


def shown(*arguments: str | Path) -> str:
    """What the command prints at 80 columns, without the spaces that wrapped lines end in."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return "\n".join(line.rstrip() for line in result.stdout.rstrip().splitlines())


def error_line(*arguments: str | Path) -> str:
    return refusal(run(*arguments))


def test_llama_3_1_8b_on_an_h100() -> None:
    sizes = ("--batch", "1", "--batch", "8", "--length", "2048", "--length", "131072")
    assert_expected_inline(
        shown("llama-3.1-8b", "--gpu-memory", "H100", *sizes),
        """\
llama-3.1-8b
  32 layers, 32 query and 8 KV heads, head dim 128, made for 131,072 positions

KV cache
  2 x 32 layers x 8 KV heads x 128 x 2 bytes = 131,072 bytes a token in bf16

  batch   length  bf16 GQA  bf16 MHA   fp8 GQA   fp8 MHA
      1    2,048  268.4 MB    1.1 GB  134.2 MB  536.9 MB
      1  131,072   17.2 GB   68.7 GB    8.6 GB   34.4 GB

      8    2,048    2.1 GB    8.6 GB    1.1 GB    4.3 GB
      8  131,072  137.4 GB  549.8 GB   68.7 GB  274.9 GB

What fits into 80.0 GB (H100, by its data sheet)
  16.1 GB of weights (bf16) and 2.1 GB in reserve leave 61.8 GB for the KV cache

  largest batch at a length
   length  bf16 GQA  bf16 MHA  fp8 GQA  fp8 MHA
    2,048       230        57      460      115
  131,072         3      none        7        1

  largest length at a batch
  batch  bf16 GQA  bf16 MHA  fp8 GQA  fp8 MHA
      1   471,435   117,858  942,871  235,717
      8    58,929    14,732  117,858   29,464

  1 GB is 10^9 bytes.
  MHA: the cache if each query head had keys and values of its own, beside the
  same weights.
  fp8 is arithmetic: FlashCore's caches hold 16 or 32 bits an element.
  The reserve is for activations, logits and graphs. Long prompts in one piece
  need more.
  generate takes caches of 256, 512, 1024, ... slots; make_static_cache takes
  any length.""",
    )


def test_a_windowed_mqa_config_that_leaves_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "model_type": "mistral",
        "num_key_value_heads": 1,
        "sliding_window": 4096,
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    }
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(config))
    assert_expected_inline(
        shown("config.json", "--gpu-memory", "10GB", "--batch", "3", "--length", "7"),
        """\
config.json
  32 layers, 32 query and 1 KV heads, head dim 128, made for 131,072 positions

KV cache
  2 x 32 layers x 1 KV heads x 128 x 2 bytes = 16,384 bytes a token in bf16

  batch  length  bf16 MQA  bf16 MHA   fp8 MQA  fp8 MHA
      3       7  344.1 kB   11.0 MB  172.0 kB   5.5 MB

What fits into 10.0 GB (as asked)
  Nothing: 14.0 GB of weights (in bf16, though the checkpoint is quantized: give
  their size by --weights) and 2.1 GB in reserve leave no room for a KV cache.

  1 GB is 10^9 bytes.
  MHA: the cache if each query head had keys and values of its own, beside the
  same weights.
  fp8 is arithmetic: FlashCore's caches hold 16 or 32 bits an element.
  The reserve is for activations, logits and graphs. Long prompts in one piece
  need more.
  generate takes caches of 256, 512, 1024, ... slots; make_static_cache takes
  any length.
  The window of 4,096 tokens saves nothing: static caches keep every token.""",
    )


def test_a_model_with_mha_has_one_column_a_dtype(tmp_path: Path) -> None:
    shape_config("llama-3.2-1b", num_layers=1).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"num_key_value_heads": 32}))
    output = shown(tmp_path)
    assert "bf16 MHA  fp8 MHA\n" in output
    assert "GQA" not in output
    assert "query head had" not in output


@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit_and_figures_stay_whole(width: int) -> None:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render_memory(make_report(MemoryRequest("llama-3.1-8b", gpu_memory="80GB"))))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    assert "     32  131,072  549.8 GB  2,199.0 GB  274.9 GB  1,099.5 GB" in [line.rstrip() for line in lines]


@pytest.mark.parametrize("name", SHAPES)
def test_every_named_shape(name: str) -> None:
    assert shown(name).startswith(f"{name}\n")


def test_a_directory_and_its_config_give_the_named_shape(tmp_path: Path) -> None:
    shape_config("qwen2.5-7b").save_pretrained(tmp_path)
    reports = [make_report(MemoryRequest(str(path))) for path in ("qwen2.5-7b", tmp_path, tmp_path / "config.json")]
    assert len({(report.shape, report.weights, report.max_length) for report in reports}) == 1


def test_lengths_end_where_the_model_does() -> None:
    report = make_report(MemoryRequest("mistral-7b-v0.3"))
    assert report.lengths == tuple(length for length in LENGTHS if length <= 32768)


def test_weights_and_reserve_as_asked() -> None:
    report = make_report(MemoryRequest("llama-3.1-8b", gpu_memory="24GB", weights="5.5GB", reserve="500MB"))
    assert (report.weights, report.weights_source, report.reserve) == (5_500_000_000, "as asked", 500_000_000)
    assert report.room == 18_000_000_000
    assert make_report(MemoryRequest("llama-3.1-8b")).reserve == RESERVE_BYTES


def test_the_default_gpu_is_the_one_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_gpu_memory(None).num_bytes == 80 * 10**9
    assert resolve_gpu_memory(None).source == "assumed, since torch sees no GPU"
    seen = SimpleNamespace(name="NVIDIA H200", total_memory=150_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: seen)
    assert resolve_gpu_memory(None).num_bytes == 150_000_000_000
    assert resolve_gpu_memory(None).source == "cuda:0, NVIDIA H200"


@pytest.mark.parametrize("name", GPU_GB)
def test_gpus_are_known_however_their_names_are_written(name: str) -> None:
    written = {name, name.lower(), f" {name} ", name.replace(" ", ""), name.replace(" ", "-").replace("-", "_")}
    assert {resolve_gpu_memory(form).num_bytes for form in written} == {GPU_GB[name] * 10**9}


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("80GB", 80 * 10**9), (" 80 gb ", 80 * 10**9), ("0.1GB", 10**8), ("1.5TiB", 3 * 2**39), ("7mib", 7 * 2**20)],
)
def test_amounts(text: str, num_bytes: int) -> None:
    assert parse_bytes(text, "--reserve") == num_bytes


@pytest.mark.parametrize("text", ["", "80", "GB", "-1GB", "1e3GB", "nanGB", "80 G B", "80GBit", "٣GB"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"--weights: expected a number and a unit"):
        parse_bytes(text, "--weights")


def test_amounts_are_shown_in_decimal_units() -> None:
    assert [format_bytes(number) for number in (0, 999, 10**6 - 1, 10**6, 10**9, 10**13)] == [
        "0.0 kB",
        "1.0 kB",
        "1,000.0 kB",
        "1.0 MB",
        "1.0 GB",
        "10,000.0 GB",
    ]


def test_the_capacities_that_are_named_are_those_of_generate() -> None:
    rungs = ", ".join(str(capacity_for(tokens)) for tokens in (1, 257, 513))
    assert f"generate takes caches of {rungs}, ... slots" in shown("llama-3.2-1b")


def test_bad_values() -> None:
    lines = [
        error_line(""),
        error_line("llama-3.1"),
        error_line("llama-3.1-8b", "--batch", "0"),
        error_line("llama-3.1-8b", "--length", "-1"),
        error_line("llama-3.1-8b", "--gpu-memory", "P100"),
        error_line("llama-3.1-8b", "--weights", "16"),
        error_line("llama-3.1-8b", "--reserve", "some"),
    ]
    assert_expected_inline(
        folded(lines),
        """\
error: MODEL_OR_CONFIG: expected a model directory, a config.json, a hub id such as
    owner/name, or one of llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b,
    mistral-7b-v0.3, qwen2.5-7b, got ''. Check the name or the path.
error: MODEL_OR_CONFIG: expected a model directory, a config.json, a hub id such as
    owner/name, or one of llama-3.2-1b, llama-3.2-3b, llama-3.1-8b, llama-3.1-70b,
    mistral-7b-v0.3, qwen2.5-7b, got 'llama-3.1'. Check the name or the path.
error: --batch: expected 1 or more, got 0. Count from 1.
error: --length: expected 1 or more, got -1. Count from 1.
error: --gpu-memory: expected an amount such as 80GB or 79GiB, or one of A10, A100,
    A100-40GB, B200, H100, H200, L4, L40S, RTX 3090, RTX 4090, RTX 5090, got 'P100'. For
    another GPU pass its memory.
error: --weights: expected a number and a unit (MB, GB, TB, MiB, GiB, TiB), got '16'.
    Write it like 80GB or 1.5GiB.
error: --reserve: expected a number and a unit (MB, GB, TB, MiB, GiB, TiB), got 'some'.
    Write it like 80GB or 1.5GiB.""",
    )


def test_paths_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no json")
    (tmp_path / "gpt2.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2}')
    (tmp_path / "t5.json").write_text('{"model_type": "t5"}')
    (tmp_path / "bad.json").write_text('{"model_type": "llama", "num_hidden_layers": "many"}')
    own_words = [error_line(tmp_path / name).replace(str(tmp_path), "TMP") for name in ("missing", "", "gpt2.json")]
    read = [error_line(tmp_path / name).replace(str(tmp_path), "TMP") for name in ("text", "t5.json", "bad.json")]
    assert_expected_inline(
        folded([*own_words, *(line.split(", got ")[0] for line in read)]),
        """\
error: MODEL: expected an existing model directory or a hub id such as owner/name, got
    'TMP/missing'. Check the path.
error: MODEL: expected a directory with a config.json, got TMP, which has none. Pass a
    directory that save_pretrained wrote.
error: model: expected a Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE, Gemma 2, Gemma
    3, GPT-NeoX, Phi-3, OLMo 2, GPT-OSS, Granite, Cohere or Cohere 2 model of
    transformers, got GPT2LMHeadModel (model_type 'gpt2'). The model is unchanged: use it
    as it is.
error: MODEL TMP/text: expected a config that transformers can load
error: MODEL TMP/t5.json: expected a causal language model that transformers can build
error: MODEL TMP/bad.json: expected a config that transformers can load""",
    )


def test_hub_problems_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub"))
    problems = [httpx.ConnectError("no route"), GatedRepoError("403", response=response)]

    def raise_next(*args: Any, **kwargs: Any) -> None:
        raise problems.pop(0)

    monkeypatch.setattr(HfApi, "model_info", raise_next)
    assert_expected_inline(
        folded([error_line("owner/no-such-model") for _ in range(2)]),
        """\
error: MODEL owner/no-such-model: expected a model directory, or a connection to the hub,
    got neither. Check the path or the connection, or pass a local directory.
error: MODEL owner/no-such-model: expected a model that you may read, got a gated one.
    Accept its terms on its hub page, then run `hf auth login`.""",
    )
