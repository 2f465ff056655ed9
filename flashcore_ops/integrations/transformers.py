"""Patches Hugging Face models, one instance at a time, so that their attention runs on FlashCore."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from flashcore_ops.errors import OptionError

# transformers looks for "flash", "sdpa" and "flex_attention" inside names, and treats a match as its own.
ATTENTION_NAME = "fcore"
_ORIGINAL_CONFIG = "_flashcore_original_config"

Model = TypeVar("Model", bound=nn.Module)


def patch_model(model: Model) -> Model:
    """Makes the attention of one model run on FlashCore; `flashcore models` prints the families that are served.

    The model and its submodules get a private copy of their config, so models made from the same config object,
    and copies made before, stay as they are. Nothing of it is saved with the model. Calls need
    `torch.no_grad()`; `generate` brings it along. The private copy, `model.config`, names FlashCore as its attention:
    to build an unpatched twin, use the original config object or call `restore_attention` first.

    Args:
        model: a transformers model with any head, or a wrapper around one, such as PEFT's; changed in place.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the family or a setting is not served; the model is unchanged.
        DtypeError: the weights are not float16, bfloat16 or float32; the model is unchanged.
        OptionError: the model is patched already.

    Source: https://huggingface.co/docs/transformers/attention_interface

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4)
        >>> model = LlamaModel(LlamaConfig(num_hidden_layers=1, **sizes))
        >>> is_patched(patch_model(model))
        True
    """
    from flashcore_ops.integrations.cache_guard import guard_caches
    from flashcore_ops.integrations.decoder_layer import fuse_modules
    from flashcore_ops.integrations.generate import keep_generation
    from flashcore_ops.integrations.model_checks import check_model

    if any(_ORIGINAL_CONFIG in vars(module) for module in model.modules()):
        raise OptionError.explain(
            "model",
            expected="a model that is not patched",
            got="one that is, or has a part that is",
            fix="Call restore_attention(model) first.",
        )
    check_model(model)
    register_fcore()
    memo: dict[int, Any] = {}
    copies = [(module, copy.deepcopy(config, memo)) for module, config in _configs(model)]
    for module, config in copies:
        setattr(module, _ORIGINAL_CONFIG, module.config)
        module.config = config
        config._attn_implementation = ATTENTION_NAME
    fuse_modules(model)
    guard_caches(model)
    keep_generation(model)
    return model


# What the call is named where users know it from; it serves every family too.
replace_llama_attention_with_flashcore = patch_model


def restore_attention(model: Model) -> Model:
    """Undoes `patch_model`: each module gets back the very config that it had.

    Settings that were changed on `model.config` in between belong to the private copy and go with it. Waits for
    generations on kept caches that are under way in other threads, open iterators of `stream_tokens` among them.

    Args:
        model: the patched model, or a wrapper around it; changed in place.

    Returns:
        The same model.

    Raises:
        OptionError: the model is not patched.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4)
        >>> config = LlamaConfig(num_hidden_layers=1, **sizes)
        >>> model = patch_model(LlamaModel(config))
        >>> restore_attention(model).config is config
        True
    """
    from flashcore_ops.integrations.cache_guard import unguard_caches
    from flashcore_ops.integrations.decoder_layer import unfuse_modules
    from flashcore_ops.integrations.generate import unkeep_generation

    patched = [module for module in model.modules() if _ORIGINAL_CONFIG in vars(module)]
    if not patched:
        raise OptionError.explain(
            "model",
            expected="a patched model",
            got=f"a {type(model).__name__} that is not",
            fix="Ask is_patched(model) first.",
        )
    # First, since it waits for generations under way in other threads.
    unkeep_generation(model)
    # By identity, since a wrapper that was put on later holds the private copy too, but not the original.
    originals = {id(module.config): getattr(module, _ORIGINAL_CONFIG) for module in patched}
    for module, config in _configs(model):
        module.config = originals.get(id(config), config)
    for module in patched:
        delattr(module, _ORIGINAL_CONFIG)
    unguard_caches(model)
    unfuse_modules(model)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether the model's attention runs on FlashCore by `patch_model`.

    Example:
        >>> is_patched(nn.Linear(1, 1))
        False
    """
    return any(
        _ORIGINAL_CONFIG in vars(module) and config._attn_implementation == ATTENTION_NAME
        for module, config in _configs(model)
    )


def register_fcore() -> None:
    """Makes `fcore` known to transformers; more than once does no harm.

    Example:
        >>> register_fcore()
        >>> from transformers import AttentionInterface
        >>> "fcore" in AttentionInterface()
        True
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    from flashcore_ops.integrations.attention import fcore_attention
    from flashcore_ops.integrations.masks import create_fcore_mask

    AttentionInterface.register(ATTENTION_NAME, fcore_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, create_fcore_mask)


def _configs(model: nn.Module) -> list[tuple[Any, Any]]:
    """Every module of the model that holds a transformers config, with that config."""
    from transformers import PreTrainedConfig

    held = ((module, vars(module).get("config")) for module in model.modules())
    return [(module, config) for module, config in held if isinstance(config, PreTrainedConfig)]
