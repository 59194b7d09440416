"""The gated activation between the products of an MLP, and its gradients.

    h = act(g) u      dg = dh u act'(g)      du = dh act(g)

One kernel each on GPUs where they have passed their check at first use (``first_use``), unless ``FASTLORA_BACKEND``
keeps Triton away; elsewhere torch's own operators, in place, which round where a model's own code does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..eager import is_eager
from . import first_use, triton
from .first_use_checks import Gated
from .replay import replay

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
    if _by_kernel(g, activation):
        return launch_forward(g.contiguous(), u.contiguous(), activation, overwrite)
    act, _, options = _OPERATORS[activation]
    return act(g, **options, out=g if overwrite else torch.empty_like(g)).mul_(u)


def backward(
    g: Tensor, u: Tensor, dh: Tensor, activation: str, *, with_h: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dg [M, N] in the place of dh, du and, if it is asked for, h."""
    if _by_kernel(g, activation):
        return launch_backward(g.contiguous(), u.contiguous(), dh.contiguous(), activation, with_h)
    act, derivative, options = _OPERATORS[activation]
    du = act(g, **options, out=torch.empty_like(g))
    h = du * u if with_h else None
    du.mul_(dh)
    return derivative(dh.mul_(u), g, **options, grad_input=dh), du, h


def _by_kernel(g: Tensor, activation: str) -> bool:
    if g.is_cpu or not g.numel() or not is_eager():
        return False
    if os.environ.get("FASTLORA_BACKEND", "auto").startswith(("library", "reference", "-triton")):
        return False
    return first_use.objection_to_swiglu(Gated(g.device, g.dtype, activation)) is None


def launch_forward(g: Tensor, u: Tensor, activation: str, overwrite: bool) -> Tensor:
    """:func:`forward` by one launch; g and u are contiguous."""
    from ..kernels import swiglu as kernel

    def launcher() -> tuple[tuple[Tensor], list[Any]]:
        h = g if overwrite else torch.empty_like(g)
        return (h,), triton.for_this_gpu([kernel.forward_launch(g, u, h, activation)])

    with triton.device_of(g):
        (h,) = replay("swiglu", (g, u), (activation, overwrite), g.device, launcher)
    return h  # type: ignore[return-value]


def launch_backward(
    g: Tensor, u: Tensor, dh: Tensor, activation: str, with_h: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`backward` by one launch; g, u and dh are contiguous."""
    from ..kernels import swiglu as kernel

    def launcher() -> tuple[tuple[Tensor, Tensor, Tensor | None], list[Any]]:
        du, h = torch.empty_like(g), torch.empty_like(g) if with_h else None
        return (dh, du, h), triton.for_this_gpu([kernel.backward_launch(g, u, dh, du, h, activation)])

    with triton.device_of(g):
        dg, du, h = replay("swiglu_backward", (g, u, dh), (activation, with_h), g.device, launcher)
    return dg, du, h  # type: ignore[return-value]
