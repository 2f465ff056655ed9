"""Writes tokens as text while they are made, and notes when each one came."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TextIO

from torch import Tensor
from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Timing:
    """Wall time of one generation, in seconds. `decode_seconds` spans all new tokens but the first."""

    new_tokens: int
    first_token_seconds: float
    decode_seconds: float

    @property
    def decode_rate(self) -> float | None:
        """Decoded tokens per second, or None where only one token was made.

        Example:
            >>> Timing(new_tokens=11, first_token_seconds=0.5, decode_seconds=2.0).decode_rate
            5.0
        """
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


class TimedTokens(Iterator[int]):
    """The tokens of a stream of one row; its clock starts when the first is asked for.

    Example:
        >>> import torch
        >>> tokens = TimedTokens(iter([torch.tensor([7]), torch.tensor([8])]), clock=iter([0.0, 0.5, 0.75]).__next__)
        >>> list(tokens)
        [7, 8]
        >>> tokens.timing()
        Timing(new_tokens=2, first_token_seconds=0.5, decode_seconds=0.25)
    """

    def __init__(self, stream: Iterator[Tensor], clock: Callable[[], float] = time.perf_counter) -> None:
        self._stream = stream
        self._clock = clock
        self._times: list[float] = []

    def __next__(self) -> int:
        if not self._times:
            self._times.append(self._clock())
        token = int(next(self._stream))
        self._times.append(self._clock())
        return token

    def timing(self) -> Timing:
        """What the clock has seen; call it after the first token."""
        start, first, last = self._times[0], self._times[1], self._times[-1]
        return Timing(
            new_tokens=len(self._times) - 1,
            first_token_seconds=first - start,
            decode_seconds=last - first,
        )


class TextWriter:
    """Writes each token's text as soon as it is whole.

    transformers' own TextStreamer decodes every line afresh, and tokenizers that strip a leading
    space then lose one at each line's start. Here each piece is what the new tokens add to the text
    of the tokens before them, so the pieces join to the text of the whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, output: TextIO) -> None:
        self._tokenizer = tokenizer
        self._output = output
        self._tokens: list[int] = []
        # Tokens [_context, _written) are on the output and give the next piece its left context.
        self._context = 0
        self._written = 0
        self._last_char = ""

    def write(self, tokens: Iterable[int]) -> None:
        """Takes the tokens that follow those before; the first call's may be a prompt."""
        self._tokens.extend(tokens)
        self._write_text(final=False)

    def end(self) -> None:
        """Writes what was held back, and ends the line."""
        self._write_text(final=True)
        if self._last_char != "\n":
            self._output.write("\n")
        self._output.flush()

    def _write_text(self, *, final: bool) -> None:
        before = self._decode(self._tokens[self._context : self._written])
        text = self._decode(self._tokens[self._context :])
        # A character may span tokens: its last bytes are still to come.
        if text.endswith(REPLACEMENT) and not final:
            return
        piece = text[len(before) :]
        if piece:
            self._output.write(piece)
            self._output.flush()
            self._last_char = piece[-1]
        self._context, self._written = self._written, len(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)
