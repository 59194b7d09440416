"""The two verbs on the vendor's GEMM, with the low-rank product added in place: no M×N temporary.

    on a CPU     z = x aᵀ, times scale in place;   y = z bᵀ + bias, to which the GEMM adds x wᵀ
    elsewhere    z = scale · x aᵀ in one GEMM;     y = x wᵀ + bias, to which the GEMM adds z bᵀ

Runs on any device and never refuses: the default on a CPU and the safety net on a GPU. Against the frozen GEMM it
costs one read of x (for z), and one read and one write of y. With dropout the masked operand exists a few rows at a
time. On a CPU the order and form of the products are those that were fastest: benchmarks/HARDWARE.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import masks
from .dropout import Dropout, kept
from .request import Kernel, Product, new_middle, runs_anything, whole_rows


def lora_matmul(p: Product) -> tuple[Tensor | None, Tensor]:
    """x [M, K], w [N, K] or None for z alone, a [R, K], b [N, R], bias [N] → y [M, N], z [M, R]."""
    x, w, a, b, scale = p.x, p.w, p.a, p.b, p.scale
    if not x.is_cpu:
        return _elsewhere(p)
    dtype = x.dtype
    half = dtype.itemsize == 2
    if half:
        x = whole_rows(x)
    if a.dtype is not dtype:
        a, b = a.to(dtype), b.to(dtype)
    dropout = None if p.seed is None else Dropout(p.dropout_p, p.seed)
    if dropout is None or p.on_product:
        z = F.linear(x, a)
    else:
        z = x.new_empty(x.shape[0], a.shape[0])
        scale *= dropout.rescale
        for rows, mask in masks.chunks(dropout, x):
            torch.mm(kept(x[rows], mask), a.T, out=z[rows])
    if scale != 1:
        z.mul_(scale)
    if half and a.shape[0] % 8:
        z = new_middle(x, a.shape[0]).copy_(z)
    if w is None:
        return None, z
    if dropout is None or not p.on_product:
        y = F.linear(z, b, p.bias)
    else:
        y = _dropped_product(z, b.T, dropout)
        if p.bias is not None:
            y.add_(p.bias)
    return y.addmm_(x, w.T), z


def _dropped_product(z: Tensor, b_rn: Tensor, dropout: Dropout) -> Tensor:
    """D(z b_rn), a few rows at a time."""
    product = z.new_empty(z.shape[0], b_rn.shape[1])
    for rows, mask in masks.chunks(dropout, product):
        torch.mul(kept(torch.mm(z[rows], b_rn), mask), dropout.rescale, out=product[rows])
    return product


def _elsewhere(p: Product) -> tuple[Tensor | None, Tensor]:
    x, w = p.x, p.w
    a, b = p.a.to(x.dtype), p.b.to(x.dtype)
    z = new_middle(x, a.shape[0])
    if (dropout := p.mask_x) is None:
        z.addmm_(x, a.T, beta=0, alpha=p.scale)
    else:
        for rows, mask in masks.chunks(dropout, x):
            z[rows].addmm_(kept(x[rows], mask), a.T, beta=0, alpha=p.scale * dropout.rescale)
    if w is None:
        return None, z
    y = F.linear(x, w, p.bias)
    if (dropout := p.mask_product) is None:
        y.addmm_(z, b.T)
    else:
        for rows, mask in masks.chunks(dropout, y):
            y[rows].add_(kept(z[rows] @ b.T, mask), alpha=dropout.rescale)
    return y, z


def rank_grad(p: Tensor, q: Tensor, *, dtype: torch.dtype, dropout: Dropout | None = None) -> Tensor:
    """p [M, P], q [M, Q] → pᵀ D(q) [P, Q] in ``dtype``."""
    if dropout is None:
        if q.is_cpu:
            grad = _rank_grad_on_cpu(p, q)
        elif q.is_cuda and dtype is torch.float32 and q.dtype is not dtype:
            return torch.mm(p.T, q, out_dtype=dtype)
        else:
            grad = torch.mm(p.T, q)
        return grad if grad.dtype is dtype else grad.to(dtype)
    wide = torch.promote_types(q.dtype, torch.float32)
    grad = torch.zeros(p.shape[1], q.shape[1], dtype=wide, device=q.device)
    for rows, mask in masks.chunks(dropout, q):
        grad.add_(torch.mm(p[rows].T, kept(q[rows], mask)), alpha=dropout.rescale)
    return grad.to(dtype)


def _rank_grad_on_cpu(p: Tensor, q: Tensor) -> Tensor:
    half = q.dtype.itemsize == 2
    m, narrow = q.shape
    # The narrow side first is faster, its result turned and copied, from so many tokens on.
    if m >= (64 if half else 16) * narrow and p.shape[1] > narrow:
        return torch.mm(whole_rows(q.T) if half else q.T, p).T.contiguous()
    return torch.mm(whole_rows(p.T) if half else p.T, q)


def gradients(p: Product, dy: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx [M, K], da [R, K] and db [N, R] on a CPU: the two verbs' products, the operands not turned."""
    x, w, a, b, scale = p.x, p.w, p.a, p.b, p.scale
    dtype, adapter_dtype = dy.dtype, a.dtype
    if dtype.itemsize == 2:
        dy = whole_rows(dy)
    if adapter_dtype is not dtype:
        a, b = a.to(dtype), b.to(dtype)
    t = torch.mm(dy, b)
    if scale != 1:
        t.mul_(scale)
    if p.seed is None:
        dx, da = torch.mm(t, a), torch.mm(t.T, x)
    else:
        dropout = Dropout(p.dropout_p, p.seed)
        dx, da = _dropped_product(t, a, dropout), rank_grad(t, x, dtype=adapter_dtype, dropout=dropout)
    db = _rank_grad_on_cpu(dy, z)
    if adapter_dtype is not dtype:
        da, db = da.to(adapter_dtype), db.to(adapter_dtype)
    return dx.addmm_(dy, w), da, db  # type: ignore[arg-type]


LORA_MATMUL = (Kernel("library", runs_anything, lora_matmul, gradients=gradients),)
RANK_GRAD = (Kernel("library", runs_anything, rank_grad),)
