"""The two verbs on the vendor's GEMM, with the low-rank product added in place: no M×N temporary.

    on a CPU     z = x aᵀ, times scale in place;   y = z bᵀ + bias, to which the GEMM adds x wᵀ
    elsewhere    z = scale · x aᵀ in one GEMM;     y = x wᵀ + bias, to which the GEMM adds z bᵀ

Runs on any device and never refuses: the default on a CPU and the safety net on a GPU. Against the frozen GEMM it
costs one read of x (for z), and one read and one write of y. With dropout the masked operand exists a few rows at a
time. On a CPU the order and form of the products are those that were fastest: benchmarks/HARDWARE.md. Which these are
differs between shapes and dtypes, so the kernels have forms (``_FORMS``) that are of use there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dtypes import wide_of
from . import masks
from .dropout import Dropout
from .request import Kernel, Product, Together, new_middle, runs_anything, whole_rows


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
        return _product_last(x, w, z, b, p.bias, dropout if p.on_product else None), z
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


def _product_last(x: Tensor, w: Tensor, z: Tensor, b: Tensor, bias: Tensor | None, dropout: Dropout | None) -> Tensor:
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
        return product, _as(torch.mm(t.T, masked), dtype).mul_(dropout.rescale)
    grad = torch.zeros(a.shape, dtype=wide_of(x.dtype), device=x.device)
    for rows in dropout.chunks(x):
        masked = masks.kept_both(dropout, x[rows], torch.mm(t[rows], a, out=product[rows]), rows.start)
        grad.add_(torch.mm(t[rows].T, masked), alpha=dropout.rescale)
    return product, _as(grad, dtype)


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
    # Its factor is not put into t: the verbs' bits, which compiled calls give, are these.
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
        return _product_last(dy, w.T, t, a.T, None, dropout), da, db  # type: ignore[union-attr]
    return dx.addmm_(dy, w, beta=rescale), da, db  # type: ignore[arg-type]


def lora_matmul_group(products: Sequence[Product]) -> tuple[list[Tensor], list[Tensor]]:
    """y and z of each of several products of one x: the middles by one GEMM, or masked in one pass over x."""
    x = whole_rows(products[0].x)
    on_cpu, dtype = x.is_cpu, x.dtype
    if any(p.seed is not None for p in products):
        parts = _dropped_middles(x, products)
    else:
        wide = _middles(x, torch.cat([_as(p.a, dtype) for p in products]))
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
        b = _as(p.b, dtype)
        ys.append(F.linear(z, b, p.bias).addmm_(x, w.T) if on_cpu else _product_last(x, w, z, b, p.bias, None))
        zs.append(z)
    return ys, zs


def _dropped_middles(x: Tensor, products: Sequence[Product]) -> Sequence[Tensor]:
    """(keepᵢ ⊙ x) aᵢᵀ of each product: a few rows are masked for all of them while the caches hold these."""
    wide = torch.float32 if x.is_cuda and x.dtype.itemsize == 2 else x.dtype
    a_s = [_as(p.a, x.dtype) for p in products]
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


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype is dtype else t.to(dtype)


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
    a_s = [_as(p.a, dtype) for p in products]
    ts = []
    for p, dy in zip(products, dys, strict=True):
        scale = p.scale if (dropout := p.mask_x) is None else p.scale * dropout.rescale
        ts.append(torch.mm(dy, _as(p.b, dtype)).mul_(scale))
    adapter_dtypes = {p.a.dtype for p in products}
    if len(adapter_dtypes) == 1 and all(p.seed is None for p in products):
        t = torch.cat(ts, dim=1)
        dx = torch.mm(t, torch.cat(a_s))
        das = list(_rank_grad(t, x, adapter_dtypes.pop(), None).split([a.shape[0] for a in a_s]))
    else:
        dx, das = _masked_sum_and_grads(products, ts, a_s)
    dbs = []
    for p, dy, z in zip(products, dys, zs, strict=True):
        dx.addmm_(dy, p.w)  # type: ignore[arg-type]
        dbs.append(_rank_grad(dy, z, p.b.dtype, None))
    return dx, das, dbs


def _masked_sum_and_grads(
    products: Sequence[Product], ts: Sequence[Tensor], a_s: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Σ keepᵢ ⊙ (tᵢ aᵢ), and tᵢᵀ (keepᵢ ⊙ x) of each product: a few rows for all at a time, each mask made once."""
    x = products[0].x
    wide = wide_of(x.dtype)
    total = x.new_zeros(x.shape)
    grads = [torch.zeros(a.shape, dtype=wide, device=x.device) for a in a_s]
    for rows in _chunks(x):
        for p, t, a, grad in zip(products, ts, a_s, grads, strict=True):
            masked, t_rows = x[rows], t[rows]
            if (dropout := p.mask_x) is None:
                total[rows].addmm_(t_rows, a)
            else:
                product = torch.mm(t_rows, a)
                masked = masks.kept_both(dropout, masked, product, rows.start)
                total[rows].add_(product)
            grad.add_(_rank_grad(t_rows, masked, wide, None))
    return total, [grad.to(p.a.dtype) for p, grad in zip(products, grads, strict=True)]


# Elements of x up to which torch's own nodes are faster than a Function, for all that they add an [M, K] gradient more;
# with dropout bytes of x, since they keep the mask and the masked x.
_SMALL = 1 << 18
_SMALL_DROPPED = 1 << 16
# The same of x and of y where the low-rank products are float32 beside a base of 16 bits: 256 kB are kept at most.
_WIDE = 1 << 16
_WIDE_DROPPED = 1 << 15
# Most elements of a and b, times M + 16: above it 16-bit products win. Adapters of 16 bits have to be cast and kept so,
# which does not pay either where torch makes their products without oneDNN.
_WIDE_WORK = 1 << 23
_WIDE_WORK_CAST = 3 << 18
_WITHOUT_ONEDNN = 1 << 12


def is_small(x: Tensor, drops: bool) -> bool:
    """Whether x has so few elements that :func:`small` is the faster way."""
    return x.nbytes <= _SMALL_DROPPED if drops else x.numel() <= _SMALL


def small(p: Product, drops: bool) -> Tensor | None:
    """y [M, N] of x [M, K] on a CPU in torch's own differentiable operators; None where the verbs are to be called.

    At few tokens the time of a Python Function shows. x and z are kept, as the verbs' caller keeps them. Where it
    ``drops``, it draws the seed.
    """
    x, w, a, b = p.x, p.w, p.a, p.b
    # torch's operators say nothing where some operands are on the meta device.
    if not (w.is_cpu and a.is_cpu and b.is_cpu and a.dim() == 2 == b.dim()):  # type: ignore[union-attr]
        return None
    dtype, r = x.dtype, a.shape[0]
    half = dtype.itemsize == 2
    if half and _is_wide(p, drops):
        return _small_wide(p, drops)
    # Not by is_small: here a call of a function shows.
    if not r or a.dtype is not dtype or (x.nbytes > _SMALL_DROPPED if drops else x.numel() > _SMALL):
        return None
    # Of 16 bits, only what oneDNN reads within its bounds: whole_rows, new_middle.
    if not dtype.is_floating_point or (half and (r % 8 or not x.is_contiguous())):
        return None
    # The base first: autograd goes backward through the newest nodes first, and is faster ending with dy w.
    y = F.linear(x, w, p.bias)  # type: ignore[arg-type]
    z = F.linear(x * masks.factors(p.dropout_p, x) if drops else x, a)
    return y.addmm_(z, b.t(), alpha=p.scale)


def _is_wide(p: Product, drops: bool) -> bool:
    """Whether float32 low-rank products are faster beside the 16-bit product of x [M, K] and w."""
    x, a, b = p.x, p.a, p.b
    m, k = x.shape
    most = _WIDE_DROPPED if drops else _WIDE
    if not a.numel() or a.dtype is not b.dtype or m * k > most or m * b.shape[0] > most or not x.is_contiguous():
        return False
    work = (a.numel() + b.numel()) * (m + 16)
    if a.dtype is torch.float32:
        return work <= _WIDE_WORK
    return a.dtype is x.dtype and work <= _WIDE_WORK_CAST and m * a.numel() > _WITHOUT_ONEDNN


def _small_wide(p: Product, drops: bool) -> Tensor | None:
    """:func:`small` with float32 low-rank products: oneDNN takes longer to begin a 16-bit product than these take."""
    # The base first, as in small.
    y = F.linear(p.x, p.w, p.bias)  # type: ignore[arg-type]
    x = p.x.float()
    if drops:
        x = x * masks.factors(p.dropout_p, x)
    z = F.linear(x, p.a.float())
    if p.scale != 1:
        z = z * p.scale
    update = F.linear(z, p.b.float())
    # Not left to add_, which broadcasts.
    return y.add_(update) if y.shape == update.shape else None


_run_last = functools.partial(lora_matmul, last=True)
_gradients_last = functools.partial(gradients, last=True)


def _form(words: str, run: Callable[..., Any] = lora_matmul, backward: Callable[..., Any] = gradients) -> Kernel:
    return Kernel(f"library:{words}", runs_anything, run, gradients=backward, small=small)


# Where a form does what one before it does, forward or backward, both have one function there.
_FORMS = (
    _form("addmm", functools.partial(lora_matmul, addmm=True)),
    _form("last", _run_last, _gradients_last),
    _form("addmm,last", functools.partial(lora_matmul, addmm=True, last=True), _gradients_last),
    _form("narrow", backward=functools.partial(gradients, narrow=True)),
    _form("wide", backward=functools.partial(gradients, narrow=False)),
    _form("last,narrow", _run_last, functools.partial(gradients, last=True, narrow=True)),
    _form("last,wide", _run_last, functools.partial(gradients, last=True, narrow=False)),
)
_RANK_GRAD_FORMS = (
    Kernel("library:narrow", runs_anything, functools.partial(rank_grad, narrow=True)),
    Kernel("library:wide", runs_anything, functools.partial(rank_grad, narrow=False)),
)
LORA_MATMUL = (
    Kernel(
        "library",
        runs_anything,
        lora_matmul,
        gradients=gradients,
        small=small,
        together=Together(lora_matmul_group, gradients_group),
        forms=_FORMS,
    ),
)
RANK_GRAD = (Kernel("library", runs_anything, rank_grad, forms=_RANK_GRAD_FORMS),)
