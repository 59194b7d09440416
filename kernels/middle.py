"""The middle z = scale · D(x) aᵀ, a tall-skinny product: the first launch of every fused kernel.

    for each block of M, block of R:
        acc_mr = 0
        for k:  acc_mr += D(x_mk) · a_rkᵀ
        z_mr = scale · acc_mr

Operands: x [M, K] in bf16, fp16 or fp32, a [R, K] in that dtype or fp32, any strides; z [M, R] in the dtype of x,
rounded once. Bytes: one read of x, which bounds it for R <= 64. In the backward x is dy, a is bᵀ, and z is t.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, strided
from .philox import Mask, keep_mask
from .tiles import middle_tile


@triton.jit(do_not_specialize=["M", "threshold"])
def _middle_kernel(
    x_ptr,
    a_ptr,
    z_ptr,
    seed_ptr,
    threshold,
    scale,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_zm,
    stride_ar,
    stride_ak,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first_m = tl.program_id(0) * BLOCK_M
    m = first_m + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    a_ptrs = a_ptr + k.to(tl.int64)[:, None] * stride_ak + r.to(tl.int64)[None, :] * stride_ar

    acc_mr = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for first_k in range(0, K, BLOCK_K):
        inside_k = first_k + k < K
        x_mk = tl.load(x_ptrs, mask=(m < M)[:, None] & inside_k[None, :], other=0.0)
        a_kr = tl.load(a_ptrs, mask=inside_k[:, None] & (r < R)[None, :], other=0.0)
        if DROPOUT:
            x_mk = tl.where(keep_mask(seed_ptr, first_m, first_k, threshold, BLOCK_M, BLOCK_K), x_mk, 0.0)
        acc_mr = tl.dot(x_mk, a_kr.to(x_mk.dtype), acc_mr, input_precision=PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        a_ptrs += BLOCK_K * tl.cast(stride_ak, tl.int64)

    z_ptrs = z_ptr + m.to(tl.int64)[:, None] * stride_zm + r[None, :]
    tl.store(z_ptrs, (acc_mr * scale).to(z_ptr.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])


def launch(p: Any, z: Tensor, *, precision: str) -> Launch:
    """The launch that fills z.

    Args:
        p: the ``Product`` whose x, a, scale and mask on x are read.
        z: [M, R], rows contiguous.
        precision: Triton's ``input_precision`` for fp32 operands.
    """
    x, a = p.x, p.a
    (m, k), r = x.shape, a.shape[0]
    mask = Mask.of(p.mask_x)
    tile = middle_tile(r, x.element_size())
    return Launch(
        _middle_kernel,
        (triton.cdiv(m, tile.rows), triton.cdiv(r, tile.columns)),
        strided("x", x, "mk")
        | strided("a", a, "rk")
        | strided("z", z, "m")
        | dict(
            seed_ptr=mask.seed,
            threshold=mask.threshold,
            scale=p.scale * mask.rescale,
            M=m,
            K=k,
            R=r,
            DROPOUT=mask.seed is not None,
            PRECISION=precision,
            BLOCK_M=tile.rows,
            BLOCK_R=tile.columns,
            BLOCK_K=tile.depth,
        ),
        tile.options,
    )
