"""The chain rule of a product whose rows, low-rank update included, are set to learned norms (DoRA).

    g = magnitude / ‖w + scale · b a‖ of each row, in which the norm is a constant
    z = scale · D(x) aᵀ    u = D(x) wᵀ + z bᵀ    y = x wᵀ + bias + (g - 1) ⊙ D(x) wᵀ + g ⊙ z bᵀ

    without dropout    y = g ⊙ u + bias                          dx = du w + t a
    with dropout       y = (x wᵀ + z bᵀ + bias) + (g - 1) ⊙ u    dx = dy w + D'((g - 1) ⊙ dy w + t a)

    du = g ⊙ dy    t = scale · du b    da = tᵀ D(x)    db = duᵀ z    dmagnitude = Σ_m dy ⊙ u / norm

Kept for the backward: x, z, g, and, where the magnitude trains, u [M, N] and the norms; with dropout the seed.
Passes over [M, N] beside the products: forward one, which reads u (with dropout also the sum that it is added to) and
writes y; backward one, which reads dy and u and writes du, or (g - 1) ⊙ dy. With dropout there are two products with w
each way, not one, and masks over [M, K]. The passes are torch's operators, so that one pass may be a few launches; on a
CPU they go by rows that its caches hold.

Source: Liu et al., 2024, https://arxiv.org/abs/2402.09353, equation (5) and section 4.3; with dropout as in PEFT.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import dispatch, masks
from ..backends.dropout import Dropout
from ..backends.request import Product, whole_rows
from ..dtypes import wide_of
from ..eager import is_eager
from . import base
from .autograd import by_the_verbs, rows_of, unrows, verbs, without_zero_strides
from .base import StoredWeight
from .norms import row_blocks

_ops = torch.library.Library("fastlora", "FRAGMENT")
_ops.define("kept(Tensor x, float dropout_p, Tensor seed) -> Tensor")

# Elements of [M, N] that are widened at a time.
_BLOCK = {"cpu": 1 << 16}


def _kept_op(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    return masks.kept(Dropout(dropout_p, seed), x)


def _kept_fake(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_ops.impl("kept", _kept_op, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::kept", _kept_fake, lib=_ops)


def _kept(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    """keep ⊙ x as a new tensor [M, K]: no factor 1 / (1 - p)."""
    kept: Tensor = (_kept_op if is_eager() else torch.ops.fastlora.kept)(x, dropout_p, seed)
    return kept


def _forward(p: Product, g: Tensor, stored: StoredWeight | None, *, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y [M, N], u [M, N] and z [M, R] of x [M, K]; u lacks dropout's factor, and is overwritten unless to ``keep``.

    The product's w is dense; a stored weight that has a product of its own for so many tokens runs that.
    """
    eager = is_eager()
    if stored is not None and stored.multiplies(p.x.shape[0]):
        p = p._replace(w=stored)  # type: ignore[arg-type]

    def lora_matmul(p: Product) -> tuple[Tensor, Tensor]:
        return base.lora_matmul(p, eager)

    if p.seed is None:
        u, z = lora_matmul(p._replace(bias=None))
        return _plus_scaled(p.bias, u, g, None if keep else u), u, z
    y, z = lora_matmul(p)
    x = _kept(p.x, p.dropout_p, p.seed)
    u, _ = lora_matmul(p._replace(x=x, bias=None, seed=None))
    return _plus_scaled(y, u, (g - 1) * _rescale(p.dropout_p), y), u, z


def _rescale(dropout_p: float) -> float:
    """What D multiplies kept elements by."""
    return Dropout(dropout_p, None).rescale  # type: ignore[arg-type]


def _plus_scaled(c: Tensor | None, u: Tensor, g: Tensor, out: Tensor | None) -> Tensor:
    """c + g ⊙ u in the dtype of u, rounded once, in ``out`` or new memory; c [M, N] or [N], u [M, N], g [N]."""
    wide = wide_of(u.dtype)
    g = g.to(wide)
    if not is_eager():
        return (u.to(wide) * g if c is None else torch.addcmul(c.to(wide), u.to(wide), g)).to(u.dtype)
    if out is None:
        out = torch.empty_like(u)
    for rows in row_blocks(u, _BLOCK):
        if c is None:
            torch.mul(u[rows], g, out=out[rows])
        else:
            torch.addcmul(c if c.dim() == 1 else c[rows], u[rows], g, out=out[rows])
    return out


def multiply(p: Product, magnitude: Tensor, norm: Tensor, stored: StoredWeight | None = None) -> Tensor:
    """y [..., N] of a product of plain tensors whose x is [..., K]; magnitude and norm [N], norm without a gradient.

    ``stored`` is what the product's w was made of for this call, which makes it again in the backward.
    """
    if not torch.is_grad_enabled():
        return unrows(_forward(p._replace(x=rows_of(p.x)), magnitude / norm, stored, keep=False)[0], p.x)
    constants = (norm, p.scale, p.dropout_p, p.seed, stored)
    y: Tensor = _Dora.apply(p.x, p.w, p.a, p.b, p.bias, magnitude, *constants)  # type: ignore[no-untyped-call]
    return y


class _Saved(NamedTuple):
    """What the backward has: x [..., K], z [M, R], u [M, N], g and norm [N]; None for what it does not need."""

    x: Any
    a: Any
    b: Any
    z: Any
    seed: Any
    g: Any
    u: Any
    norm: Any
    w: Any


class _Needs(NamedTuple):
    """Which operands ask for a gradient."""

    x: bool
    w: bool
    a: bool
    b: bool
    bias: bool
    magnitude: bool


class _Constants(NamedTuple):
    """What the backward knows of the forward beside its tensors."""

    scale: float
    dropout_p: float
    adapter_dtype: torch.dtype
    x_shape: torch.Size


class _Dora(torch.autograd.Function):
    """The chain rule in the module docstring, on the kernels for eager code, on the operators for others."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        x, w, a, b, bias, magnitude, norm, scale, dropout_p, seed, stored = operands
        need = _Needs(*ctx.needs_input_grad[:6])
        g = magnitude / norm
        p = Product(rows_of(x), w, a, b, scale, bias, dropout_p, seed)
        y_mn, u_mn, z_mr = _forward(p, g, stored, keep=need.magnitude)
        turned = need.x or need.a
        saved = _Saved(
            x=x if need.a or need.w else None,
            a=a if turned else None,
            b=b if turned else None,
            z=z_mr if need.b else None,
            seed=seed,
            g=g if turned or need.w or need.b else None,
            u=u_mn if need.magnitude else None,
            norm=norm if need.magnitude else None,
            w=w if need.x and stored is None else None,
        )
        ctx.save_for_backward(*saved)
        ctx.stored = stored
        ctx.constants = scale, dropout_p, a.dtype, x.shape
        return unrows(y_mn, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need, saved, c = _Needs(*ctx.needs_input_grad[:6]), _Saved(*ctx.saved_tensors), _Constants(*ctx.constants)
        if need.x and ctx.stored is not None:
            saved = saved._replace(w=base.opened(ctx.stored, dy.dtype))
        # The operands got their dtypes in the forward; autocast would change some of them and not others.
        with torch.autocast(dy.device.type, enabled=False):
            return (*_gradients(need, saved, c, rows_of(dy)), None, None, None, None, None)


def _gradients(need: _Needs, saved: _Saved, c: _Constants, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx, dw, da, db, dbias and dmagnitude, those that are needed; dy [M, N]."""
    if is_eager():
        dy = without_zero_strides(dy)
    g, seed = saved.g, saved.seed
    factor = g
    if g is not None and seed is not None:
        factor = g - 1 if need.x or need.w else None
    scaled, sums = _scaled_and_sums(dy, factor, saved.u)
    gradients: tuple[Tensor | None, ...] = (None, None, None, None)
    if g is not None:
        through = _through_product if seed is None else _through_dropout
        gradients = through(need, saved, c, dy, scaled)
    dmagnitude = None
    if sums is not None:
        rescale = 1.0 if seed is None else _rescale(c.dropout_p)
        dmagnitude = (sums * rescale / saved.norm).to(c.adapter_dtype)
    return *gradients, dy.sum(0) if need.bias else None, dmagnitude


def _scaled_and_sums(dy: Tensor, factor: Tensor | None, u: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """factor ⊙ dy [M, N] in the dtype of dy, and Σ_m dy ⊙ u [N], from one read of dy; None for what is None."""
    wide = wide_of(dy.dtype)
    if not is_eager():
        scaled = None if factor is None else (dy.to(wide) * factor).to(dy.dtype)
        return scaled, None if u is None else (dy.to(wide) * u.to(wide)).sum(0)
    m, n = dy.shape
    scaled = None if factor is None else dy.new_empty(m, n)
    sums = None if u is None else dy.new_zeros(n, dtype=wide)
    for rows in row_blocks(dy, _BLOCK):
        part = dy[rows].to(wide)
        if scaled is not None:
            torch.mul(part, factor, out=scaled[rows])  # type: ignore[arg-type]
        if sums is not None:
            sums.add_((part * u[rows]).sum(0))  # type: ignore[index]
    return scaled, sums


def _through_product(need: _Needs, saved: _Saved, c: _Constants, dy: Tensor, du: Any) -> tuple[Tensor | None, ...]:
    """dx, dw, da and db without dropout: those of the product, of which du is the incoming gradient."""
    x, w, a, b, z = saved.x, saved.w, saved.a, saved.b, saved.z
    eager = is_eager()
    if eager and need[:4] == (True, False, True, True):
        p = Product(rows_of(x), w, a, b, c.scale)
        if (gradients := dispatch.gradients_of(p, du)) is not None:
            dx, da, db = gradients(p, du, z)
            return dx.view(c.x_shape), None, da, db
    return by_the_verbs((x, w, a, b, z, None), c, (*need[:4], False), du, eager)[:4]


def _through_dropout(need: _Needs, saved: _Saved, c: _Constants, dy: Tensor, h: Any) -> tuple[Tensor | None, ...]:
    """dx, dw, da and db with dropout, h = (g - 1) ⊙ dy; the g of du = g ⊙ dy is applied to the rows of b and db."""
    x, a, b, z, seed, g, _, _, w = saved
    lora_matmul, rank_grad = verbs(is_eager())
    rescale, g_n1 = _rescale(c.dropout_p), g.unsqueeze(1)
    dx = dw = da = db = None
    if need.x or need.a:
        t = lora_matmul(Product(dy, None, (b * g_n1).to(c.adapter_dtype).T, a.T, c.scale))[1]
    if need.x:
        kept = _kept(_plus_product(torch.mm(t, a.to(t.dtype)), h, w), c.dropout_p, seed)
        # The factor is the product's: of add(mm, kept, alpha=factor) torch 2.13's inductor makes an addmm without it.
        dx = _plus_product(kept, whole_rows(dy), w, beta=rescale).view(c.x_shape)
    if need.a:
        da = rank_grad(t, rows_of(x), c.adapter_dtype, c.dropout_p, seed)
    if need.b:
        db = (rank_grad(dy, z, g.dtype, 0.0, None) * g_n1).to(c.adapter_dtype)
    if need.w:
        x_mk = rows_of(x)
        dw = _plus_product(torch.mm(dy.T, x_mk), h.T, _kept(x_mk, c.dropout_p, seed), alpha=rescale)
    return dx, dw, da, db


def _plus_product(c: Tensor, p: Any, q: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """beta · c + alpha · p q, in the memory of c for eager code; counters of FLOPs know only the other form."""
    if is_eager():
        return c.addmm_(p, q, alpha=alpha, beta=beta)
    return torch.addmm(c, p, q, alpha=alpha, beta=beta)
