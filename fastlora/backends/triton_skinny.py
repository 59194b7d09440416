"""``triton-skinny``: the vendor's GEMM, and Triton kernels for all that has the rank or a mask in it.

    z = scale · D(x) aᵀ             middle            y  = z bᵀ + bias    rank_update,   then  y  += x wᵀ
    t = scale · dy b,  db = dyᵀ z   middle_and_grad   dx = D'(t a)        rank_update,   then  dx += dy w
    da = tᵀ D(x)                    rank_grad

Only kernels that are easy to prove: pointer loads, no flags, no waiting between CTAs, mma.sync. Against the frozen GEMM
a step reads x twice more and dy once more, writes y and dx once more and reads them in the GEMM. Launches of a step at
M = 8192: 9, two of them the GEMMs, with or without dropout: middle, rank_update, GEMM; middle_and_grad and its sum,
rank_update, GEMM, rank_grad and its sum. Where M is small middle has a sum, too; where reading dy once does not pay,
middle and rank_grad are launched instead of middle_and_grad.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import triton
from .dropout import Dropout
from .replay import replay
from .request import Kernel, Product, new_middle


def lora_matmul(p: Product) -> tuple[Tensor | None, Tensor]:
    """x [M, K], w [N, K] or None for z alone, a [R, K], b [N, R], bias [N] → y [M, N], z [M, R]."""
    y, z = launch(p)
    return (None if y is None else y.addmm_(p.x, p.w.T)), z  # type: ignore[union-attr]


def launch(p: Product) -> tuple[Tensor | None, Tensor]:
    """z bᵀ + bias and z: all of :func:`lora_matmul` but the vendor's GEMM."""
    return triton.run_product(launches, p)


def launches(p: Product, capability: int, precision: str) -> triton.Launches:
    """The memory of y and z, and the launches that fill z and write z bᵀ + bias into y."""
    from ..kernels import middle, rank_update

    z = new_middle(p.x, p.a.shape[0])
    steps = middle.launches(p, z, capability=capability, precision=precision)
    if p.w is None:
        return None, z, steps
    y, step = rank_update.launch(p, z, precision=precision)
    return y, z, [*steps, step]


def gradients(p: Product, dy: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx [M, K], da [R, K] and db [N, R], with one read of dy for t and db where that pays."""
    dx, da, db = launch_gradients(p, dy, z)
    return dx.addmm_(dy, p.w), da, db  # type: ignore[arg-type]


def launch_gradients(p: Product, dy: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """D'(t a), da and db: all of :func:`gradients` but the vendor's GEMM."""
    with triton.device_of(dy):
        capability, precision = triton.capability_of(dy.device), triton.precision()

        def launcher() -> tuple[tuple[Tensor, Tensor, Tensor], list[Any]]:
            dx, da, db, steps = gradient_launches(p, dy, z, capability, precision)
            return (dx, da, db), triton.for_this_gpu(steps)

        constants = (p.scale, p.dropout_p, capability, precision)
        operands = (p.x, dy, p.a, p.b, z, p.seed)
        dx, da, db = replay("gradient_launches", operands, constants, dy.device, launcher)
    return dx, da, db  # type: ignore[return-value]


def gradient_launches(
    p: Product, dy: Tensor, z: Tensor, capability: int, precision: str
) -> tuple[Tensor, Tensor, Tensor, list[Any]]:
    """The memory of dx, da and db, and the launches that fill da and db and write D'(t a) into dx."""
    from ..kernels import middle, middle_and_grad, rank_grad, rank_update

    (m, n), r = dy.shape, p.b.shape[1]
    t = new_middle(dy, r)
    turned = Product(dy, None, p.b.T, p.a.T, p.scale, None, p.dropout_p, p.seed, on_product=True)
    if middle_and_grad.pays(m, n, r, dy.element_size(), capability):
        db, steps = middle_and_grad.launches(dy, p.b, z, t, scale=p.scale, capability=capability, precision=precision)
    else:
        db, steps = rank_grad.launches(dy, z, dtype=p.b.dtype, capability=capability, precision=precision)
        steps = [*middle.launches(turned, t, capability=capability, precision=precision), *steps]
    dx, update = rank_update.launch(turned, t, precision=precision)
    dropout = None if p.seed is None else Dropout(p.dropout_p, p.seed)
    da, last = rank_grad.launches(t, p.x, dtype=p.a.dtype, capability=capability, precision=precision, dropout=dropout)
    return dx, da, db, [*steps, update, *last]


LORA_MATMUL = (Kernel("triton-skinny", triton.refuses, lora_matmul, gradients=gradients),)
