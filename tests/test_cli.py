"""The `flashcore generate` command, end to end on a tiny random model."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from rich.console import Console
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

from flashcore_ops import free_kept_caches, replace_llama_attention_with_flashcore
from flashcore_ops.cli import app
from flashcore_ops.commands import comparison, generate
from flashcore_ops.commands.console import stage
from flashcore_ops.commands.request import Decoding
from flashcore_ops.commands.streaming import TextWriter, TimedTokens
from flashcore_ops.generation import Sampling
from flashcore_ops.kept_steps import kept_steps
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
    """Counts calls of ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def test_the_text_comes_through_flashcore_and_the_comparison_does_not(model_path: Path) -> None:
    with CallCounter() as counter:
        run_tiny(model_path, "--compare", tokens=5)
    layers, decode_steps = 2, 4
    assert counter.calls["flashcore::attention"] == layers
    assert counter.calls["flashcore::rope_append_attention"] == layers * decode_steps


def test_each_token_is_read_before_the_next_is_made(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the time to the first token holds no decode step on the CPU."""
    steps: list[int] = []

    class Output(io.StringIO):
        def flush(self) -> None:
            steps.append(counter.calls["flashcore::rope_append_attention"] // 2)

    monkeypatch.setattr(generate, "sys", SimpleNamespace(stdout=Output()))
    monkeypatch.setattr(TextWriter, "_decode", lambda self, tokens: "." * len(tokens))
    with CallCounter() as counter:
        run_tiny(model_path, tokens=4)
    assert steps == [0, 1, 2, 3, 3]


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


def settings_path(model_path: Path, to: Path, **settings: Any) -> Path:
    """A copy of the model with these generation settings."""
    for file in model_path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    (to / "generation_config.json").write_text(json.dumps(settings))
    return to


@pytest.mark.parametrize("as_list", [False, True])
def test_the_models_stop_tokens_end_the_text(model_path: Path, tmp_path: Path, as_list: bool) -> None:
    _, tokens = hugging_face_tokens(model_path, 12)
    new_tokens = tokens[len(PROMPT) :].tolist()
    stop = new_tokens[5]
    num_tokens = new_tokens.index(stop) + 1
    path = settings_path(model_path, tmp_path, eos_token_id=[0, stop] if as_list else stop)
    result = run_tiny(path, "--compare")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(f"{num_tokens} new token")
    assert result.stderr.endswith(f"none: {num_tokens} tokens equal\n")


def test_settings_that_are_not_followed_are_named_and_left_out_of_the_comparison(
    model_path: Path, tmp_path: Path
) -> None:
    settings = {"eos_token_id": 0, "repetition_penalty": 5.0, "min_new_tokens": 3}
    result = run_tiny(settings_path(model_path, tmp_path, **settings), "--compare")
    assert result.exit_code == 0, result.output
    assert result.stdout == run_tiny(model_path).stdout
    assert_expected_inline(
        result.stderr.splitlines()[0],
        """Not used of the model's generation settings: repetition_penalty, min_new_tokens.""",
    )


def test_the_models_top_k_counts_in_sampling(model_path: Path, tmp_path: Path) -> None:
    path = settings_path(model_path, tmp_path, eos_token_id=0, top_k=1)
    greedy, sampled = run_tiny(path), run_tiny(path, "--temperature", "9", "--seed", "5", "--compare")
    assert sampled.stdout == greedy.stdout
    assert_expected_inline(
        sampled.stderr.splitlines()[-1],
        """first token that differs from Hugging Face sdpa (temperature 9, top_k 1, seed 5): none: 12 tokens equal""",
    )


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
    patch, restore = generate.patch_model, comparison.restore_attention
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

    monkeypatch.setattr(generate, "patch_model", patch_wrongly)
    monkeypatch.setattr(comparison, "restore_attention", restore_rightly)


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
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "eos_token_id": [0]}
    result = run_tiny(settings_path(model_path, tmp_path, **settings))
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


def written(tokenizer: Any, prompt: list[int], tokens: list[int]) -> list[str]:
    """The text on the output after the prompt, after each token, and at the end."""
    output = io.StringIO()
    writer = TextWriter(tokenizer, output)
    states = []
    for piece in (prompt, *([token] for token in tokens)):
        writer.write(piece)
        states.append(output.getvalue())
    writer.end()
    return [*states, output.getvalue()]


def test_a_character_of_several_tokens_is_written_when_it_is_whole() -> None:
    tokenizer = byte_tokenizer()
    states = written(tokenizer, tokenizer.encode("a"), tokenizer.encode("né!"))
    assert states == ["a", "an", "an", "ané", "ané!", "ané!\n"]


def test_streamed_pieces_keep_the_spaces_that_a_tokenizer_strips() -> None:
    vocabulary = {"▁def": 0, "▁f": 1, "\n": 2, "▁▁▁▁": 3, "pass": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="▁f"))
    # As in LLaMA 2: the first space of whatever is decoded goes.
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    states = written(tokenizer, [0, 1, 2], [3, 4])
    assert states[-1] == "def f\n    pass\n"


def test_timing_separates_the_first_token_from_the_rest() -> None:
    clock = FakeClock(10.0, 12.0, 12.5, 13.0)
    timed = TimedTokens((torch.tensor([token]) for token in (8, 9, 10)), clock)
    assert list(timed) == [8, 9, 10]
    timing = timed.timing()
    assert (timing.new_tokens, timing.first_token_seconds, timing.decode_seconds) == (3, 2.0, 1.0)
    assert timing.decode_rate == 2.0


@pytest.mark.parametrize("is_terminal", [True, False])
def test_stages_show_in_terminals_only(is_terminal: bool) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=80, _environ={})
    with stage(console, "Compiling [kernels]"):
        pass
    assert ("Compiling [kernels]" in output.getvalue()) == is_terminal
    assert output.getvalue().endswith("\x1b[2K" if is_terminal else "")


def test_a_warm_up_shows_its_stages_and_changes_no_token(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="sdpa")
    model = replace_llama_attention_with_flashcore(model)
    inputs = dict(AutoTokenizer.from_pretrained(model_path)(PROMPT, return_tensors="pt"))
    decoding = Decoding(max_new_tokens=300, sampling=Sampling(temperature=1.0), seed=3, stop_tokens=[])
    cold = [int(token) for token in islice(decoding.stream(model, inputs), 9)]
    free_kept_caches(model)
    output = io.StringIO()
    generate.warm_up(model, inputs, decoding, Console(file=output, force_terminal=True, width=80, _environ={}))
    shapes = kept_steps(model).shapes()
    assert shapes == [(1, 512)]
    assert [int(token) for token in islice(decoding.stream(model, inputs), 9)] == cold
    assert kept_steps(model).shapes() == shapes
    shown = re.findall(r"Compiling decode kernels and capturing the decode graph|Compiling prefill", output.getvalue())
    assert sorted(set(shown)) == ["Compiling decode kernels and capturing the decode graph", "Compiling prefill"]


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
