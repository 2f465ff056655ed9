"""Indices of tensors in a layout, for the kernels in Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def offsets(dim: gl.constexpr, size: gl.constexpr, layout: gl.constexpr):
    """0 to size - 1 along one dimension of three."""
    if dim == 0:
        return gl.arange(0, size, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    elif dim == 1:
        return gl.arange(0, size, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    else:
        return gl.arange(0, size, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
