"""Whole training steps of the reference, the oracle and the baseline of the error rule, beside the rule itself."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backends import reference
from .backends.request import Product
from .error_rule import MAX_FACTOR, RMS_FACTOR, Errors, assert_close_to_oracle, compare

__all__ = [
    "MAX_FACTOR",
    "RMS_FACTOR",
    "DoraStep",
    "Errors",
    "MlpStep",
    "Step",
    "assert_close_to_oracle",
    "compare",
    "oracle_dora_step",
    "oracle_mlp_step",
    "oracle_step",
    "reference_dora_step",
    "reference_mlp_step",
    "reference_step",
]


class Step(NamedTuple):
    """What one training step of a LoRA layer computes: y [M, N], dx [M, K], da [R, K], db [N, R]."""

    y: Tensor
    dx: Tensor
    da: Tensor
    db: Tensor


def reference_step(product: Product, dy: Tensor) -> Step:
    """Forward and backward in the reference's two verbs, in the dtype of x: the baseline.

    Args:
        product: the forward, with x [M, K] and dropout, if any, on the input.
        dy: gradient of the output [M, N].
    """
    p = product
    assert p.w is not None
    y, z = reference.lora_matmul(p)
    dx, t = reference.lora_matmul(p.turned(dy))
    assert y is not None
    assert dx is not None
    da = reference.rank_grad(t, p.x, dtype=p.a.dtype, dropout=p.mask_x)
    db = reference.rank_grad(dy, z, dtype=p.b.dtype)
    return Step(y, dx, da, db)


def oracle_step(product: Product, dy: Tensor) -> Step:
    """:func:`reference_step` in float64 on the same rounded inputs: the oracle."""
    return reference_step(product.map(Tensor.double), dy.double())


class MlpStep(NamedTuple):
    """What one training step of a gated MLP of LoRA layers computes: y and dx, and da and db of gate, up and down."""

    y: Tensor
    dx: Tensor
    das: tuple[Tensor, Tensor, Tensor]
    dbs: tuple[Tensor, Tensor, Tensor]


def reference_mlp_step(gate: Product, up: Product, down: Product, dy: Tensor, activation: str) -> MlpStep:
    """Forward and backward of y = down(act(gate(x)) up(x)), layer by layer, in the dtype of x: the baseline.

    Args:
        gate: the forward, with x [M, K] and dropout, if any, on the input.
        up: the same, of the same x.
        down: the same; its x is not looked at.
        dy: gradient of the output.
        activation: a name in ``reference.ACTIVATIONS``.
    """
    g, u = (reference.lora_matmul(p)[0] for p in (gate, up))
    assert g is not None
    assert u is not None
    last = reference_step(down._replace(x=reference.swiglu(g, u, activation)), dy)
    dg, du = reference.swiglu_gradients(g, u, last.dx, activation)
    first, second = reference_step(gate, dg), reference_step(up, du)
    return MlpStep(last.y, first.dx + second.dx, (first.da, second.da, last.da), (first.db, second.db, last.db))


def oracle_mlp_step(gate: Product, up: Product, down: Product, dy: Tensor, activation: str) -> MlpStep:
    """:func:`reference_mlp_step` in float64 on the same rounded inputs: the oracle."""
    gate, up, down = (p.map(Tensor.double) for p in (gate, up, down))
    return reference_mlp_step(gate, up, down, dy.double(), activation)


class DoraStep(NamedTuple):
    """What one training step of a DoRA layer computes: y, dx, dw [N, K], da, db and dmagnitude [N]."""

    y: Tensor
    dx: Tensor
    dw: Tensor
    da: Tensor
    db: Tensor
    dmagnitude: Tensor


def reference_dora_step(product: Product, magnitude: Tensor, dy: Tensor) -> DoraStep:
    """Forward and backward of a DoRA layer with a dense b a, in the dtype of x: the baseline.

    y = x wᵀ + bias + (g - 1) ⊙ D(x) wᵀ + g ⊙ z bᵀ, g = magnitude / ‖w + scale · b a‖ by rows, the norm a constant.

    Args:
        product: the forward, with x [M, K] and dropout, if any, on the input.
        magnitude: [N].
        dy: gradient of the output [M, N].
    """
    p, mask = product, product.mask_x
    assert p.w is not None
    x, w, dy = p.x.contiguous(), p.w, dy.contiguous()
    dtype = x.dtype
    a, b = p.a.to(dtype), p.b.to(dtype)
    dropped = reference.dropped(x, mask)
    z = p.scale * (dropped @ a.T)
    norm = torch.linalg.vector_norm(w + p.scale * (b @ a), dim=1)
    g = magnitude / norm
    base, of_dropped, update = x @ w.T, dropped @ w.T, z @ b.T
    y = (base + (g - 1) * of_dropped + g * update).to(dtype)
    du, h = (g * dy).to(dtype), ((g - 1) * dy).to(dtype)
    t = p.scale * (du @ b)
    return DoraStep(
        y if p.bias is None else y + p.bias,
        dy @ w + reference.dropped(h @ w + t @ a, mask),
        dy.T.contiguous() @ x + h.T.contiguous() @ dropped,
        (t.T.contiguous() @ dropped).to(p.a.dtype),
        (du.T.contiguous() @ z).to(p.b.dtype),
        ((dy * (of_dropped + update)).sum(0) / norm).to(magnitude.dtype),
    )


def oracle_dora_step(product: Product, magnitude: Tensor, dy: Tensor) -> DoraStep:
    """:func:`reference_dora_step` in float64 on the same rounded inputs: the oracle."""
    return reference_dora_step(product.map(Tensor.double), magnitude.double(), dy.double())
