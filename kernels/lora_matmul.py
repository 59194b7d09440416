"""lora_matmul: y = x wᵀ + z bᵀ + bias with z = scale · D(x) aᵀ. This file: the verb, and its portable kernel.

    z from the middle kernel, then for each block of M, block of N:
        acc_mn = z_mr · b_nrᵀ                      masked where the mask sits on the product
        for k:  acc_mn += x_mk · w_nkᵀ
        y_mn = acc_mn + bias_n

Operands: x [M, K], w [N, K], bias [N] in bf16, fp16 or fp32; a [R, K], b [N, R] in that dtype or fp32, cast tile by
tile; z [M, R] and y [M, N] in the dtype of x. In the backward the same kernels make dx and t: x is dy, w is wᵀ, a is
bᵀ, b is aᵀ, all strided views, and the mask sits on the product instead of the input. Bytes: the frozen GEMM's, plus
one read of x for z; y is stored once. Portable means masked pointer loads, any strides, sm_80 and newer: used where TMA
cannot go. ``lora_matmul_tma.py`` holds the other two designs, serial and one_launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lora_matmul_tma, middle
from .indexing import low_rank_product, tile_position
from .launch import Launch
from .philox import NO_MASK, Mask, keep_mask
from .tiles import GROUP_M, matmul_tile, portable_rows, rank_trip

DESIGNS = ("portable", "serial", "one_launch")


@triton.jit(do_not_specialize=["M", "threshold"])
def _base_kernel(
    x_ptr,
    w_ptr,
    z_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    seed_ptr,
    threshold,
    rescale,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_br,
    MASK_PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    block_m, block_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    first_m = block_m * BLOCK_M
    first_n = block_n * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    acc_mn = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_mn = low_rank_product(acc_mn, z_ptr, b_ptr, first_m, first_n, M, N, R, stride_bn, stride_br, BLOCK_R, PRECISION)
    if MASK_PRODUCT:
        # The product comes before the base, so it can be masked in the accumulator itself.
        keep_mn = keep_mask(seed_ptr, first_m, first_n, threshold, BLOCK_M, BLOCK_N)
        acc_mn = tl.where(keep_mn, acc_mn * rescale, 0.0)

    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    w_ptrs = w_ptr + k.to(tl.int64)[:, None] * stride_wk + n.to(tl.int64)[None, :] * stride_wn
    for first_k in range(0, K, BLOCK_K):
        inside_k = first_k + k < K
        x_mk = tl.load(x_ptrs, mask=(m < M)[:, None] & inside_k[None, :], other=0.0)
        w_kn = tl.load(w_ptrs, mask=inside_k[:, None] & (n < N)[None, :], other=0.0)
        acc_mn = tl.dot(x_mk, w_kn, acc_mn, input_precision=PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        w_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)

    if bias_ptr is not None:
        acc_mn += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, acc_mn.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def launches(
    x: Tensor,
    w: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    bias: Tensor | None,
    dropout: Mask | None,
    on_product: bool,
    capability: int,
    precision: str,
    design: str,
) -> tuple[Tensor | None, Tensor, list[Launch]]:
    """The memory of y and z and the launches that fill it.

    Args:
        x: [M, K], M >= 1.
        w: [N, K], or None for z alone.
        a: [R, K].
        b: [N, R].
        scale: factor on z.
        bias: [N] contiguous, or None.
        dropout: the mask, or None.
        on_product: the mask sits on z bᵀ instead of x.
        capability: compute capability as a number, 90 for sm_90; picks the tile.
        precision: Triton's ``input_precision`` for fp32 operands.
        design: one of ``DESIGNS``; the TMA designs must not be asked for what ``lora_matmul_tma.refuses``.
    """
    on_x = None if on_product else dropout
    on_low_rank = dropout if on_product else None
    if w is not None and design == "one_launch":
        return lora_matmul_tma.one_launch(x, w, a, b, scale=scale, bias=bias, on_x=on_x, on_low_rank=on_low_rank)
    z, step = middle.launch(x, a, scale=scale, precision=precision, dropout=on_x)
    if w is None:
        return None, z, [step]
    if design == "serial":
        y, base = lora_matmul_tma.serial(x, w, z, b, bias=bias, dropout=on_low_rank)
    else:
        y, base = _portable(x, w, z, b, bias=bias, dropout=on_low_rank, capability=capability, precision=precision)
    return y, z, [step, base]


def _portable(
    x: Tensor,
    w: Tensor,
    z: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None,
    dropout: Mask | None,
    capability: int,
    precision: str,
) -> tuple[Tensor, Launch]:
    (m, k), (n, r) = x.shape, b.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    seed, threshold, rescale = dropout or NO_MASK
    # Triton vectorises a load only along strides and extents that it knows to be multiples of 16.
    sizes = (k, n, *x.stride(), *w.stride(), x.data_ptr(), w.data_ptr())
    ragged = any(size % 16 for size in sizes if size != 1)
    kind = "ragged" if ragged else precision if x.dtype is torch.float32 else None
    tile = matmul_tile(portable_rows(capability, kind, masked=dropout is not None), m, n)
    return y, Launch(
        _base_kernel,
        (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),),
        dict(
            x_ptr=x,
            w_ptr=w,
            z_ptr=z,
            b_ptr=b,
            bias_ptr=bias,
            y_ptr=y,
            seed_ptr=seed,
            threshold=threshold,
            rescale=rescale,
            M=m,
            N=n,
            K=k,
            R=r,
            stride_xm=x.stride(0),
            stride_xk=x.stride(1),
            stride_wn=w.stride(0),
            stride_wk=w.stride(1),
            stride_bn=b.stride(0),
            stride_br=b.stride(1),
            MASK_PRODUCT=dropout is not None,
            PRECISION=precision,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            BLOCK_R=rank_trip(r, b.element_size()),
            GROUP_M=GROUP_M,
        ),
        tile.options,
    )
