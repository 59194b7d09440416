"""``triton-portable``: y = x wᵀ + z bᵀ + bias from a finished z, through masked pointer loads.

    for each block of M, block of N:
        for k:  acc_mn += x_mk · w_nkᵀ
        acc_mn += z_mr · b_nrᵀ                     first of all where the mask sits on the product, and masked
        y_mn = acc_mn + bias_n

Operands: x [M, K], w [N, K], bias [N] in bf16, fp16 or fp32; b [N, R] in that dtype or fp32, cast tile by tile;
z [M, R] and y [M, N] in the dtype of x. In the backward the same kernel makes dx: x is dy, w is wᵀ, b is aᵀ, all
strided views, and the mask sits on the product. Bytes: the frozen GEMM's, plus one read of x by ``middle.py``, which
makes z; y is stored once. Any strides, sm_80 and newer, AMD: used where TMA cannot go.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fence import copy_stages, fence_async_proxy
from .indexing import low_rank_arguments, low_rank_product, masked, store_y, tile_position
from .launch import Launch, strided
from .tiles import matmul_tile, portable_rows, rank_trip, sms


@triton.jit(do_not_specialize=["M", "threshold"])
def _portable_kernel(
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
    stride_zm,
    stride_bn,
    stride_br,
    Z_IN_EIGHTS: tl.constexpr,
    B_IN_EIGHTS: tl.constexpr,
    MASK_PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    k = tl.arange(0, BLOCK_K)

    acc_mn = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if MASK_PRODUCT:
        # The product comes before the base, so it can be masked in the accumulator itself.
        acc_mn = low_rank_product(
            acc_mn, z_ptr, b_ptr, first_m, first_n, M, N, R, stride_zm, stride_bn, stride_br, BLOCK_R, PRECISION
        )
        acc_mn = masked(acc_mn, seed_ptr, first_m, first_n, threshold, rescale)

    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    w_ptrs = w_ptr + k.to(tl.int64)[:, None] * stride_wk + n.to(tl.int64)[None, :] * stride_wn
    for first_k in tl.range(0, K, BLOCK_K, num_stages=copy_stages()):
        inside_k = first_k + k < K
        x_mk = tl.load(x_ptrs, mask=(m < M)[:, None] & inside_k[None, :], other=0.0)
        w_kn = tl.load(w_ptrs, mask=inside_k[:, None] & (n < N)[None, :], other=0.0)
        fence_async_proxy(first_k)
        acc_mn = tl.dot(x_mk, w_kn, acc_mn, input_precision=PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        w_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)
    if not MASK_PRODUCT:
        # Last, as a trip of its own: an accumulator that enters the loop running makes ptxas serialise its wgmmas.
        acc_mn = low_rank_product(
            acc_mn, z_ptr, b_ptr, first_m, first_n, M, N, R, stride_zm, stride_bn, stride_br, BLOCK_R, PRECISION
        )
    store_y(acc_mn, bias_ptr, y_ptr, first_m, first_n, M, N)


def launch(p: Any, z: Tensor, *, capability: int, precision: str) -> tuple[Tensor, Launch]:
    """y's memory and the launch that fills it.

    Args:
        p: the ``Product`` whose x, w, b, bias (contiguous) and mask on the product are read; M >= 1.
        z: [M, R], rows contiguous.
        capability: the architecture's number, 90 for sm_90, 0x942 for gfx942; picks the tile.
        precision: Triton's ``input_precision`` for fp32 operands.
    """
    x, w, b = p.x, p.w, p.b
    (m, k), (n, r) = x.shape, b.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    low_rank = low_rank_arguments(p, z)
    # Triton vectorises a load only along strides and extents that it knows to be multiples of 16.
    sizes = (k, n, *x.stride(), *w.stride(), x.data_ptr(), w.data_ptr())
    ragged = any(size % 16 for size in sizes if size != 1)
    kind = "ragged" if ragged else precision if x.dtype is torch.float32 else None
    tile = matmul_tile(portable_rows(capability, kind, masked=low_rank["MASK_PRODUCT"]), m, n, sms(x.device))
    return y, Launch(
        _portable_kernel,
        (triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns),),
        strided("x", x, "mk")
        | strided("w", w, "nk")
        | low_rank
        | dict(
            y_ptr=y,
            K=k,
            PRECISION=precision,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            BLOCK_R=rank_trip(r, b.element_size()),
        ),
        tile.options,
    )
