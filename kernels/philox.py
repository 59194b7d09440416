"""The dropout mask's bits in Triton: the same as ``fastlora/backends/dropout.py``, whose docstring defines them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

_ROWS, _COLUMNS = 32, 128


class Mask(NamedTuple):
    """The arguments from which a kernel makes a mask anew; without dropout ``seed`` is None and nothing is masked.

    Attributes:
        seed: (key, offset) int64 [2] on the device.
        threshold: the smallest signed 16-bit lane that keeps.
        rescale: 1 / (1 - p).
    """

    seed: Tensor | None
    threshold: int
    rescale: float

    @staticmethod
    def of(dropout: Any) -> Mask:
        """The mask of a ``Dropout``, or that of None."""
        return Mask(None, 0, 1.0) if dropout is None else Mask(dropout.seed, dropout.threshold, dropout.rescale)


@triton.jit
def keep_mask(seed_ptr, first_row, first_column, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """bool [BLOCK_ROWS, BLOCK_COLUMNS]; ``first_column`` is a multiple of 8. One Philox call decides 8 columns."""
    key = tl.load(seed_ptr)
    offset = tl.load(seed_ptr + 1)
    # [1, calls] and [rows, 1]: the first rounds run on one axis only, the full tile starts in the third.
    call = (first_column // 8 + tl.arange(0, BLOCK_COLUMNS // 8))[None, :]
    row = (first_row + tl.arange(0, BLOCK_ROWS))[:, None]
    w0, w1, w2, w3 = tl.philox(key, call, row, offset.to(tl.int32), (offset >> 32).to(tl.int32), 7)
    # word = 2 i + j, half h: joining (0, 2) with (1, 3), then low with high, leaves [rows, calls, i, j, h]: lane order.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.int32, bitcast=True)
    lanes = tl.join((words << 16) >> 16, words >> 16)
    return tl.reshape(lanes, (BLOCK_ROWS, BLOCK_COLUMNS)) >= threshold


@triton.jit(do_not_specialize=["threshold", "first_row", "ROWS"])
def _keep_bits_kernel(
    seed_ptr,
    bits_ptr,
    threshold,
    first_row,
    ROWS,
    COLUMNS,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    block_row = tl.program_id(0) * BLOCK_ROWS
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    keep = keep_mask(seed_ptr, first_row + block_row, first_column, threshold, BLOCK_ROWS, BLOCK_COLUMNS)
    row = block_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    bits_ptrs = bits_ptr + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    tl.store(bits_ptrs, -keep.to(tl.int16), mask=inside)


def launch(dropout: Any, bits: Tensor, first_row: int) -> Launch:
    """The launch that fills bits, contiguous int16 [rows, columns], for the rows of the mask from ``first_row`` on.

    All bits of an element are set where it is kept, none where it is dropped.
    """
    rows, columns = bits.shape
    mask = Mask.of(dropout)
    return Launch(
        _keep_bits_kernel,
        (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS)),
        dict(
            seed_ptr=mask.seed,
            bits_ptr=bits,
            threshold=mask.threshold,
            first_row=first_row,
            ROWS=rows,
            COLUMNS=columns,
            BLOCK_ROWS=_ROWS,
            BLOCK_COLUMNS=_COLUMNS,
        ),
        dict(num_warps=4, num_stages=1),
    )
