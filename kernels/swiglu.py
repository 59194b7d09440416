"""The gated activation of an MLP between its products, forward and backward: elementwise, in one pass each.

    for each block of elements:
        h = act(g) · u
    for each block of elements:
        h = act(g) · u,  du = dh · act(g),  dg = dh · u · act'(g)

with silu(g) = g σ(g), gelu(g) = g Φ(g), and gelu by tanh, which is g σ(2v) with v = √(2/π) (g + 0.044715 g³).

Operands: g, u, dh and the results, all contiguous [M, N] in bf16, fp16 or fp32; computed in fp32, rounded once. dg
takes the place of dh. Bytes: forward two reads and a write of [M, N]; backward three reads and three writes, two
without h. Used between the products of ``lora_swiglu_mlp`` on GPUs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

# A vector of 16 bytes of each 16-bit operand a thread.
_BLOCK, _WARPS = 1024, 4


@triton.jit
def _sigmoid(v):
    """σ(v) and 1 - σ(v): by exp(-|v|), so that neither overflows and 1 - σ(v) loses nothing near 1."""
    small = tl.exp(-tl.abs(v))
    # Not div_rn: its calls take registers across them, and this divisor of 1 to 2 needs none of their care.
    near_one = 1.0 / (1.0 + small)
    near_zero = small * near_one
    return tl.where(v > 0, near_one, near_zero), tl.where(v > 0, near_zero, near_one)


@triton.jit
def activated(g, ACTIVATION: tl.constexpr):
    """act(g) and act'(g) of g in fp32."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        act = g * share
        derivative = share + g * (0.3989422804014327 * tl.exp(-0.5 * g * g))
    elif ACTIVATION == "gelu_tanh":
        square = g * g
        share, rest = _sigmoid(g * (1.5957691216057308 + 0.07135481627260025 * square))
        act = g * share
        derivative = share + act * rest * (1.5957691216057308 + 0.21406444881780074 * square)
    else:
        share, rest = _sigmoid(g)
        act = g * share
        derivative = share + act * rest
    return act, derivative


@triton.jit
def _swiglu_kernel(g_ptr, u_ptr, h_ptr, SIZE, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    g = tl.load(g_ptr + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + i, mask=inside, other=0.0).to(tl.float32)
    act, _ = activated(g, ACTIVATION)
    tl.store(h_ptr + i, (act * u).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(g_ptr, u_ptr, dh_ptr, du_ptr, h_ptr, SIZE, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    g = tl.load(g_ptr + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + i, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + i, mask=inside, other=0.0).to(tl.float32)
    act, derivative = activated(g, ACTIVATION)
    if h_ptr is not None:
        tl.store(h_ptr + i, (act * u).to(h_ptr.dtype.element_ty), mask=inside)
    tl.store(du_ptr + i, (dh * act).to(du_ptr.dtype.element_ty), mask=inside)
    tl.store(dh_ptr + i, (dh * u * derivative).to(dh_ptr.dtype.element_ty), mask=inside)


def forward_launch(g: Tensor, u: Tensor, h: Tensor, activation: str) -> Launch:
    """The launch that writes h, which may be g's own memory; all contiguous [M, N], at least one element."""
    return _launch(_swiglu_kernel, activation, g_ptr=g, u_ptr=u, h_ptr=h)


def backward_launch(g: Tensor, u: Tensor, dh: Tensor, du: Tensor, h: Tensor | None, activation: str) -> Launch:
    """The launch that writes dg over dh, and du, and h where there is memory for it."""
    return _launch(_swiglu_backward_kernel, activation, g_ptr=g, u_ptr=u, dh_ptr=dh, du_ptr=du, h_ptr=h)


def _launch(kernel: object, activation: str, **tensors: Tensor | None) -> Launch:
    size = tensors["g_ptr"].numel()  # type: ignore[union-attr]
    return Launch(
        kernel,
        (triton.cdiv(size, _BLOCK),),
        tensors | dict(SIZE=size, ACTIVATION=activation, BLOCK=_BLOCK),
        dict(num_warps=_WARPS, num_stages=1),
    )
