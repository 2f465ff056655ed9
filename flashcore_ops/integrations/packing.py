"""Packed sequences, which transformers tells by position ids that restart: recognised, and attended to by our kernels.

They travel as int32 `[1, 1, 1, N + 1]`, the bounds of N sequences in the rows of the whole batch, one behind the other.
A batch with a single sequence is not packed, so this is never as narrow as the (start, end) of `kv_range`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import and_masks, packed_sequence_mask_function

from flashcore_ops.integrations.closures import closed_over, is_same_function


def packed_bounds(mask_function: Any, plain: Callable[..., Tensor], q_length: int, kv_length: int) -> Tensor | None:
    """The bounds `[1, 1, 1, N + 1]` if a mask function is a plain one within packed sequences, else None.

    Example:
        >>> from transformers.masking_utils import causal_mask_function
        >>> packed = packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1]]))
        >>> packed_bounds(and_masks(causal_mask_function, packed), causal_mask_function, 5, 5)
        tensor([[[[0, 2, 5]]]], dtype=torch.int32)
    """
    if getattr(mask_function, "__code__", None) is not and_masks(plain).__code__:
        return None
    (parts,) = closed_over(mask_function)
    if len(parts) != 2 or not is_same_function(parts[0], plain):
        return None
    if getattr(parts[1], "__code__", None) is not packed_sequence_mask_function(torch.empty(0)).__code__:
        return None
    # [B, Q]: the number of each token's sequence, which rises along a row.
    (numbers,) = closed_over(parts[1])
    if q_length != kv_length or numbers.shape[1] != q_length:
        return None
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    bounds = torch.nn.functional.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=numbers.numel())
    return bounds.to(torch.int32)[None, None, None]


def is_packed(attention_mask: Tensor) -> bool:
    """Whether an int32 mask has the bounds of packed sequences."""
    return attention_mask.shape[:3] == (1, 1, 1) and attention_mask.shape[3] > 2


def packed_attention(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, *options: Any) -> Tensor:
    """`[B, Hq, Q, D]` of tensors in a model's layout, whose rows become one batch without a copy.

    options: those of `torch.ops.flashcore.attention` after kv_range, up to the sinks.
    """
    rows = (tensor.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for tensor in (query, key, value))
    output: Tensor = torch.ops.flashcore.attention(*rows, None, *options, cu_seqlens_q=bounds[0, 0, 0])
    return output[0].transpose(0, 1).unflatten(0, (query.shape[0], -1)).transpose(1, 2)
