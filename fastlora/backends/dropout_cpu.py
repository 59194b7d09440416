"""The dropout mask applied on a CPU by ``csrc/dropout_cpu.cpp``, where an install found a C++ compiler to build it.

Ten times faster than the same bits from torch's operators, and three times faster than ``F.dropout``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 2
LIBRARY = Path(__file__).parent.with_name("libfastlora_cpu.so")

# Fewer elements are one thread's in any case.
_ONE_THREAD = 1 << 18


def masked(
    x: Tensor, seed: Tensor, threshold: int, first_row: int, out: Tensor | None, beside: Tensor | None = None
) -> Tensor | None:
    """keep ⊙ x of x [rows, columns] on a CPU, in ``out`` or a new tensor; None where there is no library.

    Args:
        x: any strides, elements of 2, 4 or 8 bytes.
        seed: int64 [2] on the CPU.
        threshold: the smallest signed 16-bit lane that keeps.
        first_row: the row of the mask that is for the first of x.
        out: [rows, columns] in the dtype of x, rows contiguous, x itself or no memory of x.
        beside: another [rows, columns] in the dtype of x, rows contiguous, masked in place by the same bits.
    """
    mask = _mask()
    if mask is None:
        return None
    if x.stride(1) != 1:
        x = x.contiguous()
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, columns = x.shape
    threads = 1 if rows * columns <= _ONE_THREAD else torch.get_num_threads()
    also = (None, 0) if beside is None else (beside.data_ptr(), beside.stride(0))
    mask(
        seed.data_ptr(), threshold, first_row, rows, columns, x.element_size(),
        x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), *also, *also, threads,
    )  # fmt: skip
    return out


def masked_row(row: Tensor, rows: int, seed: Tensor, threshold: int) -> Tensor | None:
    """keep ⊙ a row [columns] for each of so many rows, contiguous, by one thread; None where there is no library."""
    mask = _mask()
    if mask is None:
        return None
    columns = row.numel()
    out = row.new_empty((rows, columns))
    mask(
        seed.data_ptr(), threshold, 0, rows, columns, row.element_size(),
        row.data_ptr(), 0, out.data_ptr(), columns, None, 0, None, 0, 1,
    )  # fmt: skip
    return out


def is_built() -> bool:
    """Whether there is a library of this ABI."""
    return _mask() is not None


def forget() -> None:
    """Looks for the library again at the next call."""
    _mask.cache_clear()


@functools.cache
def _mask() -> Callable[..., None] | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
        if library.fastlora_cpu_abi() != ABI:
            return None
        mask: Any = library.fastlora_cpu_mask
    except (OSError, AttributeError):
        return None
    i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    mask.argtypes = (pointer, i32, i64, i64, i64, i32, *4 * (pointer, i64), i32)
    mask.restype = None
    return mask  # type: ignore[no-any-return]
