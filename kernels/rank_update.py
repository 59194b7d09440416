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

from .indexing import low_rank_arguments, low_rank_product, masked, store_y, tile_position
from .launch import Launch
from .tiles import rank_update_tile


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
    MASK_PRODUCT: tl.constexpr,
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
    acc_mn = low_rank_product(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
        z_ptr, b_ptr, first_m, first_n, M, N, R, stride_zm, stride_bn, stride_br, BLOCK_R, PRECISION,
    )  # fmt: skip
    if MASK_PRODUCT:
        acc_mn = masked(acc_mn, seed_ptr, first_m, first_n, threshold, rescale)
    store_y(acc_mn, bias_ptr, y_ptr, first_m, first_n, M, N)


def launch(p: Any, z: Tensor, *, precision: str) -> tuple[Tensor, Launch]:
    """y's memory and the launch that fills it with the product.

    Args:
        p: the ``Product`` whose b, bias (contiguous) and mask on the product are read.
        z: [M, R], rows contiguous, M >= 1.
        precision: Triton's ``input_precision`` for fp32 operands.
    """
    m, (n, r) = z.shape[0], p.b.shape
    y = torch.empty(m, n, dtype=z.dtype, device=z.device)
    tile = rank_update_tile(r, z.element_size())
    return y, Launch(
        _rank_update_kernel,
        (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),),
        low_rank_arguments(p, z)
        | dict(y_ptr=y, PRECISION=precision, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_R=tile.depth),
        tile.options,
    )
