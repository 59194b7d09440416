"""Whole training steps of the reference, the oracle and the baseline of the error rule, beside the rule itself."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .backends import reference
from .backends.request import Product
from .error_rule import MAX_FACTOR, RMS_FACTOR, Errors, assert_close_to_oracle, compare

__all__ = [
    "MAX_FACTOR",
    "RMS_FACTOR",
    "Errors",
    "Step",
    "assert_close_to_oracle",
    "compare",
    "oracle_step",
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
    turned = Product(dy, p.w.T, p.b.T, p.a.T, p.scale, None, p.dropout_p, p.seed, on_product=True)
    dx, t = reference.lora_matmul(turned)
    assert y is not None
    assert dx is not None
    da = reference.rank_grad(t, p.x, dtype=p.a.dtype, dropout=p.mask_x)
    db = reference.rank_grad(dy, z, dtype=p.b.dtype)
    return Step(y, dx, da, db)


def oracle_step(product: Product, dy: Tensor) -> Step:
    """:func:`reference_step` in float64 on the same rounded inputs: the oracle."""
    return reference_step(product.map(Tensor.double), dy.double())
