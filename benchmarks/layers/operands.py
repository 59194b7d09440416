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


def make_operands(case: Case, device: torch.device) -> Operands:
    """The same numbers for the same case on the same device."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, variance: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device).mul_(variance**0.5)
        return values.to(case.torch_dtype)

    return Operands(
        xs=tuple(normal(case.m, case.k).requires_grad_() for _ in range(COPIES)),
        dys=tuple(normal(case.m, case.n) for _ in range(COPIES)),
        w=normal(case.n, case.k, variance=1 / case.k),
        bias=normal(case.n) if case.bias else None,
        a=normal(case.r, case.k, variance=1 / case.k),
        b=normal(case.n, case.r, variance=1 / case.r),
    )
