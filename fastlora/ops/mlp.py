"""``lora_swiglu_mlp``: the gated MLP of a transformer, its three LoRA layers as one node of the graph.

    g = gate(x)    u = up(x)    h = act(g) u    y = down(h)
    dh = dy W_down + D'(t_down A_down)          dA_down = t_downᵀ D(h)     dB_down = dyᵀ z_down
    dg = dh u act'(g)    du = dh act(g)         and from these as in a group of gate and up

Kept for the backward are x, g, u and the rank-R middles: h, which torch's own graph keeps with act(g) beside them, is
made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import dispatch, reference, swiglu
from ..backends.dropout import draw_seed
from ..backends.request import Product
from ..eager import is_eager
from . import base, group, linear, plain
from .autograd import rows_of, unrows, verbs, without_zero_strides
from .base import StoredWeight
from .group import Branch

# Elements of h up to which torch's own nodes are faster than a Function, for all that they keep two such tensors more.
_SMALL = 1 << 18

ACTIVATIONS = tuple(reference.ACTIVATIONS)


def lora_swiglu_mlp(
    x: Tensor, gate: Branch, up: Branch, down: Branch, *, activation: str = "silu", training: bool = True
) -> Tensor:
    """The gated MLP of LoRA layers: ``y = down(act(gate(x)) · up(x))``.

    What three calls of :func:`fastlora.lora_linear` give, keeping two tensors as wide as the MLP for the backward where
    they keep four, and with fewer passes over x. Code that is traced or compiled, DTensors, and few tokens on a CPU run
    those three calls.

    Args:
        x: input [..., K].
        gate: :class:`Branch` with weight [N, K].
        up: the same, of the same sizes but for its rank.
        down: :class:`Branch` with weight [out_features, N].
        activation: ``silu``, ``gelu`` or ``gelu_tanh``.
        training: False switches dropout off.

    Returns:
        y [..., out_features].

    Raises:
        ValueError: ``activation`` is unknown; or as ``lora_linear``.
        TypeError: a branch is no ``Branch``; or as ``lora_linear``.
        RuntimeError: the widths of the branches do not fit together; or as ``lora_linear``. A message about a branch
            begins with its name.

    Source: Shazeer, 2020, https://arxiv.org/abs/2002.05202, equation (6), with LoRA on each of its layers.
    """
    branches = {"gate": gate, "up": up, "down": down}
    _check(branches, activation)
    tensors = all(linear.is_plain(x, b.weight, b.lora_a, b.lora_b, b.bias) for b in branches.values())
    if not (tensors and is_eager()):
        return _layer_by_layer(x, branches, activation, training)
    if any(branch.is_stored for branch in branches.values()):
        dtype = base.common_dtype(x, [branch.weight for branch in branches.values()])
        if dtype is None:
            return _layer_by_layer(x, branches, activation, training)
        with base.without_autocast(x.device.type):
            return _at_once(x.to(dtype), branches, activation, training).to(x.dtype)
    if _is_small(x, gate.weight):
        return _layer_by_layer(x, branches, activation, training)
    return _at_once(x, branches, activation, training)


def _at_once(x: Tensor, branches: dict[str, Branch], activation: str, training: bool) -> Tensor:
    """The three layers as one node of the graph."""
    gate, up, down = branches.values()
    gate_p = _product("gate", x, gate)
    # What autocast made of x for gate is the x of up; that of down will be as wide as gate's output.
    up_p = _product("up", gate_p.x, up)
    h = gate_p.x.new_empty(()).expand(*x.shape[:-1], gate.weight.shape[0])
    products = [gate_p, up_p, _product("down", h, down)]
    if training:
        products = [p._replace(seed=draw_seed(x.device)) if p.dropout_p > 0 else p for p in products]
    if not torch.is_grad_enabled():
        return unrows(_forward(products, activation, keep=False)[0], x)
    operands = [t for p in products for t in group.operands_of(p)]
    y: Tensor = _Mlp.apply(products, activation, gate_p.x, *operands)  # type: ignore[no-untyped-call]
    return y


def _check(branches: dict[str, Branch], activation: str) -> None:
    """Raises for what the three layers cannot see one by one."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown: expected one of {', '.join(ACTIVATIONS)}")
    for name, branch in branches.items():
        if not isinstance(branch, Branch):
            raise TypeError(
                f"{name}: expected a fastlora.Branch(weight, lora_a, lora_b, scale, bias, dropout_p), got "
                f"{type(branch).__name__}"
            )
    gate, up, down = (branch.weight for branch in branches.values())
    # What is no matrix is put into words by its layer; a trace is told of every size that is looked at.
    if plain.is_traced() or not all(isinstance(w, (Tensor, StoredWeight)) and w.dim() == 2 for w in (gate, up, down)):
        return
    (n, k), found = gate.shape, up.shape
    if found != gate.shape:
        raise RuntimeError(f"up: weight has shape {list(found)}: expected [{n}, {k}], as gate's")
    if down.shape[1] != n:
        raise RuntimeError(
            f"down: weight has shape {list(down.shape)}: expected [out_features, {n}], the out_features of gate and up"
        )


def _is_small(x: Tensor, w: Tensor | StoredWeight) -> bool:
    """Whether each layer by itself would be a small call."""
    if not (x.dim() and w.dim()) or dispatch.small_of(x) is None:
        return False
    return x.numel() * w.shape[0] <= _SMALL * x.shape[-1]


def _layer_by_layer(x: Tensor, branches: dict[str, Branch], activation: str, training: bool) -> Tensor:
    """The same in three calls of ``lora_linear``."""

    def layer(name: str, x: Tensor) -> Tensor:
        weight, a, b, scale, bias, p = branches[name]
        options = dict(scale=scale, bias=bias, dropout_p=p, training=training)
        y: Tensor = group.of_branch(name, linear.lora_linear, x, weight, a, b, **options)
        return y

    return layer("down", reference.swiglu(layer("gate", x), layer("up", x), activation))


def _product(name: str, x: Tensor, branch: Branch) -> Product:
    product: Product = group.of_branch(name, linear.product_of, x, *branch)
    return product


def _forward(
    products: Sequence[Product], activation: str, *, keep: bool
) -> tuple[Tensor, list[Tensor], tuple[Tensor, Tensor]]:
    """y, z of each product, and g and u, which mean nothing afterwards where they are not to be kept."""
    (g, u), zs = base.lora_matmul_group(group.by_rows(products[:2]))
    h = swiglu.forward(g, u, activation, overwrite=not keep)
    y, z = base.lora_matmul(products[2]._replace(x=h))
    return y, [*zs, z], (g, u)


class _Needs(NamedTuple):
    """Which gradients are asked for: of x, and of w, a, b and bias of each branch."""

    x: bool
    gate: tuple[bool, ...]
    up: tuple[bool, ...]
    down: tuple[bool, ...]

    @staticmethod
    def of(ctx: Any) -> _Needs:
        return _Needs(ctx.needs_input_grad[2], *group.needs_of(ctx.needs_input_grad[3:]))

    @property
    def dh(self) -> bool:
        """Whether anything before h asks for a gradient."""
        return self.x or any(self.gate) or any(self.up)

    @property
    def h(self) -> bool:
        """Whether a gradient of down is made of h: dw or da."""
        return any(self.down[:2])


class _Mlp(torch.autograd.Function):
    """The chain rule in the module docstring, for eager code."""

    @staticmethod
    def forward(ctx: Any, products: list[Product], activation: str, x: Tensor, *operands: Tensor | None) -> Tensor:
        needs = _Needs.of(ctx)
        keep = needs.dh or needs.h
        y, zs, wide = _forward(products, activation, keep=keep)
        gate, up, down = (
            group.kept(p, z, need_input, asked)
            for p, z, need_input, asked in zip(products, zs, (needs.x, needs.x, needs.dh), needs[1:], strict=True)
        )
        any_x = any(need for asked in (needs.gate, needs.up) for need in asked[:2])
        ctx.save_for_backward(*(wide if keep else (None, None)), *down, x if any_x else None, *gate, *up)
        ctx.constants, ctx.stored = (activation, group.constants_of(products)), group.stored_of(products)
        return unrows(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):
            return None, None, *_gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    """dx, and dw, da, db and dbias of gate, up and down, those that are needed."""
    activation, constants = ctx.constants
    # Looked at once: a checkpoint hands out each of them once.
    g, u, *saved = ctx.saved_tensors
    down, of_group = list(saved[:5]), saved[5:]
    needs, stored = _Needs.of(ctx), ctx.stored
    if needs.dh and stored[2] is not None:
        down[0] = base.opened(stored[2], dy.dtype)
    dg, du, of_down = _through_down(rows_of(dy), (g, u), down, constants[2], activation, needs)
    others = group.gradients(of_group, stored[:2], constants[:2], needs.x, (needs.gate, needs.up), (dg, du))
    return [*others, *of_down]


def _through_down(
    dy: Tensor,
    wide: tuple[Tensor, Tensor],
    kept: Sequence[Tensor | None],
    constants: tuple[Any, ...],
    activation: str,
    needs: _Needs,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """dg and du, and dw, da, db and dbias of down.

    Not the product's own gradients, which would want h before there is dh: h is made with dg and du, in one pass.
    """
    w, a, b, z, seed = kept
    scale, dropout_p, adapter_dtype, _ = constants
    need_w, need_a, need_b, need_bias = needs.down
    eager = is_eager()
    lora_matmul, rank_grad = verbs(eager)
    dg = du = h = dw = da = db = None
    if eager:
        dy = without_zero_strides(dy)
    if needs.dh or need_a:
        turned = Product(dy, w.T if needs.dh else None, b.T, a.T, scale, None, dropout_p, seed, True)  # type: ignore[union-attr]
        dh, t = lora_matmul(turned)
    if needs.dh:
        dg, du, h = swiglu.backward(*wide, dh, activation, with_h=needs.h)
    elif needs.h:
        h = swiglu.forward(*wide, activation)
    if need_a:
        da = rank_grad(t, h, adapter_dtype, dropout_p, seed)
    if need_w:
        dw = torch.mm(dy.T, h)  # type: ignore[arg-type]
    if need_b:
        db = rank_grad(dy, z, adapter_dtype, 0.0, None)
    return dg, du, [dw, da, db, dy.sum(0) if need_bias else None]
