"""Hugging Face attention masks as FlashCore reads them.

A causal mask, windowed or not, with padding on the left only, travels as int32 `[B, 1, 1, 2]`: the (start, end)
of each row's `kv_range`. Packed sequences travel as their bounds, or while tracing as a flag (packing.py).
transformers hands 4-D masks on untouched, so this channel reaches the attention function through the model,
`generate` and accelerate's hooks alike. Any other mask travels as uint8 `[B, 1, Q, S]` and takes the dense path; a
user's own 4-D mask is bool or float, so uint8 is taken to be ours.

No token sees padding to its right, so causality alone would do there. But Hugging Face's `generate` goes on from the
padding's own rows, and those see no padding in its attention: the dense path gives the same. While tracing there is
no other path, and these rows have no meaning.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    causal_mask_function,
    prepare_padding_mask,
    sliding_window_causal_mask_function,
)
from transformers.utils.import_utils import is_tracing

from flashcore_ops.errors import CapacityError, MaskError, UnsupportedModelError
from flashcore_ops.integrations.call_checks import mark_channel
from flashcore_ops.integrations.closures import is_same_function
from flashcore_ops.integrations.dense import create_dense_mask
from flashcore_ops.integrations.packing import packed_bounds, packed_numbers, single_sequences
from flashcore_ops.integrations.static_cache import check_capacity

MaskFunction = Callable[..., Tensor]

NOT_LEFT_PADDING = "the attention mask has right padding or holes"
NOT_CAUSAL = "the mask is not plainly causal (a custom mask function, bidirectional attention)"
HOLES = "the attention mask has holes, padding between tokens"
_FIX = "Only causal masks with padding around the tokens can be served here: run this batch without torch.compile."

# An end beyond every slot. transformers 5.17 tells of fewer slots than a draft model's sliding cache holds, and the
# newest tokens are the last of them all the same.
_ALL_SLOTS = 2**31 - 1
# By window, the shape of the last mask that was found left-padded.
Records = dict[int | None, tuple[int, int]]
# By the identity of a model's config, which cannot be hashed.
_left_padded: dict[int, Records] = {}


def create_fcore_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: PreTrainedConfig | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of `fcore`; transformers calls it once a forward pass for each kind of layer.

    Args:
        batch_size, q_length, kv_length: B, Q and S of the attention to come.
        q_offset: position of the first query token; an int64 scalar on the device for a static cache.
        kv_offset: position of slot 0; above 0 once a sliding-window cache has dropped tokens.
        mask_function: whether a query position may see a key position.
        attention_mask: bool `[B, L]` over positions from 0, True for tokens and False for padding.
        local_size: the sliding window in tokens, None for none.
        config: the config of the model that asks.
        use_vmap: whether mask_function has a user's own parts.
        device: where the result lives.

    Returns:
        None if causality and window alone hide slots, else the int32 channel or the dense path's mask.

    Raises:
        MaskError: attention_mask is not `[B, L]`.
        UnsupportedModelError: torch.jit.trace is at work.
        CapacityError: the tokens do not fit into the static cache, where the host knows its length, or a static cache
            shorter than the window has dropped tokens that the window still shows. transformers asks for the mask
            before it writes to the cache, so nothing is lost.

    Source: transformers.masking_utils.sdpa_mask, whose arguments these are.

    Example:
        >>> mask = torch.tensor([[True, True, True], [False, True, True]])
        >>> create_fcore_mask(batch_size=2, q_length=3, kv_length=8, attention_mask=mask)[:, 0, 0].tolist()
        [[0, 3], [1, 3]]
    """
    place: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "device": device,
    }
    content = {"mask_function": mask_function, "attention_mask": attention_mask, "use_vmap": use_vmap}
    plain = causal_mask_function if local_size is None else sliding_window_causal_mask_function(local_size)
    _check_not_scripted()
    is_traced = is_tracing(attention_mask) or is_tracing(packed_numbers(mask_function))
    _check_window(q_offset, kv_offset, local_size)
    # Closures cannot be compared while tracing, but the config says what they are there too.
    is_causal = getattr(config, "is_causal", True)
    if use_vmap or not is_causal or not (is_traced or is_same_function(mask_function, plain)):
        bounds = None if use_vmap or is_traced else packed_bounds(mask_function, plain, q_length, kv_length)
        return create_dense_mask(NOT_CAUSAL, **place, **content) if bounds is None else mark_channel(bounds)

    # The sum is a new tensor: a static cache's q_offset is its live counter.
    end = q_offset + q_length - kv_offset
    fills_slots = not isinstance(end, Tensor) and end == kv_length
    if is_traced and mask_function is not causal_mask_function:
        is_plain = _is_same_mask(mask_function, plain, **place)
        if attention_mask is None and fills_slots:
            return single_sequences(is_plain)
        torch._assert_async(is_plain, f"flashcore: {NOT_CAUSAL}. {_FIX}")
    if not is_traced:
        _check_capacity(end, q_length, kv_length)
    if attention_mask is None:
        return None if fills_slots else pack_range(torch.zeros(batch_size, dtype=torch.int64, device=device), end)

    _check_padding_mask(attention_mask, batch_size)
    padding_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    tokens = padding_mask[:, kv_offset : kv_offset + kv_length]
    if is_traced:
        # A prompt's alone: a step's mask that hides the new tokens of all rows was not extended for them.
        is_prompt = (q_offset == 0) & (attention_mask.shape[1] >= q_length)
        tokens = tokens | (_right_padding(tokens, end) & is_prompt)
    start, is_left_padded = _left_padding(tokens, end)
    if is_traced:
        torch._assert_async(is_left_padded, f"flashcore: {HOLES}. {_FIX}")
        return pack_range(start, end)
    if not _is_left_padded(is_left_padded, attention_mask, q_length, _records_of(config), local_size):
        return create_dense_mask(NOT_LEFT_PADDING, **place, **content)
    return pack_range(start, _ALL_SLOTS if fills_slots else end)


def _is_same_mask(
    mask_function: MaskFunction,
    plain: MaskFunction,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    device: torch.device | str,
) -> Tensor:
    """Whether two masks agree everywhere, found by the device: closures cannot be compared while tracing.

    Without a cache, transformers adds its packed-sequence mask to every traced call, packed or not.
    """
    indices = (
        torch.arange(batch_size, device=device)[:, None, None, None],
        torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device),
        torch.arange(q_length, device=device)[None, None, :, None] + q_offset,
        torch.arange(kv_length, device=device)[None, None, None, :] + kv_offset,
    )
    return (mask_function(*indices) == plain(*indices)).all()


def _check_not_scripted() -> None:
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise UnsupportedModelError.explain(
            "torch.jit.trace",
            expected="torch.compile or torch.export, which keep the device's checks of masks",
            got="torch.jit.trace, which loses them",
            fix="Trace another implementation: call restore_attention(model) first.",
        )


def _check_window(q_offset: int | Tensor, kv_offset: int, window: int | None) -> None:
    # Only layers that drop tokens have an offset, and those count on the host.
    if window is None or kv_offset == 0 or isinstance(q_offset, Tensor):
        return
    if kv_offset > max(0, q_offset - window + 1):
        raise CapacityError.explain(
            "past_key_values",
            # Without lengths, which torch.compile cannot put into a text.
            expected=f"room for the {window} tokens of the sliding window, or for all that come",
            got="a cache that has dropped some of them",
            fix="Make the static cache with a larger max_cache_len.",
        )


def _check_capacity(end: int | Tensor, q_length: int, kv_length: int) -> None:
    # A prefill can afford to wait for the length, a decode step cannot.
    if q_length == 1 and isinstance(end, Tensor) and _reading_waits(end):
        return
    check_capacity(int(end), kv_length)


def _check_padding_mask(attention_mask: Tensor, batch_size: int) -> None:
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size:
        raise MaskError.explain(
            "attention_mask",
            expected=f"[B, L] with B = {batch_size}, or a 4-D mask",
            got=f"{list(attention_mask.shape)}",
            fix="Pass what the tokenizer returns, one row for each sequence of the batch.",
        )


def _left_padding(padding_mask: Tensor, end: int | Tensor) -> tuple[Tensor, Tensor]:
    """First slot `[B]` of each row's tokens, and whether all slots before `end` are padding first, then tokens."""
    slots = torch.arange(padding_mask.shape[1], device=padding_mask.device)
    tokens = padding_mask & (slots < end)
    start = end - tokens.sum(dim=-1)
    return start, (tokens == ((slots >= start[:, None]) & (slots < end))).all()


def _right_padding(padding_mask: Tensor, end: int | Tensor) -> Tensor:
    """Which slots are at or after a row's last token before `end`, if it has one: no token before sees them."""
    slots = torch.arange(padding_mask.shape[1], device=padding_mask.device)
    num_so_far = (padding_mask & (slots < end)).cumsum(dim=-1)
    return (num_so_far > 0) & (num_so_far == num_so_far[:, -1:])


def _records_of(config: PreTrainedConfig | None) -> Records:
    """One model's records. They go when its config does, before another object can have its identity."""
    key = id(config)
    if key not in _left_padded:
        _left_padded[key] = {}
        if config is not None:
            weakref.finalize(config, _left_padded.pop, key, None)
    return _left_padded[key]


def _is_left_padded(
    is_left_padded: Tensor, attention_mask: Tensor, q_length: int, records: Records, window: int | None
) -> bool:
    """Reads the flag, except at the decode steps that follow a left-padded mask, where reading it has a price.

    By its shape such a step goes on with the same batch, and is left-padded too. Should it be another batch with
    another mask, the device raises.
    """
    batch_size, width = attention_mask.shape
    is_successor = records.get(window) in ((batch_size, width), (batch_size, width - 1))
    if q_length == 1 and is_successor and _reading_waits(attention_mask):
        torch._assert_async(is_left_padded, f"flashcore: {NOT_LEFT_PADDING}, which its prefill had not.")
    elif not is_left_padded:
        records.pop(window, None)
        return False
    records[window] = (batch_size, width)
    return True


def _reading_waits(tensor: Tensor) -> bool:
    """Whether the host has to wait for all queued work before it can look at the tensor."""
    return tensor.device.type != "cpu"


def pack_range(start: Tensor, end: int | Tensor) -> Tensor:
    """The channel int32 `[B, 1, 1, 2]` of the slots from start `[B]` to before end.

    Example:
        >>> pack_range(torch.tensor([0, 1]), end=3)[:, 0, 0].tolist()
        [[0, 3], [1, 3]]
    """
    end = end.expand_as(start) if isinstance(end, Tensor) else torch.full_like(start, end)
    return mark_channel(torch.stack((start, end), dim=-1).to(torch.int32)[:, None, None])
