"""The middles of a group: zᵢ = scaleᵢ · Dᵢ(x) aᵢᵀ of up to four branches by one pass over x.

    for each block of M, block of columns, split of K:
        acc_mc = 0
        for k in split:  acc_mc += D(x_mk) · a_ckᵀ        column c: a row of the a to whose branch it belongs
        partial[split] = scale_c · acc_mc
    z = sum of partial over splits, in order

Without masks a block's columns are those of any branches, and up to 128 of them in all read x once. With masks a block
is one branch's, whose mask it makes; the blocks of a row are neighbours, and all but the first find x in the L2 cache.
On AMD a block is one branch's in any case: Triton's compiler for it takes no tensor of pointers into several matrices.
Operands: x [M, K] in bf16, fp16 or fp32, any strides, aᵢ [Rᵢ, K] contiguous in that dtype or fp32; z [M, C] contiguous
(``branches``), in the dtype of x. Bytes: one read of x, plus 8 · splits · M · C where K is split, as in ``middle``.
Used by ``triton-skinny`` for ``lora_linear_group``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import branches, ordered_sum
from .branches import branch_at, branch_of_block, of_branch
from .launch import Launch, strided
from .middle import skinny_product
from .ordered_sum import Partial
from .philox import Mask
from .tiles import FULL_TWICE, is_amd, middle_tile, split


@triton.jit(do_not_specialize=["M", "C", "blocks_c", *branches.ANY_VALUE])
def _group_middle_kernel(
    x_ptr,
    z_ptr,
    a_0_ptr,
    a_1_ptr,
    a_2_ptr,
    a_3_ptr,
    seed_0_ptr,
    seed_1_ptr,
    seed_2_ptr,
    seed_3_ptr,
    threshold_0,
    threshold_1,
    threshold_2,
    threshold_3,
    factor_0,
    factor_1,
    factor_2,
    factor_3,
    rank_0,
    rank_1,
    rank_2,
    rank_3,
    begin_1,
    begin_2,
    begin_3,
    M,
    K,
    C,
    blocks_c,
    k_per_split,
    stride_xm,
    stride_xk,
    ALONE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Of eight each, so that z is stored by vectors.
    begin_1, begin_2, begin_3, C = begin_1 // 8 * 8, begin_2 // 8 * 8, begin_3 // 8 * 8, C // 8 * 8
    block_m = tl.program_id(0) // blocks_c
    block_c = tl.program_id(0) - block_m * blocks_c
    split = tl.program_id(1)
    first_m = block_m * BLOCK_M
    first_k = split * k_per_split
    last_k = min(K, first_k + k_per_split)
    if ALONE:
        branch, block_c = branch_of_block(block_c, rank_0, rank_1, rank_2, rank_3, BLOCK_C)
        c = of_branch(branch, 0, begin_1, begin_2, begin_3) + block_c * BLOCK_C + tl.arange(0, BLOCK_C)
        end_c = of_branch(branch, begin_1, begin_2, begin_3, C)
    else:
        c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
        end_c = C
        branch = branch_at(c, begin_1, begin_2, begin_3)
    if DROPOUT:
        seed_ptr = of_branch(branch, seed_0_ptr, seed_1_ptr, seed_2_ptr, seed_3_ptr)
        threshold = of_branch(branch, threshold_0, threshold_1, threshold_2, threshold_3)
    else:
        seed_ptr = seed_0_ptr
        threshold = threshold_0
    r = c - of_branch(branch, 0, begin_1, begin_2, begin_3)
    # Beyond a branch its last row is read again, which takes no mask; z has no such columns, or none that is read.
    r = tl.minimum(r, tl.maximum(of_branch(branch, rank_0, rank_1, rank_2, rank_3), 1) - 1)
    m = first_m + tl.arange(0, BLOCK_M)
    k = first_k + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    a_rows = of_branch(branch, a_0_ptr, a_1_ptr, a_2_ptr, a_3_ptr) + r.to(tl.int64) * K
    acc_mc = skinny_product(
        x_ptrs, a_rows[None, :] + k[:, None], seed_ptr, threshold, first_m, first_k, last_k, r, M, K, None,
        stride_xk, 1, DROPOUT, PRECISION, BLOCK_M, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    acc_mc *= of_branch(branch, factor_0, factor_1, factor_2, factor_3)

    z_ptrs = z_ptr + (split.to(tl.int64) * M + m.to(tl.int64))[:, None] * C + c[None, :]
    tl.store(z_ptrs, acc_mc.to(z_ptr.dtype.element_ty), mask=(m < M)[:, None] & (c < end_c)[None, :])


def launches(products: Sequence[Any], z: Tensor, *, capability: int, precision: str) -> list[Launch]:
    """The launches that fill z.

    Args:
        products: two to four ``Product`` of one x, whose a (contiguous), scale and mask on x are read; M >= 1.
        z: [M, C] contiguous, C as ``branches.begins`` says.
        capability: the architecture's number, 90 for sm_90, 0x942 for gfx942; picks the tile.
        precision: Triton's ``input_precision`` for fp32 operands.
    """
    x, a = products[0].x, products[0].a
    (m, k), width = x.shape, z.shape[1]
    masked = branches.is_masked(products)
    alone = masked or is_amd(capability)
    r = max(branches.ranks_of(products)) if alone else width
    tile = middle_tile(r, x.element_size(), a.element_size(), capability)
    blocks_c = branches.blocks(products, tile.columns) if alone else triton.cdiv(width, tile.columns)
    blocks = triton.cdiv(m, tile.rows) * blocks_c
    splits, k_per_split = split(k, tile.depth, blocks, FULL_TWICE)
    parts = z if splits == 1 else torch.empty(splits, m, width, dtype=torch.float32, device=x.device)
    product = Launch(
        _group_middle_kernel,
        (blocks, splits),
        strided("x", x, "mk")
        | branches.arguments(products, [p.scale * Mask.of(p.mask_x).rescale for p in products])
        | dict(
            z_ptr=parts,
            M=m,
            K=k,
            C=width,
            blocks_c=blocks_c,
            k_per_split=k_per_split,
            ALONE=alone,
            DROPOUT=masked,
            PRECISION=precision,
            BLOCK_M=tile.rows,
            BLOCK_C=tile.columns,
            BLOCK_K=tile.depth,
        ),
        tile.options,
    )
    return [product] if splits == 1 else [product, ordered_sum.launch(Partial(parts, z))]
