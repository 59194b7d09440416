"""What a backend is asked: the facts about one call that decide whether and how it can run; and how z lies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_HALF = frozenset({torch.bfloat16, torch.float16})
_EIGHT = "a multiple of 8 elements"


class Request(NamedTuple):
    """One call of a verb, hashable, without its data. M is the token count, R the rank.

    For ``lora_matmul`` K and N are the contracted and the produced width (in the backward these are out_features and
    in_features); for ``rank_grad`` they are the two sides of the gradient. ``unaligned`` says in words which 16-bit
    operand the copy engine of a GPU cannot read.
    """

    verb: str
    device: torch.device
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    m: int
    k: int
    n: int
    r: int
    dropout: bool
    unaligned: str | None = None

    @staticmethod
    def of_lora_matmul(x: Tensor, w: Tensor | None, a: Tensor, b: Tensor, dropout: bool) -> Request:
        """The request of ``lora_matmul`` on these tensors."""
        (m, k), n, dtype = x.shape, b.shape[0], x.dtype
        unaligned = None
        if dtype in _HALF:
            # On the way of every call: one look at the numbers, and words only where something is wrong.
            row, step = x.stride()
            if w is None:
                if step != 1 or row & 7 or row < k or x.data_ptr() & 15:
                    unaligned = _unaligned("x", x)
            else:
                w_row, w_step = w.stride()
                w_columns = k
                if w_step != 1:
                    # The transposed view of a matrix: its rows are that matrix's.
                    w_row, w_step, w_columns = w_step, w_row, n
                wrong_strides = step != 1 or w_step != 1 or (row | w_row | n) & 7 or row < k or w_row < w_columns
                if wrong_strides or (x.data_ptr() | w.data_ptr()) & 15:
                    w_rows = _unaligned("w", w) if w.stride(1) == 1 else _unaligned("wᵀ", w.T)
                    unaligned = _unaligned("x", x) or w_rows or f"N = {n}: rows of y must start on 16 bytes, {_EIGHT}"
        return Request("lora_matmul", x.device, dtype, a.dtype, m, k, n, a.shape[0], dropout, unaligned)

    @staticmethod
    def of_rank_grad(p: Tensor, q: Tensor, dtype: torch.dtype, dropout: bool) -> Request:
        """The request of ``rank_grad`` on these tensors."""
        k, (m, n) = p.shape[1], q.shape
        unaligned = None
        if q.dtype in _HALF:
            p_row, p_step = p.stride()
            q_row, q_step = q.stride()
            wrong_strides = p_step != 1 or q_step != 1 or (p_row | q_row) & 7 or p_row < k or q_row < n
            if wrong_strides or (p.data_ptr() | q.data_ptr()) & 15:
                unaligned = _unaligned("p", p) or _unaligned("q", q)
        return Request("rank_grad", q.device, q.dtype, dtype, m, k, n, min(k, n), dropout, unaligned)


def new_middle(x: Tensor, r: int) -> Tensor:
    """Memory for z [M, R]. Rows of 16-bit elements start on 16 bytes, so that tensor copies can read them.

    That holds on every device and backend: torch.compile and its caches on disk are told before one is chosen.
    """
    m, dtype = x.shape[0], x.dtype
    padding = -r % 8
    if padding == 0 or dtype not in _HALF:
        return torch.empty((m, r), dtype=dtype, device=x.device)
    return torch.empty((m, r + padding), dtype=dtype, device=x.device)[:, :r]


def _unaligned(name: str, rows: Tensor) -> str | None:
    """Why tensor copies cannot read a matrix of 16-bit elements by its rows, or None."""
    row, step = rows.stride()
    if step != 1 or row & 7 or row < rows.shape[1]:
        return f"{name} has strides {(row, step)}: rows must be contiguous and start on 16 bytes, {_EIGHT}"
    if rows.data_ptr() & 15:
        return f"{name} starts at an address that is no multiple of 16 bytes: pass a copy of it"
    return None
