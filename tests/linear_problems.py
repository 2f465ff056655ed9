"""Random problems of the linear op, held to the bar of `problems`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashcore_ops import reference
from tests.problems import over_the_bar


@dataclass(frozen=True)
class LinearProblem:
    """The arguments of `linear`, in its order."""

    input: Tensor
    weights: list[Tensor]
    norm_weight: Tensor | None = None
    eps: float = 1e-6
    residual: Tensor | None = None
    is_gated: bool = False
    has_constant_weights: bool = False

    def arguments(self) -> tuple[object, ...]:
        return (
            *(self.input, self.weights, self.norm_weight, self.eps, self.residual),
            *(self.is_gated, self.has_constant_weights),
        )

    def in_float64(self) -> LinearProblem:
        return replace(
            self,
            input=self.input.double(),
            weights=[weight.double() for weight in self.weights],
            norm_weight=None if self.norm_weight is None else self.norm_weight.double(),
            residual=None if self.residual is None else self.residual.double(),
        )

    def with_depth_shuffled(self) -> LinearProblem:
        order = torch.randperm(self.input.shape[-1], device=self.input.device)
        return replace(
            self,
            input=self.input[..., order],
            weights=[weight[:, order] for weight in self.weights],
            norm_weight=None if self.norm_weight is None else self.norm_weight[order],
        )

    def with_offset(self) -> LinearProblem:
        """The same tensors one element behind an aligned address."""

        def view(tensor: Tensor) -> Tensor:
            return tensor.new_full((tensor.numel() + 1,), torch.nan)[1:].view(tensor.shape).copy_(tensor)

        return replace(
            self,
            input=view(self.input),
            weights=[view(weight) for weight in self.weights],
            norm_weight=None if self.norm_weight is None else view(self.norm_weight),
            residual=None if self.residual is None else view(self.residual),
        )


def make_linear(
    shape: tuple[int, ...] = (3, 64),
    sizes: tuple[int, ...] = (24,),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    has_norm: bool = False,
    eps: float = 1e-6,
    has_residual: bool = False,
    is_gated: bool = False,
) -> LinearProblem:
    """Normal random tensors, the weights scaled as a model's: input of shape `[..., K]`, a weight `[N, K]` a size."""
    depth = shape[-1]
    width = sizes[0] if is_gated else sum(sizes)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    return LinearProblem(
        input=normal(*shape),
        weights=[normal(size, depth) * depth**-0.5 for size in sizes],
        norm_weight=normal(depth) if has_norm else None,
        eps=eps,
        residual=normal(*shape[:-1], width) if has_residual else None,
        is_gated=is_gated,
    )


def assert_linear_as_accurate_as_pytorch(output: Tensor, problem: LinearProblem) -> None:
    """At most twice the error of plain PyTorch in the inputs' dtype, plus the rounding of the output; never NaN."""
    exact = _by_reference(problem.in_float64())
    plain = [_by_reference(problem)]
    assert output.shape == exact.shape
    assert output.is_contiguous()
    over = over_the_bar("output", output, plain, exact, problem.input.dtype)
    if over:
        # As with attention: on a few numbers one order of summation can come out exact by luck.
        plain += [_by_reference(problem.with_depth_shuffled()) for _ in range(7)]
        over = over_the_bar("output", output, plain, exact, problem.input.dtype)
    assert not over, over


def _by_reference(problem: LinearProblem) -> Tensor:
    return reference.linear(
        problem.input, problem.weights, problem.norm_weight, problem.eps, problem.residual, problem.is_gated
    )
