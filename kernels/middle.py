"""The middle z = scale · D(x) aᵀ, a tall-skinny product: the first launch of every Triton kernel.

    for each block of M, block of R, split of K:
        acc_mr = 0
        for k in split:  acc_mr += D(x_mk) · a_rkᵀ
        partial[split] = acc_mr
    z = scale · sum of partial over splits, in order

Operands: x [M, K] in bf16, fp16 or fp32, a [R, K] in that dtype or fp32, any strides; z [M, R] in the dtype of x, rows
contiguous, rounded once. K is split where blocks of M alone leave a large GPU idle, M <= 4224 at K = 4096; a second
launch then adds up the fp32 partials, and without splits there is none. Bytes: one read of x, which bounds it for
R <= 64, plus 8 · splits · M · R where K is split. In the backward x is dy, a is bᵀ, and z is t. The number of splits
depends on the shapes and the tile alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ordered_sum
from .launch import Launch, strided
from .ordered_sum import Partial
from .philox import Mask, keep_mask
from .tiles import FULL_TWICE, middle_tile, split


@triton.jit
def skinny_product(
    x_ptrs, a_ptrs, seed_ptr, threshold, first_m, first_k, last_k, r, M, K, R,
    stride_xk, stride_ak, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """D(x_mk) · a_krᵀ summed over a split of K; ``x_ptrs`` and ``a_ptrs`` are those of its first trip.

    ``r`` are their rows of a, of which there are R; where R is None, all of them are there.
    """
    m = first_m + tl.arange(0, BLOCK_M)
    acc_mr = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for block_k in range(first_k, last_k, BLOCK_K):
        inside_k = block_k + tl.arange(0, BLOCK_K) < K  # a split ends with a block
        x_mk = tl.load(x_ptrs, mask=(m < M)[:, None] & inside_k[None, :], other=0.0)
        inside_kr = inside_k[:, None] if R is None else inside_k[:, None] & (r < R)[None, :]
        a_kr = tl.load(a_ptrs, mask=inside_kr, other=0.0)
        if DROPOUT:
            x_mk = tl.where(keep_mask(seed_ptr, first_m, block_k, threshold, BLOCK_M, BLOCK_K), x_mk, 0.0)
        acc_mr = tl.dot(x_mk, a_kr.to(x_mk.dtype), acc_mr, input_precision=PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        a_ptrs += BLOCK_K * tl.cast(stride_ak, tl.int64)
    return acc_mr


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
    k_per_split,
    stride_xm,
    stride_xk,
    stride_zs,
    stride_zm,
    stride_ar,
    stride_ak,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The blocks of R are neighbours, so that all but the first find x in the L2 cache.
    blocks_r = tl.cdiv(R, BLOCK_R)
    block_m = tl.program_id(0) // blocks_r
    split = tl.program_id(1)
    first_m = block_m * BLOCK_M
    first_k = split * k_per_split
    last_k = min(K, first_k + k_per_split)
    m = first_m + tl.arange(0, BLOCK_M)
    r = (tl.program_id(0) - block_m * blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = first_k + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    a_ptrs = a_ptr + k.to(tl.int64)[:, None] * stride_ak + r.to(tl.int64)[None, :] * stride_ar
    acc_mr = skinny_product(
        x_ptrs, a_ptrs, seed_ptr, threshold, first_m, first_k, last_k, r, M, K, R,
        stride_xk, stride_ak, DROPOUT, PRECISION, BLOCK_M, BLOCK_R, BLOCK_K,
    )  # fmt: skip

    z_ptrs = z_ptr + split.to(tl.int64) * stride_zs + m.to(tl.int64)[:, None] * stride_zm + r[None, :]
    tl.store(z_ptrs, (acc_mr * scale).to(z_ptr.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])


def launches(p: Any, z: Tensor, *, capability: int, precision: str) -> list[Launch]:
    """The launches that fill z.

    Args:
        p: the ``Product`` whose x, a, scale and mask on x are read; M >= 1.
        z: [M, R], rows contiguous.
        capability: the architecture's number, 90 for sm_90, 0x942 for gfx942; picks the tile.
        precision: Triton's ``input_precision`` for fp32 operands.
    """
    x, a = p.x, p.a
    (m, k), r = x.shape, a.shape[0]
    mask = Mask.of(p.mask_x)
    scale = p.scale * mask.rescale
    tile = middle_tile(r, x.element_size(), a.element_size(), capability)
    blocks = triton.cdiv(m, tile.rows) * triton.cdiv(r, tile.columns)
    splits, k_per_split = split(k, tile.depth, blocks, FULL_TWICE)
    parts = z if splits == 1 else torch.empty(splits, m, r, dtype=torch.float32, device=x.device)
    product = Launch(
        _middle_kernel,
        (blocks, splits),
        strided("x", x, "mk")
        | strided("a", a, "rk")
        | dict(
            z_ptr=parts,
            seed_ptr=mask.seed,
            threshold=mask.threshold,
            scale=scale if splits == 1 else 1.0,
            M=m,
            K=k,
            R=r,
            k_per_split=k_per_split,
            stride_zs=m * r,
            stride_zm=parts.stride(-2),
            DROPOUT=mask.seed is not None,
            PRECISION=precision,
            BLOCK_M=tile.rows,
            BLOCK_R=tile.columns,
            BLOCK_K=tile.depth,
        ),
        tile.options,
    )
    return [product] if splits == 1 else [product, ordered_sum.launch(Partial(parts, z, scale))]
