"""The model under validation, and what it is asked to continue."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "Once upon a time",
    "The meaning of life is",
    "In a galaxy far, far away",
    "def fibonacci(n):\n    ",
)
# Tokens of the prompts of a model without a tokenizer.
_RANDOM_LENGTHS = (4, 7, 11, 6)


@dataclass(frozen=True)
class Subject:
    """A causal language model in eval mode, on Hugging Face's attention; its tokenizer, or None for random weights."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def prompts(self) -> list[Tensor]:
        """The prompts' tokens, int64 `[T]` each, of different lengths."""
        if self.tokenizer is not None:
            encoded = [self.tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in PROMPTS]
        else:
            generator = torch.Generator().manual_seed(0)
            vocabulary = self.model.config.get_text_config().vocab_size
            encoded = [torch.randint(vocabulary, (length,), generator=generator) for length in _RANDOM_LENGTHS]
        return [tokens.to(self.device) for tokens in encoded]

    def text(self, tokens: list[int]) -> str | None:
        """Tokens as text; None without a tokenizer."""
        return None if self.tokenizer is None else str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def left_padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    """Prompts `[T]` as `input_ids` and `attention_mask` `[B, T]`, shorter ones padded with token 0 on the left.

    Example:
        >>> left_padded([torch.tensor([5]), torch.tensor([6, 7])])["attention_mask"]
        tensor([[0, 1],
                [1, 1]])
    """
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.zeros(len(prompts), length, dtype=torch.int64, device=prompts[0].device)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = prompt
        attention_mask[row, length - len(prompt) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
