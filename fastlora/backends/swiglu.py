"""The gated activation between the products of an MLP, and its gradients.

    h = act(g) u      dg = dh u act'(g)      du = dh act(g)

In torch's own operators, in place, which round where a model's own code does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten


class _Operators(NamedTuple):
    """act(g) and ds act'(g) into given memory, with the options of both."""

    act: Callable[..., Tensor]
    derivative: Callable[..., Tensor]
    options: dict[str, Any]


_OPERATORS = {
    "silu": _Operators(_aten.silu.out, _aten.silu_backward.grad_input, {}),
    "gelu": _Operators(_aten.gelu.out, _aten.gelu_backward.grad_input, {}),
    "gelu_tanh": _Operators(_aten.gelu.out, _aten.gelu_backward.grad_input, {"approximate": "tanh"}),
}


def forward(g: Tensor, u: Tensor, activation: str, *, overwrite: bool = False) -> Tensor:
    """h [M, N] of g and u, in the place of g where that may be overwritten."""
    act, _, options = _OPERATORS[activation]
    return act(g, **options, out=g if overwrite else torch.empty_like(g)).mul_(u)


def backward(
    g: Tensor, u: Tensor, dh: Tensor, activation: str, *, with_h: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dg [M, N] in the place of dh, du and, if it is asked for, h."""
    act, derivative, options = _OPERATORS[activation]
    du = act(g, **options, out=torch.empty_like(g))
    h = du * u if with_h else None
    du.mul_(dh)
    return derivative(dh.mul_(u), g, **options, grad_input=dh), du, h
