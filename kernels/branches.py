"""Up to four branches in one launch: where the columns of each lie, its arguments, and how a program picks its own.

z and t of a group are the columns of one matrix [M, C]. Those of a branch begin at a multiple of eight, so that rows of
16-bit elements start on 16 bytes; what lies between two branches is never read.

    columns   0 … rank_0    begin_1 … begin_1 + rank_1    begin_2 …    C
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .philox import Mask

MOST = 4
# A 16-bit lane is no smaller: the mask of a branch that drops nothing among others that do.
_KEEPS_ALL = -(1 << 15)
# Integers of which Triton is to compile no kernel of their own.
ANY_VALUE = [*(f"{name}_{i}" for name in ("rank", "threshold") for i in range(MOST)), "begin_1", "begin_2", "begin_3"]


def parts(dtypes: Sequence[Any]) -> Iterator[slice]:
    """The branches that go into one launch, by the dtypes of their adapters: at most four neighbours of one dtype."""
    start = 0
    for i in range(1, len(dtypes) + 1):
        if i == len(dtypes) or i - start == MOST or dtypes[i] is not dtypes[start]:
            yield slice(start, i)
            start = i


def begins(ranks: Sequence[int]) -> tuple[list[int], int]:
    """The first column of each branch, and the number of all columns."""
    found, width = [], 0
    for rank in ranks:
        found.append(width)
        width += -(-rank // 8) * 8
    return found, width


def views(columns: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """The z or t of each branch."""
    return [columns[:, begin : begin + rank] for begin, rank in zip(begins(ranks)[0], ranks, strict=True)]


def ranks_of(products: Sequence[Any]) -> list[int]:
    """The rank of each product."""
    return [p.a.shape[0] for p in products]


def is_masked(products: Sequence[Any]) -> bool:
    """Whether any of the products drops."""
    return any(p.seed is not None for p in products)


def in_eights(ranks: Sequence[int]) -> bool:
    """Whether all branches may be read eight columns at a time."""
    return not any(rank % 8 for rank in ranks)


def arguments(products: Sequence[Any], factors: Sequence[float]) -> dict[str, Any]:
    """The arguments of two to four branches by name; one that is not there has no columns, and repeats the first.

    Args:
        products: of one x; their a [R, K] contiguous, of one dtype.
        factors: the factor on each branch's result.
    """
    first, width = begins(ranks_of(products))
    masks = [Mask.of(p.mask_x) for p in products]
    seed = next((mask.seed for mask in masks if mask.seed is not None), None)
    found: dict[str, Any] = {}
    for i in range(MOST):
        there = i < len(products)
        mask = masks[i] if there else Mask.of(None)
        found |= {
            f"a_{i}_ptr": products[i if there else 0].a,
            f"seed_{i}_ptr": seed if mask.seed is None else mask.seed,
            f"threshold_{i}": _KEEPS_ALL if mask.seed is None else mask.threshold,
            f"factor_{i}": factors[i] if there else 1.0,
            f"rank_{i}": products[i].a.shape[0] if there else 0,
        }
        if i:
            found[f"begin_{i}"] = first[i] if there else width
    return found


def blocks(products: Sequence[Any], rows: int) -> int:
    """Blocks of so many columns, each of one branch alone."""
    return sum(triton.cdiv(rank, rows) for rank in ranks_of(products))


@triton.jit
def of_branch(branch, of_0, of_1, of_2, of_3):
    """What belongs to a branch, or to each of a tensor of branches."""
    return tl.where(branch < 2, tl.where(branch == 0, of_0, of_1), tl.where(branch == 2, of_2, of_3))


@triton.jit
def branch_at(column, begin_1, begin_2, begin_3):
    """The branch whose columns these are."""
    return (column >= begin_1).to(tl.int32) + (column >= begin_2).to(tl.int32) + (column >= begin_3).to(tl.int32)


@triton.jit
def branch_of_block(block, rank_0, rank_1, rank_2, rank_3, BLOCK_R: tl.constexpr):
    """The branch of a block of ranks, and which of that branch's blocks it is."""
    first_1 = tl.cdiv(rank_0, BLOCK_R)
    first_2 = first_1 + tl.cdiv(rank_1, BLOCK_R)
    first_3 = first_2 + tl.cdiv(rank_2, BLOCK_R)
    branch = branch_at(block, first_1, first_2, first_3)
    return branch, block - of_branch(branch, 0, first_1, first_2, first_3)
