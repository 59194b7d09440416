"""Calls of few tokens on a CPU in torch's own differentiable operators: a Python Function costs more than products.

    y = x wᵀ + bias + scale · (D(x) aᵀ) bᵀ

The measurements behind the bounds are in benchmarks/HARDWARE.md, "Products on a CPU".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import masks
from .request import Product

# Elements of x up to which torch's own nodes are faster than a Function, for all that they add an [M, K] gradient more.
_SMALL = 1 << 18
# Elements of x up to which more than x and z may be kept for that: with dropout the mask and the masked x, beside a
# base of 16 bits x in float32, or these two. PEFT keeps the same, of any size. y has no more for float32 products.
_KEPT = 1 << 17
# Most elements of float32 a and b, times M + 16: above it 16-bit products win.
_WIDE_WORK = 1 << 23
# Most tokens, and elements of a and b, where these are of 16 bits: they are cast and kept in float32, 64 kB at most.
# It pays only where torch would leave their products to oneDNN.
_CAST_TOKENS = 32
_CAST = 1 << 14
_WITHOUT_ONEDNN = 1 << 12
# Elements of y up to which, in 16 bits, a product made and added is faster than one accumulated into y.
_ADDED = 1 << 16


def is_small(p: Product) -> bool:
    """Whether :func:`small` takes a call of such sizes and dtypes, x being [..., K]; in training."""
    x = p.x
    if x.dtype.itemsize == 2 and _is_wide(p):
        return True
    return p.a.dtype is x.dtype and x.numel() <= (_KEPT if p.dropout_p > 0 else _SMALL)


def small(p: Product, drops: bool) -> Tensor | None:
    """y [M, N] of x [M, K] on a CPU in torch's own differentiable operators; None where the verbs are to be called.

    Kept are z and x, or with dropout the mask and the masked x: in float32 where the products are, then a and b too if
    they had to be cast. Where it ``drops``, it draws the seed.
    """
    x, w, a, b, scale = p.x, p.w, p.a, p.b, p.scale
    # torch's operators say nothing where some operands are on the meta device.
    if not (w.is_cpu and a.is_cpu and b.is_cpu and a.dim() == 2 == b.dim()):  # type: ignore[union-attr]
        return None
    dtype, r = x.dtype, a.shape[0]
    half = dtype.itemsize == 2
    wide = half and _is_wide(p)
    if not wide:
        # Not by is_small: here a call of a function shows.
        if not r or a.dtype is not dtype or x.numel() > (_KEPT if drops else _SMALL):
            return None
        # Of 16 bits, only what oneDNN reads within its bounds: whole_rows, new_middle. dy is read as nn.Linear's is.
        if not dtype.is_floating_point or (half and (r % 8 or not x.is_contiguous())):
            return None
    # The base first: autograd goes backward through the newest nodes first, and is faster ending with dy w.
    y = F.linear(x, w, p.bias)  # type: ignore[arg-type]
    if wide:
        x, a, b = x.float(), a.float(), b.float()
    if drops:
        x = x * masks.factors(p.dropout_p, x)
    z = F.linear(x, a)
    if not wide and (not half or y.numel() > _ADDED):
        return y.addmm_(z, b.t(), alpha=scale)
    update = F.linear(z if scale == 1 else z * scale, b)
    # Not left to add_, which broadcasts.
    return y.add_(update) if y.shape == update.shape else None


def _is_wide(p: Product) -> bool:
    """Whether float32 low-rank products are faster beside the base's: oneDNN takes long to begin one of 16 bits."""
    x, a, b = p.x, p.a, p.b
    elements, k = x.numel(), x.shape[-1]
    if not a.numel() or not k or a.dtype is not b.dtype or elements > _KEPT or not x.is_contiguous():
        return False
    m, adapters = elements // k, a.numel() + b.numel()
    if m * b.shape[0] > _KEPT:
        return False
    if a.dtype is torch.float32:
        return adapters * (m + 16) <= _WIDE_WORK
    return a.dtype is x.dtype and m <= _CAST_TOKENS and adapters <= _CAST and m * a.numel() > _WITHOUT_ONEDNN
