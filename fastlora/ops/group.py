"""``lora_linear_group``: several LoRA layers with one input as one product, such as q, k and v, or gate and up.

    yᵢ = x Wᵢᵀ + zᵢ Bᵢᵀ + biasᵢ      zᵢ = scaleᵢ · Dᵢ(x) Aᵢᵀ
    dx = Σ dyᵢ Wᵢ + D'ᵢ(tᵢ Aᵢ)        tᵢ = scaleᵢ · dyᵢ Bᵢ
    dAᵢ = tᵢᵀ Dᵢ(x)                   dBᵢ = dyᵢᵀ zᵢ

All zᵢ are made by one pass over x, and so are all dAᵢ; dx is summed where it is written. Each branch has its own
width, rank, scale and dropout mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import dispatch
from ..backends.dropout import draw_seed
from ..backends.request import Product
from ..eager import is_eager
from . import base, linear, small
from .autograd import by_the_verbs, rows_of, unrows, without_zero_strides
from .base import StoredWeight


class Branch(NamedTuple):
    """One LoRA layer among others: the arguments of :func:`fastlora.lora_linear` but x.

    Attributes:
        weight: base weight [N, K], or a :class:`StoredWeight`.
        lora_a: down projection [R, K].
        lora_b: up projection [N, R].
        scale: factor on the update.
        bias: base bias [N] or None.
        dropout_p: probability of dropping an element of the input on its way into ``lora_a``.
    """

    weight: Tensor | StoredWeight
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    bias: Tensor | None = None
    dropout_p: float = 0.0

    @property
    def is_stored(self) -> bool:
        """Whether the base is stored otherwise than as a matrix."""
        return isinstance(self.weight, StoredWeight)


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor | StoredWeight],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    *,
    scales: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    dropout_ps: float | Sequence[float] = 0.0,
    training: bool = True,
) -> tuple[Tensor, ...]:
    """Several linear layers of one input, each with a low-rank update: ``yᵢ = x Wᵢᵀ + scaleᵢ · Dᵢ(x) Aᵢᵀ Bᵢᵀ + biasᵢ``.

    What :func:`fastlora.lora_linear` gives for each of them, in fewer passes over x and over its gradient. Each branch
    has a dropout mask of its own. The gradient of an output that nobody used costs nothing. Code that is traced or
    compiled runs the branches one by one.

    Args:
        x: input [..., K] of all branches.
        weights: base weight [Nᵢ, K] of each branch, or a :class:`StoredWeight`.
        lora_as: down projections [Rᵢ, K].
        lora_bs: up projections [Nᵢ, Rᵢ].
        scales: factor on each update.
        biases: base bias [Nᵢ] of each, or None.
        dropout_ps: probability of dropping an element of x on its way into each ``lora_a``, or one for all.
        training: False switches dropout off.

    Returns:
        yᵢ [..., Nᵢ] of each branch, in order.

    Raises:
        ValueError: there is no branch, or the sequences differ in length; or as ``lora_linear``.
        TypeError, RuntimeError: as ``lora_linear``; the message begins with the number of the branch.

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685, equation (3).
    """
    count = len(weights)
    ps = [dropout_ps] * count if isinstance(dropout_ps, (int, float)) else dropout_ps
    biases = [None] * count if biases is None else biases
    lengths = {
        "weights": count,
        "lora_as": len(lora_as),
        "lora_bs": len(lora_bs),
        "scales": len(scales),
        "biases": len(biases),
        "dropout_ps": len(ps),
    }
    if count == 0 or len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"expected as many of each as there are branches, at least one, got {shown}")
    branches = [Branch(*each) for each in zip(weights, lora_as, lora_bs, scales, biases, ps, strict=True)]
    return multiply(x, branches, training)


def multiply(x: Tensor, branches: Sequence[Branch], training: bool = True) -> tuple[Tensor, ...]:
    """:func:`lora_linear_group` of branches as values."""
    if not is_eager() or not all(linear.is_plain(x, w, a, b, bias) for w, a, b, _, bias, _ in branches):
        return _one_by_one(x, branches, training)
    if any(branch.is_stored for branch in branches):
        dtype = base.common_dtype(x, [branch.weight for branch in branches])
        if dtype is None:
            return _one_by_one(x, branches, training)
        with base.without_autocast(x.device.type):
            return tuple(y.to(x.dtype) for y in _together(x.to(dtype), branches, training))
    first = small.multiply(Product(x, *branches[0]), training)  # type: ignore[arg-type]
    if first is not None:
        return first, *(_small(i, x, branch, training) for i, branch in enumerate(branches) if i)
    return _together(x, branches, training)


def _together(x: Tensor, branches: Sequence[Branch], training: bool) -> tuple[Tensor, ...]:
    """All branches as one node of the graph."""
    products: list[Product] = []
    for i, branch in enumerate(branches):
        # What autocast made of x for the first branch is the x of all.
        product = of_branch(f"branch {i}", linear.product_of, products[0].x if products else x, *branch)
        products.append(product)
    if training:
        products = [p._replace(seed=draw_seed(p.x.device)) if p.dropout_p > 0 else p for p in products]
    return _multiply(products)


def _one_by_one(x: Tensor, branches: Sequence[Branch], training: bool) -> tuple[Tensor, ...]:
    """Each branch by itself."""
    return tuple(_alone(i, x, branch, training) for i, branch in enumerate(branches))


def _alone(i: int, x: Tensor, branch: Branch, training: bool) -> Tensor:
    """One branch by itself."""
    w, a, b, scale, bias, p = branch
    options = dict(scale=scale, bias=bias, dropout_p=p, training=training)
    y: Tensor = of_branch(f"branch {i}", linear.lora_linear, x, w, a, b, **options)
    return y


def _small(i: int, x: Tensor, branch: Branch, training: bool) -> Tensor:
    """The same where the first branch was a small call."""
    y = small.multiply(Product(x, *branch), training)  # type: ignore[arg-type]
    return _alone(i, x, branch, training) if y is None else y


def of_branch(branch: str, call: Any, *arguments: Any, **options: Any) -> Any:
    """What a call for a branch returns; what it raises says which branch it is."""
    try:
        return call(*arguments, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{branch}: {error}") from error


def _multiply(products: list[Product]) -> tuple[Tensor, ...]:
    x = products[0].x
    if not torch.is_grad_enabled():
        return tuple(unrows(y, x) for y in base.lora_matmul_group(by_rows(products))[0])
    operands = [t for p in products for t in operands_of(p)]
    ys: tuple[Tensor, ...] = _Group.apply(products, x, *operands)  # type: ignore[no-untyped-call]
    return ys


def by_rows(products: Sequence[Product]) -> list[Product]:
    """The products with their one x as [M, K]."""
    x = rows_of(products[0].x)
    return [p._replace(x=x) for p in products]


# Of each branch: w, a, b, bias.
_OPERANDS = 4


def operands_of(p: Product) -> tuple[Tensor | None, ...]:
    """The tensors of a product that may ask for a gradient, but x."""
    return base.matrix_of(p.w), p.a, p.b, p.bias


# What a layer trains.
_USUAL = (False, True, True)


class _Group(torch.autograd.Function):
    """The chain rule in the module docstring, for eager code."""

    @staticmethod
    def forward(ctx: Any, products: list[Product], x: Tensor, *operands: Tensor | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ys, zs = base.lora_matmul_group(by_rows(products))
        need_x, needs = ctx.needs_input_grad[1], needs_of(ctx.needs_input_grad[2:])
        saved = [t for p, z, asked in zip(products, zs, needs, strict=True) for t in kept(p, z, need_x, asked)]
        any_x = any(need_w or need_a for need_w, need_a, *_ in needs)
        ctx.save_for_backward(x if any_x else None, *saved)
        ctx.constants, ctx.stored = constants_of(products), stored_of(products)
        return tuple(unrows(y, x) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        device_type = next((dy.device.type for dy in dys if dy is not None), "cpu")
        with torch.autocast(device_type, enabled=False):
            need_x, needs = ctx.needs_input_grad[1], needs_of(ctx.needs_input_grad[2:])
            return None, *gradients(ctx.saved_tensors, ctx.stored, ctx.constants, need_x, needs, dys)


def needs_of(flat: Sequence[bool]) -> list[tuple[bool, ...]]:
    """Which of w, a, b and bias ask for a gradient, of each branch."""
    return [tuple(flat[i : i + _OPERANDS]) for i in range(0, len(flat), _OPERANDS)]


def kept(p: Product, z: Tensor, need_x: bool, needs: Sequence[bool]) -> list[Tensor | None]:
    """w, a, b, z and seed of one branch, as far as its backward needs them; a stored w is kept beside the tensors."""
    _, need_a, need_b, _ = needs
    return [
        base.matrix_of(p.w) if need_x else None,
        p.a if need_x or need_a else None,
        p.b if need_x or need_a else None,
        z if need_b else None,
        p.seed,
    ]


def constants_of(products: Sequence[Product]) -> list[tuple[Any, ...]]:
    """Scale, dropout_p, dtype of the adapters and shape of x, of each branch."""
    return [(p.scale, p.dropout_p, p.a.dtype, p.x.shape) for p in products]


def stored_of(products: Sequence[Product]) -> list[StoredWeight | None]:
    """The stored weight of each branch, None of those that are matrices."""
    return [base.stored_of(p.w) for p in products]


def gradients(
    kept: Sequence[Any],
    stored: Sequence[StoredWeight | None],
    constants: Sequence[tuple[Any, ...]],
    need_x: bool,
    needs: Sequence[tuple[bool, ...]],
    dys: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """dx, and dw, da, db and dbias of each branch; nothing of a branch whose output nobody used.

    Args:
        kept: x [..., K], then what :func:`kept` keeps of each branch.
        stored: as :func:`stored_of` has them.
        constants: as :func:`constants_of` has them.
        need_x: whether x asks for a gradient.
        needs: which of w, a, b and bias ask for one, of each branch.
        dys: gradient of each output, or None.
    """
    x, *saved = kept
    eager = is_eager()
    live = [i for i, dy in enumerate(dys) if dy is not None]
    dy_s = {i: without_zero_strides(rows_of(dys[i])) for i in live}  # type: ignore[arg-type]
    parts = {i: list(saved[5 * i : 5 * i + 5]) for i in live}
    for i in live:
        if need_x and stored[i] is not None:
            parts[i][0] = base.opened(stored[i], dy_s[i].dtype, i)
    found: list[Tensor | None] = [None] * (1 + _OPERANDS * len(dys))
    usual = need_x and all(needs[i][:3] == _USUAL for i in live)
    if eager and usual and live:
        products, zs = [], []
        for i in live:
            w, a, b, z, seed = parts[i]
            scale, dropout_p, _, _ = constants[i]
            products.append(Product(rows_of(x), w, a, b, scale, None, dropout_p, seed))
            zs.append(z)
        together = dispatch.group_gradients_of(products, list(dy_s.values()))
        if together is not None:
            dx, das, dbs = together(products, list(dy_s.values()), zs)
            found[0] = dx.view(constants[0][3])
            for i, da, db in zip(live, das, dbs, strict=True):
                at = 1 + _OPERANDS * i
                found[at + 1], found[at + 2] = da, db
                found[at + 3] = dy_s[i].sum(0) if needs[i][3] else None
            return found
    for i in live:
        w, a, b, z, seed = parts[i]
        dx_i, *others = by_the_verbs((x, w, a, b, z, seed), constants[i], (need_x, *needs[i]), dy_s[i], eager)
        at = 1 + _OPERANDS * i
        found[at : at + _OPERANDS] = others
        if dx_i is not None:
            found[0] = dx_i if found[0] is None else found[0].add_(dx_i)
    return found
