"""Small eager calls in torch's own autograd nodes: at few tokens the time of a Python Function and of checks shows.

With dropout, and beside 16-bit bases, they keep a little more than the Function does, within the bounds of the kernel's
way; where it would refuse a second differentiation they allow it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import dispatch
from ..backends.request import Product
from .autograd import rows_of


def multiply(p: Product, training: bool) -> Tensor | None:
    """y [..., N] of an eager call of plain tensors, or None where it is not small, or not one that needs no checks.

    The operators find wrong shapes, dtypes and devices, and the call is then left to those who put them into words.
    """
    x, bias, dropout_p = p.x, p.bias, p.dropout_p
    small = dispatch.small_of(x)
    if small is None or type(p.scale) is not float or type(dropout_p) is not float or torch.is_autocast_enabled("cpu"):
        return None
    if bias is not None and bias.shape != p.w.shape[:1]:  # type: ignore[union-attr]
        return None
    dims = x.dim()
    if dims != 2:
        if dims == 0:
            return None
        p = p._replace(x=rows_of(x))
    if not 0 <= dropout_p < 1:
        return None
    try:
        y_mn = small(p, training and dropout_p > 0)
    except RuntimeError:
        return None
    return y_mn if y_mn is None or dims == 2 else y_mn.view([*x.shape[:-1], y_mn.shape[1]])
