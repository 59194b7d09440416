"""The tensors of one case, made outside every clock: random normal, b never zero, scale never 1."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastlora.quantised import stored_weight

from ..cases import COPIES, SCALE, Case
from ..measure.failures import AbsentError, imported


@dataclass(frozen=True)
class Operands:
    """xs and dys hold COPIES of x [M, K] and dy [M, N]; w [N, K], bias [N] or None, a [R, K], b [N, R].

    Variances keep y and both parts of it of order one, so that fp16 does not overflow and no term drowns another. Of a
    quantised base ``stored`` is the layer, and w what it holds, made dense; of DoRA ``magnitude`` [N] is the length of
    each row of w + scale · b a, times something between 0.5 and 1.5.
    """

    xs: tuple[Tensor, ...]
    dys: tuple[Tensor, ...]
    w: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float = SCALE
    stored: nn.Linear | None = None
    magnitude: Tensor | None = None

    @property
    def branches(self) -> tuple[Operands, ...]:
        """Itself: one layer has one branch."""
        return (self,)

    def base(self) -> nn.Linear:
        """The frozen base layer: ``nn.Linear`` over the storage of w and bias, or the quantised one."""
        return self.linear() if self.stored is None else self.stored

    def linear(self, trained: bool = False) -> nn.Linear:
        """``nn.Linear`` over the storage of w and bias."""
        linear = nn.Linear(self.w.shape[1], self.w.shape[0], bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.w, requires_grad=trained)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias, requires_grad=trained)
        return linear

    def adapters(self, dtype: torch.dtype | None = None) -> tuple[nn.Parameter, nn.Parameter]:
        """Copies of a and b to train, in their own dtype unless another is given."""
        a, b = (nn.Parameter(tensor.to(dtype or tensor.dtype, copy=True)) for tensor in (self.a, self.b))
        return a, b


@dataclass(frozen=True)
class Together:
    """Several layers: the operands of each, COPIES of their one x, and of a dy, or of a tuple with the dy of each.

    In an MLP gate and up have no dy, and down no x.
    """

    branches: tuple[Operands, ...]
    xs: tuple[Tensor, ...]
    dys: tuple[Tensor, ...] | tuple[tuple[Tensor, ...], ...]


def frozen_tensors(o: Operands | Together) -> list[Tensor]:
    """The base weights and biases, quantised ones as they are stored, and DoRA's magnitudes."""
    dense = [t for branch in o.branches for t in (branch.w, branch.bias, branch.magnitude) if t is not None]
    stored = [t for branch in o.branches if branch.stored is not None for t in branch.stored.parameters()]
    return [*dense, *stored]


def make_operands(case: Case, device: torch.device) -> Operands | Together:
    """The same numbers for the same case on the same device."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, variance: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device).mul_(variance**0.5)
        return values.to(case.torch_dtype)

    xs = tuple(normal(case.m, case.k).requires_grad_() for _ in range(COPIES))
    ends = range(len(case.branches))[-1:] if case.is_mlp else range(len(case.branches))
    branches = tuple(
        _in_variant(
            of,
            Operands(
                xs=() if case.is_mlp and i in ends else xs,
                dys=tuple(normal(of.m, of.n) for _ in range(COPIES if i in ends else 0)),
                w=normal(of.n, of.k, variance=1 / of.k),
                bias=normal(of.n) if of.bias else None,
                a=normal(of.r, of.k, variance=1 / of.k),
                b=normal(of.n, of.r, variance=1 / of.r),
            ),
        )
        for i, of in enumerate(case.branches)
    )
    if len(branches) == 1:
        return branches[0]
    dys = [branches[i].dys for i in ends]
    return Together(branches, xs, dys[0] if case.is_mlp else tuple(zip(*dys, strict=True)))


def _in_variant(case: Case, o: Operands) -> Operands:
    """The operands with a base that is stored as the case says, or with a magnitude."""
    if case.is_dora:
        length = torch.linalg.vector_norm(o.w.float() + o.scale * (o.b.float() @ o.a.float()), dim=1)
        factor = torch.linspace(0.5, 1.5, case.n, device=o.w.device)
        return replace(o, magnitude=(length * factor).to(o.w.dtype))
    if case.quantised is None:
        return o
    layer = _quantised(case, o)
    stored = stored_weight(layer)
    assert not isinstance(stored, str), stored
    return replace(o, stored=layer, w=stored.dense(case.torch_dtype))


def _quantised(case: Case, o: Operands) -> nn.Linear:
    """bitsandbytes' layer of w and bias, on their device."""
    bnb = imported("bitsandbytes").nn
    if case.quantised == "nf4":
        layer = bnb.Linear4bit(case.k, case.n, bias=case.bias, compute_dtype=case.torch_dtype, quant_type="nf4")
    elif o.w.device.type == "cuda":
        raise AbsentError("bitsandbytes rounds the input of an 8-bit layer to int8 on a GPU: no oracle holds it")
    else:
        layer = bnb.Linear8bitLt(case.k, case.n, bias=case.bias, has_fp16_weights=False)
    layer.weight.data = o.w.cpu()
    if o.bias is not None:
        layer.bias = nn.Parameter(o.bias)
    layer.requires_grad_(False)
    quantised: nn.Linear = layer.to(o.w.device)
    return quantised
