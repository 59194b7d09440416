"""The two verbs on the Triton kernels: what they refuse, and which of their designs runs.

``FASTLORA_TRITON_DESIGN=portable|serial|one_launch`` forces a design; else serial where TMA can go, portable elsewhere.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from .dropout import Dropout
from .request import Request

_INTERPRETED_CAPABILITY = 90


def refuses(request: Request) -> str | None:
    """The reason why these kernels cannot run a request, or None."""
    if not _installed():
        return "triton is not installed: pip install triton"
    if request.dtype is torch.float64:
        return "float64: the kernels accumulate in float32"
    if 0 in (request.m, request.k, request.n):
        return f"nothing to compute: M={request.m} K={request.k} N={request.n}"
    if _interpreting():
        if request.dtype is torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
        return None
    if request.device.type != "cuda":
        return f"x is on {request.device.type}: the kernels need a CUDA GPU (or TRITON_INTERPRET=1 to try them without)"
    if torch.version.hip:
        return "AMD GPUs: the kernels have never been tried there"
    capability = _capability(request.device)
    if capability < 80:
        return f"sm_{capability}: the kernels need sm_80 or newer"
    return None


def lora_matmul(
    x: Tensor,
    w: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
    on_product: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """x [M, K], w [N, K] or None for z alone, a [R, K], b [N, R], bias [N] → y [M, N], z [M, R]."""
    with _device(x):
        y, z, steps = _launches(x, w, a, b, scale, bias, dropout, on_product)
        for step in steps:
            step.run()
    return y, z


def plan(x: Tensor, w: Tensor, a: Tensor, b: Tensor, *, dropout: Dropout | None = None) -> str:
    """The design and tile that :func:`lora_matmul` would launch, such as ``serial 128x256x64, 8 warps, 3 stages``."""
    capability = _capability(x.device)
    with _device(x):
        launch = _launches(x, w, a, b, 1.0, None, dropout, on_product=False)[2][-1]
    rows, columns, depth = (launch.arguments[f"BLOCK_{axis}"] for axis in "MNK")
    design = _design(x, w, a, capability, masked=dropout is not None)
    warps, stages = launch.options["num_warps"], launch.options["num_stages"]
    return f"{design} {rows}x{columns}x{depth}, {warps} warps, {stages} stages"


def rank_grad(p: Tensor, q: Tensor, *, dtype: torch.dtype, dropout: Dropout | None = None) -> Tensor:
    """p [M, P], q [M, Q] → pᵀ D(q) [P, Q] in ``dtype``."""
    from ..kernels import rank_grad as kernel

    with _device(q):
        grad: Tensor
        grad, steps = kernel.launches(p, q, dtype=dtype, precision=_precision(), dropout=_mask(dropout))
        for step in steps:
            step.run()
    return grad


def _launches(
    x: Tensor,
    w: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
    dropout: Dropout | None,
    on_product: bool,
) -> tuple[Tensor | None, Tensor, list[Any]]:
    from ..kernels import lora_matmul as kernel

    capability = _capability(x.device)
    masked = dropout is not None and not on_product
    planned: tuple[Tensor | None, Tensor, list[Any]] = kernel.launches(
        x,
        w,
        a,
        b,
        scale=scale,
        bias=None if bias is None else bias.contiguous(),
        dropout=_mask(dropout),
        on_product=on_product,
        capability=capability,
        precision=_precision(),
        design="portable" if w is None else _design(x, w, a, capability, masked=masked),
    )
    return planned


def _design(x: Tensor, w: Tensor, a: Tensor, capability: int, *, masked: bool) -> str:
    from ..kernels import lora_matmul as kernel
    from ..kernels import lora_matmul_tma as tma

    forced = os.environ.get("FASTLORA_TRITON_DESIGN")
    if forced is None:
        return "portable" if tma.refuses(x, w, capability) else "serial"
    if forced not in kernel.DESIGNS:
        raise RuntimeError(f"FASTLORA_TRITON_DESIGN={forced!r} is unknown: expected {', '.join(kernel.DESIGNS)}")
    reason = None
    if forced != "portable":
        reason = tma.refuses(x, w, capability)
    if forced == "one_launch":
        reason = reason or tma.refuses_one_launch(a, capability, masked)
    if reason:
        raise RuntimeError(f"FASTLORA_TRITON_DESIGN={forced} cannot run this call: {reason}")
    return forced


def _mask(dropout: Dropout | None) -> Any:
    from ..kernels.philox import Mask

    return None if dropout is None else Mask(dropout.seed, dropout.threshold, dropout.rescale)


def _precision() -> str:
    """How fp32 operands are multiplied: as torch's own matmul does."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _device(x: Tensor) -> Any:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
