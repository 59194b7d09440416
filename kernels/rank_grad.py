"""rank_grad: g = pᵀ D(q), the gradient of an adapter; a tall-skinny reduction over the M tokens.

    wide, narrow = the wider and the narrower of p and q       wide [M, C], narrow [M, R]
    for each block of R, block of C, split of M:
        acc_rc = 0                                  two of them above 32 rows
        for m in split:  acc_rc += narrow_mrᵀ · D(wide_mc)
        partial[split] = acc_rc
    g = sum of partial over splits, in order

Operands: p [M, P], q [M, Q] in bf16, fp16 or fp32, any strides; g [P, Q] in the parameter's dtype. The mask sits on q
and is made anew from (seed, row, column). Bytes: one read of p and q, plus 4 · splits · P · Q written and read.
Memory-bound for R <= 64. Used for da = rank_grad(t, x) and db = rank_grad(dy, z). The same bits run after run: no
atomics, and the number of splits depends on the shapes and the tile alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ordered_sum
from .launch import Launch, in_eights
from .ordered_sum import Partial
from .philox import Mask, keep_mask
from .tiles import FULL_TWICE, rank_grad_tile, split


@triton.jit
def skinny_reduction(
    wide_ptr, narrow_ptr, grad_ptr, seed_ptr, threshold, rescale, first_r, M, C, R,
    tokens_per_split, stride_wide_m, stride_wide_c, stride_narrow_m, stride_narrow_r, stride_grad_s, stride_grad_r,
    stride_grad_c, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, HALF_R: tl.constexpr,
):  # fmt: skip
    """Stores the block of rows from ``first_r`` on; axes 1 and 2 of the grid are blocks of C and splits of M."""
    first_c = tl.program_id(1) * BLOCK_C
    split = tl.program_id(2)
    first_m = split * tokens_per_split
    last_m = min(M, first_m + tokens_per_split)
    m = tl.arange(0, BLOCK_M)
    c = first_c + tl.arange(0, BLOCK_C)
    r = first_r + tl.arange(0, HALF_R)
    wide_ptrs = wide_ptr + (first_m + m).to(tl.int64)[:, None] * stride_wide_m + c.to(tl.int64)[None, :] * stride_wide_c
    narrow_ptrs = (
        narrow_ptr + (first_m + m).to(tl.int64)[:, None] * stride_narrow_m + r.to(tl.int64)[None, :] * stride_narrow_r
    )
    upper = HALF_R * tl.cast(stride_narrow_r, tl.int64)

    # Products of at most 32 rows are mma.sync: wgmma would ask for a fence of the proxy that Triton 3.6 leaves out.
    acc_rc = tl.zeros((HALF_R, BLOCK_C), dtype=tl.float32)
    upper_rc = tl.zeros((HALF_R, BLOCK_C), dtype=tl.float32)
    for block_m in range(first_m, last_m, BLOCK_M):
        inside_m = (block_m + m < last_m)[:, None]
        wide_mc = tl.load(wide_ptrs, mask=inside_m & (c < C)[None, :], other=0.0)
        narrow_mr = tl.load(narrow_ptrs, mask=inside_m & (r < R)[None, :], other=0.0)
        if DROPOUT:
            wide_mc = tl.where(keep_mask(seed_ptr, block_m, first_c, threshold, BLOCK_M, BLOCK_C), wide_mc, 0.0)
        acc_rc = tl.dot(narrow_mr.T, wide_mc, acc_rc, input_precision=PRECISION)
        if BLOCK_R > HALF_R:
            upper_mr = tl.load(narrow_ptrs + upper, mask=inside_m & (HALF_R + r < R)[None, :], other=0.0)
            upper_rc = tl.dot(upper_mr.T, wide_mc, upper_rc, input_precision=PRECISION)
        wide_ptrs += BLOCK_M * tl.cast(stride_wide_m, tl.int64)
        narrow_ptrs += BLOCK_M * tl.cast(stride_narrow_m, tl.int64)

    grad_ptrs = (
        grad_ptr
        + split.to(tl.int64) * stride_grad_s
        + r.to(tl.int64)[:, None] * stride_grad_r
        + c.to(tl.int64)[None, :] * stride_grad_c
    )
    inside_c = (c < C)[None, :]
    tl.store(grad_ptrs, (acc_rc * rescale).to(grad_ptr.dtype.element_ty), mask=(r < R)[:, None] & inside_c)
    if BLOCK_R > HALF_R:
        grad_ptrs += HALF_R * tl.cast(stride_grad_r, tl.int64)
        inside = (HALF_R + r < R)[:, None] & inside_c
        tl.store(grad_ptrs, (upper_rc * rescale).to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "threshold", "tokens_per_split"])
def _rank_grad_kernel(
    wide_ptr,
    narrow_ptr,
    grad_ptr,
    seed_ptr,
    threshold,
    rescale,
    M,
    C,
    R,
    tokens_per_split,
    stride_wide_m,
    stride_wide_c,
    stride_narrow_m,
    stride_narrow_r,
    stride_grad_s,
    stride_grad_r,
    stride_grad_c,
    IN_EIGHTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HALF_R: tl.constexpr,
):
    if IN_EIGHTS:
        R, stride_narrow_m = R // 8 * 8, stride_narrow_m // 8 * 8
    # The blocks of R are neighbours, so that all but the first find the wide side in the L2 cache.
    skinny_reduction(
        wide_ptr, narrow_ptr, grad_ptr, seed_ptr, threshold, rescale, tl.program_id(0) * BLOCK_R, M, C, R,
        tokens_per_split, stride_wide_m, stride_wide_c, stride_narrow_m, stride_narrow_r, stride_grad_s, stride_grad_r,
        stride_grad_c, DROPOUT, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R, HALF_R,
    )  # fmt: skip


def launches(
    p: Tensor, q: Tensor, *, dtype: torch.dtype, capability: int, precision: str, dropout: Any = None
) -> tuple[Tensor, list[Launch]]:
    """The gradient's memory and the launches that fill it.

    Args:
        p: [M, P], M >= 1.
        q: [M, Q]; the mask is on it.
        dtype: dtype of the gradient.
        capability: the architecture's number, 90 for sm_90, 0x942 for gfx942; picks the tile.
        precision: Triton's ``input_precision`` for fp32 operands.
        dropout: the ``Dropout`` on q, or None.
    """
    q_is_wide = dropout is not None or q.shape[1] >= p.shape[1]
    wide, narrow = (q, p) if q_is_wide else (p, q)
    (m, c), r = wide.shape, narrow.shape[1]
    tile = rank_grad_tile(r, precision if q.dtype is torch.float32 else None, capability)
    blocks = triton.cdiv(c, tile.columns) * triton.cdiv(r, tile.rows)
    splits, tokens_per_split = split(m, tile.depth, blocks, FULL_TWICE)

    grad = torch.empty(p.shape[1], q.shape[1], dtype=dtype, device=q.device)
    partial = grad if splits == 1 else torch.empty(splits, *grad.shape, dtype=torch.float32, device=q.device)
    stride_r, stride_c = grad.stride() if q_is_wide else grad.stride()[::-1]
    mask = Mask.of(dropout)
    product = Launch(
        _rank_grad_kernel,
        (triton.cdiv(r, tile.rows), triton.cdiv(c, tile.columns), splits),
        dict(
            wide_ptr=wide,
            narrow_ptr=narrow,
            grad_ptr=partial,
            seed_ptr=mask.seed,
            threshold=mask.threshold,
            rescale=mask.rescale,
            M=m,
            C=c,
            R=r,
            tokens_per_split=tokens_per_split,
            stride_wide_m=wide.stride(0),
            stride_wide_c=wide.stride(1),
            stride_narrow_m=narrow.stride(0),
            stride_narrow_r=narrow.stride(1),
            stride_grad_s=grad.numel(),
            stride_grad_r=stride_r,
            stride_grad_c=stride_c,
            IN_EIGHTS=in_eights(narrow),
            DROPOUT=dropout is not None,
            PRECISION=precision,
            BLOCK_M=tile.depth,
            BLOCK_C=tile.columns,
            BLOCK_R=tile.rows,
            HALF_R=min(tile.rows, 32),
        ),
        tile.options,
    )
    if splits == 1:
        return grad, [product]
    return grad, [product, ordered_sum.launch(Partial(partial, grad))]
