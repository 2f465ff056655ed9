"""Triton kernels and their launchers. They know tensors and strides, not models, ops or dispatch.

Names in kernels: `i_` program index, `o_` offsets, `m_` mask, `p_` pointers, `b_` loaded block. Sizes: B batch, Hq and
Hkv heads, G = Hq / Hkv, Q query tokens, S KV slots, D and Dv head dims; tiles BLOCK_M rows, BLOCK_N slots, BLOCK_D,
BLOCK_DV.
"""
