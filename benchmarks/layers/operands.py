"""The tensors of one case, made outside every clock: random normal, b never zero, scale never 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cases import COPIES, SCALE, Case


@dataclass(frozen=True)
class Operands:
    """xs and dys hold COPIES of x [M, K] and dy [M, N]; w [N, K], bias [N] or None, a [R, K], b [N, R].

    Variances keep y and both parts of it of order one, so that fp16 does not overflow and no term drowns another.
    """

    xs: tuple[Tensor, ...]
    dys: tuple[Tensor, ...]
    w: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float = SCALE

    @property
    def branches(self) -> tuple[Operands, ...]:
        """Itself: one layer has one branch."""
        return (self,)

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
    """The base weights and biases."""
    return [t for branch in o.branches for t in (branch.w, branch.bias) if t is not None]


def make_operands(case: Case, device: torch.device) -> Operands | Together:
    """The same numbers for the same case on the same device."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, variance: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device).mul_(variance**0.5)
        return values.to(case.torch_dtype)

    xs = tuple(normal(case.m, case.k).requires_grad_() for _ in range(COPIES))
    ends = range(len(case.branches))[-1:] if case.is_mlp else range(len(case.branches))
    branches = tuple(
        Operands(
            xs=() if case.is_mlp and i in ends else xs,
            dys=tuple(normal(of.m, of.n) for _ in range(COPIES if i in ends else 0)),
            w=normal(of.n, of.k, variance=1 / of.k),
            bias=normal(of.n) if of.bias else None,
            a=normal(of.r, of.k, variance=1 / of.k),
            b=normal(of.n, of.r, variance=1 / of.r),
        )
        for i, of in enumerate(case.branches)
    )
    if len(branches) == 1:
        return branches[0]
    dys = [branches[i].dys for i in ends]
    return Together(branches, xs, dys[0] if case.is_mlp else tuple(zip(*dys, strict=True)))
