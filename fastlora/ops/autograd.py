"""The chain rule of a product, written in the two verbs, over two registered torch operators.

    y  = x wᵀ + z bᵀ + bias     z = scale · D(x) aᵀ
    dx = dy w + D'(t a)         t = scale · dy b
    da = tᵀ D(x)                db = dyᵀ z

Source: Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation (3), with dropout on the
adapter's input as in the authors' code. The operators are opaque to torch.compile; a plain ``autograd.Function`` over
them costs eager code less than operators with registered autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import dispatch
from ..backends.dropout import Dropout
from ..backends.request import Product, new_middle

_ops = torch.library.Library("fastlora", "FRAGMENT")
_ops.define(
    "lora_matmul(Tensor x, Tensor? w, Tensor a, Tensor b, float scale, Tensor? bias, "
    "float dropout_p, Tensor? seed, bool on_product) -> (Tensor, Tensor)"
)
_ops.define("rank_grad(Tensor p, Tensor q, ScalarType dtype, float dropout_p, Tensor? seed) -> Tensor")


def _lora_matmul(*operands: Any) -> tuple[Tensor, Tensor]:
    product = Product(*operands)
    y, z = dispatch.lora_matmul(product)
    return (product.x.new_empty(0) if y is None else y), z


def _lora_matmul_fake(*operands: Any) -> tuple[Tensor, Tensor]:
    p = Product(*operands)
    y = p.x.new_empty(0) if p.w is None else p.x.new_empty(p.x.shape[0], p.w.shape[0])
    return y, new_middle(p.x, p.a.shape[0])


def _rank_grad(p: Tensor, q: Tensor, dtype: torch.dtype, dropout_p: float, seed: Tensor | None) -> Tensor:
    return dispatch.rank_grad(p, q, dtype, None if seed is None else Dropout(dropout_p, seed))


def _rank_grad_fake(p: Tensor, q: Tensor, dtype: torch.dtype, dropout_p: float, seed: Tensor | None) -> Tensor:
    return q.new_empty(p.shape[1], q.shape[1], dtype=dtype)


_ops.impl("lora_matmul", _lora_matmul, "CompositeExplicitAutograd")
_ops.impl("rank_grad", _rank_grad, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::lora_matmul", _lora_matmul_fake, lib=_ops)
torch.library.register_fake("fastlora::rank_grad", _rank_grad_fake, lib=_ops)
lora_matmul_op = torch.ops.fastlora.lora_matmul.default
rank_grad_op = torch.ops.fastlora.rank_grad.default
_unsafe_view = torch.ops.aten._unsafe_view.default


def multiply(product: Product) -> Tensor:
    """y [..., N] of a product of plain tensors whose x is [..., K]."""
    if not torch.is_grad_enabled():
        return _unrows(lora_matmul_op(*_by_rows(product))[0], product.x)
    y: Tensor = _LoRALinear.apply(*product)  # type: ignore[no-untyped-call]
    return y


class _LoRALinear(torch.autograd.Function):
    """The chain rule in the module docstring, computing only what ``needs_input_grad`` asks for."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        p = Product(*operands)
        y_mn, z_mr = lora_matmul_op(*_by_rows(p))
        need_x, need_w, need_a, need_b = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            p.x if need_a or need_w else None,
            p.w if need_x else None,
            p.a if need_x or need_a else None,
            p.b if need_x or need_a else None,
            z_mr if need_b else None,
            p.seed,
        )
        ctx.scale, ctx.dropout_p = p.scale, p.dropout_p
        ctx.x_shape, ctx.adapter_dtype = p.x.shape, p.a.dtype
        return _unrows(y_mn, p.x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(dy.device.type):
            # The operands got their dtypes in the forward; autocast would change some of them and not others.
            with torch.autocast(dy.device.type, enabled=False):
                return _gradients(ctx, dy)
        return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """One gradient for each field of Product."""
    x, w, a, b, z_mr, seed = ctx.saved_tensors
    need_x, need_w, need_a, need_b, _, need_bias = ctx.needs_input_grad[:6]
    dx = dw = da = db = dbias = None
    dy_mn = rows_of(dy)
    if need_x or need_a:
        # The forward's verb with the operands turned; without need_x only its rank-R middle is made.
        turned = Product(dy_mn, w.T if need_x else None, b.T, a.T, ctx.scale, None, ctx.dropout_p, seed, True)
        dx_mk, t_mr = lora_matmul_op(*turned)
        dx = dx_mk.view(ctx.x_shape) if need_x else None
    if need_a:
        da = rank_grad_op(t_mr, rows_of(x), ctx.adapter_dtype, ctx.dropout_p, seed)
    if need_b:
        db = rank_grad_op(dy_mn, z_mr, ctx.adapter_dtype, 0.0, None)
    if need_w:
        dw = torch.mm(dy_mn.T, rows_of(x))
    if need_bias:
        dbias = dy_mn.sum(0)
    return dx, dw, da, db, None, dbias, None, None, None


def _by_rows(p: Product) -> Product:
    """The product with x as [M, K]."""
    return p if p.x.dim() == 2 else p._replace(x=rows_of(p.x))


def rows_of(x: Tensor) -> Tensor:
    """All leading dimensions as one: [..., C] -> [M, C], a view wherever the strides allow."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def _unrows(y_mn: Tensor, x: Tensor) -> Tensor:
    """[M, N] with the leading dimensions of x."""
    if x.dim() == 2:
        return y_mn
    # Not y_mn.view: autograd forbids in-place operations on a view that a custom Function returns.
    y: Tensor = _unsafe_view(y_mn, [*x.shape[:-1], y_mn.shape[1]])
    return y
