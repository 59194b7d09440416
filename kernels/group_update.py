"""The low-rank part of a group's gradient, dx = Σ D'ᵢ(tᵢ aᵢ) over up to four branches: written before the GEMMs.

    for each block of M, block of K:
        sum_mk = 0
        for each branch:
            acc_mk = 0
            for r of its columns:  acc_mk += t_mr · a_rk
            sum_mk += D'(acc_mk)
        dx_mk = sum_mk

Each branch has a mask of its own, so its product is masked before it is added; without masks one accumulator runs
through all. Operands: t [M, C] contiguous (``branches``) in bf16, fp16 or fp32; aᵢ [Rᵢ, K] contiguous in that dtype or
fp32, cast tile by tile; dx [M, K] contiguous in the dtype of t, rounded once. Bytes: one write of dx, one read of t and
the aᵢ. The vendor's GEMMs then add dyᵢ wᵢ (beta = 1). Used by ``triton-skinny`` for ``lora_linear_group``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import branches
from .branches import of_branch
from .indexing import low_rank_product, masked, store_y, tile_position
from .launch import Launch
from .philox import Mask
from .tiles import GROUP_M, group_update_tile


@triton.jit(do_not_specialize=["M", "C", "count", *branches.ANY_VALUE])
def _group_update_kernel(
    t_ptr,
    dx_ptr,
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
    count,
    M,
    K,
    C,
    IN_EIGHTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    begin_1, begin_2, begin_3, C = begin_1 // 8 * 8, begin_2 // 8 * 8, begin_3 // 8 * 8, C // 8 * 8
    block_m, block_k = tile_position(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    first_m = block_m * BLOCK_M
    first_k = block_k * BLOCK_K
    sum_mk = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for branch in range(count):
        rank = of_branch(branch, rank_0, rank_1, rank_2, rank_3)
        if IN_EIGHTS:
            rank = rank // 8 * 8
        t_columns = t_ptr + of_branch(branch, 0, begin_1, begin_2, begin_3)
        a_ptr = of_branch(branch, a_0_ptr, a_1_ptr, a_2_ptr, a_3_ptr)
        acc_mk = low_rank_product(
            tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32) if DROPOUT else sum_mk,
            t_columns, a_ptr, first_m, first_k, M, K, rank, C, 1, K, BLOCK_R, PRECISION,
        )  # fmt: skip
        if DROPOUT:
            seed_ptr = of_branch(branch, seed_0_ptr, seed_1_ptr, seed_2_ptr, seed_3_ptr)
            threshold = of_branch(branch, threshold_0, threshold_1, threshold_2, threshold_3)
            factor = of_branch(branch, factor_0, factor_1, factor_2, factor_3)
            sum_mk += masked(acc_mk, seed_ptr, first_m, first_k, threshold, factor)
        else:
            sum_mk = acc_mk
    store_y(sum_mk, None, dx_ptr, first_m, first_k, M, K)


def launch(products: Sequence[Any], t: Tensor, *, precision: str) -> tuple[Tensor, Launch]:
    """dx's memory and the launch that fills it.

    Args:
        products: two to four ``Product`` of one x, whose a (contiguous) and mask on x are read.
        t: [M, C] contiguous, C as ``branches.begins`` says; M >= 1.
        precision: Triton's ``input_precision`` for fp32 operands.
    """
    m, k = products[0].x.shape
    dx = torch.empty(m, k, dtype=t.dtype, device=t.device)
    ranks = branches.ranks_of(products)
    tile = group_update_tile(max(ranks), t.element_size(), products[0].a.element_size())
    return dx, Launch(
        _group_update_kernel,
        (triton.cdiv(m, tile.rows) * triton.cdiv(k, tile.columns),),
        branches.arguments(products, [Mask.of(p.mask_x).rescale for p in products])
        | dict(
            t_ptr=t,
            dx_ptr=dx,
            count=len(products),
            M=m,
            K=k,
            C=t.shape[1],
            IN_EIGHTS=branches.in_eights(ranks),
            DROPOUT=branches.is_masked(products),
            PRECISION=precision,
            BLOCK_M=tile.rows,
            BLOCK_K=tile.columns,
            BLOCK_R=tile.depth,
            GROUP_M=GROUP_M,
        ),
        tile.options,
    )
