"""What the base kernels share: where a tile lies, how it is loaded, and the low-rank product."""

import triton
import triton.language as tl


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
