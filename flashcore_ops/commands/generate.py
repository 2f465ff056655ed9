"""`flashcore generate`: patch a model, stream its text, and hold it against Hugging Face's own attention."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flashcore_ops import patch_model, warmup
from flashcore_ops.checks import dtype_name
from flashcore_ops.commands.comparison import compare_with_hugging_face, describe_comparison
from flashcore_ops.commands.console import count_of, stage, stderr_console
from flashcore_ops.commands.loading import check_model_name, load_model, resolve_device, resolve_dtype
from flashcore_ops.commands.peak_memory import peak_memory, start_peak_memory
from flashcore_ops.commands.request import Decoding, GenerateRequest, ignored_settings
from flashcore_ops.commands.streaming import TextWriter, TimedTokens, Timing
from flashcore_ops.default_model import default_model_path
from flashcore_ops.errors import DeviceError, OptionError
from flashcore_ops.integrations.families import reference_implementation


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
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceError.explain(
            f"--device {device}",
            expected="memory for the model and its cache",
            got="too little",
            fix="Use a smaller model, dtype or --max-new-tokens, or --device cpu.",
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU or the CPU had no room; the CPU's allocator has no error class of its own.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError()), is_out_of_memory(RuntimeError("size mismatch"))
        (True, False)
    """
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def generate_and_compare(request: GenerateRequest, *, device: torch.device, dtype: torch.dtype) -> bool:
    """What run_generate does once the request is known to be sound."""
    console = stderr_console()
    name = str(default_model_path()) if request.model is None else request.model
    # A download from the hub draws its own progress bars.
    with stage(console, "Loading the model") if Path(name).is_dir() else nullcontext():
        model, tokenizer = load_model(name, dtype=dtype, device=device)
        patch_model(model)
    inputs = encode_prompt(tokenizer, request.prompt, device=device)
    decoding = Decoding.of(request, model.generation_config)
    if ignored := ignored_settings(model.generation_config):
        console.print(f"Not used of the model's generation settings: {', '.join(ignored)}.", style="dim")

    if device.type == "cuda":
        warm_up(model, inputs, decoding, console)
    start_peak_memory(device)
    tokens, timing = stream_text(model, tokenizer, inputs, decoding, console)
    run = describe_run(
        timing,
        prompt_tokens=inputs["input_ids"].shape[1],
        where=f"{dtype_name(dtype)} on {device}",
        memory=peak_memory(device),
    )
    console.print(run, style="dim")
    if not request.compare:
        return True

    reference = reference_implementation(type(model))
    with stage(console, f"Generating with Hugging Face {reference}"):
        difference = compare_with_hugging_face(model, inputs, decoding, tokens)
    comparison = describe_comparison(
        difference, tokenizer, num_tokens=len(tokens), decoding=str(decoding), reference=reference
    )
    console.print(comparison)
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


def warm_up(model: PreTrainedModel, inputs: dict[str, Tensor], decoding: Decoding, console: Console) -> None:
    """Pays for kernels and graph ahead, so that the figures are those of generating alone."""
    num_tokens = inputs["input_ids"].shape[1] + decoding.max_new_tokens
    with stage(console, "Compiling decode kernels and capturing the decode graph"):
        warmup(model, batch_size=1, capacity=num_tokens)
    with stage(console, "Compiling prefill kernels for the prompt"):
        next(decoding.stream(model, inputs))


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: dict[str, Tensor],
    decoding: Decoding,
    console: Console,
) -> tuple[list[int], Timing]:
    """Writes the prompt and the new tokens' text to stdout; returns these tokens, and when they came."""
    writer = TextWriter(tokenizer, sys.stdout)
    timed = TimedTokens(decoding.stream(model, inputs))
    with stage(console, "Reading the prompt"):
        tokens = [next(timed)]
    writer.write([*inputs["input_ids"][0].tolist(), *tokens])
    for token in timed:
        tokens.append(token)
        writer.write([token])
    writer.end()
    return tokens, timed.timing()


def describe_run(timing: Timing, *, prompt_tokens: int, where: str, memory: str) -> str:
    """One line of figures.

    Example:
        >>> timing = Timing(new_tokens=21, first_token_seconds=0.25, decode_seconds=0.5)
        >>> describe_run(timing, prompt_tokens=4, where="float32 on cpu", memory="peak ...")
        '21 new tokens, float32 on cpu: first after 0.25 s (4-token prompt), then 40.0 tokens/s; peak ...'
    """
    count = count_of(timing.new_tokens, "new token")
    rate = "" if timing.decode_rate is None else f", then {timing.decode_rate:.1f} tokens/s"
    first = f"first after {timing.first_token_seconds:.2f} s ({prompt_tokens}-token prompt)"
    return f"{count}, {where}: {first}{rate}; {memory}"
