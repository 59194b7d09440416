"""Dropout masks applied: by the C++ code on a CPU, by a kernel on a GPU where one has proved itself, else by torch.

A mask made of torch operators takes 130 launches for each 16 million elements, the kernel one. The bits are the same.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import dropout_cpu, first_use, triton
from .dropout import Dropout, draw_seed

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def kept(dropout: Dropout, x: Tensor, first_row: int = 0) -> Tensor:
    """keep ⊙ x as a new tensor, x [rows, C] the rows from ``first_row`` on: no factor 1 / (1 - p)."""
    return _kept(dropout, x, first_row, None)


def kept_(dropout: Dropout, x: Tensor, first_row: int = 0) -> Tensor:
    """The same in place; the rows of x are contiguous."""
    return _kept(dropout, x, first_row, x)


def kept_both(dropout: Dropout, x: Tensor, product: Tensor, first_row: int = 0) -> Tensor:
    """:func:`kept` of x, and :func:`kept_` of a product of its shape and dtype, by bits that are made once."""
    return _kept(dropout, x, first_row, None, product)


def factors(p: float, x: Tensor) -> Tensor:
    """What D multiplies x [M, C] on a CPU by, 0 or 1 / (1 - p), in the dtype of x, by a seed that it draws."""
    seed = draw_seed(x.device)
    threshold, row = _factor_row(p, x.shape[1], x.dtype)
    made = dropout_cpu.masked_row(row, x.shape[0], seed, threshold)
    return kept_(Dropout(p, seed), row.repeat(x.shape[0], 1)) if made is None else made


@functools.lru_cache(maxsize=256)
def _factor_row(p: float, columns: int, dtype: torch.dtype) -> tuple[int, Tensor]:
    # Kept, because with cold caches making them takes as long as the mask of a few tokens.
    dropout = Dropout(p, torch.empty(0))
    return dropout.threshold, torch.full((columns,), dropout.rescale, dtype=dtype, device="cpu")


def _kept(dropout: Dropout, x: Tensor, first_row: int, out: Tensor | None, beside: Tensor | None = None) -> Tensor:
    if x.is_cpu:
        masked = dropout_cpu.masked(x, dropout.seed, dropout.threshold, first_row, out, beside)
        if masked is not None:
            return masked
    by_kernel = not x.is_cpu and first_use.objection_to_masks(x.device) is None
    make = keep_bits if by_kernel else Dropout.bits
    # On bits, which a CPU does ten times faster than ``where``.
    bits = _BITS[x.element_size()]
    mask = make(dropout, first_row, *x.shape).to(bits)
    if beside is not None:
        beside.view(bits).bitwise_and_(mask)
    words = x.view(bits)
    return (words.bitwise_and(mask) if out is None else words.bitwise_and_(mask)).view(x.dtype)


def keep_bits(dropout: Dropout, first_row: int, rows: int, columns: int) -> Tensor:
    """:meth:`Dropout.bits`, made by one launch."""
    from ..kernels import philox

    bits = torch.empty(rows, columns, dtype=torch.int16, device=dropout.seed.device)
    if bits.numel():
        with triton.device_of(bits):
            philox.launch(dropout, bits, first_row).run()
    return bits
