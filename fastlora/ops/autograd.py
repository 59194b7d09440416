"""``lora_linear`` and its chain rule, written in the two verbs, over two registered torch operators.

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
from ..backends.dispatch import rows_of
from ..backends.dropout import Dropout, draw_seed
from ..backends.request import Request, new_middle
from . import dtensor

_ops = torch.library.Library("fastlora", "FRAGMENT")
_ops.define(
    "lora_matmul(Tensor x, Tensor? w, Tensor a, Tensor b, float scale, Tensor? bias, "
    "float dropout_p, Tensor? seed, bool on_product) -> (Tensor, Tensor)"
)
_ops.define("rank_grad(Tensor p, Tensor q, ScalarType dtype, float dropout_p, Tensor? seed) -> Tensor")


def _lora_matmul(
    x: Tensor,
    w: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    on_product: bool,
) -> tuple[Tensor, Tensor]:
    dropout = None if seed is None else Dropout(dropout_p, seed)
    request = Request.of_lora_matmul(x, w, a, b, dropout is not None)
    backend = dispatch.backend_for(request)
    y, z = backend.lora_matmul(x, w, a, b, scale=scale, bias=bias, dropout=dropout, on_product=on_product)
    if request.r % 8 and z.stride() != (expected := new_middle(x, request.r)).stride():
        z = expected.copy_(z)
    return (x.new_empty(0) if y is None else y), z


def _lora_matmul_fake(
    x: Tensor,
    w: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    on_product: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(0) if w is None else x.new_empty(x.shape[0], w.shape[0])
    return y, new_middle(x, a.shape[0])


def _rank_grad(p: Tensor, q: Tensor, dtype: torch.dtype, dropout_p: float, seed: Tensor | None) -> Tensor:
    dropout = None if seed is None else Dropout(dropout_p, seed)
    backend = dispatch.backend_for(Request.of_rank_grad(p, q, dtype, dropout is not None))
    grad: Tensor = backend.rank_grad(p, q, dtype=dtype, dropout=dropout)
    return grad


def _rank_grad_fake(p: Tensor, q: Tensor, dtype: torch.dtype, dropout_p: float, seed: Tensor | None) -> Tensor:
    return q.new_empty(p.shape[1], q.shape[1], dtype=dtype)


_ops.impl("lora_matmul", _lora_matmul, "CompositeExplicitAutograd")
_ops.impl("rank_grad", _rank_grad, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::lora_matmul", _lora_matmul_fake, lib=_ops)
torch.library.register_fake("fastlora::rank_grad", _rank_grad_fake, lib=_ops)
lora_matmul_op = torch.ops.fastlora.lora_matmul.default
rank_grad_op = torch.ops.fastlora.rank_grad.default
_unsafe_view = torch.ops.aten._unsafe_view.default


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """A linear layer with a low-rank update: ``y = x Wᵀ + scale · D(x) Aᵀ Bᵀ + bias``.

    D is dropout on the adapter's input alone, recomputed in the backward and never stored. x and the rank-R middle are
    all that is kept for backward. Gradients flow to every argument that asks for one, ``weight`` and ``bias`` included.

    Args:
        x: input [..., K], bfloat16, float16, float32 or float64. On DTensors see :mod:`fastlora.ops.dtensor`.
        weight: base weight [N, K], as ``nn.Linear`` stores it, in the dtype of x.
        lora_a: down projection [R, K], in the dtype of x, or float32 on a half-precision base.
        lora_b: up projection [N, R], in the dtype of ``lora_a``.
        scale: factor on the update, lora_alpha / r (or lora_alpha / sqrt(r) for rsLoRA).
        bias: base bias [N] or None.
        dropout_p: probability of dropping an element of x on its way into ``lora_a``, 0 <= p < 1, realised to 1/65536.
        training: False switches dropout off.

    Returns:
        y [..., N] in the dtype of x (of autocast where that is on).

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: ``dropout_p`` is outside [0, 1).
        RuntimeError: shapes, dtypes or devices do not fit together, or some arguments are DTensors and others not; or
            ``FASTLORA_BACKEND`` forces a backend that refuses this call.

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685, equation (3).
    """
    dispatch.check(x, weight, lora_a, lora_b, scale, bias, dropout_p)
    x, weight, lora_a, lora_b, bias = dispatch.autocast(x, weight, lora_a, lora_b, bias)
    dispatch.check_dtypes(x, weight, lora_a, lora_b, bias)

    seed = draw_seed(x.device) if training and dropout_p > 0 else None
    if dtensor.is_sharded(x):
        return dtensor.lora_linear(_product, x, weight, lora_a, lora_b, bias, float(scale), float(dropout_p), seed)
    return _product(x, weight, lora_a, lora_b, bias, float(scale), float(dropout_p), seed)


def _product(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    """``lora_linear`` of plain tensors that fit together."""
    if not torch.is_grad_enabled():
        return _unrows(lora_matmul_op(rows_of(x), weight, lora_a, lora_b, scale, bias, dropout_p, seed, False)[0], x)
    y: Tensor = _LoRALinear.apply(  # type: ignore[no-untyped-call]
        x, weight, lora_a, lora_b, bias, scale, dropout_p, seed
    )
    return y


class _LoRALinear(torch.autograd.Function):
    """The chain rule in the module docstring, computing only what ``needs_input_grad`` asks for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        scale: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        x_mk = rows_of(x)
        y_mn, z_mr = lora_matmul_op(x_mk, weight, lora_a, lora_b, scale, bias, dropout_p, seed, False)
        need_x, need_weight, need_a, need_b = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            x if need_a or need_weight else None,
            weight if need_x else None,
            lora_a if need_x or need_a else None,
            lora_b if need_x or need_a else None,
            z_mr if need_b else None,
            seed,
        )
        ctx.scale, ctx.dropout_p = scale, dropout_p
        ctx.x_shape, ctx.adapter_dtype = x.shape, lora_a.dtype
        return _unrows(y_mn, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(dy.device.type):
            # The operands got their dtypes in the forward; autocast would change some of them and not others.
            with torch.autocast(dy.device.type, enabled=False):
                return _gradients(ctx, dy)
        return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, z_mr, seed = ctx.saved_tensors
    need_x, need_weight, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
    p = ctx.dropout_p
    dx = dweight = da = db = dbias = None
    dy_mn = rows_of(dy)
    if need_x or need_a:
        # The forward's verb with the operands turned; without need_x only its rank-R middle is made.
        w = weight.T if need_x else None
        dx_mk, t_mr = lora_matmul_op(dy_mn, w, lora_b.T, lora_a.T, ctx.scale, None, p, seed, True)
        dx = dx_mk.view(ctx.x_shape) if need_x else None
    if need_a:
        da = rank_grad_op(t_mr, rows_of(x), ctx.adapter_dtype, p, seed)
    if need_b:
        db = rank_grad_op(dy_mn, z_mr, ctx.adapter_dtype, 0.0, None)
    if need_weight:
        dweight = torch.mm(dy_mn.T, rows_of(x))
    if need_bias:
        dbias = dy_mn.sum(0)
    return dx, dweight, da, db, dbias, None, None, None


def _unrows(y_mn: Tensor, x: Tensor) -> Tensor:
    """[M, N] with the leading dimensions of x."""
    if x.dim() == 2:
        return y_mn
    # Not y_mn.view: autograd forbids in-place operations on a view that a custom Function returns.
    y: Tensor = _unsafe_view(y_mn, [*x.shape[:-1], y_mn.shape[1]])
    return y
