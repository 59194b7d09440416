"""Calls of few tokens on a CPU in torch's own differentiable operators: there a Python Function outlasts the products.

    y = x wᵀ + bias + scale · (D(x) aᵀ) bᵀ

The measurements behind the bounds are in benchmarks/HARDWARE.md, "Products on a CPU".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import masks
from .request import Product

# Elements of x up to which torch's own nodes are faster than a Function, for all that they add an [M, K] gradient more;
# with dropout bytes of x, since they keep the mask and the masked x.
_SMALL = 1 << 18
_SMALL_DROPPED = 1 << 16
# The same of x and of y where the low-rank products are float32 beside a base of 16 bits: 256 kB are kept at most.
_WIDE = 1 << 16
_WIDE_DROPPED = 1 << 15
# Most elements of float32 a and b, times M + 16: above it 16-bit products win.
_WIDE_WORK = 1 << 23
# Most tokens, and elements of a and b, where these are of 16 bits: they are cast and kept in float32, 64 kB at most.
# It pays only where torch would leave their products to oneDNN.
_CAST_TOKENS = 32
_CAST = 1 << 14
_WITHOUT_ONEDNN = 1 << 12


def is_small(x: Tensor, drops: bool) -> bool:
    """Whether x has so few elements that :func:`small` is the faster way."""
    return x.nbytes <= _SMALL_DROPPED if drops else x.numel() <= _SMALL


def small(p: Product, drops: bool) -> Tensor | None:
    """y [M, N] of x [M, K] on a CPU in torch's own differentiable operators; None where the verbs are to be called.

    At few tokens the time of a Python Function shows. x and z are kept, as the verbs' caller keeps them; beside 16 bits
    perhaps in float32, x too. Where it ``drops``, it draws the seed.
    """
    x, w, a, b, scale = p.x, p.w, p.a, p.b, p.scale
    # torch's operators say nothing where some operands are on the meta device.
    if not (w.is_cpu and a.is_cpu and b.is_cpu and a.dim() == 2 == b.dim()):  # type: ignore[union-attr]
        return None
    dtype, r = x.dtype, a.shape[0]
    half = dtype.itemsize == 2
    wide = half and _is_wide(p, drops)
    if not wide:
        # Not by is_small: here a call of a function shows.
        if not r or a.dtype is not dtype or (x.nbytes > _SMALL_DROPPED if drops else x.numel() > _SMALL):
            return None
        # Of 16 bits, only what oneDNN reads within its bounds: whole_rows, new_middle.
        if not dtype.is_floating_point or (half and (r % 8 or not x.is_contiguous())):
            return None
    # The base first: autograd goes backward through the newest nodes first, and is faster ending with dy w.
    y = F.linear(x, w, p.bias)  # type: ignore[arg-type]
    if wide:
        x, a, b = x.float(), a.float(), b.float()
    if drops:
        x = x * masks.factors(p.dropout_p, x)
    z = F.linear(x, a)
    if not half or y.numel() > _WIDE:
        return y.addmm_(z, b.t(), alpha=scale)
    update = F.linear(z if scale == 1 else z * scale, b)
    # Not left to add_, which broadcasts.
    return y.add_(update) if y.shape == update.shape else None


def _is_wide(p: Product, drops: bool) -> bool:
    """Whether float32 low-rank products are faster beside the base's: oneDNN takes long to begin one of 16 bits."""
    x, a, b = p.x, p.a, p.b
    m, k = x.shape
    most = _WIDE_DROPPED if drops else _WIDE
    if not a.numel() or a.dtype is not b.dtype or m * k > most or m * b.shape[0] > most or not x.is_contiguous():
        return False
    adapters = a.numel() + b.numel()
    if a.dtype is torch.float32:
        return adapters * (m + 16) <= _WIDE_WORK
    return a.dtype is x.dtype and m <= _CAST_TOKENS and adapters <= _CAST and m * a.numel() > _WITHOUT_ONEDNN
