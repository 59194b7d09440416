"""The dropout mask's bits in Triton: the same as ``fastlora/backends/dropout.py``, whose docstring defines them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


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
