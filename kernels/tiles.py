"""The tile table, and how much shared memory a row of it may take.

Rows are choices by arithmetic (accumulator registers, shared memory, waves), not yet by measurement; what has been
measured stands in benchmarks/HARDWARE.md. ``tests/kernels/compile_gate.py`` compiles every row for every architecture
it is meant for.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# An architecture is a number: 90 for sm_90, and for AMD the hexadecimal digits of its name: 0x942 for gfx942.
_FIRST_AMD, _FIRST_WAVE32 = 0x900, 0x1000

# Bytes of shared memory one CTA may have (CUDA C++ Programming Guide, technical specifications; AMD's instruction set
# manuals: the LDS of a workgroup).
SHARED_MEMORY = {
    80: 163 << 10,
    86: 99 << 10,
    87: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    103: 227 << 10,
    120: 99 << 10,
    121: 99 << 10,
    0x942: 64 << 10,
    0x950: 160 << 10,
    0x1100: 64 << 10,
}

# Multiprocessors where there is no GPU to ask: an H100's.
DEFAULT_SMS = 132


class Tile(NamedTuple):
    """rows × columns of one fp32 accumulator, and the depth of a trip of its loop.

    lora_matmul: rows of M, columns of N, depth of K. Its middle z: M, R, K. rank_update: M, N, R. rank_grad: R, C, M.
    middle_and_grad: R, N, M.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """Compiler options of this row."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# The pointer kernel, largest first. "large" is for the GPUs whose matrix instructions read shared memory; "small" for
# those that hold operands in registers too, and have 99 KiB at the least; "ragged" for strides that no vector load can
# follow, where every element holds an address. "wave32" is AMD's gfx11, whose fp32 products take twice the registers.
PORTABLE = {
    "large": (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 3)),
    "small": (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 4), Tile(64, 64, 64, 4, 3)),
    "tf32": (Tile(128, 128, 32, 8, 2), Tile(64, 64, 32, 4, 3)),
    "ieee": (Tile(64, 64, 32, 4, 2),),
    "ieee_wave32": (Tile(64, 64, 16, 8, 2),),
    "ragged": (Tile(64, 64, 16, 4, 2),),
}

# The TMA kernels, largest first. sm_120 has TMA too, but little shared memory, and spills there: it stays portable.
TMA = (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 8, 4))
TMA_CAPABILITIES = (90, 100, 103)

# Accumulator registers a thread may hold; with more of them ptxas spills at 255 (seen in the compile gate).
_ACCUMULATOR_BUDGET = 160

# Accumulator columns to leave free where z is loaded in eights or one by one, because its rank is no multiple of 16.
SCALAR_LOADS = 128

# Row blocks that walk the columns together, so that their w stays in L2.
GROUP_M = 8

# What a row or a column of a tile costs beside its products, in products: half of the time in which the L2 delivers
# its 2 bytes, at 64 bytes a clock, while the SM makes 2048 products a clock.
_OPERAND_COST = 32


@functools.cache
def sms(device: torch.device) -> int:
    """A device's streaming multiprocessors, or compute units."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else DEFAULT_SMS


def matmul_tile(rows: tuple[Tile, ...], m: int, n: int, sms: int = DEFAULT_SMS) -> Tile:
    """The row with which ``sms`` multiprocessors are soonest done with an [m, n] output; of equals the first.

    The tiles come in waves of ``sms``, the last of which takes as long as the others. A tile takes the time of its
    products and, in part, of its operands' loads, without which the smallest tile would nearly always be best.
    """

    def time(tile: Tile) -> int:
        tiles = -(-m // tile.rows) * -(-n // tile.columns)
        return -(-tiles // sms) * (tile.rows * tile.columns + _OPERAND_COST * (tile.rows + tile.columns))

    return min(rows, key=time)


def portable_rows(capability: int, kind: str | None, masked: bool) -> tuple[Tile, ...]:
    """Rows of the pointer kernel.

    ``capability`` is an architecture's number, AMD's too. ``kind`` is "ragged", or Triton's ``input_precision`` for
    fp32 operands, or None for aligned 16-bit ones; ``masked`` says that the product is, whose Philox words take half an
    accumulator.
    """
    if kind == "ieee" and _is_wave32(capability):
        kind = "ieee_wave32"
    rows = PORTABLE[kind or ("large" if capability in TMA_CAPABILITIES else "small")]
    return tuple(tile for tile in rows if _fits(tile, tile.columns // 2 if masked else 0))


def tma_rows(extra_columns: int = 0) -> tuple[Tile, ...]:
    """Rows of the TMA kernels that have registers for ``extra_columns`` more accumulator columns."""
    return tuple(tile for tile in TMA if _fits(tile, extra_columns))


def _fits(tile: Tile, extra_columns: int) -> bool:
    return tile.rows * (tile.columns + extra_columns) <= 32 * tile.warps * _ACCUMULATOR_BUDGET


def middle_tile(r: int, itemsize: int, adapter_itemsize: int, capability: int) -> Tile:
    """The row for z [M, r]: 32 tokens a CTA.

    With 32 rows the product is mma.sync, not wgmma: the masked operand comes from registers, which wgmma must not be
    given, since ptxas before 13.3 may reuse those registers too early.
    """
    columns = min(padded_rank(r), 128 if itemsize == 2 else 64)
    if itemsize != 2:
        return Tile(32, columns, 32 if columns <= 16 else 16, 4, 4)
    if is_amd(capability):
        return Tile(32, columns, 64 if columns <= 32 else 32, 256 // warp_size(capability), 2)
    return Tile(32, columns, 128 if columns <= 32 else 64, 8, 3 if columns * adapter_itemsize > 256 else 4)


def rank_update_tile(r: int, itemsize: int) -> Tile:
    """The row for D(z bᵀ) [M, N]: M, N, R. Few registers and many CTAs, and 32 rows, as in the middle."""
    if itemsize != 2:
        return Tile(32, 64, min(padded_rank(r), 32), 4, 1)
    return Tile(32, 128, min(padded_rank(r), 64), 8 if padded_rank(r) == 16 else 4, 1)


def group_update_tile(r: int, itemsize: int, adapter_itemsize: int) -> Tile:
    """The row for Σ D'(t a) [M, K]: M, K, R. Smaller than rank_update's, since it has one accumulator more."""
    if itemsize != 2:
        return Tile(32, 32, 16, 4, 1)
    return Tile(32, 128, rank_trip(r, adapter_itemsize), 8, 1)


def middle_and_grad_tile(r: int, itemsize: int, capability: int) -> Tile:
    """The row for (t, db) from one read of dy: R, N, M."""
    rows = padded_rank(r)
    if is_amd(capability):
        return (
            Tile(rows, 128 if warp_size(capability) == 64 else 64, 32, 4, 2)
            if itemsize == 2
            else Tile(rows, 64, 16, 8, 2)
        )
    if itemsize != 2:
        return Tile(rows, 64, 32, 4, 2)
    if rows > 16:
        return Tile(rows, 256, 32, 8, 4)
    return Tile(rows, 256, 64, 8, 4 if shared_memory(capability) >= 128 << 10 else 3)


def rank_grad_tile(r: int, precision: str | None, capability: int) -> Tile:
    """The row for an adapter gradient with narrow side r; ``precision`` is Triton's for fp32 operands, else None."""
    warps = 8 if _is_wave32(capability) and (precision == "ieee" or r > 32) else 4
    if precision == "ieee":
        return Tile(16, 64, 32, warps, 2)
    return Tile(min(padded_rank(r), 64), 64, 32 if precision == "tf32" else 64, warps, 3)


# CTAs that fill the largest GPUs about once, and about twice: what kernels aim at that split their sum among CTAs.
# Constants, so that sums are the same on every GPU.
FULL, FULL_TWICE = 132, 264


def split(length: int, depth: int, blocks: int, ctas: int) -> tuple[int, int]:
    """Into how many parts a sum over ``length`` goes so that ``blocks`` of them are ``ctas`` CTAs, and their length.

    A part is a multiple of the depth of a trip, and four trips at the least.
    """
    parts = max(1, min(ctas // blocks, -(-length // (4 * depth))))
    longest = -(-length // parts)
    part = -(-longest // depth) * depth
    return -(-length // part), part


def rank_trip(r: int, itemsize: int) -> int:
    """Depth of one trip of the low-rank product: at most 32, and 16 for fp32 adapters, whose cast holds registers."""
    return min(padded_rank(r), 32 if itemsize == 2 else 16)


def padded_rank(r: int) -> int:
    """The rank inside a kernel: a power of two, at least the 16 that the matrix instructions need."""
    return max(16, 1 << (r - 1).bit_length())


def is_amd(capability: int) -> bool:
    """Whether an architecture's number is that of an AMD one."""
    return capability >= _FIRST_AMD


def amd_capability(name: str) -> int:
    """The number of an AMD architecture by the name that ROCm gives it: 0x942 for "gfx942:sramecc+:xnack-"."""
    return int(name.partition(":")[0].removeprefix("gfx"), 16)


def warp_size(capability: int) -> int:
    """Threads of a warp: AMD's are 64 wide before gfx10."""
    return 64 if is_amd(capability) and capability < _FIRST_WAVE32 else 32


def _is_wave32(capability: int) -> bool:
    return is_amd(capability) and warp_size(capability) == 32


def architecture(capability: int) -> str:
    """The name of an architecture: sm_90, gfx942."""
    return f"gfx{capability:x}" if is_amd(capability) else f"sm_{capability}"


def shared_memory(capability: int) -> int:
    """Bytes of shared memory a CTA may have; an architecture not in the table gets the smallest of all."""
    return SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values()))
