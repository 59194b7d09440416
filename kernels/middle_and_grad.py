"""t = scale · dy b and db = dyᵀ z from one read of dy, by far the largest of the operands.

    for each block of N, split of M:
        b_rn stays, db_rn = 0
        for m in split:
            t_rm   = b_rn · dy_mnᵀ                 partial: it lacks the other blocks of N
            db_rn += z_mrᵀ · dy_mn                 partial: it lacks the other splits of M
    t = scale · sum of its partials over blocks of N,   db = sum of its partials over splits of M

Operands: dy [M, N] in bf16, fp16 or fp32, z [M, R] in that dtype, b [N, R] in that dtype or fp32, any strides; t [M, R]
in the dtype of dy, rows contiguous; db [N, R] in the dtype of b. Launches: 2, the second adds up both; 1 where N is one
block and M one split. Bytes: one read of dy, and 8 · R · (M · blocks of N + N · splits of M) for the fp32 partials.

At M = 8192, N = 4096, R = 16 in bf16 that is 67 + 21 MB, where ``middle`` and ``rank_grad`` read 134 + 2 MB. The
partials of t alone are R / 64 of dy, so a read is saved up to rank 32, and only where :func:`pays` says so. Small M
needs no case of its own: the blocks of N fill the GPU. Used by ``triton-skinny``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ordered_sum
from .launch import Launch, in_eights, strided
from .ordered_sum import Partial
from .tiles import FULL, Tile, middle_and_grad_tile, padded_rank, split

MAX_RANK = 32


@triton.jit(do_not_specialize=["M", "tokens_per_split"])
def _middle_and_grad_kernel(
    dy_ptr,
    b_ptr,
    z_ptr,
    t_ptr,
    db_ptr,
    scale,
    M,
    N,
    R,
    tokens_per_split,
    stride_dym,
    stride_dyn,
    stride_bn,
    stride_br,
    stride_zm,
    stride_zr,
    stride_tn,
    stride_tm,
    stride_dbm,
    IN_EIGHTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if IN_EIGHTS:
        R, stride_zm, stride_bn = R // 8 * 8, stride_zm // 8 * 8, stride_bn // 8 * 8
    block_n = tl.program_id(0)
    split_m = tl.program_id(1)
    first_m = split_m * tokens_per_split
    last_m = min(M, first_m + tokens_per_split)
    m = tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    inside_n, inside_r = n < N, r < R
    rows = (first_m + m).to(tl.int64)[:, None]
    dy_ptrs = dy_ptr + rows * stride_dym + n.to(tl.int64)[None, :] * stride_dyn
    z_ptrs = z_ptr + rows * stride_zm + r.to(tl.int64)[None, :] * stride_zr
    t_ptrs = t_ptr + block_n.to(tl.int64) * stride_tn + rows * stride_tm + r[None, :]
    b_ptrs = b_ptr + r.to(tl.int64)[:, None] * stride_br + n.to(tl.int64)[None, :] * stride_bn
    b_rn = tl.load(b_ptrs, mask=inside_r[:, None] & inside_n[None, :], other=0.0).to(dy_ptr.dtype.element_ty)

    db_rn = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    for block_m in range(first_m, last_m, BLOCK_M):
        inside_m = (block_m + m < last_m)[:, None]
        dy_mn = tl.load(dy_ptrs, mask=inside_m & inside_n[None, :], other=0.0)
        z_mr = tl.load(z_ptrs, mask=inside_m & inside_r[None, :], other=0.0)
        # The rank is the rows of both products: up to 32 of them they are mma.sync, which needs no fence of a proxy.
        t_rm = tl.dot(b_rn, dy_mn.T, input_precision=PRECISION)
        db_rn = tl.dot(z_mr.T, dy_mn, db_rn, input_precision=PRECISION)
        tl.store(t_ptrs, (t_rm * scale).T.to(t_ptr.dtype.element_ty), mask=inside_m & inside_r[None, :])
        dy_ptrs += BLOCK_M * tl.cast(stride_dym, tl.int64)
        z_ptrs += BLOCK_M * tl.cast(stride_zm, tl.int64)
        t_ptrs += BLOCK_M * tl.cast(stride_tm, tl.int64)

    db_ptrs = db_ptr + split_m.to(tl.int64) * stride_dbm + n.to(tl.int64)[None, :] * R + r[:, None]
    tl.store(db_ptrs, db_rn.to(db_ptr.dtype.element_ty), mask=inside_r[:, None] & inside_n[None, :])


def launches(
    dy: Tensor, b: Tensor, z: Tensor, t: Tensor, *, scale: float, capability: int, precision: str
) -> tuple[Tensor, list[Launch]]:
    """db's memory, and the launches that fill it and t.

    Args:
        dy: [M, N], M >= 1.
        b: [N, R], R at most ``MAX_RANK``.
        z: [M, R] in the dtype of dy.
        t: [M, R] in the dtype of dy, rows contiguous.
        scale: factor on t.
        capability: compute capability as a number, 90 for sm_90; picks the tile.
        precision: Triton's ``input_precision`` for fp32 operands.
    """
    (m, n), r = dy.shape, b.shape[1]
    tile = middle_and_grad_tile(r, dy.element_size(), capability)
    blocks, splits, tokens_per_split = _grid(m, n, tile)
    fp32 = dict(dtype=torch.float32, device=dy.device)
    db = torch.empty(n, r, dtype=b.dtype, device=dy.device)
    t_parts = t if blocks == 1 else torch.empty(blocks, m, r, **fp32)  # type: ignore[call-overload]
    db_parts = db if splits == 1 else torch.empty(splits, n, r, **fp32)  # type: ignore[call-overload]
    product = Launch(
        _middle_and_grad_kernel,
        (blocks, splits),
        strided("dy", dy, "mn")
        | strided("b", b, "nr")
        | strided("z", z, "mr")
        | dict(
            t_ptr=t_parts,
            db_ptr=db_parts,
            scale=scale if blocks == 1 else 1.0,
            M=m,
            N=n,
            R=r,
            tokens_per_split=tokens_per_split,
            stride_tn=m * r,
            stride_tm=t_parts.stride(-2),
            stride_dbm=n * r,
            IN_EIGHTS=in_eights(z, b),
            PRECISION=precision,
            BLOCK_M=tile.depth,
            BLOCK_N=tile.columns,
            BLOCK_R=tile.rows,
        ),
        tile.options,
    )
    waiting = [Partial(t_parts, t, scale)] if blocks > 1 else []
    waiting += [Partial(db_parts, db)] if splits > 1 else []
    return db, [product, ordered_sum.launch(*waiting)] if waiting else [product]


def pays(m: int, n: int, r: int, itemsize: int, capability: int) -> bool:
    """Whether the partial sums move less than the read of dy [m, n] that they save."""
    if padded_rank(r) > MAX_RANK or max(m, n) * r >= 2**31:
        return False
    blocks, splits, _ = _grid(m, n, middle_and_grad_tile(r, itemsize, capability))
    return 8 * r * (m * blocks * (blocks > 1) + n * splits * (splits > 1)) < itemsize * m * n


def _grid(m: int, n: int, tile: Tile) -> tuple[int, int, int]:
    """Blocks of N, splits of M, and the tokens of a split.

    The GPU is filled once: each CTA has 64 KiB in flight, and more of them mean more partial sums.
    """
    blocks = triton.cdiv(n, tile.columns)
    return blocks, *split(m, tile.depth, blocks, FULL)
