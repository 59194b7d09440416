"""Dropout masks a few rows at a time, from a kernel where one can make them and has proved itself, else from torch.

A mask made of torch operators takes 130 launches for each 16 million elements, the kernel one. The bits are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import first_use, triton
from .dropout import Dropout


def chunks(dropout: Dropout, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """:meth:`Dropout.chunks`."""
    return dropout.chunks(x, None if x.is_cpu or first_use.objection_to_masks(x.device) else keep_bits)


def keep_bits(dropout: Dropout, first_row: int, rows: int, columns: int) -> Tensor:
    """int16 [rows, columns] for :func:`kept`, made by one launch."""
    from ..kernels import philox

    bits = torch.empty(rows, columns, dtype=torch.int16, device=dropout.seed.device)
    if bits.numel():
        with triton.device_of(bits):
            philox.launch(dropout, bits, first_row).run()
    return bits
