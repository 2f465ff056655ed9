"""Argument checks of the linear op: the same for real and fake tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flashcore_ops.checks import SUPPORTED_DTYPES, check_no_gradients, dtype_name
from flashcore_ops.errors import DeviceError, DtypeError, LayoutError, OptionError, ShapeError

MAX_WEIGHTS = 3


def check_linear(
    input: Tensor,
    weights: Sequence[Tensor],
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    is_gated: bool,
) -> None:
    """Raises a typed error unless the linear op can serve these arguments."""
    check_no_gradients(input, *weights, norm_weight, residual)
    if input.dtype not in SUPPORTED_DTYPES:
        raise DtypeError.explain(
            "input",
            expected="float16, bfloat16 or float32",
            got=dtype_name(input.dtype),
            fix="Cast it with .to(dtype).",
        )
    if input.dim() == 0 or input.shape[-1] == 0:
        raise ShapeError.explain(
            "input", expected="[..., K] with K above 0", got=f"{list(input.shape)}", fix="Pass at least one feature."
        )
    _check_weights(input, weights, is_gated)
    if norm_weight is not None:
        _check_like(input, norm_weight, "norm_weight", shape=(input.shape[-1],))
    if residual is not None:
        width = weights[0].shape[0] if is_gated else sum(weight.shape[0] for weight in weights)
        _check_like(input, residual, "residual", shape=(*input.shape[:-1], width), is_contiguous=False)
    if not (math.isfinite(eps) and eps >= 0):
        raise OptionError.explain("eps", expected="a finite number from 0", got=f"{eps}", fix="Pass the norm's own.")


def _check_weights(input: Tensor, weights: Sequence[Tensor], is_gated: bool) -> None:
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise ShapeError.explain(
            "weights",
            expected=f"1 to {MAX_WEIGHTS} of them",
            got=f"{len(weights)}",
            fix="Pass the weights of the layers that share this input.",
        )
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or weight.shape[0] == 0:
            raise ShapeError.explain(
                f"weights[{i}]",
                expected="[N, K] with N above 0",
                got=f"{list(weight.shape)}",
                fix="Pass the weight of an nn.Linear.",
            )
        _check_like(input, weight, f"weights[{i}]", shape=(weight.shape[0], input.shape[-1]))
    if is_gated and (len(weights) != 2 or weights[0].shape != weights[1].shape):
        raise ShapeError.explain(
            "weights",
            expected="two of one shape with is_gated, the gate's first",
            got=f"{[list(weight.shape) for weight in weights]}",
            fix="Pass [gate_proj.weight, up_proj.weight].",
        )


def _check_like(input: Tensor, tensor: Tensor, name: str, shape: tuple[int, ...], is_contiguous: bool = True) -> None:
    if tensor.shape != shape:
        raise ShapeError.explain(
            name, expected=f"shape {list(shape)}", got=f"{list(tensor.shape)}", fix=f"Pass {name} as {list(shape)}."
        )
    if tensor.dtype != input.dtype:
        raise DtypeError.explain(
            name,
            expected=f"input's dtype {dtype_name(input.dtype)}",
            got=dtype_name(tensor.dtype),
            fix="Cast it with .to(input.dtype).",
        )
    if tensor.device != input.device:
        raise DeviceError.explain(
            name,
            expected=f"input's device {input.device}",
            got=f"{tensor.device}",
            fix="Move it with .to(input.device).",
        )
    if is_contiguous and not tensor.is_contiguous():
        raise LayoutError.explain(
            name,
            expected="a contiguous tensor",
            got=f"strides {list(tensor.stride())}",
            fix="Call .contiguous() on it.",
        )


def supports_linear(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a weight can go to the linear op beside inputs of a dtype.

    Example:
        >>> supports_linear(torch.ones(4, 8), dtype=torch.float32)
        True
        >>> supports_linear(torch.ones(4, 8).t(), dtype=torch.float32)
        False
    """
    return weight.dtype == dtype and dtype in SUPPORTED_DTYPES and weight.is_contiguous()
