"""``dora_linear``: the border of the linear layer whose rows, low-rank update included, have norms that are learned.

Its products and passes over [M, N] are in :mod:`fastlora.ops.dora_autograd`, its norms in :mod:`fastlora.ops.norms`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.dropout import draw_seed
from ..backends.request import Product
from ..eager import is_eager
from ..text import dtype_name
from . import base, dora_autograd, dtensor, flops, linear, plain
from .base import StoredWeight
from .norms import forget_norms, row_norms

__all__ = ["dora_linear", "forget_norms"]


def dora_linear(
    x: Tensor,
    weight: Tensor | StoredWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """A linear layer with a weight-decomposed low-rank update (DoRA): ``y = x Wᵀ + bias`` with W's rows set to norms.

        g = magnitude / ‖W + scale · B A‖                            row by row, no gradient through the norm
        y = x Wᵀ + bias + (g - 1) ⊙ D(x) Wᵀ + g · scale ⊙ D(x) Aᵀ Bᵀ

    The norm needs no dense B A. Of a weight that asks for no gradient its own share is kept from call to call: see
    ``fastlora.ops.dora.forget_norms`` for changes that torch does not count. Gradients flow to every argument that asks
    for one.

    Args:
        x: input [..., K], bfloat16, float16, float32 or float64; no DTensor, as all others.
        weight: base weight [N, K], as ``nn.Linear`` stores it, in the dtype of x; or a :class:`StoredWeight`.
        lora_a: down projection [R, K], in the dtype of x, or float32 on a half-precision base.
        lora_b: up projection [N, R], in the dtype of ``lora_a``.
        magnitude: the norm of each row [N], in the dtype of ``lora_a``.
        scale: factor on the update, lora_alpha / r (or lora_alpha / sqrt(r) for rsLoRA).
        bias: base bias [N] or None.
        dropout_p: probability of dropping an element of D(x), 0 <= p < 1, realised to 1/65536.
        training: False switches dropout off.

    Returns:
        y [..., N] in the dtype of x (of autocast where that is on).

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: ``dropout_p`` is outside [0, 1).
        RuntimeError: shapes, dtypes or devices do not fit together, or an argument is a DTensor; or
            ``FASTLORA_BACKEND`` forces a kernel that refuses this call.

    Source: Liu et al., 2024, https://arxiv.org/abs/2402.09353, equation (5) and section 4.3.
    """
    if plain.is_traced():
        product = Product(x, weight, lora_a, lora_b, scale, bias, dropout_p)  # type: ignore[arg-type]
        return plain.multiply(product, training, magnitude)
    _refuse_sharded(x=x, weight=weight, lora_a=lora_a, lora_b=lora_b, magnitude=magnitude, bias=bias)
    p = linear.product_of(x, weight, lora_a, lora_b, scale, bias, dropout_p)
    _check_magnitude(magnitude, x, weight, lora_a)
    if training and p.dropout_p > 0:
        p = p._replace(seed=draw_seed(x.device))
    if not is_eager() and not torch.compiler.is_compiling():
        flops.register()
    if isinstance(weight, StoredWeight):
        with base.without_autocast(x.device.type):
            w = base.opened(weight, p.x.dtype)
            norm = row_norms(w, p.a, p.b, p.scale, weight.source)
            return dora_autograd.multiply(p._replace(w=w), magnitude, norm, weight).to(x.dtype)
    # Of the weight itself: what autocast makes of it is new at every call, and rounded.
    norm = row_norms(weight, lora_a, lora_b, p.scale)
    return dora_autograd.multiply(p, magnitude, norm)


def _refuse_sharded(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and dtensor.is_sharded(tensor):
            raise RuntimeError(
                f"{name} is a DTensor: dora_linear takes plain tensors, since the norms are of whole rows. Under FSDP2 "
                "call the module that fully_shard wrapped, whose forward gathers its weights; under tensor parallelism "
                "use lora_linear, without DoRA"
            )


def _check_magnitude(magnitude: Tensor, x: Tensor, weight: Tensor | StoredWeight, lora_a: Tensor) -> None:
    """Raises for a magnitude that does not fit to the others, which do."""
    if not isinstance(magnitude, Tensor):
        raise TypeError(f"magnitude must be a torch.Tensor, got {type(magnitude).__name__}")
    n = weight.shape[0]
    if magnitude.shape != (n,):
        raise RuntimeError(
            f"magnitude has shape {list(magnitude.shape)}: expected [{n}], the out_features of weight (got weight "
            f"{list(weight.shape)})"
        )
    if magnitude.device != x.device:
        raise RuntimeError(f"magnitude is on {magnitude.device} and x on {x.device}: move them to one device")
    if magnitude.dtype is not lora_a.dtype:
        raise RuntimeError(
            f"magnitude is {dtype_name(magnitude.dtype)} and lora_a {dtype_name(lora_a.dtype)}: expected one dtype"
        )
