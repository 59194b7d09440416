"""The two verbs as plain torch: specification and oracle, never optimised.

    lora_matmul   z = scale · D(x) aᵀ,   y = x wᵀ + z bᵀ + bias          the mask on the input
                  z = scale · x aᵀ,      y = x wᵀ + D(z bᵀ) + bias       the mask on the product
    rank_grad     g = pᵀ D(q)

Forward:   (y, z)  = lora_matmul(x, w, a, b)               mask on the input
Backward:  (dx, t) = lora_matmul(dy, wᵀ, bᵀ, aᵀ)           mask on the product
           da = rank_grad(t, x)                            mask on x
           db = rank_grad(dy, z)                           no mask

Run in float64 on the same rounded inputs it is the oracle; run in the tested dtype, the baseline.

Between the products of an MLP stands the gated activation h = act(g) u, with dg = dh u act'(g) and du = dh act(g).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import Dropout
from .request import Kernel, Product, new_middle, runs_anything, whole_rows


def lora_matmul(p: Product) -> tuple[Tensor | None, Tensor]:
    """x [M, K], w [N, K] or None for z alone, a [R, K], b [N, R], bias [N] → y [M, N], z [M, R]."""
    x = whole_rows(p.x)
    a, b = p.a.to(x.dtype), p.b.to(x.dtype)
    z = new_middle(x, a.shape[0]).copy_(p.scale * (dropped(x, p.mask_x) @ a.T))
    if p.w is None:
        return None, z
    y = x @ p.w.T + dropped(z @ b.T, p.mask_product)
    return (y if p.bias is None else y + p.bias), z


def rank_grad(p: Tensor, q: Tensor, *, dtype: torch.dtype, dropout: Dropout | None = None) -> Tensor:
    """p [M, P], q [M, Q] → pᵀ D(q) [P, Q] in ``dtype``."""
    return (whole_rows(p.T) @ dropped(q, dropout)).to(dtype)


def dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    """D(x), or x itself without dropout."""
    if dropout is None:
        return x
    return torch.where(dropout.keep(*x.shape), x * dropout.rescale, 0)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_backward, approximate="tanh"),
}


def swiglu(g: Tensor, u: Tensor, activation: str) -> Tensor:
    """h = act(g) u."""
    return ACTIVATIONS[activation](g) * u


def swiglu_gradients(g: Tensor, u: Tensor, dh: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dg = dh u act'(g) and du = dh act(g)."""
    return _DERIVATIVES[activation](dh * u, g), dh * ACTIVATIONS[activation](g)


LORA_MATMUL = (Kernel("reference", runs_anything, lora_matmul),)
RANK_GRAD = (Kernel("reference", runs_anything, rank_grad),)
