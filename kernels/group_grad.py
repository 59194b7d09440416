"""The gradients of a group's down projections: daᵢ = tᵢᵀ Dᵢ(x) of up to four branches by one pass over x.

    for each block of a branch's rank, block of K, split of M:
        acc_rk = 0                                  two of them above 32 rows
        for m in split:  acc_rk += t_mrᵀ · D(x_mk)
        partial[split] = acc_rk
    da = sum of partial over splits, in order

The blocks of ranks are neighbours, and all but the first find x in the L2 cache. Without masks t is one matrix and this
is ``rank_grad``, whose blocks of 64 rows are those of any branches. Operands: t [M, C] contiguous (``branches``), x
[M, K] in bf16, fp16 or fp32, any strides; da [C, K] in the parameters' dtype, the rows of each branch where t has its
columns, those between two branches of no meaning. Bytes: one read of x and t, plus 4 · splits · C · K written and read.
Used by ``triton-skinny`` for ``lora_linear_group``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import branches, ordered_sum, rank_grad
from .branches import branch_of_block, of_branch
from .launch import Launch, strided
from .ordered_sum import Partial
from .philox import Mask
from .rank_grad import skinny_reduction
from .tiles import FULL_TWICE, rank_grad_tile, split


@triton.jit(do_not_specialize=["M", "C", "tokens_per_split", *branches.ANY_VALUE])
def _group_grad_kernel(
    x_ptr,
    t_ptr,
    grad_ptr,
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
    tokens_per_split,
    stride_xm,
    stride_xk,
    IN_EIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HALF_R: tl.constexpr,
):
    begin_1, begin_2, begin_3, C = begin_1 // 8 * 8, begin_2 // 8 * 8, begin_3 // 8 * 8, C // 8 * 8
    branch, block = branch_of_block(tl.program_id(0), rank_0, rank_1, rank_2, rank_3, BLOCK_R)
    rank = of_branch(branch, rank_0, rank_1, rank_2, rank_3)
    if IN_EIGHTS:
        rank = rank // 8 * 8
    begin = of_branch(branch, 0, begin_1, begin_2, begin_3)
    skinny_reduction(
        x_ptr,
        t_ptr + begin,
        grad_ptr + begin.to(tl.int64) * K,
        of_branch(branch, seed_0_ptr, seed_1_ptr, seed_2_ptr, seed_3_ptr),
        of_branch(branch, threshold_0, threshold_1, threshold_2, threshold_3),
        of_branch(branch, factor_0, factor_1, factor_2, factor_3),
        block * BLOCK_R, M, K, rank, tokens_per_split, stride_xm, stride_xk, C, 1, C.to(tl.int64) * K, K, 1,
        True, PRECISION, BLOCK_M, BLOCK_C, BLOCK_R, HALF_R,
    )  # fmt: skip


def launches(
    products: Sequence[Any], t: Tensor, *, dtype: torch.dtype, capability: int, precision: str
) -> tuple[Tensor, list[Launch]]:
    """The memory [C, K] of all gradients and the launches that fill it.

    Args:
        products: two to four ``Product`` of one x, whose x, rank and mask on x are read; M >= 1.
        t: [M, C] contiguous, C as ``branches.begins`` says.
        dtype: dtype of the gradients.
        capability: the architecture's number, 90 for sm_90, 0x942 for gfx942; picks the tile.
        precision: Triton's ``input_precision`` for fp32 operands.
    """
    x, ranks = products[0].x, branches.ranks_of(products)
    if not branches.is_masked(products):
        return rank_grad.launches(t, x, dtype=dtype, capability=capability, precision=precision)
    (m, k), width = x.shape, t.shape[1]
    tile = rank_grad_tile(max(ranks), precision if x.dtype is torch.float32 else None, capability)
    blocks_r, blocks_k = branches.blocks(products, tile.rows), triton.cdiv(k, tile.columns)
    splits, tokens_per_split = split(m, tile.depth, blocks_r * blocks_k, FULL_TWICE)
    grad = torch.empty(width, k, dtype=dtype, device=x.device)
    partial = grad if splits == 1 else torch.empty(splits, width, k, dtype=torch.float32, device=x.device)
    taken = branches.arguments(products, [Mask.of(p.mask_x).rescale for p in products])
    product = Launch(
        _group_grad_kernel,
        (blocks_r, blocks_k, splits),
        strided("x", x, "mk")
        | {name: value for name, value in taken.items() if not name.startswith("a_")}
        | dict(
            t_ptr=t,
            grad_ptr=partial,
            M=m,
            K=k,
            C=width,
            tokens_per_split=tokens_per_split,
            IN_EIGHTS=branches.in_eights(ranks),
            PRECISION=precision,
            BLOCK_M=tile.depth,
            BLOCK_C=tile.columns,
            BLOCK_R=tile.rows,
            HALF_R=min(tile.rows, 32),
        ),
        tile.options,
    )
    return grad, [product] if splits == 1 else [product, ordered_sum.launch(Partial(partial, grad))]
