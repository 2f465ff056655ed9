"""Random problems of decode's fused op, the oracle's answer to them, and what must have happened to the caches."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashcore_ops import reference
from tests.problems import over_the_bar


@dataclass(frozen=True)
class RopeProblem:
    """The arguments of `rope_append_attention`, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor
    sin: Tensor
    key_cache: Tensor
    value_cache: Tensor
    kv_range: Tensor
    scale: float | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None

    def arguments(self) -> tuple[object, ...]:
        return (
            *(self.query, self.key, self.value, self.cos, self.sin, self.key_cache, self.value_cache, self.kv_range),
            *(self.scale, self.window, self.softcap, self.sinks),
        )

    def with_own_caches(self) -> RopeProblem:
        return replace(self, key_cache=self.key_cache.clone(), value_cache=self.value_cache.clone())

    def in_float64(self) -> RopeProblem:
        doubled = {name: field.double() for name, field in vars(self).items() if isinstance(field, Tensor)}
        return replace(self, **doubled | {"kv_range": self.kv_range})

    def with_head_dim_shuffled(self) -> RopeProblem:
        """The same scores, summed in another order; rotated pairs stay pairs."""
        half = self.query.shape[3] // 2
        order = torch.randperm(half, device=self.query.device)
        order = torch.cat([order, order + half])
        names = ("query", "key", "cos", "sin", "key_cache")
        return replace(self, **{name: getattr(self, name)[..., order] for name in names})

    def reference_output(self) -> Tensor:
        return reference.rope_append_attention(*self.with_own_caches().arguments())

    def has_slot(self) -> Tensor:
        """Rows `[B]` whose new token has a slot."""
        end = self.kv_range[:, 1]
        return (end >= 1) & (end <= self.key_cache.shape[2])

    def new_slots(self) -> tuple[Tensor, Tensor]:
        """Rows, and the slots their new tokens go to."""
        rows = self.has_slot().nonzero()[:, 0]
        return rows, self.kv_range[rows, 1].long() - 1


def make_rope_problem(
    batch: int = 2,
    num_query_heads: int = 4,
    num_kv_heads: int = 2,
    kv_len: int = 33,
    head_dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    kv_range: list[tuple[int, int]] | None = None,
    is_rotation_shared: bool = False,
    has_sinks: bool = False,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> RopeProblem:
    """query, key and value are views of one projection; what no output may come from is NaN: every cache slot that is
    not seen, and the new value of rows that see nothing."""
    value_dim = head_dim if value_dim is None else value_dim
    widths = [num_query_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * value_dim]
    query, key, value = torch.randn(batch, 1, sum(widths), dtype=dtype, device=device).split(widths, dim=-1)
    angles = torch.rand(1 if is_rotation_shared else batch, 1, head_dim // 2, device=device) * 6.3
    angles = torch.cat([angles, angles], dim=-1)
    kv_range = [(0, kv_len)] * batch if kv_range is None else kv_range
    ranges = torch.tensor(kv_range, dtype=torch.int32, device=device).reshape(batch, 2)
    value[ranges[:, 0] >= ranges[:, 1]] = torch.nan
    # The new token is seen beside the cached ones, and its own slot is written, never read.
    visible = reference.visible_slots(1, kv_len, ranges, window=window)[:, 0]
    visible &= torch.arange(kv_len, device=device) != ranges[:, 1:] - 1
    unread = ~visible[:, None, :, None]
    return RopeProblem(
        query=query.unflatten(-1, (num_query_heads, head_dim)).transpose(1, 2),
        key=key.unflatten(-1, (num_kv_heads, head_dim)).transpose(1, 2),
        value=value.unflatten(-1, (num_kv_heads, value_dim)).transpose(1, 2),
        cos=angles.cos().to(dtype),
        sin=angles.sin().to(dtype),
        key_cache=torch.randn(batch, num_kv_heads, kv_len, head_dim, dtype=dtype, device=device).masked_fill(
            unread, torch.nan
        ),
        value_cache=torch.randn(batch, num_kv_heads, kv_len, value_dim, dtype=dtype, device=device).masked_fill(
            unread, torch.nan
        ),
        kv_range=ranges,
        sinks=torch.randn(num_query_heads, device=device) if has_sinks else None,
        scale=scale,
        window=window,
        softcap=softcap,
    )


def assert_output_as_accurate_as_pytorch(output: Tensor, problem: RopeProblem) -> None:
    """The bar of `tests.problems`, for a problem whose caches are still those from before the call."""
    has_slot, is_blind = problem.has_slot(), problem.kv_range[:, 0] >= problem.kv_range[:, 1]
    assert output[~has_slot].isnan().all(), "a row without a slot is NaN"
    assert (output[has_slot & is_blind] == 0).all(), "a row that sees nothing is exactly 0"
    exact, plain = problem.in_float64().reference_output(), [problem.reference_output()]
    assert output.shape == exact.shape

    def excess() -> str:
        seen = [each[has_slot] for each in plain]
        return over_the_bar("output", output[has_slot], seen, exact[has_slot], problem.query.dtype)

    over = excess()
    if over:
        plain += [problem.with_head_dim_shuffled().reference_output() for _ in range(7)]
        over = excess()
    assert not over, over


def assert_appended(before: RopeProblem, after: RopeProblem, key: Tensor | None) -> None:
    """The new value and the rotated key are in their slots, and no other bit of the caches has changed.

    Without a key `[B, Hkv, 1, D]` to equal, the stored one must pass the bar.
    """
    rows, slots = before.new_slots()
    expected_key_cache, expected_value_cache = before.key_cache.clone(), before.value_cache.clone()
    expected_value_cache[rows, :, slots] = before.value[rows, :, 0]
    if key is None:
        key = after.key_cache[rows, :, slots]
        plain = reference.rotate(before.key, before.cos, before.sin)[rows, :, 0]
        exact = reference.rotate(before.key.double(), before.cos.double(), before.sin.double())[rows, :, 0]
        over = over_the_bar("key", key, [plain], exact, before.key.dtype)
        assert not over, over
    else:
        key = key[rows, :, 0]
    expected_key_cache[rows, :, slots] = key
    assert torch.equal(bits(after.key_cache), bits(expected_key_cache))
    assert torch.equal(bits(after.value_cache), bits(expected_value_cache))


def bits(tensor: Tensor) -> Tensor:
    """The same bits as integers: NaN is equal to itself."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
