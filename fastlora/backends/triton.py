"""The two verbs on the Triton kernels: what each refuses, and how it is launched."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..kernels.tiles import TMA_CAPABILITIES, amd_capability, architecture
from ..text import dtype_name
from .dropout import Dropout
from .replay import replay
from .request import Kernel, Product, Request, new_middle

_INTERPRETED_CAPABILITY = 90

_NOT_INSTALLED = "triton is not installed: pip install triton"

Launches = tuple["Tensor | None", Tensor, list[Any]]


def refuses(request: Request) -> str | None:
    """The reason why none of these kernels can run a request, or None."""
    if not _installed():
        return _NOT_INSTALLED
    if request.dtype is torch.float64:
        return "float64: the kernels accumulate in float32"
    if 0 in (request.m, request.k, request.n):
        return f"nothing to compute: M={request.m} K={request.k} N={request.n}"
    if _interpreting():
        if request.dtype is torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly: use float16 or float32 there"
        return None
    if request.device.type != "cuda":
        return f"x is on {request.device.type}: the kernels need a CUDA GPU (or TRITON_INTERPRET=1 to try them without)"
    return _too_old(request.device)


def refuses_masks(device: torch.device) -> str | None:
    """The reason why no kernel can make dropout masks on a device, or None."""
    if not _installed():
        return _NOT_INSTALLED
    return None if _interpreting() else _too_old(device)


def _too_old(device: torch.device) -> str | None:
    capability = capability_of(device)
    return None if capability >= 80 else f"sm_{capability}: the kernels need sm_80 or newer"


def refuses_serial(request: Request) -> str | None:
    """The reason why ``triton-serial`` cannot run a request, or None; z alone is the middle kernel's in any case."""
    if (reason := refuses(request)) or request.z_only:
        return reason
    capability = capability_of(request.device)
    if capability not in TMA_CAPABILITIES:
        return f"TMA tiles are for {', '.join(f'sm_{c}' for c in TMA_CAPABILITIES)}, this is {architecture(capability)}"
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype_name(request.dtype)}: TMA tiles are for 16-bit operands"
    return request.unaligned


def launches_portable(p: Product, capability: int, precision: str) -> Launches:
    """y's and z's memory, and the launches of ``triton-portable`` that fill it."""
    from ..kernels import lora_matmul_portable as kernel

    base = functools.partial(kernel.launch, capability=capability, precision=precision)
    return _launches(p, capability, precision, base)


def launches_serial(p: Product, capability: int, precision: str) -> Launches:
    """y's and z's memory, and the launches of ``triton-serial`` that fill it."""
    from ..kernels import lora_matmul_serial as kernel

    return _launches(p, capability, precision, kernel.launch)


def _launches(
    p: Product, capability: int, precision: str, base: Callable[[Product, Tensor], tuple[Tensor, Any]]
) -> Launches:
    from ..kernels import middle

    z = new_middle(p.x, p.a.shape[0])
    steps = middle.launches(p, z, capability=capability, precision=precision)
    if p.w is None:
        return None, z, steps
    y, step = base(p, z)
    return y, z, [*steps, step]


def _run(launches: Callable[[Product, int, str], Launches]) -> Callable[[Product], tuple[Tensor | None, Tensor]]:
    return lambda p: run_product(launches, p)


def run_product(launches: Callable[[Product, int, str], Launches], p: Product) -> tuple[Tensor | None, Tensor]:
    """y and z of a product, by launches that were made for it or for one like it."""
    if p.bias is not None and not p.bias.is_contiguous():
        p = p._replace(bias=p.bias.contiguous())
    with device_of(p.x):
        capability, how = capability_of(p.x.device), precision()

        def launcher() -> tuple[tuple[Tensor | None, Tensor], list[Any]]:
            y, z, steps = launches(p, capability, how)
            return (y, z), for_this_gpu(steps)

        constants = (p.scale, p.dropout_p, p.on_product, capability, how)
        operands = (p.x, p.w, p.a, p.b, p.bias, p.seed)
        y, z = replay(launches.__qualname__, operands, constants, p.x.device, launcher)
    return y, z  # type: ignore[return-value]


def _tile(launches: Callable[[Product, int, str], Launches]) -> Callable[[Product], str]:
    def tile(p: Product) -> str:
        with device_of(p.x):
            step = launches(p, capability_of(p.x.device), precision())[2][-1]
        rows, columns, depth = (step.arguments[f"BLOCK_{axis}"] for axis in "MNK")
        return f"{rows}x{columns}x{depth}, {step.options['num_warps']} warps, {step.options['num_stages']} stages"

    return tile


def rank_grad(p: Tensor, q: Tensor, *, dtype: torch.dtype, dropout: Dropout | None = None) -> Tensor:
    """p [M, P], q [M, Q] → pᵀ D(q) [P, Q] in ``dtype``."""
    from ..kernels import rank_grad as kernel

    with device_of(q):
        capability, how = capability_of(q.device), precision()

        def launcher() -> tuple[tuple[Tensor], list[Any]]:
            grad, steps = kernel.launches(p, q, dtype=dtype, capability=capability, precision=how, dropout=dropout)
            return (grad,), for_this_gpu(steps)

        seed, dropped = (None, None) if dropout is None else (dropout.seed, dropout.p)
        (grad,) = replay("rank_grad", (p, q, seed), (dtype, dropped, capability, how), q.device, launcher)
    return grad  # type: ignore[return-value]


def run_all(steps: Iterable[Any]) -> None:
    """Launches on the current device and stream."""
    for step in for_this_gpu(steps):
        step.run()


def for_this_gpu(steps: Iterable[Any]) -> list[Any]:
    """The launches with the options that the GPU's maker asks for."""
    return [step.on_amd() if torch.version.hip else step for step in steps]


def precision() -> str:
    """How fp32 operands are multiplied: as torch's own matmul does, but never as tf32 on AMD GPUs."""
    return "tf32" if not torch.version.hip and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def device_of(x: Tensor) -> Any:
    """Triton launches on the current device: make it that of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def capability_of(device: torch.device) -> int:
    """A device's architecture as a number, 90 for sm_90, 0x942 for gfx942; the interpreter runs what is for sm_90."""
    if device.type != "cuda":
        return _INTERPRETED_CAPABILITY
    if torch.version.hip:
        return amd_capability(torch.cuda.get_device_properties(device).gcnArchName)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


LORA_MATMUL = (
    Kernel("triton-serial", refuses_serial, _run(launches_serial), _tile(launches_serial)),
    Kernel("triton-portable", refuses, _run(launches_portable), _tile(launches_portable)),
)
RANK_GRAD = (Kernel("triton", refuses, rank_grad),)
