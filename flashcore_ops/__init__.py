"""FlashCore: inference attention for LLaMA-family models, in Triton, as `torch.library` ops.

Importing this package registers `torch.ops.flashcore`.
"""

from flashcore_ops.errors import FlashCoreError
from flashcore_ops.functional import (
    append_kv_,
    attention,
    attention_with_lse,
    linear,
    rope_append_attention,
)
from flashcore_ops.integrations.transformers import (
    is_patched,
    replace_llama_attention_with_flashcore,
    restore_attention,
)
from flashcore_ops.kv_cache import attention_with_kv_cache

__version__ = "0.1.0"

__all__ = [
    "FlashCoreError",
    "append_kv_",
    "attention",
    "attention_with_kv_cache",
    "attention_with_lse",
    "is_patched",
    "linear",
    "replace_llama_attention_with_flashcore",
    "restore_attention",
    "rope_append_attention",
]
