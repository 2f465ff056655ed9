"""torch's FlexAttention, compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.cases import Inputs
from bench.peers.implementation import Call


def block_mask_of(inputs: Inputs) -> BlockMask | None:
    """Which blocks of slots rows see; None where all rows see all slots, as FlexAttention is fastest so."""
    case = inputs.case
    if not case.is_causal or (case.query_len == 1 and not case.window and not case.padding):
        return None
    offset = case.kv_len - case.query_len
    # Inductor's CPU kernels refuse a mask function that holds a view.
    starts = inputs.kv_range[:, 0].contiguous()

    def is_visible(batch: Tensor, head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        visible = slot <= row + offset
        if case.window:
            visible = visible & (slot > row + offset - case.window)
        if case.padding:
            visible = visible & (slot >= starts[batch])
        return visible

    batch = case.batch if case.padding else None
    return create_block_mask(is_visible, batch, None, case.query_len, case.kv_len, device=inputs.query.device)


@dataclass(frozen=True)
class FlexAttention:
    """FlexAttention in its default configuration, compiled for the case's own shapes.

    The first call compiles, which is the one that is checked and not timed.
    """

    name: str = "flex"

    def why_not(self, inputs: Inputs) -> str | None:
        return None

    def prepare(self, sets: Sequence[Inputs]) -> list[Call]:
        attend = partial(
            torch.compile(flex_attention, dynamic=False),
            block_mask=block_mask_of(sets[0]),
            enable_gqa=sets[0].case.group > 1,
        )
        return [partial(attend, inputs.query, inputs.key, inputs.value) for inputs in sets]
