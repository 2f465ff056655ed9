"""A lean prefill-and-decode loop: tokens feed themselves on the device, and the host only reads them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashcore_ops.decode_step import DecodeStep, greedy
from flashcore_ops.errors import MaskError, OptionError, ShapeError
from flashcore_ops.kept_steps import capacity_for, check_is_patched, kept_steps

# Steps that are queued before the host looks at their tokens, where nobody waits for each.
STEPS_PER_READ = 16


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; temperature 0 is greedy.

    Attributes:
        temperature: logits are divided by it.
        top_k: only so many of the likeliest tokens count; 0 for all.
        top_p: only the likeliest tokens whose probabilities sum up to it count.

    Raises:
        OptionError: temperature or top_k is negative, or top_p is not in (0, 1].

    Example:
        >>> logits = torch.tensor([[0.0, 9.0, 1.0]])
        >>> Sampling(temperature=1.0, top_k=1).choose(logits)
        tensor([1])
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise OptionError.explain(
                "temperature", expected="0 or a positive number", got=str(self.temperature), fix="Use 0 for greedy."
            )
        if self.top_k < 0:
            raise OptionError.explain("top_k", expected="0 or more", got=str(self.top_k), fix="Use 0 for all tokens.")
        if not 0 < self.top_p <= 1:
            raise OptionError.explain(
                "top_p", expected="above 0, up to 1", got=str(self.top_p), fix="Use 1.0 for all tokens."
            )

    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Tokens `[B]` for logits `[B, V]`, on their device and without waiting for it."""
        if self.temperature == 0:
            return greedy(logits)[:, 0]
        logits = logits.float()
        # From the largest down, and by a number that float32 can divide by, so that no temperature makes it NaN.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(self.temperature, 1e-30)
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(dim=-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            # The token that crosses the threshold still counts.
            is_tail = ordered.cumsum(dim=-1) - ordered >= self.top_p
            probabilities = probabilities.scatter(1, order, ordered.masked_fill(is_tail, 0.0))
        # An exponential race: the same distribution as multinomial, which would wait for the device.
        race = torch.empty_like(probabilities).exponential_(generator=generator)
        return (probabilities / race).argmax(dim=-1)


def stream_tokens(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_tokens: Collection[int] = (),
    generator: torch.Generator | None = None,
    steps_per_read: int = 1,
) -> Iterator[Tensor]:
    """Generates tokens and yields each step's as soon as the host has it.

    While the host reads one token the device works on the next, so streaming costs no time on the device. On a GPU the
    step is a kept CUDA graph (see `warmup` and `free_kept_caches`). Once the first token is asked for, other threads'
    calls with the same model wait until the iterator is exhausted or closed. Any thread may take the next token; one
    that has taken an iterator over must end it before it generates anything else with the model.

    Args:
        model: a patched causal language model.
        input_ids: int64 `[B, T]`, the prompts.
        attention_mask: `[B, T]`, 1 for tokens and 0 for padding on the left; None for no padding.
        max_new_tokens: steps at most.
        sampling: how tokens are chosen; greedy if None.
        stop_tokens: ids that end a row.
        generator: on the model's device, draws for sampling; None for the device's default.
        steps_per_read: steps queued between two looks of the host. More than 1 saves host time and delays the tokens.

    Yields:
        int64 `[B]` on the CPU, step by step. A row that has ended repeats its stop token. Ends when all rows have.

    Raises:
        OptionError: max_new_tokens or steps_per_read is below 1, the model is not patched, or its rotations would
            change under way (Phi-3's longrope).
        ShapeError: input_ids is not `[B, T]` with T > 0.
        MaskError: attention_mask is not `[B, T]`, or has padding that is not on the left.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flashcore_ops import replace_llama_attention_with_flashcore
        >>> sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval()
        >>> model = replace_llama_attention_with_flashcore(model)
        >>> len(list(stream_tokens(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5)))
        5
    """
    check_is_patched(model)
    _check_arguments(input_ids, attention_mask, max_new_tokens, steps_per_read)
    _check_rotations(model, input_ids.shape[1], max_new_tokens)
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.int64)
    return _stream(
        model,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        sampling=sampling or Sampling(),
        stops=stops,
        generator=generator,
        steps_per_read=steps_per_read,
    )


def _stream(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stops: Tensor,
    generator: torch.Generator | None,
    steps_per_read: int,
) -> Iterator[Tensor]:
    batch_size, prompt_len = input_ids.shape
    steps = kept_steps(model)
    with steps.turn():
        step = steps.get(model, batch_size, capacity_for(prompt_len + max_new_tokens))
        step.tokens.copy_(sampling.choose(prefill(model, step, input_ids, attention_mask), generator)[:, None])
        has_ended = torch.zeros(batch_size, dtype=torch.bool)
        previous = torch.zeros(batch_size, dtype=torch.int64)
        for tokens in _read_ahead(step, max_new_tokens, steps_per_read, sampling=sampling, generator=generator):
            previous = torch.where(has_ended, previous, tokens)
            yield previous
            has_ended |= torch.isin(previous, stops)
            if has_ended.all():
                return


def generate_tokens(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """`stream_tokens` in one go, with the options given there: int64 `[B, new tokens]` on the CPU.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flashcore_ops import replace_llama_attention_with_flashcore
        >>> sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval()
        >>> model = replace_llama_attention_with_flashcore(model)
        >>> generate_tokens(model, torch.tensor([[1, 2, 3]]), max_new_tokens=5).shape
        torch.Size([1, 5])
    """
    options = {"steps_per_read": STEPS_PER_READ} | options
    return torch.stack(list(stream_tokens(model, input_ids, attention_mask, **options)), dim=1)


def prefill(model: Any, step: DecodeStep, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Fills the step's cache with the prompts, and sets the step to go on behind them.

    Returns:
        The prompts' last logits `[B, V]`; the caller chooses the step's first tokens by them.
    """
    device = step.length.device
    padding = torch.zeros(input_ids.shape[0], dtype=torch.int64, device=device)
    position_ids = None
    if attention_mask is not None:
        attention_mask = attention_mask.to(device).bool()
        padding = input_ids.shape[1] - attention_mask.sum(dim=-1)
        position_ids = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    step.start.copy_(padding)
    step.position_offset.copy_(padding)
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=step.cache,
            use_cache=True,
            return_dict=True,
            logits_to_keep=1,
        ).logits
    return logits[:, -1]


def _read_ahead(
    step: DecodeStep,
    num_tokens: int,
    steps_per_read: int,
    *,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Yields num_tokens tokens `[B]`, from the one that is in the step; a GPU stays one read ahead."""
    is_cuda = step.tokens.is_cuda
    pending: tuple[list[Tensor], torch.cuda.Event] | None = None
    for first in range(0, num_tokens, steps_per_read):
        texts = []
        for index in range(first, min(first + steps_per_read, num_tokens)):
            if index > 0:
                step.run()
                if sampling.temperature > 0:
                    step.tokens.copy_(sampling.choose(step.logits, generator)[:, None])
            texts.append(torch.empty(step.tokens.shape[0], dtype=torch.int64, pin_memory=is_cuda))
            texts[-1].copy_(step.tokens[:, 0], non_blocking=True)
        if not is_cuda:
            # Nothing would run while the host reads.
            yield from texts
            continue
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(step.tokens.device))
        if pending is not None:
            yield from _read(*pending)
        pending = texts, event
    if pending is not None:
        yield from _read(*pending)


def _read(tokens: list[Tensor], event: torch.cuda.Event) -> list[Tensor]:
    event.synchronize()
    return tokens


def _check_rotations(model: Any, prompt_len: int, max_new_tokens: int) -> None:
    """Raises OptionError where Phi-3's longrope would change its frequencies behind the prompt.

    There its own `generate` computes all keys anew, and ours would go on with the old ones.
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    is_phi = rope.get("rope_type") == "longrope" and hasattr(model.config, "original_max_position_embeddings")
    limit = model.config.original_max_position_embeddings if is_phi else 0
    # The last token is not fed back.
    if prompt_len <= limit < prompt_len + max_new_tokens - 1:
        raise OptionError.explain(
            "max_new_tokens",
            expected=f"at most {limit - prompt_len + 1}, since longrope rotates otherwise past {limit} tokens",
            got=str(max_new_tokens),
            fix="Use model.generate, which fills the cache anew there.",
        )


def _check_arguments(
    input_ids: Tensor, attention_mask: Tensor | None, max_new_tokens: int, steps_per_read: int
) -> None:
    for name, number in (("max_new_tokens", max_new_tokens), ("steps_per_read", steps_per_read)):
        if number < 1:
            raise OptionError.explain(name, expected="1 or more", got=str(number), fix="Ask for a token.")
    if input_ids.dim() != 2 or input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise ShapeError.explain(
            "input_ids",
            expected="[B, T] with B and T above 0",
            got=f"{list(input_ids.shape)}",
            fix="Pass what the tokenizer returns.",
        )
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise MaskError.explain(
            "attention_mask",
            expected=f"input_ids' shape {list(input_ids.shape)}",
            got=f"{list(attention_mask.shape)}",
            fix="Pass what the tokenizer returns.",
        )
    mask = attention_mask.bool()
    if not bool((mask[:, 1:] >= mask[:, :-1]).all()) or not bool(mask[:, -1].all()):
        raise MaskError.explain(
            "attention_mask",
            expected="padding on the left only",
            got="padding after tokens",
            fix='Set tokenizer.padding_side = "left".',
        )
