"""What the linear op refuses: (what is wrong, what is passed instead, the error, its text)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashcore_ops.errors import DtypeError, FlashCoreError, GradientError, LayoutError, OptionError, ShapeError


def linear_arguments() -> dict[str, Any]:
    return {
        "input": torch.zeros(2, 3, 8),
        "weights": [torch.zeros(6, 8), torch.zeros(6, 8)],
        "norm_weight": torch.zeros(8),
        "residual": torch.zeros(2, 3, 12),
    }


LINEAR_CASES: list[tuple[str, Callable[[], dict[str, Any]], type[FlashCoreError], str]] = [
    (
        "unsupported dtype",
        lambda: {"input": torch.zeros(2, 3, 8, dtype=torch.float64)},
        DtypeError,
        "input: expected float16, bfloat16 or float32, got float64. Cast it with .to(dtype).",
    ),
    (
        "no dims",
        lambda: {"input": torch.tensor(1.0)},
        ShapeError,
        "input: expected [..., K] with K above 0, got []. Pass at least one feature.",
    ),
    (
        "no features",
        lambda: {"input": torch.zeros(2, 0)},
        ShapeError,
        "input: expected [..., K] with K above 0, got [2, 0]. Pass at least one feature.",
    ),
    (
        "no weights",
        lambda: {"weights": []},
        ShapeError,
        "weights: expected 1 to 3 of them, got 0. Pass the weights of the layers that share this input.",
    ),
    (
        "four weights",
        lambda: {"weights": [torch.zeros(6, 8)] * 4},
        ShapeError,
        "weights: expected 1 to 3 of them, got 4. Pass the weights of the layers that share this input.",
    ),
    (
        "rank of a weight",
        lambda: {"weights": [torch.zeros(6, 8), torch.zeros(8)]},
        ShapeError,
        "weights[1]: expected [N, K] with N above 0, got [8]. Pass the weight of an nn.Linear.",
    ),
    (
        "empty weight",
        lambda: {"weights": [torch.zeros(0, 8)]},
        ShapeError,
        "weights[0]: expected [N, K] with N above 0, got [0, 8]. Pass the weight of an nn.Linear.",
    ),
    (
        "depth of a weight",
        lambda: {"weights": [torch.zeros(6, 8), torch.zeros(6, 9)]},
        ShapeError,
        "weights[1]: expected shape [6, 8], got [6, 9]. Pass weights[1] as [6, 8].",
    ),
    (
        "dtype of a weight",
        lambda: {"weights": [torch.zeros(6, 8, dtype=torch.bfloat16)]},
        DtypeError,
        "weights[0]: expected input's dtype float32, got bfloat16. Cast it with .to(input.dtype).",
    ),
    (
        "transposed weight",
        lambda: {"weights": [torch.zeros(8, 6).t()]},
        LayoutError,
        "weights[0]: expected a contiguous tensor, got strides [1, 6]. Call .contiguous() on it.",
    ),
    (
        "gated single",
        lambda: {"weights": [torch.zeros(6, 8)], "is_gated": True},
        ShapeError,
        "weights: expected two of one shape with is_gated, the gate's first, got [[6, 8]]. "
        "Pass [gate_proj.weight, up_proj.weight].",
    ),
    (
        "gated pair of two sizes",
        lambda: {"weights": [torch.zeros(6, 8), torch.zeros(7, 8)], "is_gated": True},
        ShapeError,
        "weights: expected two of one shape with is_gated, the gate's first, got [[6, 8], [7, 8]]. "
        "Pass [gate_proj.weight, up_proj.weight].",
    ),
    (
        "shape of the norm",
        lambda: {"norm_weight": torch.zeros(7)},
        ShapeError,
        "norm_weight: expected shape [8], got [7]. Pass norm_weight as [8].",
    ),
    (
        "dtype of the norm",
        lambda: {"norm_weight": torch.zeros(8, dtype=torch.float16)},
        DtypeError,
        "norm_weight: expected input's dtype float32, got float16. Cast it with .to(input.dtype).",
    ),
    (
        "shape of the residual",
        lambda: {"residual": torch.zeros(2, 1, 12)},
        ShapeError,
        "residual: expected shape [2, 3, 12], got [2, 1, 12]. Pass residual as [2, 3, 12].",
    ),
    (
        "gated residual",
        lambda: {"is_gated": True},
        ShapeError,
        "residual: expected shape [2, 3, 6], got [2, 3, 12]. Pass residual as [2, 3, 6].",
    ),
    (
        "negative eps",
        lambda: {"eps": -1e-6},
        OptionError,
        "eps: expected a finite number from 0, got -1e-06. Pass the norm's own.",
    ),
    (
        "eps of nan",
        lambda: {"eps": float("nan")},
        OptionError,
        "eps: expected a finite number from 0, got nan. Pass the norm's own.",
    ),
    (
        "gradients",
        lambda: {"weights": [torch.zeros(6, 8), torch.zeros(6, 8, requires_grad=True)]},
        GradientError,
        "flashcore: expected no gradients, since its ops are inference-only, "
        "got an input that requires grad while grad mode is on. Call under torch.no_grad(), or detach the inputs.",
    ),
]
