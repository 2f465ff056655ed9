"""Packed sequences, told by position ids that restart or by `cu_seq_lens_q`, and attended to by our kernels.

Those that transformers finds by the position ids travel as int32 `[1, 1, 1, N + 1]`, the bounds of N sequences in the
rows of the whole batch, one behind the other. A batch with a single sequence is not packed, so this is never as narrow
as the (start, end) of `kv_range`.

While tracing nobody can count the sequences. There int32 `[1, 1, 1, 1]` travels, whether the positions restart nowhere,
and the device raises if they do and `cu_seq_lens_q` does not say where.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import and_masks, packed_sequence_mask_function

from flashcore_ops.errors import MaskError
from flashcore_ops.integrations.closures import closed_over, is_same_function

# What transformers' closures are told by.
_AND = and_masks().__code__
_PACKED = packed_sequence_mask_function(torch.empty(0)).__code__
_RESTARTS = (
    "position_ids restart, and torch.compile cannot count packed sequences. Pass cu_seq_lens_q too, int32 [N + 1], "
    "or run this batch without torch.compile."
)


def packed_bounds(mask_function: Any, plain: Callable[..., Tensor], q_length: int, kv_length: int) -> Tensor | None:
    """The bounds `[1, 1, 1, N + 1]` if a mask function is a plain one within packed sequences, else None.

    Example:
        >>> from transformers.masking_utils import causal_mask_function
        >>> packed = packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1]]))
        >>> packed_bounds(and_masks(causal_mask_function, packed), causal_mask_function, 5, 5)
        tensor([[[[0, 2, 5]]]], dtype=torch.int32)
    """
    parts = _and_parts(mask_function)
    numbers = packed_numbers(mask_function)
    if numbers is None or len(parts) != 2 or not is_same_function(parts[0], plain):
        return None
    if q_length != kv_length or numbers.shape[1] != q_length:
        return None
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    bounds = torch.nn.functional.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=numbers.numel())
    return bounds.to(torch.int32)[None, None, None]


def packed_numbers(mask_function: Any) -> Tensor | None:
    """`[B, Q]`, the number of each token's sequence, which rises along a row; None if a mask is not of packed ones."""
    packed = [part for part in _and_parts(mask_function) if getattr(part, "__code__", None) is _PACKED]
    if len(packed) != 1:
        return None
    (numbers,) = closed_over(packed[0])
    found: Tensor = numbers
    return found


def _and_parts(mask_function: Any) -> tuple[Any, ...]:
    """The mask functions that transformers has joined into one by `and_masks`."""
    if getattr(mask_function, "__code__", None) is not _AND:
        return ()
    (parts,) = closed_over(mask_function)
    return tuple(parts)


def single_sequences(is_single: Tensor) -> Tensor:
    """What travels while tracing: whether each row is a single sequence, as the device finds it."""
    return is_single.to(torch.int32)[None, None, None, None]


def sequence_bounds(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """The bounds `[N + 1]` of the packed sequences that a layer's arguments tell of, or None."""
    bounds: Tensor | None = kwargs.get("cu_seq_lens_q")
    if bounds is None and attention_mask is not None and is_sequence_bounds(attention_mask):
        bounds = attention_mask[0, 0, 0]
    return bounds


def drop_flag(attention_mask: Tensor | None) -> Tensor | None:
    """The mask of rows that are not packed: the flag of a traced call is checked on the device, and gone."""
    if attention_mask is None or not is_flag(attention_mask):
        return attention_mask
    torch._assert_async(attention_mask[0, 0, 0, 0] == 1, f"flashcore: {_RESTARTS}")
    return None


def is_sequence_bounds(attention_mask: Tensor) -> bool:
    """Whether a mask is what `packed_bounds` returns."""
    is_ours = attention_mask.dtype == torch.int32 and attention_mask.shape[:3] == (1, 1, 1)
    return is_ours and attention_mask.shape[3] > 2


def is_flag(attention_mask: Tensor) -> bool:
    """Whether a mask is what `single_sequences` returns."""
    return attention_mask.dtype == torch.int32 and attention_mask.shape == (1, 1, 1, 1)


def check_sequence_bounds(bounds: Any, key_bounds: Any, attention_mask: Tensor | None, *, has_past: bool) -> None:
    """Raises MaskError if cu_seq_lens_q is malformed, or beside an attention mask, past tokens or another
    cu_seq_lens_k."""
    got = None
    if not isinstance(bounds, Tensor) or bounds.dim() != 1 or len(bounds) < 2 or bounds.dtype != torch.int32:
        got = f"{bounds.dtype} {list(bounds.shape)}" if isinstance(bounds, Tensor) else f"a {type(bounds).__name__}"
    elif attention_mask is not None and not (is_sequence_bounds(attention_mask) or is_flag(attention_mask)):
        got = "an attention_mask beside it"
    elif has_past:
        got = "past tokens, or a cache with room for more than these, beside it"
    elif key_bounds is not None and not isinstance(key_bounds, Tensor):
        got = f"a {type(key_bounds).__name__} as cu_seq_lens_k beside it"
    elif key_bounds is not None and key_bounds.shape != bounds.shape:
        got = f"another cu_seq_lens_k {list(key_bounds.shape)} beside it"
    if got is not None:
        raise _bounds_error(got)


def check_bound_values(bounds: Tensor, key_bounds: Tensor | None, *, num_rows: int) -> None:
    """Raises MaskError unless bounds rise from 0 to num_rows, and key_bounds are the same. While tracing the device
    raises; else the host reads them, so this is for once a call."""
    are_good = (bounds[0] == 0) & (bounds[-1] == num_rows) & (bounds[1:] >= bounds[:-1]).all()
    if key_bounds is not None:
        are_good = are_good & (key_bounds == bounds).all()
    if torch.compiler.is_compiling():
        torch._assert_async(are_good, "flashcore: cu_seq_lens_q does not rise from 0 to the tokens of the batch.")
    elif not are_good:
        beside = "" if key_bounds is None else f", cu_seq_lens_k {key_bounds.tolist()}"
        raise _bounds_error(f"{bounds.tolist()}{beside} for {num_rows} tokens")


def _bounds_error(got: str) -> MaskError:
    return MaskError.explain(
        "cu_seq_lens_q",
        expected="int32 [N + 1], the bounds of N sequences of new tokens that tell all of the mask",
        got=got,
        fix="Pass what DataCollatorWithFlattening(return_flash_attn_kwargs=True) returns, and no mask or cache.",
    )


def packed_attention(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *options: Any) -> Tensor:
    """`[B, Hq, Q, D]` of tensors in a model's layout, whose rows become one batch without a copy.

    bounds: int32 `[N + 1]`, those of the sequences in all rows of the batch.
    options: those of `torch.ops.flashcore.attention` after kv_range, up to the sinks.
    """
    rows = (tensor.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for tensor in (query, key, value))
    output: Tensor = torch.ops.flashcore.attention(*rows, None, *options, cu_seqlens_q=bounds)
    return output[0].transpose(0, 1).unflatten(0, (query.shape[0], -1)).transpose(1, 2)
