"""FlashCore: inference attention for LLaMA-family models, in Triton, as `torch.library` ops.

Importing this package registers `torch.ops.flashcore`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    patch_model,
    replace_llama_attention_with_flashcore,
    restore_attention,
)
from flashcore_ops.kv_cache import attention_with_kv_cache

if TYPE_CHECKING:
    from flashcore_ops.integrations.static_cache import make_static_cache
    from flashcore_ops.kept_steps import free_kept_caches, warmup

__version__ = "0.1.0"

__all__ = [
    "FlashCoreError",
    "append_kv_",
    "attention",
    "attention_with_kv_cache",
    "attention_with_lse",
    "free_kept_caches",
    "is_patched",
    "linear",
    "make_static_cache",
    "patch_model",
    "replace_llama_attention_with_flashcore",
    "restore_attention",
    "rope_append_attention",
    "warmup",
]

# These build on transformers, which takes seconds to import and may be absent.
_LATE = {
    "free_kept_caches": "flashcore_ops.kept_steps",
    "make_static_cache": "flashcore_ops.integrations.static_cache",
    "warmup": "flashcore_ops.kept_steps",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATE[name]), name)
