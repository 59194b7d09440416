"""``triton-serial``: y = x wᵀ + z bᵀ + bias from a finished z, persistent, on TMA descriptors.

    each CTA walks the tiles with a fixed stride:
        for k:  acc_mn += x_mk · w_nkᵀ
        acc_mn += z_mr · b_nrᵀ                     one more trip of the same accumulator
        y_mn = acc_mn + bias_n

Operands: 16-bit x [M, K], w [N, K] or its transposed view, and y [M, N] through TMA (rows a multiple of 16 bytes);
b [N, R] in the dtype of x or fp32, any strides, and z [M, R] through masked pointer loads (any rank). With the mask on
the product, the masked product starts the accumulator. Bytes: the frozen GEMM's, plus one read of x by ``middle.py``,
which makes z. For sm_90 and sm_100.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .indexing import low_rank_arguments, low_rank_product, masked, tile_position
from .launch import Launch
from .tiles import SCALAR_LOADS, matmul_tile, rank_trip, sms, tma_rows


@triton.jit
def _load_x_w(x_desc, w_desc, first_m, first_n, first_k, W_K_BY_N: tl.constexpr):
    """x_mk and w_kn of one trip; TMA fills with zeros past the edges."""
    x_mk = x_desc.load([first_m, first_k])
    w_kn = w_desc.load([first_k, first_n]) if W_K_BY_N else w_desc.load([first_n, first_k]).T
    return x_mk, w_kn


@triton.jit
def _load_bias(bias_ptr, first_n, N, BLOCK_N: tl.constexpr):
    bias_n = None
    if bias_ptr is not None:
        n = first_n + tl.arange(0, BLOCK_N)
        bias_n = tl.load(bias_ptr + n, mask=n < N, other=0.0)
    return bias_n


@triton.jit
def _split_columns(acc_mn):
    """The left and the right half of the columns."""
    halves: tl.constexpr = (acc_mn.shape[0], 2, acc_mn.shape[1] // 2)
    return tl.split(tl.permute(tl.reshape(acc_mn, halves), (0, 2, 1)))


@triton.jit
def _store_y(y_desc, acc_mn, bias_n, bias_ptr, first_m, first_n, N):
    """y_mn = acc_mn + bias_n, in halves: y then takes half the shared memory on its way out."""
    left_mn, right_mn = _split_columns(acc_mn)
    half: tl.constexpr = left_mn.shape[1]
    if bias_n is not None:
        left_n, right_n = tl.split(tl.permute(tl.reshape(bias_n.to(tl.float32), (2, half)), (1, 0)))
        y_desc.store([first_m, first_n], (left_mn + left_n[None, :]).to(y_desc.dtype))
        y_desc.store([first_m, first_n + half], (right_mn + right_n[None, :]).to(y_desc.dtype))
    elif bias_ptr is not None:
        left_n = _load_bias(bias_ptr, first_n, N, half).to(tl.float32)
        y_desc.store([first_m, first_n], (left_mn + left_n[None, :]).to(y_desc.dtype))
        right_n = _load_bias(bias_ptr, first_n + half, N, half).to(tl.float32)
        y_desc.store([first_m, first_n + half], (right_mn + right_n[None, :]).to(y_desc.dtype))
    else:
        y_desc.store([first_m, first_n], left_mn.to(y_desc.dtype))
        y_desc.store([first_m, first_n + half], right_mn.to(y_desc.dtype))


@triton.jit(do_not_specialize=["M", "threshold"])
def _serial_kernel(
    x_desc,
    w_desc,
    y_desc,
    z_ptr,
    b_ptr,
    bias_ptr,
    seed_ptr,
    threshold,
    rescale,
    M,
    N,
    K,
    R,
    stride_zm,
    stride_bn,
    stride_br,
    Z_IN_EIGHTS: tl.constexpr,
    B_IN_EIGHTS: tl.constexpr,
    MASK_PRODUCT: tl.constexpr,
    W_K_BY_N: tl.constexpr,
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
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0)):
        block_m, block_n = tile_position(tile, blocks_m, blocks_n, GROUP_M)
        first_m = block_m * BLOCK_M
        first_n = block_n * BLOCK_N
        # An element or two a thread, spread out after the loop: read there, it is what each accumulator register needs.
        # Not with 64 rows: it is two registers too many on sm_100, and each half reads its own.
        bias_n = None
        if BLOCK_M > 64:
            bias_n = _load_bias(bias_ptr, first_n, N, BLOCK_N)
        acc_mn = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if MASK_PRODUCT:
            acc_mn = low_rank_product(
                acc_mn, z_ptr, b_ptr, first_m, first_n, M, N, R, stride_zm, stride_bn, stride_br, BLOCK_R, None
            )
            acc_mn = masked(acc_mn, seed_ptr, first_m, first_n, threshold, rescale)
        for first_k in range(0, K, BLOCK_K):
            x_mk, w_kn = _load_x_w(x_desc, w_desc, first_m, first_n, first_k, W_K_BY_N)
            acc_mn = tl.dot(x_mk, w_kn, acc_mn)
        if not MASK_PRODUCT:
            acc_mn = low_rank_product(
                acc_mn, z_ptr, b_ptr, first_m, first_n, M, N, R, stride_zm, stride_bn, stride_br, BLOCK_R, None
            )
        _store_y(y_desc, acc_mn, bias_n, bias_ptr, first_m, first_n, N)


def launch(p: Any, z: Tensor) -> tuple[Tensor, Launch]:
    """y's memory and the launch that fills it.

    Args:
        p: the ``Product`` whose x, w, b, bias (contiguous) and mask on the product are read; M >= 1, and the rows of
            x, of w or wᵀ, and of y start on 16 bytes.
        z: [M, R], rows contiguous.
    """
    x, w, b = p.x, p.w, p.b
    (m, k), (n, r) = x.shape, b.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    low_rank = low_rank_arguments(p, z)
    tile = matmul_tile(tma_rows(SCALAR_LOADS if low_rank["MASK_PRODUCT"] and r % 16 else 0), m, n, sms(x.device))
    w_k_by_n = w.stride(1) != 1
    tiles = triton.cdiv(m, tile.rows) * triton.cdiv(n, tile.columns)
    return y, Launch(
        _serial_kernel,
        # In the interpreter a few CTAs, which then walk several tiles each.
        (min(tiles, sms(x.device) if x.is_cuda else 4),),
        low_rank
        | dict(
            x_desc=TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
            w_desc=TensorDescriptor.from_tensor(w.T, [tile.depth, tile.columns])
            if w_k_by_n
            else TensorDescriptor.from_tensor(w, [tile.columns, tile.depth]),
            y_desc=TensorDescriptor.from_tensor(y, [tile.rows, tile.columns // 2]),
            K=k,
            W_K_BY_N=w_k_by_n,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            BLOCK_R=rank_trip(r, b.element_size()),
        ),
        tile.options,
    )
