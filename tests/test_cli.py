"""The `flashcore generate` command, end to end on a tiny random model."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from flashcore_ops.cli import app
from flashcore_ops.commands import generate
from flashcore_ops.commands.streaming import TimedTextStreamer
from tests.snapshots import assert_expected_inline

PROMPT = "Once upon"
END = "</s>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that random tokens make broken and multi-byte characters."""
    symbols = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"FORCE_COLOR": None})


def run_tiny(model_path: Path, *arguments: str, tokens: int = 12) -> Result:
    options = ("--device", "cpu", "--prompt", PROMPT, "--max-new-tokens", str(tokens))
    return run("generate", model_path, *options, *arguments)


def hugging_face_tokens(model_path: Path, tokens: int) -> tuple[Any, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="sdpa")
    ids = AutoTokenizer.from_pretrained(model_path)(PROMPT, return_tensors="pt").input_ids
    return model, model.generate(ids, max_new_tokens=tokens, do_sample=False)[0]


def test_stdout_is_the_prompt_and_the_greedy_text_of_hugging_face(model_path: Path) -> None:
    _, tokens = hugging_face_tokens(model_path, 40)
    text = AutoTokenizer.from_pretrained(model_path).decode(tokens, skip_special_tokens=True)
    result = run_tiny(model_path, tokens=40)
    assert result.exit_code == 0, result.output
    assert result.stdout == text.removesuffix("\n") + "\n"


class CallCounter(TorchDispatchMode):
    """Counts calls of flashcore.attention."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.flashcore.attention.default
        return func(*args, **(kwargs or {}))


def test_the_text_comes_through_flashcore_and_the_comparison_does_not(model_path: Path) -> None:
    with CallCounter() as counter:
        run_tiny(model_path, "--compare", tokens=5)
    layers, steps = 2, 5
    assert counter.calls == layers * steps


def test_figures_go_to_stderr(model_path: Path) -> None:
    stderr = run_tiny(model_path).stderr
    assert_expected_inline(
        re.sub(r"\d+\.\d+", "N", stderr),
        """\
12 new tokens, float32 on cpu: first after N s (9-token prompt), then N tokens/s; peak resident memory N GiB
""",
    )


def test_one_token_has_no_decode_rate(model_path: Path) -> None:
    stderr = run_tiny(model_path, tokens=1).stderr
    assert_expected_inline(
        re.sub(r"\d+\.\d+", "N", stderr),
        """\
1 new token, float32 on cpu: first after N s (9-token prompt); peak resident memory N GiB
""",
    )


def test_greedy_repeats_itself(model_path: Path) -> None:
    assert run_tiny(model_path).stdout == run_tiny(model_path, "--seed", "7").stdout


def test_seed_decides_the_sample(model_path: Path) -> None:
    first, again, other = (
        run_tiny(model_path, "--temperature", "2", "--seed", seed).stdout for seed in ("1", "1", "2")
    )
    assert first == again
    assert first != other


def test_compare_equal_greedy(model_path: Path) -> None:
    result = run_tiny(model_path, "--compare")
    assert result.exit_code == 0, result.output
    assert_expected_inline(
        result.stderr.splitlines()[-1],
        """first token that differs from Hugging Face sdpa (greedy): none: 12 tokens equal""",
    )


def test_compare_equal_sampling(model_path: Path) -> None:
    result = run_tiny(model_path, "--compare", "--temperature", "0.7", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert_expected_inline(
        result.stderr.splitlines()[-1],
        """first token that differs from Hugging Face sdpa (temperature 0.7, seed 3): none: 12 tokens equal""",
    )


@pytest.fixture
def wrong_token_at_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the patched model, and not the restored one, choose the token of "Z" at index 3."""
    patch, restore = generate.replace_llama_attention_with_flashcore, generate.restore_attention
    handles: list[Any] = []

    def patch_wrongly(model: Any) -> Any:
        calls = iter(range(1000))

        def favour_z(module: Any, inputs: Any, logits: torch.Tensor) -> None:
            if next(calls) == 3:
                logits[..., byte_tokenizer().convert_tokens_to_ids("Z")] = 1e4

        handles.append(model.lm_head.register_forward_hook(favour_z))
        return patch(model)

    def restore_rightly(model: Any) -> Any:
        handles.pop().remove()
        return restore(model)

    monkeypatch.setattr(generate, "replace_llama_attention_with_flashcore", patch_wrongly)
    monkeypatch.setattr(generate, "restore_attention", restore_rightly)


@pytest.mark.usefixtures("wrong_token_at_3")
def test_compare_reports_the_first_difference_and_fails_in_float32(model_path: Path) -> None:
    model, tokens = hugging_face_tokens(model_path, 12)
    differing = len(PROMPT) + 3
    with torch.no_grad():
        largest, second = model(tokens[None, :differing]).logits[0, -1].topk(2).values.tolist()
    result = run_tiny(model_path, "--compare")
    expected = byte_tokenizer().decode(tokens[differing : differing + 1])
    z = byte_tokenizer().convert_tokens_to_ids("Z")
    assert result.exit_code == 1
    gap = f"{largest - second:.3g}"
    assert result.stderr.splitlines()[-1] == (
        f"first token that differs from Hugging Face sdpa (greedy): index 3 of 12: flashcore 'Z' ({z}), "
        f"sdpa {expected!r} ({tokens[differing]}); gap between sdpa's top two logits there: {gap}"
    )


@pytest.mark.usefixtures("wrong_token_at_3")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compare_reports_but_does_not_fail_in_half_precision(model_path: Path, dtype: str) -> None:
    result = run_tiny(model_path, "--compare", "--dtype", dtype)
    assert result.exit_code == 0, result.output
    difference, note = result.stderr.splitlines()[-2:]
    assert "index 3 of 12: flashcore 'Z'" in difference
    assert note == f"In {dtype} rounding breaks near ties either way, so this is not a failure."


def test_the_default_model_is_used_when_none_is_named(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "default_model_path", lambda: model_path)
    result = run("generate", "--device", "cpu", "--max-new-tokens", "2")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Once upon a time")


def test_a_models_sampling_settings_neither_warn_nor_count_in_greedy(
    model_path: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in model_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "eos_token_id": [0]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    result = run_tiny(tmp_path)
    assert result.stdout == run_tiny(model_path).stdout
    assert result.stderr.count("\n") == 1
    assert capfd.readouterr().err == ""


@pytest.mark.gpu
def test_a_gpu_runs_bfloat16_by_default(model_path: Path) -> None:
    result = run("generate", model_path, "--max-new-tokens", "12", "--compare")
    assert result.exit_code == 0, result.output
    assert "bfloat16 on cuda" in result.stderr
    assert "peak GPU memory" in result.stderr


def test_damaged_model_files(model_path: Path, tmp_path: Path) -> None:
    for file in model_path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lines = []
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (tmp_path / name).write_text("{ this is not")
        result = run("generate", tmp_path)
        assert result.exit_code == 2, result.output
        assert result.stderr.count("\n") == 1, result.stderr
        lines.append(result.stderr.replace(str(tmp_path), "TMP"))
    assert [line.split(", got ")[0] for line in lines] == [
        "error: MODEL TMP: expected weights that transformers can load",
        "error: MODEL TMP: expected a tokenizer that transformers can load",
        "error: MODEL TMP: expected a causal language model that transformers can load",
    ]


class FakeClock:
    def __init__(self, *times: float) -> None:
        self._times = iter(times)

    def __call__(self) -> float:
        return next(self._times)


def stream(
    tokenizer: Any, prompt: list[int], tokens: list[int], clock: FakeClock | None = None
) -> tuple[list[str], Any]:
    """The text on the output after the prompt and after each token, and the streamer."""
    output = io.StringIO()
    streamer = TimedTextStreamer(tokenizer, output, clock or FakeClock(*range(100)))
    streamer.put(torch.tensor([prompt]))
    states = [output.getvalue()]
    for token in tokens:
        streamer.put(torch.tensor([token]))
        states.append(output.getvalue())
    streamer.end()
    return [*states, output.getvalue()], streamer


def test_a_character_of_several_tokens_is_written_when_it_is_whole() -> None:
    tokenizer = byte_tokenizer()
    states, _ = stream(tokenizer, tokenizer.encode("a"), tokenizer.encode("né!"))
    assert states == ["a", "an", "an", "ané", "ané!", "ané!\n"]


def test_streamed_pieces_keep_the_spaces_that_a_tokenizer_strips() -> None:
    vocabulary = {"▁def": 0, "▁f": 1, "\n": 2, "▁▁▁▁": 3, "pass": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="▁f"))
    # As in LLaMA 2: the first space of whatever is decoded goes.
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    states, _ = stream(tokenizer, [0, 1, 2], [3, 4])
    assert states[-1] == "def f\n    pass\n"


def test_timing_separates_the_first_token_from_the_rest() -> None:
    tokenizer = byte_tokenizer()
    _, streamer = stream(tokenizer, [5, 6, 7], [8, 9, 10], FakeClock(10.0, 12.0, 12.5, 13.0))
    timing = streamer.timing()
    assert (timing.prompt_tokens, timing.new_tokens) == (3, 3)
    assert (timing.first_token_seconds, timing.decode_seconds, timing.decode_rate) == (2.0, 1.0, 2.0)


def test_help_does_not_load_transformers() -> None:
    script = (
        "import runpy, sys\n"
        "sys.argv = ['flashcore', '--help']\n"
        "try:\n    runpy.run_module('flashcore_ops', run_name='__main__')\n"
        "except SystemExit as stop:\n    print(stop.code, 'transformers' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script]
    root = Path(__file__).parents[1]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "0 False", finished.stdout
