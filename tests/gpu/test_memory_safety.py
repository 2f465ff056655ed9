"""compute-sanitizer over hostile kv_range and positions, and odd linear layers: no access outside the tensors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CUDA_BIN = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}{os.pathsep}{CUDA_BIN}")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is neither on the PATH nor in CUDA_HOME"),
]

HOSTILE_CALLS = """
import torch
from flashcore_ops import append_kv_, attention_with_lse, linear, rope_append_attention

INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)
hostile = [(-7, 5), (3, 2000), (2000, 3000), (INT32.min, INT32.max), (INT32.max, INT32.min), (40, 41)]
kv_range = torch.tensor(hostile, dtype=torch.int32, device="cuda")
batch = len(hostile)
for query_len, window, head_dim in [(1, 0, 64), (1, 5, 24), (3, 0, 64), (20, 0, 24), (150, 5, 64), (150, 0, 64)]:
    query = torch.randn(batch, 6, query_len, head_dim, device="cuda", dtype=torch.float16)
    key, value = (torch.randn(batch, 2, 41, head_dim, device="cuda", dtype=torch.float16) for _ in "kv")
    sinks = torch.randn(1, device="cuda").expand(6)
    for num_splits in (2, 1):
        attention_with_lse(query, key, value, kv_range, window=window, sinks=sinks, num_splits=num_splits)
for num_splits, head_dim, dtype in [(2, 24, torch.float32), (1, 24, torch.float32), (2, 64, torch.float16)]:
    options = {"dtype": dtype, "device": "cuda"}
    query, key, value = torch.randn(batch, 10, 1, head_dim, **options).split([6, 2, 2], dim=1)
    rotation = torch.randn(1, 1, head_dim, **options)
    caches = [torch.zeros(batch, 2, 41, head_dim, **options) for _ in "kv"]
    rope_append_attention(query, key, value, rotation, rotation, *caches, kv_range, window=5, num_splits=num_splits)
key_cache, value_cache = (torch.zeros(6, 2, 41, 24, device="cuda") for _ in "kv")
key, value = torch.randn(2, 6, 2, 3, 24, device="cuda").unbind()
positions = torch.tensor([-2, 0, 40, 0, 41, 0, -100, 0, INT64.max, 0, INT64.min], device="cuda")[::2]
append_kv_(key_cache, value_cache, key, value.clone(), positions)
HALF, FLOAT = torch.float16, torch.float32
for dtype, num_rows, depth in [(HALF, 1, 570), (HALF, 35, 570), (HALF, 1, 8), (HALF, 1, 8200), (FLOAT, 3, 33)]:
    options = {"dtype": dtype, "device": "cuda"}
    weights = [torch.randn(size, depth, **options) for size in (7, 33, 1)]
    rows, norm_weight = torch.randn(num_rows, depth, **options), torch.randn(depth, **options)
    linear(rows, weights, norm_weight, residual=torch.randn(num_rows, 41, **options))
    linear(rows, [weights[1], weights[1].clone()], is_gated=True)
torch.cuda.synchronize()
print("all calls ran")
"""


def test_no_access_out_of_bounds():
    finished = subprocess.run(
        [str(SANITIZER), "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", HOSTILE_CALLS],
        # Without torch's caching every tensor is an allocation of its own, whose bounds the tool knows.
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    assert "all calls ran" in finished.stdout
    assert "ERROR SUMMARY: 0 errors" in finished.stdout
