"""What is measured: shapes, random inputs, and the only place with FLOP and byte formulas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashcore_ops.checks import dtype_name


@dataclass(frozen=True)
class Inputs:
    """One set of tensors of a case.

    query `[B, Hq, Q, D]`; key and value `[B, Hkv, S, D]`, every slot filled; kv_range int32 `[B, 2]`, (0, S) in each
    row; mask the bool `[B, 1, 1, S]` of a filled static cache at decode, None at prefill.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    kv_range: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Case:
    """Causal attention of Q query tokens, the last of S slots.

    Example:
        >>> decode = Case(batch=1, query_len=1, kv_len=2048)
        >>> str(decode), decode.num_bytes
        ('decode 1 x 2048', 8404992)
        >>> prefill = Case(batch=16, query_len=1024, kv_len=1024)
        >>> str(prefill), prefill.num_flops
        ('prefill 16 x 1024', 137438953472)
    """

    batch: int
    query_len: int
    kv_len: int
    num_query_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{'decode' if self.is_decode else 'prefill'} {self.batch} x {self.kv_len}"

    @property
    def is_decode(self) -> bool:
        return self.query_len == 1

    @property
    def num_flops(self) -> int:
        """Operations of the two products: 4 per visible score and head dim, half of the diagonal block counted."""
        visible = self.query_len * self.kv_len - self.query_len**2 // 2
        return 4 * self.batch * self.num_query_heads * self.head_dim * visible

    @property
    def num_kv_bytes(self) -> int:
        """Bytes of the keys and values."""
        return 2 * self.batch * self.num_kv_heads * self.kv_len * self.head_dim * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """The fewest bytes to move: each of query, key and value read once, the output written once."""
        num_query_elements = self.batch * self.num_query_heads * self.query_len * self.head_dim
        return self.num_kv_bytes + 2 * num_query_elements * self.dtype.itemsize

    def floor_us(self, read_tbs: float, matmul_tflops: float) -> float:
        """Microseconds that no implementation goes much below, given the GPU's measured rates."""
        return max(self.num_bytes / read_tbs, self.num_flops / matmul_tflops) / 1e6

    def tflops(self, microseconds: float) -> float:
        """TFLOP/s of one call that took so long."""
        return self.num_flops / microseconds / 1e6

    def to_json(self) -> dict[str, int | str]:
        return {
            "B": self.batch,
            "Q": self.query_len,
            "S": self.kv_len,
            "Hq": self.num_query_heads,
            "Hkv": self.num_kv_heads,
            "D": self.head_dim,
            "dtype": dtype_name(self.dtype),
        }

    def random_inputs(self, generator: torch.Generator) -> Inputs:
        """Normal random tensors on the generator's device, fresh at each call."""
        device = generator.device

        def normal(num_heads: int, num_tokens: int) -> Tensor:
            shape = (self.batch, num_heads, num_tokens, self.head_dim)
            return torch.randn(shape, dtype=self.dtype, device=device, generator=generator)

        return Inputs(
            query=normal(self.num_query_heads, self.query_len),
            key=normal(self.num_kv_heads, self.kv_len),
            value=normal(self.num_kv_heads, self.kv_len),
            kv_range=torch.tensor([[0, self.kv_len]] * self.batch, dtype=torch.int32, device=device),
            mask=torch.ones(self.batch, 1, 1, self.kv_len, dtype=torch.bool, device=device) if self.is_decode else None,
        )


def decode(batch: int, kv_len: int) -> Case:
    """One new token of each of `batch` sequences against a cache of kv_len slots."""
    return Case(batch=batch, query_len=1, kv_len=kv_len)


def prefill(length: int, num_tokens: int = 16384) -> Case:
    """Sequences of one length, as many as make up num_tokens in all, and at least one."""
    return Case(batch=max(1, num_tokens // length), query_len=length, kv_len=length)


DECODE = (
    *(decode(batch=1, kv_len=kv_len) for kv_len in (512, 2048, 8192, 32768, 131072)),
    *(decode(batch=8, kv_len=kv_len) for kv_len in (512, 2048, 8192)),
    *(decode(batch=32, kv_len=kv_len) for kv_len in (2048, 8192)),
    *(decode(batch=batch, kv_len=2048) for batch in (64, 128)),
)
PREFILL = tuple(prefill(length) for length in (512, 1024, 2048, 4096, 8192, 16384, 32768))
QUICK_DECODE = (decode(batch=1, kv_len=512), decode(batch=1, kv_len=8192), decode(batch=32, kv_len=2048))
QUICK_PREFILL = (prefill(1024), prefill(4096))
