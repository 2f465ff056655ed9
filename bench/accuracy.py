"""Whether a result is right: the float64 answer to a case, and the largest error that passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import Inputs
from flashcore_ops import reference

# Scores that the reference holds at once in float64: 1 GiB, of which it makes a handful of copies.
MAX_SCORES = 2**27


@dataclass(frozen=True)
class Target:
    """The answer `[B, Hq, Q, D]` in float64, and the largest distance from it that passes.

    is_padding: bool `[B, 1, Q, 1]`, rows that see nothing. What an implementation gives there is its own affair.
    The bar is twice the error of plain PyTorch attention in the inputs' dtype, plus the rounding of the answer to it.
    """

    exact: Tensor
    is_padding: Tensor
    bar: float


def make_target(inputs: Inputs, max_scores: int = MAX_SCORES) -> Target:
    """Computes the whole answer in blocks of query rows, so that the scores of one block fit in memory.

    Example:
        >>> from bench.cases import Case
        >>> case = Case(batch=2, query_len=5, kv_len=9, num_query_heads=4, num_kv_heads=2)
        >>> make_target(case.random_inputs(torch.Generator())).exact.shape
        torch.Size([2, 4, 5, 128])
    """
    query, key, value, case = inputs.query, inputs.key, inputs.value, inputs.case
    exact = torch.empty(*query.shape[:3], value.shape[3], dtype=torch.float64, device=query.device)
    plain_error, rounding = 0.0, 0.0
    block = max(1, max_scores // (case.num_query_heads * case.kv_len))
    for row in range(case.batch):
        for first in range(0, case.query_len, block):
            last = min(first + block, case.query_len)
            # Causal is aligned to the bottom right, so a block sees the slots up to its own last row.
            end = case.kv_len - case.query_len + last if case.is_causal else case.kv_len
            q, k, v = query[row, None, :, first:last], key[row, None, :, :end], value[row, None, :, :end]
            options = (inputs.kv_range[row, None], None, case.is_causal, case.window)
            plain, _ = reference.attention_with_lse(q, k, v, *options)
            answer, _ = reference.attention_with_lse(q.double(), k.double(), v.double(), *options)
            exact[row, :, first:last] = answer[0]
            plain_error = max(plain_error, _distance(plain, answer))
            rounding = max(rounding, _distance(answer.to(query.dtype), answer))
    column = torch.arange(case.query_len, device=query.device) + case.kv_len - case.query_len
    is_padding = column < inputs.kv_range[:, :1]
    return Target(exact=exact, is_padding=is_padding[:, None, :, None], bar=2 * plain_error + rounding)


def max_abs_error(output: Tensor, target: Target) -> float:
    """The largest distance of any element from the float64 answer, padding apart; NaN if any element is NaN.

    Example:
        >>> exact = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
        >>> target = Target(exact, is_padding=torch.tensor([True, False]).view(1, 1, 2, 1), bar=0.5)
        >>> max_abs_error(torch.tensor([torch.nan, 2.0, 0.25, -0.75]).view(1, 1, 2, 2), target)
        0.75
    """
    return _distance(output.double().masked_fill(target.is_padding, 0), target.exact)


def _distance(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item()
