"""Imports the ops and holds one call of attention against torch's own.

Usage: python -m flashcore_ops.deployment.on_host.smoke DEVICE
"""

from __future__ import annotations

import sys

import torch

from flashcore_ops import attention

# Far above float32 rounding of numbers near 1, far below what a wrong mask or scale would do.
TOLERANCE = 1e-4


def main(device: str) -> int:
    """Prints one line; 0 if the ops work on `device` (cpu or cuda), else 1."""
    if device == "cuda" and not torch.cuda.is_available():
        built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        print(f"nvidia-smi sees a GPU and torch {torch.__version__} (built for {built_for}) does not")
        return 1
    error = attention_error(torch.device(device))
    print(f"torch {torch.__version__}, attention on {device}, largest difference from torch's sdpa {error:.1e}")
    return 0 if error <= TOLERANCE else 1


def attention_error(device: torch.device) -> float:
    """The largest absolute difference between our causal attention and torch's, in float32.

    Example:
        >>> attention_error(torch.device("cpu")) < TOLERANCE
        True
    """
    generator = torch.Generator(device).manual_seed(0)
    # [1, 4, 111, 64]
    query, key, value = (torch.randn(1, 4, 111, 64, device=device, generator=generator) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return float((attention(query, key, value) - expected).abs().max())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
