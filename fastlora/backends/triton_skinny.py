"""``triton-skinny``: the vendor's GEMM, and Triton kernels for all that has the rank or a mask in it.

    z = scale · D(x) aᵀ             middle            y  = z bᵀ + bias    rank_update,   then  y  += x wᵀ
    t = scale · dy b,  db = dyᵀ z   middle_and_grad   dx = D'(t a)        rank_update,   then  dx += dy w
    da = tᵀ D(x)                    rank_grad

Only kernels that are easy to prove: pointer loads, no flags, no waiting between CTAs, mma.sync. Against the frozen GEMM
a step reads x twice more and dy once more, writes y and dx once more and reads them in the GEMM. Launches of a step at
M = 8192: 9, two of them the GEMMs, with or without dropout: middle, rank_update, GEMM; middle_and_grad and its sum,
rank_update, GEMM, rank_grad and its sum. Where M is small middle has a sum, too; where reading dy once does not pay,
middle and rank_grad are launched instead of middle_and_grad.

A group of layers with one input x:

    zᵢ = scaleᵢ · Dᵢ(x) aᵢᵀ           group_middle       yᵢ = zᵢ bᵢᵀ + biasᵢ     rank_update,   then  yᵢ += x wᵢᵀ
    tᵢ = scaleᵢ · dyᵢ bᵢ, dbᵢ         as above           dx = Σ D'ᵢ(tᵢ aᵢ)       group_update,  then  dx += dyᵢ wᵢ
    daᵢ = tᵢᵀ Dᵢ(x)                   group_grad

For n layers x is read once for all zᵢ and once for all daᵢ, where layers one by one read it 2 n times, and dx is
written once by us and by no sum of n gradients. More than four branches go in parts of four.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import triton
from .dropout import Dropout
from .replay import replay
from .request import Kernel, Product, Together, new_middle


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
    from ..kernels import rank_grad, rank_update

    t = new_middle(dy, p.b.shape[1])
    turned = _turned(p, dy)
    db, steps = _t_and_db(p, dy, z, t, capability, precision)
    dx, update = rank_update.launch(turned, t, precision=precision)
    dropout = None if p.seed is None else Dropout(p.dropout_p, p.seed)
    da, last = rank_grad.launches(t, p.x, dtype=p.a.dtype, capability=capability, precision=precision, dropout=dropout)
    return dx, da, db, [*steps, update, *last]


def _turned(p: Product, dy: Tensor) -> Product:
    """The backward's product, for its low-rank part alone."""
    return p._replace(w=None).turned(dy)


def _t_and_db(
    p: Product, dy: Tensor, z: Tensor, t: Tensor, capability: int, precision: str
) -> tuple[Tensor, list[Any]]:
    """db's memory, and the launches that fill it and t."""
    from ..kernels import middle, middle_and_grad, rank_grad

    (m, n), r = dy.shape, p.b.shape[1]
    if middle_and_grad.pays(m, n, r, dy.element_size(), capability):
        return middle_and_grad.launches(dy, p.b, z, t, scale=p.scale, capability=capability, precision=precision)
    db, steps = rank_grad.launches(dy, z, dtype=p.b.dtype, capability=capability, precision=precision)
    return db, [*middle.launches(_turned(p, dy), t, capability=capability, precision=precision), *steps]


def lora_matmul_group(products: Sequence[Product]) -> tuple[list[Tensor], list[Tensor]]:
    """yᵢ [M, Nᵢ] and zᵢ [M, Rᵢ] of several products of one x [M, K]."""
    ys: list[Tensor] = []
    zs: list[Tensor] = []
    for part in _parts(products):
        made = launch_group(products[part])
        ys += made[0]
        zs += made[1]
    for p, y in zip(products, ys, strict=True):
        y.addmm_(p.x, p.w.T)  # type: ignore[union-attr]
    return ys, zs


def _parts(products: Sequence[Product]) -> Iterator[slice]:
    from ..kernels import branches

    return branches.parts([p.a.dtype for p in products])


def launch_group(products: Sequence[Product]) -> tuple[list[Tensor], list[Tensor]]:
    """zᵢ bᵢᵀ + biasᵢ and zᵢ of a part: all of :func:`lora_matmul_group` but the vendor's GEMMs."""
    if len(products) == 1:
        y, z = launch(products[0])
        return [y], [z]  # type: ignore[list-item]
    products = [_contiguous(p) for p in products]
    x = products[0].x
    with triton.device_of(x):
        capability, precision = triton.capability_of(x.device), triton.precision()

        def launcher() -> tuple[tuple[Tensor, ...], list[Any]]:
            ys, zs, steps = group_launches(products, capability, precision)
            return (*ys, *zs), triton.for_this_gpu(steps)

        constants = (*((p.scale, p.dropout_p) for p in products), capability, precision)
        operands = (x, *(t for p in products for t in (p.a, p.b, p.bias, p.seed)))
        made = replay("group_launches", operands, constants, x.device, launcher)
    return list(made[: len(products)]), list(made[len(products) :])  # type: ignore[arg-type]


def _contiguous(p: Product) -> Product:
    """The product with a and bias as the launches of a group read them."""
    return p._replace(a=p.a.contiguous(), bias=None if p.bias is None else p.bias.contiguous())


def group_launches(
    products: Sequence[Product], capability: int, precision: str
) -> tuple[list[Tensor], list[Tensor], list[Any]]:
    """The memory of all yᵢ and zᵢ, and the launches that fill the zᵢ and write zᵢ bᵢᵀ + biasᵢ into the yᵢ."""
    from ..kernels import branches, group_middle, rank_update

    x, ranks = products[0].x, branches.ranks_of(products)
    z = x.new_empty(x.shape[0], branches.begins(ranks)[1])
    steps = group_middle.launches(products, z, capability=capability, precision=precision)
    zs, ys = branches.views(z, ranks), []
    for p, z_i in zip(products, zs, strict=True):
        y, step = rank_update.launch(p, z_i, precision=precision)
        ys.append(y)
        steps.append(step)
    return ys, zs, steps


def gradients_group(
    products: Sequence[Product], dys: Sequence[Tensor], zs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx [M, K], and daᵢ [Rᵢ, K] and dbᵢ [Nᵢ, Rᵢ] of several products of one x, from all dyᵢ and zᵢ."""
    dx: Tensor | None = None
    das: list[Tensor] = []
    dbs: list[Tensor] = []
    for part in _parts(products):
        more, *grads = launch_group_gradients(products[part], dys[part], zs[part])
        dx = more if dx is None else dx.add_(more)
        das += grads[0]
        dbs += grads[1]
    for p, dy in zip(products, dys, strict=True):
        dx.addmm_(dy, p.w)  # type: ignore[union-attr, arg-type]
    return dx, das, dbs  # type: ignore[return-value]


def launch_group_gradients(
    products: Sequence[Product], dys: Sequence[Tensor], zs: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Σ D'ᵢ(tᵢ aᵢ), all daᵢ and dbᵢ of a part: all of :func:`gradients_group` but the vendor's GEMMs."""
    if len(products) == 1:
        dx, da, db = launch_gradients(products[0], dys[0], zs[0])
        return dx, [da], [db]
    products = [_contiguous(p) for p in products]
    x = products[0].x
    with triton.device_of(x):
        capability, precision = triton.capability_of(x.device), triton.precision()

        def launcher() -> tuple[tuple[Tensor, ...], list[Any]]:
            dx, da, dbs, steps = group_gradient_launches(products, dys, zs, capability, precision)
            return (dx, da, *dbs), triton.for_this_gpu(steps)

        constants = (*((p.scale, p.dropout_p) for p in products), capability, precision)
        of_each = zip(products, dys, zs, strict=True)
        operands = (x, *(t for p, dy, z in of_each for t in (dy, p.a, p.b, z, p.seed)))
        dx, da, *dbs = replay("group_gradient_launches", operands, constants, x.device, launcher)  # type: ignore[assignment]
    return dx, rows_of_each(da, products), dbs  # type: ignore[return-value]


def rows_of_each(da: Tensor, products: Sequence[Product]) -> list[Tensor]:
    """The daᵢ of what :func:`group_gradient_launches` has of all."""
    from ..kernels import branches

    return [rows.T for rows in branches.views(da.T, branches.ranks_of(products))]


def group_gradient_launches(
    products: Sequence[Product], dys: Sequence[Tensor], zs: Sequence[Tensor], capability: int, precision: str
) -> tuple[Tensor, Tensor, list[Tensor], list[Any]]:
    """The memory of dx, of all daᵢ as rows of one matrix and of the dbᵢ, and the launches that fill them.

    In dx they write Σ D'ᵢ(tᵢ aᵢ).
    """
    from ..kernels import branches, group_grad, group_update

    x, ranks = products[0].x, branches.ranks_of(products)
    t = torch.empty(x.shape[0], branches.begins(ranks)[1], dtype=x.dtype, device=x.device)
    dbs: list[Tensor] = []
    steps: list[Any] = []
    for p, dy, z, t_i in zip(products, dys, zs, branches.views(t, ranks), strict=True):
        db, more = _t_and_db(p, dy, z, t_i, capability, precision)
        dbs.append(db)
        steps += more
    dx, update = group_update.launch(products, t, precision=precision)
    options = dict(dtype=products[0].a.dtype, capability=capability, precision=precision)
    da, last = group_grad.launches(products, t, **options)  # type: ignore[arg-type]
    return dx, da, dbs, [*steps, update, *last]


LORA_MATMUL = (
    Kernel(
        "triton-skinny",
        triton.refuses,
        lora_matmul,
        gradients=gradients,
        together=Together(lora_matmul_group, gradients_group),
    ),
)
