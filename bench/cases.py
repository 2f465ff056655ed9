"""What is measured: shapes, random inputs, and the only place with FLOP and byte formulas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from csrc_free_kernels.decode_tuning import MAX_DECODE_TOKENS
from flashcore_ops.checks import dtype_name


@dataclass(frozen=True)
class Case:
    """Attention of Q query tokens, the last of S slots.

    is_causal: rows align to the bottom right, as the op's do.
    window: with n > 0, a row sees its own column and the n - 1 before it.
    padding: slots of left padding in the last sequence of the batch; from none in the first they grow evenly.

    Raises:
        ValueError: more queries than slots, more padding than slots, or a window or padding without causal rows.

    Example:
        >>> decode = Case(batch=1, query_len=1, kv_len=2048)
        >>> str(decode), decode.num_bytes
        ('decode 1 x 2048', 8404992)
        >>> prefill = Case(batch=16, query_len=1024, kv_len=1024, head_dim=64)
        >>> str(prefill), prefill.num_flops
        ('prefill 16 x 1024, D=64', 68719476736)
    """

    batch: int
    query_len: int
    kv_len: int
    num_query_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    is_causal: bool = True
    window: int = 0
    padding: int = 0

    def __post_init__(self) -> None:
        if self.query_len > self.kv_len or self.padding >= self.kv_len:
            raise ValueError(f"expected fewer queries and less padding than {self.kv_len} slots, got {self!r}")
        if (self.window or self.padding) and not self.is_causal:
            raise ValueError(f"expected causal rows under a window or padding, got {self!r}")

    def __str__(self) -> str:
        return f"{'decode' if self.is_decode else 'prefill'} {self.label}"

    @property
    def label(self) -> str:
        """Batch and slots, and what is unlike the usual case."""
        is_usual_length = self.query_len == (1 if self.is_decode else self.kv_len)
        is_usual_heads = (self.num_query_heads, self.num_kv_heads) == (Case.num_query_heads, Case.num_kv_heads)
        parts = [
            f"{self.batch} x {self.kv_len}",
            "" if is_usual_length else f"Q={self.query_len}",
            "" if is_usual_heads else f"{self.num_query_heads}:{self.num_kv_heads}",
            "" if self.head_dim == Case.head_dim else f"D={self.head_dim}",
            "" if self.dtype == Case.dtype else dtype_name(self.dtype),
            "" if self.is_causal else "non-causal",
            f"window {self.window}" if self.window else "",
            f"padding {self.padding}" if self.padding else "",
        ]
        return ", ".join(filter(None, parts))

    @property
    def is_decode(self) -> bool:
        """Whether bytes bound it rather than arithmetic: the tokens of speculative decoding count too."""
        return self.query_len <= MAX_DECODE_TOKENS

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def starts(self) -> list[int]:
        """The first slot of each sequence that is no padding."""
        return [self.padding * row // max(self.batch - 1, 1) for row in range(self.batch)]

    @property
    def num_flops(self) -> int:
        """Operations of the two products: 4 per visible score and head dim, half of the diagonal block counted."""
        twice_visible = sum(self._twice_visible(self.kv_len - start) for start in self.starts)
        return 2 * self.num_query_heads * self.head_dim * twice_visible

    def _twice_visible(self, num_slots: int) -> int:
        """Twice the scores that are visible in one sequence without its padding."""
        if not self.is_causal:
            return 2 * self.query_len * num_slots
        num_before = num_slots - min(self.query_len, num_slots)
        window = self.window or num_slots
        # Two triangles of slots that a row may see, less two of those that its window hides.
        return num_slots**2 - num_before**2 - max(num_slots - window, 0) ** 2 + max(num_before - window, 0) ** 2

    @property
    def num_kv_bytes(self) -> int:
        """Bytes of the keys and values that some row sees."""
        widest = self.window + self.query_len - 1 if self.window else self.kv_len
        num_slots = sum(min(self.kv_len - start, widest) for start in self.starts)
        return 2 * self.num_kv_heads * num_slots * self.head_dim * self.dtype.itemsize

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

    def tbs(self, microseconds: float) -> float:
        """TB/s of one call that took so long."""
        return self.num_bytes / microseconds / 1e6

    def to_json(self) -> dict[str, int | str]:
        """The case in a results file. What a plain causal case lacks is left out."""
        options = {"is_non_causal": int(not self.is_causal), "window": self.window, "padding": self.padding}
        return {
            "B": self.batch,
            "Q": self.query_len,
            "S": self.kv_len,
            "Hq": self.num_query_heads,
            "Hkv": self.num_kv_heads,
            "D": self.head_dim,
            "dtype": dtype_name(self.dtype),
            **{name: value for name, value in options.items() if value},
        }

    def random_inputs(self, generator: torch.Generator) -> Inputs:
        """Normal random tensors on the generator's device, fresh at each call."""
        device = generator.device

        def normal(num_heads: int, num_tokens: int) -> Tensor:
            shape = (self.batch, num_heads, num_tokens, self.head_dim)
            return torch.randn(shape, dtype=self.dtype, device=device, generator=generator)

        bounds = [[start, self.kv_len] for start in self.starts]
        return Inputs(
            case=self,
            query=normal(self.num_query_heads, self.query_len),
            key=normal(self.num_kv_heads, self.kv_len),
            value=normal(self.num_kv_heads, self.kv_len),
            kv_range=torch.tensor(bounds, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class Inputs:
    """One set of tensors of a case.

    query `[B, Hq, Q, D]`; key and value `[B, Hkv, S, D]`, every slot filled; kv_range int32 `[B, 2]`, (start, S) of
    each sequence.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    kv_range: Tensor


@dataclass(frozen=True)
class HostCase:
    """What the host does around a case's kernels.

    kind: eager, the cost of one call, or first_call, the wait for a process's first one.

    Example:
        >>> case = HostCase("eager", Case(batch=1, query_len=1, kv_len=2048))
        >>> str(case), case.to_json()["kind"]
        ('eager decode 1 x 2048', 'eager')
    """

    kind: str
    case: Case

    def __str__(self) -> str:
        return f"{self.kind} {self.case}"

    def to_json(self) -> dict[str, int | str]:
        return {"kind": self.kind, **self.case.to_json()}
