"""Holds FlashCore's tokens against those of Hugging Face's own attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flashcore_ops import restore_attention
from flashcore_ops.commands.console import count_of
from flashcore_ops.commands.request import Decoding
from flashcore_ops.generation import Sampling


@dataclass(frozen=True)
class Difference:
    """The first token that FlashCore and the reference choose differently."""

    index: int
    token: int
    reference_token: int
    reference_gap: float


class ReferenceChoice(LogitsProcessor):
    """Notes the two largest logits of each step, and lets greedy search find only what `sampling` draws.

    Hugging Face's own sampler would draw other tokens from equal logits and an equal seed.
    """

    def __init__(self, sampling: Sampling, generator: torch.Generator) -> None:
        self.top_two: list[Tensor] = []
        self._sampling = sampling
        self._generator = generator

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Tensor:
        """Takes and returns the step's logits `[1, vocabulary]`."""
        self.top_two.append(scores[0].float().topk(2).values)
        if self._sampling.temperature == 0:
            return scores
        token = self._sampling.choose(scores, self._generator)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def compare_with_hugging_face(
    model: PreTrainedModel, inputs: dict[str, Tensor], decoding: Decoding, tokens: list[int]
) -> Difference | None:
    """Restores the model, generates again with Hugging Face's own loop, and returns where `tokens` part from it.

    Up to the first differing token both runs saw the same tokens and drew the same random numbers, so the gap there is
    that of logits computed on FlashCore's own text.
    """
    choice = ReferenceChoice(decoding.sampling, decoding.generator(inputs["input_ids"].device))
    restore_attention(model)
    # generate() takes from here what it is not told, such as a repetition penalty.
    stops = decoding.stop_tokens
    model.generation_config = GenerationConfig(eos_token_id=stops or None, pad_token_id=(stops or [0])[0])
    output: Any = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=decoding.max_new_tokens,
        logits_processor=LogitsProcessorList([choice]),
    )
    reference_tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    for index, (token, reference_token) in enumerate(zip(tokens, reference_tokens, strict=False)):
        if token != reference_token:
            largest, second = choice.top_two[index].tolist()
            return Difference(index, token, reference_token, reference_gap=largest - second)
    return None


def describe_comparison(
    difference: Difference | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    decoding: str,
    reference: str,
) -> str:
    """One line: where FlashCore and the reference, sdpa or eager, part, or that they do not."""
    subject = f"first token that differs from Hugging Face {reference} ({decoding})"
    if difference is None:
        return f"{subject}: none: {count_of(num_tokens, 'token')} equal"
    ours, theirs = (
        f"{tokenizer.decode([token])!r} ({token})" for token in (difference.token, difference.reference_token)
    )
    return (
        f"{subject}: index {difference.index} of {num_tokens}: flashcore {ours}, {reference} {theirs}; "
        f"gap between {reference}'s top two logits there: {difference.reference_gap:.3g}"
    )
