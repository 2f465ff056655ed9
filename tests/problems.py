"""Random attention problems, the oracle's answer to them, and the bar that a kernel must pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashcore_ops import reference

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@dataclass(frozen=True)
class Problem:
    """The arguments of `attention`, in its order but for num_splits."""

    query: Tensor
    key: Tensor
    value: Tensor
    kv_range: Tensor | None = None
    scale: float | None = None
    is_causal: bool = True
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None

    def arguments(self) -> tuple[object, ...]:
        return (
            *(self.query, self.key, self.value, self.kv_range, self.scale),
            *(self.is_causal, self.window, self.softcap, self.sinks),
        )

    def oracle(self) -> tuple[Tensor, Tensor]:
        """The reference's output and log-sum-exp, in the tensors' own dtype."""
        return reference.attention_with_lse(*self.arguments(), cu_seqlens_q=self.cu_seqlens_q)

    def in_float64(self) -> Problem:
        return replace(
            self,
            query=self.query.double(),
            key=self.key.double(),
            value=self.value.double(),
            sinks=None if self.sinks is None else self.sinks.double(),
        )

    def with_head_dim_shuffled(self) -> Problem:
        order = torch.randperm(self.query.shape[3], device=self.query.device)
        return replace(self, query=self.query[..., order], key=self.key[..., order])

    def inside_larger(self) -> Problem:
        """The same tensors as views of larger ones that are NaN elsewhere: odd strides and offsets."""

        def view(tensor: Tensor) -> Tensor:
            larger = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
            return larger[1:-2, 2:-1, 1:-2, 3:].copy_(tensor)

        return replace(self, query=view(self.query), key=view(self.key), value=view(self.value))

    def visible(self) -> Tensor:
        query_len, kv_len = self.query.shape[2], self.key.shape[2]
        options = (self.kv_range, self.is_causal, self.window)
        if self.cu_seqlens_q is not None:
            return reference.visible_slots_of_sequences(self.cu_seqlens_q, query_len, kv_len, *options)
        return reference.visible_slots(query_len, kv_len, *options, device=self.query.device)

    def poisoned(self) -> Problem:
        """The same with NaN in every slot that no row sees."""
        unseen = ~self.visible().any(dim=1)[:, None, :, None]
        return replace(
            self, key=self.key.masked_fill(unseen, torch.nan), value=self.value.masked_fill(unseen, torch.nan)
        )


def make_problem(
    batch: int = 2,
    num_query_heads: int = 4,
    num_kv_heads: int = 2,
    query_len: int = 5,
    kv_len: int = 33,
    head_dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    kv_range: list[tuple[int, int]] | None = None,
    has_sinks: bool = False,
    scale: float | None = None,
    is_causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    cu_seqlens_q: list[int] | None = None,
) -> Problem:
    """Normal random tensors in a model's layout: stored `[B, T, H, D]`, NaN in every slot that no row sees."""
    value_dim = head_dim if value_dim is None else value_dim

    def heads(num_heads: int, tokens: int, dim: int) -> Tensor:
        return torch.randn(batch, tokens, num_heads, dim, dtype=dtype, device=device).transpose(1, 2)

    def integers(numbers: list[tuple[int, int]] | list[int] | None) -> Tensor | None:
        return None if numbers is None else torch.tensor(numbers, dtype=torch.int32, device=device)

    return Problem(
        query=heads(num_query_heads, query_len, head_dim),
        key=heads(num_kv_heads, kv_len, head_dim),
        value=heads(num_kv_heads, kv_len, value_dim),
        kv_range=integers(kv_range),
        sinks=torch.randn(num_query_heads, device=device) if has_sinks else None,
        scale=scale,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        cu_seqlens_q=integers(cu_seqlens_q),
    ).poisoned()


def assert_as_accurate_as_pytorch(output: Tensor, lse: Tensor | None, problem: Problem) -> None:
    """The bar: at most twice the error of plain PyTorch in the inputs' dtype, plus the rounding of the output.

    Errors are maximum distances from the float64 reference. NaN never passes.
    """
    exact, exact_lse = problem.in_float64().oracle()
    plain = [problem.oracle()]
    blind = ~problem.visible().any(dim=2)[:, None].expand_as(exact_lse)
    assert output.shape == exact.shape
    assert (output[blind] == 0).all(), "a row that sees nothing is exactly 0"
    if lse is not None:
        assert lse.shape == exact_lse.shape
        assert lse.dtype == torch.float32
        assert torch.equal(lse.double()[blind], exact_lse[blind]), "a row that sees nothing has its sink, or -inf"

    def excess() -> str:
        over = over_the_bar("output", output, [each for each, _ in plain], exact, problem.query.dtype)
        if lse is not None:
            plain_lse = [each[~blind] for _, each in plain]
            over += over_the_bar("lse", lse[~blind], plain_lse, exact_lse[~blind], torch.float32)
        return over

    over = excess()
    if over:
        # A sum rounds by its order, and on a few numbers one order can come out exact by luck: the plain error is
        # then the largest over several orders of the head dim, in which the scores are the same.
        plain += [problem.with_head_dim_shuffled().oracle() for _ in range(7)]
        over = excess()
    assert not over, over


def over_the_bar(name: str, actual: Tensor, plain: list[Tensor], exact: Tensor, dtype: torch.dtype) -> str:
    """What is over the bar, in words, or nothing."""
    if exact.numel() == 0:
        return ""
    error = (actual.double() - exact).abs().max().item()
    plain_error = max((each.double() - exact).abs().max().item() for each in plain)
    rounding = (exact.to(dtype).double() - exact).abs().max().item()
    bar = 2 * plain_error + rounding
    # NaN compares as false.
    return "" if error <= bar else f"{name}: error {error:.3g} > {bar:.3g} = 2 * {plain_error:.3g} + {rounding:.3g}; "
