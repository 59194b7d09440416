"""The low-rank product alone, y = D(z bᵀ) + bias: written before the vendor's GEMM, which adds x wᵀ to it (beta = 1).

    for each block of M, block of N:
        acc_mn = 0
        for r:  acc_mn += z_mr · b_nrᵀ
        y_mn = D(acc_mn) + bias_n

Operands: z [M, R], rows contiguous, in bf16, fp16 or fp32; b [N, R] in that dtype or fp32, cast tile by tile, any
strides; bias [N] contiguous; y [M, N] contiguous in the dtype of z, rounded once. Bytes: one write of y, one read of z
and b. In the backward y is dx, z is t and b is aᵀ; the mask sits on this product. Used by ``triton-skinny``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .indexing import load_tile, tile_position
from .launch import Launch, in_eights, strided
from .philox import Mask, keep_mask
from .tiles import GROUP_M, rank_update_tile


@triton.jit(do_not_specialize=["M", "threshold"])
def _rank_update_kernel(
    z_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    seed_ptr,
    threshold,
    rescale,
    M,
    N,
    R,
    stride_zm,
    stride_bn,
    stride_br,
    Z_IN_EIGHTS: tl.constexpr,
    B_IN_EIGHTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    if Z_IN_EIGHTS:
        R, stride_zm = R // 8 * 8, stride_zm // 8 * 8
    if B_IN_EIGHTS:
        stride_bn = stride_bn // 8 * 8
    block_m, block_n = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    first_m = block_m * BLOCK_M
    first_n = block_n * BLOCK_N
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)

    acc_mn = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first_r in tl.range(0, R, BLOCK_R, num_stages=1):
        z_mr = load_tile(z_ptr, m, first_r + r, M, R, stride_zm, 1)
        b_rn = load_tile(b_ptr, first_r + r, n, R, N, stride_br, stride_bn)
        acc_mn = tl.dot(z_mr, b_rn.to(z_mr.dtype), acc_mn, input_precision=PRECISION)
    if DROPOUT:
        keep_mn = keep_mask(seed_ptr, first_m, first_n, threshold, BLOCK_M, BLOCK_N)
        acc_mn = tl.where(keep_mn, acc_mn * rescale, 0.0)
    if bias_ptr is not None:
        acc_mn += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, acc_mn.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def launch(p: Any, z: Tensor, *, precision: str) -> tuple[Tensor, Launch]:
    """y's memory and the launch that fills it with the product.

    Args:
        p: the ``Product`` whose b, bias (contiguous) and mask on the product are read.
        z: [M, R], rows contiguous, M >= 1.
        precision: Triton's ``input_precision`` for fp32 operands.
    """
    b = p.b
    m, (n, r) = z.shape[0], b.shape
    y = torch.empty(m, n, dtype=z.dtype, device=z.device)
    mask = Mask.of(p.mask_product)
    tile = rank_update_tile(r, z.element_size())
    return y, Launch(
        _rank_update_kernel,
        (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),),
        strided("z", z, "m")
        | strided("b", b, "nr")
        | dict(
            bias_ptr=p.bias,
            y_ptr=y,
            seed_ptr=mask.seed,
            threshold=mask.threshold,
            rescale=mask.rescale,
            M=m,
            N=n,
            R=r,
            Z_IN_EIGHTS=in_eights(z),
            B_IN_EIGHTS=in_eights(b),
            DROPOUT=mask.seed is not None,
            PRECISION=precision,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_R=tile.depth,
            GROUP_M=GROUP_M,
        ),
        tile.options,
    )
