"""FlashCore and its peers, called alike. Each declares whether it can run, and why not."""

from __future__ import annotations

from torch.nn.attention import SDPBackend

from bench.peers.flashcore import FlashCore, FlashCorePortable
from bench.peers.flashinfer import FlashInferPaged, FlashInferRagged
from bench.peers.flex import FlexAttention
from bench.peers.implementation import Call, Implementation
from bench.peers.sdpa import HuggingFaceStaticCache, Sdpa

__all__ = ["FLASHCORE", "IMPLEMENTATIONS", "PEERS", "SHOWN", "Call", "Implementation"]

FLASHCORE = FlashCore()
PEERS: tuple[Implementation, ...] = (
    Sdpa("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
    Sdpa("sdpa_flash", SDPBackend.FLASH_ATTENTION, has_lower_right=True),
    Sdpa("sdpa_efficient", SDPBackend.EFFICIENT_ATTENTION, repeats_heads=True, has_lower_right=True),
    Sdpa("sdpa_cudnn_packed", SDPBackend.CUDNN_ATTENTION, is_packed=True),
    Sdpa("sdpa_flash_packed", SDPBackend.FLASH_ATTENTION, is_packed=True),
    FlexAttention(),
    HuggingFaceStaticCache(),
    FlashInferPaged(),
    FlashInferRagged(),
)
# The columns of tables.
SHOWN: tuple[Implementation, ...] = (FLASHCORE, FlashCorePortable(), *PEERS)
IMPLEMENTATIONS: tuple[Implementation, ...] = (*SHOWN, FlashCore("flashcore_no_range", has_range=False))
