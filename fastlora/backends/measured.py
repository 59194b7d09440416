"""The tables that ``auto`` reads: which kernel is proven on which GPU.

A proof is one verb of one kernel, by its own name, on one architecture in one dtype; each has its line in
benchmarks/HARDWARE.md, and a test holds the two together.
"""

from __future__ import annotations

from typing import NamedTuple


class Proof(NamedTuple):
    """One kernel that ran on a GPU and passed every check: compute capability as a number (90), dtype by its name."""

    verb: str
    kernel: str
    capability: int
    dtype: str


PROVEN: frozenset[Proof] = frozenset()
