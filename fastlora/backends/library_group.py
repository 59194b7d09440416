"""Several products of one x on the vendor's GEMM: q, k and v, or gate and up.

    forward     zᵢ = scaleᵢ · x aᵢᵀ by one GEMM of all aᵢ;   yᵢ as the product alone makes it
    backward    dx = Σ tᵢ aᵢ by one GEMM, to which each dyᵢ wᵢ is added;   daᵢ by one GEMM of all tᵢ

With dropout the masked x exists a few rows at a time, for all products while the caches hold these rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import wide_of
from . import masks
from .dropout import Dropout
from .library_products import as_dtype, product_last, rank_grad
from .request import Product, new_middle, whole_rows


def lora_matmul_group(products: Sequence[Product]) -> tuple[list[Tensor], list[Tensor]]:
    """y and z of each of several products of one x: the middles by one GEMM, or masked in one pass over x."""
    x = whole_rows(products[0].x)
    on_cpu, dtype = x.is_cpu, x.dtype
    if any(p.seed is not None for p in products):
        parts = _dropped_middles(x, products)
    else:
        wide = _middles(x, torch.cat([as_dtype(p.a, dtype) for p in products]))
        parts = wide.split([p.a.shape[0] for p in products], dim=1)
    ys, zs = [], []
    for p, part in zip(products, parts, strict=True):
        r = part.shape[1]
        scale = p.scale if (dropout := p.mask_x) is None else p.scale * dropout.rescale
        if part.dtype is dtype and (r % 8 == 0 or dtype.itemsize != 2):
            z = part * scale
        else:
            z = new_middle(x, r).copy_(part * scale)
        w: Tensor = p.w  # type: ignore[assignment]
        b = as_dtype(p.b, dtype)
        ys.append(F.linear(z, b, p.bias).addmm_(x, w.T) if on_cpu else product_last(x, w, z, b, p.bias, None))
        zs.append(z)
    return ys, zs


def _dropped_middles(x: Tensor, products: Sequence[Product]) -> Sequence[Tensor]:
    """(keepᵢ ⊙ x) aᵢᵀ of each product: a few rows are masked for all of them while the caches hold these."""
    wide = torch.float32 if x.is_cuda and x.dtype.itemsize == 2 else x.dtype
    a_s = [as_dtype(p.a, x.dtype) for p in products]
    zs = [x.new_empty(x.shape[0], a.shape[0], dtype=wide) for a in a_s]
    for rows in _chunks(x):
        for p, a, z in zip(products, a_s, zs, strict=True):
            masked = _kept_rows(p.mask_x, x, rows)
            if wide is x.dtype:
                torch.mm(masked, a.T, out=z[rows])
            else:
                z[rows] = torch.mm(masked, a.T, out_dtype=wide)
    return zs


def _chunks(x: Tensor) -> Iterator[slice]:
    """Rows that are masked at a time, for whichever mask."""
    return Dropout(0.0, x.new_empty(0)).chunks(x)


def _kept_rows(dropout: Dropout | None, x: Tensor, rows: slice) -> Tensor:
    """keep ⊙ x of some rows, or these rows themselves."""
    return x[rows] if dropout is None else masks.kept(dropout, x[rows], rows.start)


def _middles(x: Tensor, a: Tensor) -> Tensor:
    """x aᵀ before its scales, in float32 where that costs no pass over x: rounded once then."""
    return torch.mm(x, a.T, out_dtype=torch.float32) if x.is_cuda and x.dtype.itemsize == 2 else F.linear(x, a)


def gradients_group(
    products: Sequence[Product], dys: Sequence[Tensor], zs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx [M, K], and da and db of each of several products of one x: dx is summed by the GEMMs.

    Without masks Σ tᵢ aᵢ and all tᵢᵀ x are one product each.
    """
    x, dtype = whole_rows(products[0].x), products[0].x.dtype
    if dtype.itemsize == 2:
        dys = [whole_rows(dy) for dy in dys]
    a_s = [as_dtype(p.a, dtype) for p in products]
    ts = [torch.mm(dy, as_dtype(p.b, dtype)).mul_(p.scale) for p, dy in zip(products, dys, strict=True)]
    adapter_dtypes = {p.a.dtype for p in products}
    if len(adapter_dtypes) == 1 and all(p.seed is None for p in products):
        t = torch.cat(ts, dim=1)
        dx = torch.mm(t, torch.cat(a_s))
        das = list(rank_grad(t, x, dtype=adapter_dtypes.pop()).split([a.shape[0] for a in a_s]))
    else:
        dx, das = _masked_sum_and_grads(products, ts, a_s)
    dbs = []
    for p, dy, z in zip(products, dys, zs, strict=True):
        dx.addmm_(dy, p.w)  # type: ignore[arg-type]
        dbs.append(rank_grad(dy, z, dtype=p.b.dtype))
    return dx, das, dbs


def _masked_sum_and_grads(
    products: Sequence[Product], ts: Sequence[Tensor], a_s: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Σ D'ᵢ(tᵢ aᵢ), and tᵢᵀ Dᵢ(x) of each product: a few rows for all of them at a time, each mask made once.

    tᵢ is without the factor of its mask, as in ``library_products.gradients``: where x needs no gradient the verbs give
    the same bits.
    """
    x = products[0].x
    wide = wide_of(x.dtype)
    total = x.new_zeros(x.shape)
    grads = [torch.zeros(a.shape, dtype=wide, device=x.device) for a in a_s]
    for rows in _chunks(x):
        for p, t, a, grad in zip(products, ts, a_s, grads, strict=True):
            masked, t_rows, rescale = x[rows], t[rows], 1.0
            if (dropout := p.mask_x) is None:
                total[rows].addmm_(t_rows, a)
            else:
                product, rescale = torch.mm(t_rows, a), dropout.rescale
                masked = masks.kept_both(dropout, masked, product, rows.start)
                total[rows].add_(product, alpha=rescale)
            grad.add_(rank_grad(t_rows, masked, dtype=wide), alpha=rescale)
    return total, [grad.to(p.a.dtype) for p, grad in zip(products, grads, strict=True)]
