"""The chain rule of a product, written in the two verbs, over two registered torch operators.

    y  = x wᵀ + z bᵀ + bias     z = scale · D(x) aᵀ
    dx = dy w + D'(t a)         t = scale · dy b
    da = tᵀ D(x)                db = dyᵀ z

Source: Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation (3), with dropout on the
adapter's input as in the authors' code. The operators are opaque to torch.compile; a plain ``autograd.Function`` over
them costs eager code less than operators with registered autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import dispatch
from ..backends.dropout import Dropout
from ..backends.request import Product, new_middle
from ..eager import is_eager
from . import flops

_ops = torch.library.Library("fastlora", "FRAGMENT")
_ops.define(
    "lora_matmul(Tensor x, Tensor? w, Tensor a, Tensor b, float scale, Tensor? bias, "
    "float dropout_p, Tensor? seed, bool on_product) -> (Tensor, Tensor)"
)
_ops.define("rank_grad(Tensor p, Tensor q, ScalarType dtype, float dropout_p, Tensor? seed) -> Tensor")


def without_zero_strides(dy: Tensor) -> Tensor:
    """dy of a sum as rows: a copy costs less than what kernels and vendors do about such strides, or than a refusal."""
    return dy.contiguous() if 0 in dy.stride() else dy


def _lora_matmul(*operands: Any) -> tuple[Tensor, Tensor]:
    product = Product(*operands)
    if product.on_product:
        product = product._replace(x=without_zero_strides(product.x))
    y, z = dispatch.lora_matmul(product)
    return (product.x.new_empty(0) if y is None else y), z


def _lora_matmul_fake(*operands: Any) -> tuple[Tensor, Tensor]:
    p = Product(*operands)
    y = p.x.new_empty(0) if p.w is None else p.x.new_empty(p.x.shape[0], p.w.shape[0])
    return y, new_middle(p.x, p.a.shape[0])


def _rank_grad(p: Tensor, q: Tensor, dtype: torch.dtype, dropout_p: float, seed: Tensor | None) -> Tensor:
    dropout = None if seed is None else Dropout(dropout_p, seed)
    return dispatch.rank_grad(without_zero_strides(p), q, dtype, dropout)


def _rank_grad_fake(p: Tensor, q: Tensor, dtype: torch.dtype, dropout_p: float, seed: Tensor | None) -> Tensor:
    return q.new_empty(p.shape[1], q.shape[1], dtype=dtype)


_ops.impl("lora_matmul", _lora_matmul, "CompositeExplicitAutograd")
_ops.impl("rank_grad", _rank_grad, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::lora_matmul", _lora_matmul_fake, lib=_ops)
torch.library.register_fake("fastlora::rank_grad", _rank_grad_fake, lib=_ops)
lora_matmul_op = torch.ops.fastlora.lora_matmul.default
rank_grad_op = torch.ops.fastlora.rank_grad.default


def verbs(eager: bool) -> tuple[Callable[[Product], tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """The two verbs: for eager code the kernels themselves, else the operators, which others see."""
    return (dispatch.lora_matmul, _rank_grad) if eager else (lambda p: lora_matmul_op(*p), rank_grad_op)  # type: ignore[return-value]


_unsafe_view = torch.ops.aten._unsafe_view.default


def multiply(p: Product, eager: bool = False) -> Tensor:
    """y [..., N] of a product of plain tensors whose x is [..., K]; ``eager`` where :func:`is_eager` holds."""
    if not eager and not torch.compiler.is_compiling():
        flops.register()
    if not torch.is_grad_enabled():
        rows = by_rows(p)
        return unrows((dispatch.lora_matmul(rows) if eager else lora_matmul_op(*rows))[0], p.x)
    y: Tensor
    if eager:
        y = _apply_eagerly(p.x, p.w, p.a, p.b, p.bias, p)
    else:
        y = _Traced.apply(p.x, p.w, p.a, p.b, p.bias, p.scale, p.dropout_p, p.seed)  # type: ignore[no-untyped-call]
    return y


# dx, dw, da, db and dbias, and nothing for the argument after them.
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None", "Tensor | None", None]


class _Eager(torch.autograd.Function):
    """The chain rule in the module docstring on the kernels themselves, for code that nobody traces."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, p: Product) -> Tensor:
        flat = x.dim() == 2
        y_mn, z_mr = dispatch.lora_matmul(p if flat else by_rows(p))
        save(ctx, p, z_mr)
        return y_mn if flat else unrows(y_mn, x)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Gradients:
        # once_differentiable costs two microseconds, and has nothing to do where no graph is being made.
        return (_gradients_once if torch.is_grad_enabled() else gradients)(ctx, dy)


# Function.apply without its look for functorch, which is_eager has taken: three microseconds.
_apply_eagerly: Callable[..., Tensor] = super(torch.autograd.Function, _Eager).apply


class _Traced(torch.autograd.Function):
    """The same on the operators, which torch.compile and dispatch modes see."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        x, w, a, b, bias, scale, dropout_p, seed = operands
        p = Product(x, w, a, b, scale, bias, dropout_p, seed)
        y_mn, z_mr = lora_matmul_op(*by_rows(p))
        save(ctx, p, z_mr)
        return unrows(y_mn, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*gradients(ctx, dy), None, None)


# What a layer trains: x, a and b, the base frozen, with or without its bias.
_USUAL = ((True, False, True, True, False), (True, False, True, True, True))


def save(ctx: Any, p: Product, z_mr: Tensor) -> None:
    """Keeps for the backward what ``needs_input_grad`` asks for, and nothing else."""
    if ctx.needs_input_grad[:5] in _USUAL:
        ctx.save_for_backward(p.x, p.w, p.a, p.b, z_mr, p.seed)
    else:
        need_x, need_w, need_a, need_b = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            p.x if need_a or need_w else None,
            p.w if need_x else None,
            p.a if need_x or need_a else None,
            p.b if need_x or need_a else None,
            z_mr if need_b else None,
            p.seed,
        )
    ctx.constants = p.scale, p.dropout_p, p.a.dtype, p.x.shape


def gradients(ctx: Any, dy: Tensor, saved: tuple[Any, ...] | None = None) -> Gradients:
    """The gradients that ``needs_input_grad`` asks for, of what :func:`save` has kept, or of ``saved`` in its place."""
    device_type = "cpu" if dy.is_cpu else dy.device.type
    if torch.is_autocast_enabled(device_type):
        # The operands got their dtypes in the forward; autocast would change some of them and not others.
        with torch.autocast(device_type, enabled=False):
            return gradients(ctx, dy, saved)
    dy_mn = rows_of(dy)
    eager = is_eager()
    if eager:
        dy_mn = without_zero_strides(dy_mn)
    needs = ctx.needs_input_grad[:5]
    if saved is None:
        saved = ctx.saved_tensors
    if eager and needs in _USUAL:
        x, w, a, b, z_mr, seed = saved
        scale, dropout_p, _, x_shape = ctx.constants
        p = Product(rows_of(x), w, a, b, scale, None, dropout_p, seed)
        if (together := dispatch.gradients_of(p, dy_mn)) is not None:
            dx, da, db = together(p, dy_mn, z_mr)
            return (
                dx if dx.dim() == len(x_shape) else dx.view(x_shape),
                None,
                da,
                db,
                dy_mn.sum(0) if needs[4] else None,
                None,
            )
    return _gradients_by_the_verbs(ctx, saved, dy_mn, eager)


def _gradients_by_the_verbs(ctx: Any, saved: tuple[Any, ...], dy_mn: Tensor, eager: bool) -> Gradients:
    dx, dw, da, db, dbias = by_the_verbs(saved, ctx.constants, ctx.needs_input_grad[:5], dy_mn, eager)
    return dx, dw, da, db, dbias, None


def by_the_verbs(
    saved: Sequence[Any], constants: Sequence[Any], needs: Sequence[bool], dy_mn: Tensor, eager: bool
) -> tuple[Tensor | None, ...]:
    """dx, dw, da, db and dbias, those that are needed, by the two verbs.

    Args:
        saved: x [..., K], w, a, b, z [M, R] and the seed, as far as they are needed.
        constants: scale, dropout_p, dtype of the adapters, shape of x.
        needs: which of x, w, a, b and bias ask for a gradient.
        dy_mn: gradient of the output.
        eager: whether the kernels are called without their operators.
    """
    x, w, a, b, z_mr, seed = saved
    scale, dropout_p, adapter_dtype, x_shape = constants
    need_x, need_w, need_a, need_b, need_bias = needs
    lora_matmul, rank_grad = verbs(eager)
    dx = dw = da = db = None
    if need_x or need_a:
        # The forward's verb with the operands turned; without need_x only its rank-R middle is made.
        turned = Product(dy_mn, w.T if need_x else None, b.T, a.T, scale, None, dropout_p, seed, True)
        dx_mk, t_mr = lora_matmul(turned)
        dx = dx_mk.view(x_shape) if need_x else None
    if need_a:
        da = rank_grad(t_mr, rows_of(x), adapter_dtype, dropout_p, seed)
    if need_b:
        db = rank_grad(dy_mn, z_mr, adapter_dtype, 0.0, None)
    if need_w:
        dw = torch.mm(dy_mn.T, rows_of(x))
    return dx, dw, da, db, dy_mn.sum(0) if need_bias else None


_gradients_once = once_differentiable(gradients)


def by_rows(p: Product) -> Product:
    """The product with x as [M, K]."""
    return p if p.x.dim() == 2 else p._replace(x=rows_of(p.x))


def rows_of(x: Tensor) -> Tensor:
    """All leading dimensions as one: [..., C] -> [M, C], a view wherever the strides allow."""
    if x.dim() == 2:
        return x
    return x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def unrows(y_mn: Any, x: Tensor) -> Tensor:
    """[M, N] with the leading dimensions of x."""
    if x.dim() == 2:
        rows: Tensor = y_mn
        return rows
    # Not y_mn.view: autograd forbids in-place operations on a view that a custom Function returns.
    y: Tensor = _unsafe_view(y_mn, [*x.shape[:-1], y_mn.shape[1]])
    return y
