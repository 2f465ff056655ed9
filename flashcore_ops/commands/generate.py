"""`flashcore generate`: patch a model, stream its text, and hold it against Hugging Face's sdpa."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from flashcore_ops import replace_llama_attention_with_flashcore, restore_attention
from flashcore_ops.checks import dtype_name
from flashcore_ops.commands.console import stderr_console
from flashcore_ops.commands.loading import check_model_name, load_model, resolve_device, resolve_dtype
from flashcore_ops.commands.peak_memory import peak_memory, start_peak_memory
from flashcore_ops.commands.streaming import TimedTextStreamer, Timing
from flashcore_ops.default_model import default_model_path
from flashcore_ops.errors import DeviceError, OptionError

WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class GenerateRequest:
    """The arguments of `flashcore generate`, as they were typed."""

    model: str | None
    prompt: str
    max_new_tokens: int
    temperature: float
    seed: int
    dtype: str
    device: str
    compare: bool

    def check(self) -> None:
        """Raises OptionError for a value that can be refused before a model is loaded."""
        if self.model == "":
            raise OptionError.explain(
                "MODEL",
                expected="a model directory or a hub id",
                got="an empty string",
                fix="Leave it out for the default model.",
            )
        if not self.prompt:
            raise OptionError.explain(
                "--prompt", expected="some text", got="an empty string", fix="Pass the text to continue."
            )
        if self.max_new_tokens < 1:
            raise OptionError.explain(
                "--max-new-tokens", expected="1 or more", got=str(self.max_new_tokens), fix="Ask for a token."
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise OptionError.explain(
                "--temperature",
                expected="0 or a positive number",
                got=str(self.temperature),
                fix="Use 0 for greedy.",
            )
        if not 0 <= self.seed < 2**64:
            raise OptionError.explain(
                "--seed", expected="0 to 2**64 - 1", got=str(self.seed), fix="Choose one in that range."
            )

    @property
    def decoding(self) -> str:
        """The way tokens are chosen, in words."""
        return "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}, seed {self.seed}"


@dataclass(frozen=True)
class Difference:
    """The first token that FlashCore and the reference choose differently."""

    index: int
    token: int
    reference_token: int
    reference_gap: float


def run_generate(request: GenerateRequest) -> bool:
    """Streams the text to stdout and the figures to stderr; False if a float32 comparison differs.

    Raises:
        FlashCoreError: if the request cannot be served.
    """
    request.check()
    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, device)
    if request.model is not None:
        check_model_name(request.model)
    transformers.utils.logging.disable_progress_bar()
    try:
        return generate_and_compare(request, device=device, dtype=dtype)
    except torch.OutOfMemoryError as error:
        raise DeviceError.explain(
            f"--device {device}",
            expected="memory for the model and its cache",
            got="too little",
            fix="Use a smaller model, dtype or --max-new-tokens, or --device cpu.",
        ) from error


def generate_and_compare(request: GenerateRequest, *, device: torch.device, dtype: torch.dtype) -> bool:
    """What run_generate does once the request is known to be sound."""
    console = stderr_console()
    name = str(default_model_path()) if request.model is None else request.model
    # A download from the hub draws its own progress bars.
    with console.status("Loading the model") if Path(name).is_dir() else nullcontext():
        model, tokenizer = load_model(name, dtype=dtype, device=device)
        replace_llama_attention_with_flashcore(model)
    inputs = encode_prompt(tokenizer, request.prompt, device=device)

    if device.type == "cuda":
        with console.status("Compiling kernels"):
            generate_tokens(model, inputs, request, max_new_tokens=WARM_UP_TOKENS)
    start_peak_memory(device)
    streamer = TimedTextStreamer(tokenizer, sys.stdout)
    tokens = generate_tokens(model, inputs, request, streamer=streamer)
    where = f"{dtype_name(dtype)} on {device}"
    console.print(describe_run(streamer.timing(), where=where, memory=peak_memory(device)), style="dim")
    if not request.compare:
        return True

    with console.status("Generating with Hugging Face sdpa"):
        difference = compare_with_sdpa(model, inputs, request, tokens=tokens)
    decoding = request.decoding
    console.print(describe_comparison(difference, tokenizer, num_tokens=len(tokens), decoding=decoding))
    if difference is None:
        return True
    if dtype == torch.float32:
        return False
    console.print(f"In {dtype_name(dtype)} rounding breaks near ties either way, so this is not a failure.")
    return True


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, device: torch.device) -> dict[str, torch.Tensor]:
    """The prompt as `input_ids` and `attention_mask`, int64 `[1, T]`.

    Raises:
        OptionError: if the tokenizer makes no token of it.
    """
    encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].numel() == 0:
        raise OptionError.explain(
            "--prompt", expected="text that makes a token", got=repr(prompt), fix="Pass a longer text."
        )
    return {key: encoded[key].to(device) for key in ("input_ids", "attention_mask")}


def generate_tokens(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    request: GenerateRequest,
    *,
    max_new_tokens: int | None = None,
    streamer: TimedTextStreamer | None = None,
    logits_processor: LogitsProcessor | None = None,
) -> list[int]:
    """The new tokens that `model.generate` makes, from the request's seed."""
    sampling: dict[str, Any] = {"do_sample": False}
    if request.temperature > 0:
        sampling = {"do_sample": True, "temperature": request.temperature}
    torch.manual_seed(request.seed)
    output: Any = model.generate(
        **inputs,
        **sampling,
        num_beams=1,
        max_new_tokens=max_new_tokens or request.max_new_tokens,
        streamer=streamer,
        logits_processor=LogitsProcessorList([logits_processor] if logits_processor else []),
    )
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


class TopTwoRecorder(LogitsProcessor):
    """Notes the two largest logits of each step and changes nothing."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Takes and returns the step's logits `[1, vocabulary]`."""
        self.steps.append(scores[0].float().topk(2).values)
        return scores


def compare_with_sdpa(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    request: GenerateRequest,
    *,
    tokens: list[int],
) -> Difference | None:
    """Restores the model, generates again from the same seed, and returns where `tokens` part from it.

    Up to the first differing token both runs saw the same tokens, so the gap there is that of
    logits computed on FlashCore's own text.
    """
    recorder = TopTwoRecorder()
    restore_attention(model)
    reference_tokens = generate_tokens(model, inputs, request, logits_processor=recorder)
    for index, (token, reference_token) in enumerate(zip(tokens, reference_tokens, strict=False)):
        if token != reference_token:
            largest, second = recorder.steps[index].tolist()
            return Difference(index, token, reference_token, reference_gap=largest - second)
    return None


def describe_run(timing: Timing, *, where: str, memory: str) -> str:
    """One line of figures.

    Example:
        >>> timing = Timing(prompt_tokens=4, new_tokens=21, first_token_seconds=0.25, decode_seconds=0.5)
        >>> describe_run(timing, where="float32 on cpu", memory="peak ...")
        '21 new tokens, float32 on cpu: first after 0.25 s (4-token prompt), then 40.0 tokens/s; peak ...'
    """
    count = count_of(timing.new_tokens, "new token")
    rate = "" if timing.decode_rate is None else f", then {timing.decode_rate:.1f} tokens/s"
    first = f"first after {timing.first_token_seconds:.2f} s ({timing.prompt_tokens}-token prompt)"
    return f"{count}, {where}: {first}{rate}; {memory}"


def describe_comparison(
    difference: Difference | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    decoding: str,
) -> str:
    """One line: where FlashCore and sdpa part, or that they do not."""
    subject = f"first token that differs from Hugging Face sdpa ({decoding})"
    if difference is None:
        return f"{subject}: none: {count_of(num_tokens, 'token')} equal"
    ours, theirs = (
        f"{tokenizer.decode([token])!r} ({token})" for token in (difference.token, difference.reference_token)
    )
    return (
        f"{subject}: index {difference.index} of {num_tokens}: flashcore {ours}, sdpa {theirs}; "
        f"gap between sdpa's top two logits there: {difference.reference_gap:.3g}"
    )


def count_of(number: int, noun: str) -> str:
    """A number and its noun.

    Example:
        >>> count_of(1, "token"), count_of(2, "token")
        ('1 token', '2 tokens')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
