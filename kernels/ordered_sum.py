"""Partial sums added up in order: out = factor · sum of partial over its splits.

    for each block of out:
        for split in order:  total += partial[split]
        out = factor · total

Operands: partial [splits, rows, columns] in fp32; out [rows, columns] in any dtype, rounded once, its rows contiguous.
Bytes: one read of partial, one write of out. One launch adds up two results where two are waiting. The second launch of
every kernel that splits its sum among CTAs: the same bits run after run, which atomics would not give.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

_BLOCK = 512


class Partial(NamedTuple):
    """A result that is still to be added up: partial [splits, rows, columns] and where its sum goes."""

    partial: Tensor
    out: Tensor
    factor: float = 1.0


@triton.jit
def _add_up(block, partial_ptr, out_ptr, size, splits, columns, stride_row, factor, BLOCK: tl.constexpr):
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in tl.range(0, splits, 1, loop_unroll_factor=4):
        total += tl.load(partial_ptr + i, mask=inside, other=0.0)
        partial_ptr += size
    row = i // columns
    out_ptrs = out_ptr + row.to(tl.int64) * stride_row + (i - row * columns)
    tl.store(out_ptrs, (total * factor).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size", "splits", "columns", "size_2", "splits_2", "columns_2", "blocks"])
def _sum_splits_kernel(
    partial_ptr,
    out_ptr,
    size,
    splits,
    columns,
    stride_row,
    factor,
    partial_2_ptr,
    out_2_ptr,
    size_2,
    splits_2,
    columns_2,
    stride_row_2,
    factor_2,
    blocks,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    if partial_2_ptr is None:
        _add_up(block, partial_ptr, out_ptr, size, splits, columns, stride_row, factor, BLOCK)
    else:
        if block < blocks:
            _add_up(block, partial_ptr, out_ptr, size, splits, columns, stride_row, factor, BLOCK)
        else:
            _add_up(
                block - blocks, partial_2_ptr, out_2_ptr, size_2, splits_2, columns_2, stride_row_2, factor_2, BLOCK
            )


def launch(first: Partial, second: Partial | None = None) -> Launch:
    """The launch that adds up one result or two; each has fewer than 2^31 elements."""
    blocks = triton.cdiv(first.out.numel(), _BLOCK)
    more = 0 if second is None else triton.cdiv(second.out.numel(), _BLOCK)
    return Launch(
        _sum_splits_kernel,
        (blocks + more,),
        _arguments(first, "") | _arguments(second, "_2") | dict(blocks=blocks, BLOCK=_BLOCK),
        dict(num_warps=4, num_stages=1),
    )


def _arguments(sum_: Partial | None, suffix: str) -> dict[str, object]:
    names = ("size", "splits", "columns", "stride_row", "factor")
    values: tuple[object, ...] = (0, 0, 1, 0, 1.0)
    partial = out = None
    if sum_ is not None:
        partial, out, factor = sum_
        values = (out.numel(), partial.shape[0], out.shape[1], out.stride(0), factor)
    return {f"partial{suffix}_ptr": partial, f"out{suffix}_ptr": out} | {
        f"{name}{suffix}": value for name, value in zip(names, values, strict=True)
    }
