"""A product in torch's plain operators, for ``torch.jit.trace``.

    y = x Wᵀ + bias + scale · D(x) Aᵀ Bᵀ        and DoRA's

What a trace records it replays at other sizes. The operators of this package take x as [M, K], and the sizes by which
[M, N] gets x's leading dimensions back would be constants of the trace; ``F.linear`` has none.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.request import Product
from ..dtypes import wide_of
from .base import StoredWeight, opened, without_autocast


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` records what is called."""
    return torch._C._get_tracing_state() is not None


def multiply(p: Product, training: bool, magnitude: Tensor | None = None) -> Tensor:
    """y [..., N] of operands that nobody has checked: x [..., K], dropout without a seed, DoRA's magnitude or None."""
    run = _lora if magnitude is None else functools.partial(_dora, magnitude)
    if not isinstance(p.w, StoredWeight):
        return run(p, training)
    dtype = p.w.compute_dtype(p.x)
    with without_autocast(p.x.device.type):
        bias = None if p.bias is None else p.bias.to(dtype)
        dense = p._replace(x=p.x.to(dtype), w=opened(p.w, dtype), bias=bias)
        return run(dense, training).to(p.x.dtype)


def _lora(p: Product, training: bool) -> Tensor:
    y: Tensor = F.linear(p.x, p.w, p.bias)  # type: ignore[arg-type]
    return y + _update(p, F.dropout(p.x, p.dropout_p, training))


def _dora(magnitude: Tensor, p: Product, training: bool) -> Tensor:
    """y = x Wᵀ + bias + (g - 1) ⊙ D(x) Wᵀ + g ⊙ scale · D(x) Aᵀ Bᵀ."""
    wide = wide_of(p.x.dtype)
    norm = torch.linalg.vector_norm(p.w.to(wide) + p.scale * (p.b.to(wide) @ p.a.to(wide)), dim=1)  # type: ignore[union-attr]
    # A trace records no no_grad, but this.
    g = (magnitude / norm.detach()).to(p.x.dtype)
    dropped = F.dropout(p.x, p.dropout_p, training)
    y: Tensor = F.linear(p.x, p.w, p.bias)  # type: ignore[arg-type]
    of_dropped: Tensor = F.linear(dropped, p.w)  # type: ignore[arg-type]
    total: Tensor = y + (g - 1) * of_dropped + g * _update(p, dropped)
    return total


def _update(p: Product, dropped: Tensor) -> Tensor:
    """scale · D(x) Aᵀ Bᵀ [..., N]."""
    a, b = p.a.to(dropped.dtype), p.b.to(dropped.dtype)
    update: Tensor = p.scale * F.linear(F.linear(dropped, a), b)
    return update
