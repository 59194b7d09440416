"""What the kernels of an [M, N] result share: where a tile lies, its loads and stores, and the low-rank product."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .launch import in_eights, strided
from .philox import Mask, keep_mask
from .tiles import GROUP_M


@triton.jit
def tile_position(tile, blocks_m, blocks_n, GROUP_M: tl.constexpr):
    """Tile number → (block_m, block_n), walking GROUP_M row blocks down each column, so that w's columns stay in L2."""
    group = tile // (GROUP_M * blocks_n)
    first = group * GROUP_M
    rows = min(blocks_m - first, GROUP_M)
    within = tile - group * GROUP_M * blocks_n
    return first + within % rows, within // rows


@triton.jit
def load_tile(ptr, row, column, ROWS, COLUMNS, stride_row, stride_column):
    """The [row, column] tile of a matrix, zero outside it."""
    ptrs = ptr + row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
    return tl.load(ptrs, mask=(row < ROWS)[:, None] & (column < COLUMNS)[None, :], other=0.0)


@triton.jit
def low_rank_product(
    acc_mn, z_ptr, b_ptr, first_m, first_n, M, N, R, stride_zm, stride_bn, stride_br,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc_mn + z_mr · b_nrᵀ: one more trip of the base product's accumulator, or a few where the rank is large."""
    m = first_m + tl.arange(0, acc_mn.shape[0])
    n = first_n + tl.arange(0, acc_mn.shape[1])
    r = tl.arange(0, BLOCK_R)
    for first_r in tl.range(0, R, BLOCK_R, num_stages=1):
        z_mr = load_tile(z_ptr, m, first_r + r, M, R, stride_zm, 1)
        b_rn = load_tile(b_ptr, first_r + r, n, R, N, stride_br, stride_bn)
        acc_mn = tl.dot(z_mr, b_rn.to(z_mr.dtype), acc_mn, input_precision=PRECISION)
    return acc_mn


@triton.jit
def masked(acc_mn, seed_ptr, first_m, first_n, threshold, rescale):
    """D(acc_mn), the mask on the low-rank product."""
    keep_mn = keep_mask(seed_ptr, first_m, first_n, threshold, acc_mn.shape[0], acc_mn.shape[1])
    return tl.where(keep_mn, acc_mn * rescale, 0.0)


@triton.jit
def store_y(acc_mn, bias_ptr, y_ptr, first_m, first_n, M, N):
    """y_mn = acc_mn + bias_n, rounded once into contiguous y [M, N]."""
    m = first_m + tl.arange(0, acc_mn.shape[0])
    n = first_n + tl.arange(0, acc_mn.shape[1])
    if bias_ptr is not None:
        acc_mn += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptrs, acc_mn.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def low_rank_arguments(p: Any, z: Tensor) -> dict[str, Any]:
    """The arguments of ``z bᵀ``, its mask and the bias by name, and those of the walk over [M, N].

    Args:
        p: the ``Product`` whose b, bias (contiguous) and mask on the product are read.
        z: [M, R], rows contiguous.
    """
    b, mask = p.b, Mask.of(p.mask_product)
    return (
        strided("z", z, "m")
        | strided("b", b, "nr")
        | dict(
            bias_ptr=p.bias,
            seed_ptr=mask.seed,
            threshold=mask.threshold,
            rescale=mask.rescale,
            M=z.shape[0],
            N=b.shape[0],
            R=b.shape[1],
            Z_IN_EIGHTS=in_eights(z),
            B_IN_EIGHTS=in_eights(b),
            MASK_PRODUCT=mask.seed is not None,
            GROUP_M=GROUP_M,
        )
    )
