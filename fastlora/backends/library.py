"""The two verbs on the vendor's GEMM, with the low-rank product added in place: no M×N temporary.

Runs on any device and never refuses: the default on a CPU and the safety net on a GPU. Against the frozen GEMM it
costs one read of x (for z), and one read and one write of y (for z bᵀ). With dropout the masked operand exists a few
rows at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import Dropout, kept
from .request import Kernel, Product, new_middle, runs_anything, whole_rows


def lora_matmul(p: Product) -> tuple[Tensor | None, Tensor]:
    """x [M, K], w [N, K] or None for z alone, a [R, K], b [N, R], bias [N] → y [M, N], z [M, R]."""
    x, w = whole_rows(p.x), p.w
    a, b = p.a.to(x.dtype), p.b.to(x.dtype)
    if x.is_cpu:
        a = a.contiguous()  # a CPU's GEMM is up to seven times slower on the small operand's transpose
    z = new_middle(x, a.shape[0])
    if (dropout := p.mask_x) is None:
        z.addmm_(x, a.T, beta=0, alpha=p.scale)
    else:
        for rows, mask in dropout.chunks(x):
            z[rows].addmm_(kept(x[rows], mask), a.T, beta=0, alpha=p.scale * dropout.rescale)
    if w is None:
        return None, z
    y = F.linear(x, w, p.bias)
    if (dropout := p.mask_product) is None:
        y.addmm_(z, b.T)
    else:
        for rows, mask in dropout.chunks(y):
            y[rows].add_(kept(z[rows] @ b.T, mask), alpha=dropout.rescale)
    return y, z


def rank_grad(p: Tensor, q: Tensor, *, dtype: torch.dtype, dropout: Dropout | None = None) -> Tensor:
    """p [M, P], q [M, Q] → pᵀ D(q) [P, Q] in ``dtype``."""
    if dropout is None:
        if q.is_cuda and dtype is torch.float32 and q.dtype is not dtype:
            return torch.mm(p.T, q, out_dtype=dtype)
        if p.is_cpu and p.shape[1] > q.shape[1]:
            # A CPU's GEMM is up to four times faster with the narrow side first.
            return torch.mm(whole_rows(q.T), p).T.contiguous().to(dtype)
        return torch.mm(whole_rows(p.T), q).to(dtype)
    wide = torch.promote_types(q.dtype, torch.float32)
    grad = torch.zeros(p.shape[1], q.shape[1], dtype=wide, device=q.device)
    for rows, mask in dropout.chunks(q):
        grad.add_(torch.mm(p[rows].T, kept(q[rows], mask)), alpha=dropout.rescale)
    return grad.to(dtype)


LORA_MATMUL = (Kernel("library", runs_anything, lora_matmul),)
RANK_GRAD = (Kernel("library", runs_anything, rank_grad),)
