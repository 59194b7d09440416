"""Where a tile lies and how it is loaded: shared by the kernels."""

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
