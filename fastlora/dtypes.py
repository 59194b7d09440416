"""The dtypes of floating-point operands, and what sums of them are made in."""

from __future__ import annotations

import torch

HALF = (torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)
# What the operands of a product can be.
FLOATING = (*HALF, *WIDE)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """What sums are made in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
