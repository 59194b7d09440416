"""The two verbs on the vendor's GEMM, with the low-rank product added in place: no M×N temporary.

    on a CPU     z = x aᵀ, times scale in place;   y = z bᵀ + bias, to which the GEMM adds x wᵀ
    elsewhere    z = scale · x aᵀ in one GEMM;     y = x wᵀ + bias, to which the GEMM adds z bᵀ

Runs on any device and never refuses: the default on a CPU and the safety net on a GPU. Against the frozen GEMM it
costs one read of x (for z), and one read and one write of y. With dropout the masked operand exists a few rows at a
time. On a CPU the order and form of the products are those that were fastest: benchmarks/HARDWARE.md. Which these are
differs between shapes and dtypes, so the kernels have forms that are of use there (``library``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import wide_of
from . import masks
from .dropout import Dropout
from .request import Product, new_middle, whole_rows


def lora_matmul(p: Product, *, addmm: bool = False, last: bool = False) -> tuple[Tensor | None, Tensor]:
    """x [M, K], w [N, K] or None for z alone, a [R, K], b [N, R], bias [N] → y [M, N], z [M, R].

    On a CPU z is made by one GEMM with alpha where ``addmm``, and z bᵀ added ``last``; elsewhere both hold always.
    """
    x, w, a, b, scale = p.x, p.w, p.a, p.b, p.scale
    if not x.is_cpu:
        addmm = last = True
    dtype = x.dtype
    half = dtype.itemsize == 2
    if half:
        x = whole_rows(x)
    if a.dtype is not dtype:
        a, b = a.to(dtype), b.to(dtype)
    dropout = None if p.seed is None else Dropout(p.dropout_p, p.seed)
    if addmm:
        z = _scaled_middle(x, a, scale, None if p.on_product else dropout)
    else:
        if dropout is None or p.on_product:
            z = F.linear(x, a)
        else:
            z = _dropped_middle(x, a, dropout)
            scale *= dropout.rescale
        if scale != 1:
            z.mul_(scale)
        if half and a.shape[0] % 8:
            z = new_middle(x, a.shape[0]).copy_(z)
    if w is None:
        return None, z
    if last:
        return product_last(x, w, z, b, p.bias, dropout if p.on_product else None), z
    if dropout is None or not p.on_product:
        return F.linear(z, b, p.bias).addmm_(x, w.T), z
    y = _kept_product(z, b.T, dropout).addmm_(x, w.T, beta=dropout.rescale)
    return y if p.bias is None else y.add_(p.bias), z


def _scaled_middle(x: Tensor, a: Tensor, scale: float, dropout: Dropout | None) -> Tensor:
    """z = scale · D(x) aᵀ, scaled by the GEMM."""
    z = new_middle(x, a.shape[0])
    if dropout is None:
        return z.addmm_(x, a.T, beta=0, alpha=scale)
    for rows in dropout.chunks(x):
        z[rows].addmm_(masks.kept(dropout, x[rows], rows.start), a.T, beta=0, alpha=scale * dropout.rescale)
    return z


def product_last(x: Tensor, w: Tensor, z: Tensor, b: Tensor, bias: Tensor | None, dropout: Dropout | None) -> Tensor:
    """y = x wᵀ + bias, then D(z bᵀ) added to it."""
    y = F.linear(x, w, bias)
    if dropout is None:
        return y.addmm_(z, b.T)
    for rows in dropout.chunks(y):
        y[rows].add_(masks.kept_(dropout, z[rows] @ b.T, rows.start), alpha=dropout.rescale)
    return y


def _dropped_middle(x: Tensor, a: Tensor, dropout: Dropout) -> Tensor:
    """(keep ⊙ x) aᵀ, a few rows at a time."""
    if dropout.at_once(x):
        return F.linear(masks.kept(dropout, x), a)
    z = x.new_empty(x.shape[0], a.shape[0])
    for rows in dropout.chunks(x):
        torch.mm(masks.kept(dropout, x[rows], rows.start), a.T, out=z[rows])
    return z


def _kept_product(z: Tensor, b_rn: Tensor, dropout: Dropout) -> Tensor:
    """keep ⊙ (z b_rn): each row masked while the caches still hold it."""
    product = z.new_empty(z.shape[0], b_rn.shape[1])
    for rows in dropout.chunks(product):
        masks.kept_(dropout, torch.mm(z[rows], b_rn, out=product[rows]), rows.start)
    return product


def _kept_product_and_grad(
    t: Tensor, a: Tensor, x: Tensor, dropout: Dropout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """keep ⊙ (t a), and tᵀ D(x) in ``dtype``: the bits of the mask are made once for both."""
    product = torch.empty_like(x, memory_format=torch.contiguous_format)
    if dropout.at_once(x):
        masked = masks.kept_both(dropout, x, torch.mm(t, a, out=product))
        return product, as_dtype(torch.mm(t.T, masked), dtype).mul_(dropout.rescale)
    grad = torch.zeros(a.shape, dtype=wide_of(x.dtype), device=x.device)
    for rows in dropout.chunks(x):
        masked = masks.kept_both(dropout, x[rows], torch.mm(t[rows], a, out=product[rows]), rows.start)
        grad.add_(torch.mm(t[rows].T, masked), alpha=dropout.rescale)
    return product, as_dtype(grad, dtype)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in this dtype, itself where it is: ``to`` takes a microsecond to see that."""
    return t if t.dtype is dtype else t.to(dtype)


def rank_grad(
    p: Tensor, q: Tensor, *, dtype: torch.dtype, dropout: Dropout | None = None, narrow: bool | None = None
) -> Tensor:
    """p [M, P], q [M, Q] → pᵀ D(q) [P, Q] in ``dtype``.

    On a CPU the narrower of p and q comes first where ``narrow``, the wider where not, by a rule where None. A masked q
    in more than one chunk comes second.
    """
    if dropout is None:
        return _rank_grad(p, q, dtype, narrow)
    if dropout.at_once(q):
        return _rank_grad(p, masks.kept(dropout, q), dtype, narrow).mul_(dropout.rescale)
    wide = wide_of(q.dtype)
    grad = torch.zeros(p.shape[1], q.shape[1], dtype=wide, device=q.device)
    for rows in dropout.chunks(q):
        grad.add_(torch.mm(p[rows].T, masks.kept(dropout, q[rows], rows.start)), alpha=dropout.rescale)
    return grad.to(dtype)


def _rank_grad(p: Tensor, q: Tensor, dtype: torch.dtype, narrow: bool | None) -> Tensor:
    if q.is_cpu:
        grad = _rank_grad_on_cpu(p, q, narrow)
    elif q.is_cuda and dtype is torch.float32 and q.dtype is not dtype:
        return torch.mm(p.T, q, out_dtype=dtype)
    else:
        grad = torch.mm(p.T, q)
    return grad if grad.dtype is dtype else grad.to(dtype)


def _rank_grad_on_cpu(p: Tensor, q: Tensor, narrow: bool | None) -> Tensor:
    half = q.dtype.itemsize == 2
    m, width = q.shape
    if narrow is None:
        # The narrow side first is faster, its result turned and copied, from so many tokens on.
        q_first = m >= (64 if half else 16) * width and p.shape[1] > width
    else:
        q_first = (p.shape[1] > width) is narrow
    if q_first:
        return torch.mm(whole_rows(q.T) if half else q.T, p).T.contiguous()
    return torch.mm(whole_rows(p.T) if half else p.T, q)


def gradients(
    p: Product, dy: Tensor, z: Tensor, *, last: bool = False, narrow: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [M, K], da [R, K] and db [N, R] on a CPU: the two verbs' products, the operands not turned.

    t a is added to dx ``last``, or dy w is; ``narrow`` is :func:`rank_grad`'s, for db.
    """
    x, w, a, b, scale = p.x, p.w, p.a, p.b, p.scale
    dtype, adapter_dtype = dy.dtype, a.dtype
    if dtype.itemsize == 2:
        dy = whole_rows(dy)
    if adapter_dtype is not dtype:
        a, b = a.to(dtype), b.to(dtype)
    t = torch.mm(dy, b)
    if scale != 1:
        t.mul_(scale)
    # t stays without its factor, so that results equal, bit for bit, those of the verbs, which compiled code calls.
    dropout = None if p.seed is None else Dropout(p.dropout_p, p.seed)
    rescale = 1.0 if dropout is None else dropout.rescale
    dx: Tensor | None = None
    if dropout is None:
        dx = None if last else torch.mm(t, a)
        da = torch.mm(t.T, x)
    elif last:
        da = rank_grad(t, x, dtype=adapter_dtype, dropout=dropout)
    else:
        dx, da = _kept_product_and_grad(t, a, x, dropout, adapter_dtype)
    db = _rank_grad_on_cpu(dy, z, narrow)
    if adapter_dtype is not dtype:
        da, db = da.to(adapter_dtype), db.to(adapter_dtype)
    if dx is None:
        return product_last(dy, w.T, t, a.T, None, dropout), da, db  # type: ignore[union-attr]
    return dx.addmm_(dy, w, beta=rescale), da, db  # type: ignore[arg-type]
