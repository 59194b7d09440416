"""What a backend is asked: the facts about one call that decide whether and how it can run."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Request(NamedTuple):
    """One call of a verb, hashable, without its data. M is the token count, R the rank.

    For ``lora_matmul`` K and N are the contracted and the produced width (in the backward these are out_features and
    in_features); for ``rank_grad`` they are the two sides of the gradient.
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

    @staticmethod
    def of_lora_matmul(x: Tensor, a: Tensor, b: Tensor, dropout: bool) -> Request:
        """The request of ``lora_matmul`` on these tensors."""
        m, k = x.shape
        return Request("lora_matmul", x.device, x.dtype, a.dtype, m, k, b.shape[0], a.shape[0], dropout)

    @staticmethod
    def of_rank_grad(p: Tensor, q: Tensor, dtype: torch.dtype, dropout: bool) -> Request:
        """The request of ``rank_grad`` on these tensors."""
        k, n = p.shape[1], q.shape[1]
        return Request("rank_grad", q.device, q.dtype, dtype, q.shape[0], k, n, min(k, n), dropout)
