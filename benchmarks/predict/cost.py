"""Predicts the cost of a LoRA layer, or of several of one input: FLOPs, bytes and time of each design on a device.

    time of a kernel = max(FLOPs / P, bytes / β)          P, β: what the device sustains
    time of a design = sum over its kernels
    ratio            = over the frozen layer's time: x wᵀ in the forward, dy w in the backward, both in a step

A kernel reads each operand from memory once and writes each result once, z, t, a, b and their gradients included, and
adapters have the base's dtype. Left out: launch gaps; whole waves of tiles (where a schedule is simulated, the plain
GEMM has them too); operands that stay in L2 from one kernel to the next; a GEMM that falls short of P; the arithmetic
of dropout's masks; bias; the host. Tile sizes are those of the kernels themselves: kernels/tiles.py, csrc/schedule.cuh.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple

from fastlora.kernels import tiles

SCHEDULE = Path(__file__).parents[2] / "csrc" / "schedule.cuh"


class Device(NamedTuple):
    """The rates a GPU sustains: dense FLOP/s by dtype, bytes/s of its memory; ``basis`` is their source."""

    name: str
    basis: str
    flops: Mapping[str, float]
    bytes_per_s: float
    sms: int


class Kernel(NamedTuple):
    """One launch. ``stretch`` is the factor of a simulated schedule on its arithmetic; 1 where none is simulated."""

    flops: float
    bytes: float
    stretch: float = 1.0

    def seconds(self, device: Device, dtype: str) -> float:
        """The longer of arithmetic and traffic."""
        return max(self.stretch * self.flops / device.flops[dtype], self.bytes / device.bytes_per_s)


class Problem(NamedTuple):
    """The sizes of y = x wᵀ + z bᵀ; in the backward those of dx = dy w + t a, whose K and N are turned."""

    m: int
    k: int
    n: int
    r: int
    itemsize: int
    sms: int

    @property
    def turned(self) -> Problem:
        """The other direction's."""
        return self._replace(k=self.n, n=self.k)

    @property
    def trip(self) -> int:
        """The rank as matrix instructions see it."""
        return 16 * ceil(self.r / 16)

    def moved(self, *, x: int = 0, w: int = 0, y: int = 0, z: int = 0, a: int = 0, b: int = 0) -> int:
        """Bytes of so many reads and writes of each operand, or of one of its shape."""
        m, k, n, r = self.m, self.k, self.n, self.r
        return self.itemsize * (x * m * k + w * n * k + y * m * n + z * m * r + a * r * k + b * n * r)


def gemm(p: Problem) -> Kernel:
    """x wᵀ."""
    return Kernel(2.0 * p.m * p.k * p.n, p.moved(x=1, w=1, y=1))


def added(p: Problem) -> Kernel:
    """x wᵀ added to y, which is read and written."""
    return Kernel(2.0 * p.m * p.k * p.n, p.moved(x=1, w=1, y=2))


def middle(p: Problem) -> Kernel:
    """z = x aᵀ."""
    return Kernel(2.0 * p.m * p.k * p.r, p.moved(x=1, a=1, z=1))


def product(p: Problem, touches: int) -> Kernel:
    """z bᵀ as a kernel of its own: y written (1), or read and written (2)."""
    return Kernel(2.0 * p.m * p.n * p.r, p.moved(z=1, b=1, y=touches))


def sweep(p: Problem, touches: int) -> Kernel:
    """An elementwise kernel: so many reads and writes of y; its arithmetic never counts."""
    return Kernel(0.0, p.moved(y=touches))


def extended(p: Problem) -> Kernel:
    """x wᵀ + z bᵀ: the K loop is R longer."""
    return Kernel(gemm(p).flops + 2.0 * p.m * p.n * p.trip, p.moved(x=1, w=1, y=1, z=1, b=1))


def rank_grad(p: Problem) -> Kernel:
    """da = tᵀ x; turned, db = dyᵀ z."""
    return Kernel(2.0 * p.m * p.k * p.r, p.moved(x=1, z=1, a=1))


# Tests hold grids and bytes of the kernels to the functions below.
def rank_blocks(p: Problem) -> int:
    """Counts the parts of the rank of Triton's rank_grad; they are neighbours, and all but one find x in the L2."""
    return ceil(p.r / tiles.rank_grad_tile(p.r, None, 90).rows)


def grad_splits(p: Problem) -> int:
    """Counts the splits of M into which Triton's rank_grad divides da."""
    tile = tiles.rank_grad_tile(p.r, None, 90)
    return tiles.split(p.m, tile.depth, ceil(p.k / tile.columns) * rank_blocks(p), tiles.FULL_TWICE)[0]


def rank_grad_triton(p: Problem) -> list[Kernel]:
    """da with its fp32 partial sums: written by one kernel, read and added up by another."""
    splits, flops = grad_splits(p), rank_grad(p).flops
    if splits == 1:
        return [Kernel(flops, p.moved(x=1, z=1, a=1))]
    partial = 4.0 * splits * p.r * p.k
    return [Kernel(flops, p.moved(x=1, z=1) + partial), Kernel(0.0, partial + p.moved(a=1))]


def middle_triton(p: Problem) -> list[Kernel]:
    """z as Triton makes it: K is split where few rows leave the GPU idle, and a second kernel adds up."""
    tile = tiles.middle_tile(p.r, p.itemsize, p.itemsize, 90)
    blocks = ceil(p.m / tile.rows) * ceil(p.r / tile.columns)
    splits, _ = tiles.split(p.k, tile.depth, blocks, tiles.FULL_TWICE)
    if splits == 1:
        return [middle(p)]
    partial = 4.0 * splits * p.m * p.r
    return [Kernel(middle(p).flops, p.moved(x=1, a=1) + partial), Kernel(0.0, partial + p.moved(z=1))]


def middle_and_grad(p: Problem) -> list[Kernel]:
    """t and db from one read of dy, with partial sums of both; from two reads where those would move more than a read.

    ``p`` is the backward's problem: its x is dy, its K is N.
    """
    if tiles.padded_rank(p.r) <= 32:
        tile = tiles.middle_and_grad_tile(p.r, p.itemsize, 90)
        blocks = ceil(p.k / tile.columns)
        splits, _ = tiles.split(p.m, tile.depth, blocks, tiles.FULL)
        t, db = 4.0 * p.r * p.m * blocks * (blocks > 1), 4.0 * p.r * p.k * splits * (splits > 1)
        if 2 * (t + db) < p.moved(x=1):
            made = (p.moved(z=1) if t else 0, p.moved(a=1) if db else 0)
            last = Kernel(0.0, t + db + sum(made))
            once = Kernel(2 * middle(p).flops, p.moved(x=1, a=2, z=2) - sum(made) + t + db)
            return [once, last] if t or db else [once]
    return [*middle_triton(p), *rank_grad_triton(p)]


def _constant(name: str) -> int:
    """An integer of csrc/schedule.cuh."""
    found = re.search(rf"constexpr \w+ {name} = (\d+);", SCHEDULE.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{SCHEDULE.name}: expected a line `constexpr … {name} = <integer>;`")
    return int(found[1])


# csrc runs clusters of two CTAs on tiles as wide as Triton's largest. z for one block of rows takes this part of a
# tile's time, whatever K, where one SM streams 60 GB/s.
TILE = tiles.TMA[0]
TILE_M, GROUP, CLUSTER, Z_UNIT = _constant("TILE_M"), _constant("GROUP"), 2, 0.39


def z_jobs_makespan(p: Problem) -> float:
    """The end of csrc's z_jobs launch over that of the plain GEMM in the same clusters.

    Jobs that make z, for one unit of rows or for two each, come first; tiles acquire their row's before the last trip.
    """
    clusters, units, columns = p.sms // CLUSTER, ceil(p.m / (CLUSTER * TILE_M)), ceil(p.n / TILE.columns)
    idle = -units * columns % clusters
    run = 2 if idle < units <= 2 * idle else 1
    free, released = [0.0] * clusters, [0.0] * units
    for first in range(0, units, run):
        end = free[0]
        for unit in range(first, min(units, first + run)):
            end = released[unit] = end + Z_UNIT
        heapq.heapreplace(free, end)
    for group in range(0, units, GROUP):
        for _ in range(columns):
            for unit in range(group, min(units, group + GROUP)):
                heapq.heapreplace(free, max(free[0] + 1.0, released[unit]) + p.trip / p.k)
    return max(free) / ceil(units * columns / clusters)


def z_jobs(p: Problem) -> Kernel:
    """y and z in one launch of csrc, which reads x once more, in the plain GEMM's time, stretched as the schedule is.

    Never below its own arithmetic: the waves in which z hides are not counted in the floor.
    """
    flops = gemm(p).flops + 2.0 * p.m * p.trip * (p.k + p.n)
    stretch = max(1.0, z_jobs_makespan(p) * gemm(p).flops / flops)
    return Kernel(flops, p.moved(x=2, w=1, y=1, z=2, a=1, b=1), stretch)


def rank_grad_cuda(p: Problem) -> Kernel:
    """da as csrc makes it: in one kernel, with fp32 partial sums that its last CTA of each 128 columns adds up."""
    splits = max(1, min(p.sms // ceil(p.k / 128), ceil(p.m / 256)))
    splits = ceil(p.m / (64 * ceil(ceil(p.m / splits) / 64)))
    return Kernel(rank_grad(p).flops, p.moved(x=1, z=1, a=1) + 2 * 4.0 * splits * p.k * 8 * ceil(p.r / 8))


def waves(p: Problem) -> int:
    """Counts the tiles of the plain GEMM on the busiest SM."""
    return ceil(ceil(p.m / TILE.rows) * ceil(p.n / TILE.columns) / p.sms)


def in_whole_waves(p: Problem, device: Device, dtype: str, launch_s: float = 2e-6) -> dict[str, float]:
    """Forward over the plain GEMM, both in whole waves, with ``launch_s`` for the serial design's second launch.

    The one definition here that is not the ratio of the table: it adds tiles and launches to it.
    """
    plain = waves(p) * gemm(p._replace(m=TILE.rows, n=TILE.columns)).flops * p.sms / device.flops[dtype]
    skinny = middle(p).seconds(device, dtype) + launch_s
    return {"triton-serial": 1 + p.trip / p.k + skinny / plain, "cuda-z_jobs": z_jobs_makespan(p)}


class Design(NamedTuple):
    """One way to compute the layer: its kernels in the forward, and in the backward given the turned problem too."""

    about: str
    forward: Callable[[Problem], Sequence[Kernel]]
    backward: Callable[[Problem, Problem], Sequence[Kernel]]


def _serial_forward(p: Problem) -> list[Kernel]:
    return [*middle_triton(p), extended(p)]


def _serial_backward(p: Problem, q: Problem) -> list[Kernel]:
    return [*middle_triton(q), extended(q), *rank_grad_triton(p), *rank_grad_triton(q)]


# Kernels of the package under their own names, and what they are compared with.
DESIGNS = {
    "frozen": Design("x wᵀ, dy w: the floor", lambda p: [gemm(p)], lambda p, q: [gemm(q)]),
    "plain": Design(
        "eager PyTorch, PEFT too: y and dx pass through memory for the product, the scale and the sum",
        lambda p: [gemm(p), middle(p), product(p, 1), sweep(p, 2), sweep(p, 3)],
        lambda p, q: [gemm(q), sweep(p, 2), middle(q), rank_grad(q), product(q, 1), rank_grad(p), sweep(q, 3)],
    ),
    "library": Design(
        "the vendor's GEMMs, the low-rank product added to y and dx in place",
        lambda p: [middle(p), gemm(p), product(p, 2)],
        lambda p, q: [middle(q), gemm(q), product(q, 2), rank_grad(p), rank_grad(q)],
    ),
    "serial-ideal": Design(
        "z by a skinny kernel, then x wᵀ + z bᵀ; t and db from one read of dy: the best serial design on paper",
        lambda p: [middle(p), extended(p)],
        lambda p, q: [Kernel(2 * middle(q).flops, q.moved(x=1, a=2, z=2)), extended(q), rank_grad(p)],
    ),
    "triton-serial": Design(
        "the same as built: t and db each read dy, da and db go through fp32 partial sums",
        _serial_forward,
        _serial_backward,
    ),
    "triton-portable": Design(
        "the same launches with pointer loads, from sm_80 up: by FLOPs and bytes no other than triton-serial",
        _serial_forward,
        _serial_backward,
    ),
    "triton-skinny": Design(
        "the vendor's GEMM adds to a product that Triton wrote; t and db from one read of dy; sums in fp32 partials",
        lambda p: [*middle_triton(p), product(p, 1), added(p)],
        lambda p, q: [*middle_and_grad(q), product(q, 1), added(q), *rank_grad_triton(p)],
    ),
    "cuda-serial": Design(
        "csrc in two launches: z, then x wᵀ + z bᵀ; da and db by a kernel each",
        lambda p: [middle(p), extended(p)],
        lambda p, q: [middle(q), extended(q), rank_grad_cuda(p), rank_grad_cuda(q)],
    ),
    "cuda-z_jobs": Design(
        "csrc: z by jobs of their own inside the persistent GEMM, simulated; da and db by a kernel each",
        lambda p: [z_jobs(p)],
        lambda p, q: [z_jobs(q), rank_grad_cuda(p), rank_grad_cuda(q)],
    ),
    "full": Design("full fine-tuning: dw is a third GEMM", lambda p: [gemm(p)], lambda p, q: [gemm(q), gemm(p)]),
}


def wide(ps: Sequence[Problem]) -> Problem:
    """The problem of all middles of a group: one x, the ranks side by side."""
    return ps[0]._replace(r=sum(p.r for p in ps))


class GroupDesign(NamedTuple):
    """One way to compute layers of one input together: its kernels in the forward and in the backward."""

    about: str
    forward: Callable[[Sequence[Problem]], Sequence[Kernel]]
    backward: Callable[[Sequence[Problem]], Sequence[Kernel]]


def _library_forward(ps: Sequence[Problem]) -> list[Kernel]:
    # The rows of all a are copied side by side, and the parts of z scaled.
    joined, scaled = Kernel(0.0, wide(ps).moved(a=2)), Kernel(0.0, wide(ps).moved(z=2))
    return [joined, middle(wide(ps)), scaled, *(kernel for p in ps for kernel in (gemm(p), product(p, 2)))]


def _library_backward(ps: Sequence[Problem]) -> list[Kernel]:
    qs = [p.turned for p in ps]
    # Each t is scaled, and all are copied side by side, as the rows of a are.
    moved = Kernel(0.0, wide(ps).moved(z=4, a=2))
    dx = [product(wide(ps).turned, 1), *map(added, qs)]
    return [*map(middle, qs), moved, *dx, rank_grad(wide(ps)), *map(rank_grad, qs)]


def _skinny_forward(ps: Sequence[Problem]) -> list[Kernel]:
    return [*middle_triton(wide(ps)), *(kernel for p in ps for kernel in (product(p, 1), added(p)))]


def _skinny_backward(ps: Sequence[Problem]) -> list[Kernel]:
    qs = [p.turned for p in ps]
    ts = [kernel for q in qs for kernel in middle_and_grad(q)]
    return [*ts, product(wide(ps).turned, 1), *map(added, qs), *rank_grad_triton(wide(ps))]


# Layers of one input: x is read once for all z and once for all da, and dx is written once and added to by the GEMMs.
TOGETHER = {
    "library-together": GroupDesign(
        "library for layers of one input: all z by one GEMM, all da by another, dx summed by the GEMMs",
        _library_forward,
        _library_backward,
    ),
    "triton-skinny-together": GroupDesign(
        "triton-skinny for layers of one input, likewise: all z by one kernel, all t a by one, all da by one",
        _skinny_forward,
        _skinny_backward,
    ),
}


def designs(ps: Sequence[Problem]) -> list[str]:
    """The names of the designs for one layer, or for several of one input."""
    return [*DESIGNS, *(TOGETHER if len(ps) > 1 else ())]


def kernels(design: str, *ps: Problem) -> dict[str, list[Kernel]]:
    """A design's kernels by mode; ``ps`` are the forward's problems, a step is a forward and a backward.

    Several are of layers of one input. Where a design is one layer's, they run one after the other and autograd adds
    up their dx, those of ``frozen`` too: a design whose GEMMs sum dx may be below the floor.
    """
    if design in TOGETHER:
        forward, backward = list(TOGETHER[design].forward(ps)), list(TOGETHER[design].backward(ps))
    else:
        forward = [kernel for p in ps for kernel in DESIGNS[design].forward(p)]
        backward = [kernel for p in ps for kernel in DESIGNS[design].backward(p, p.turned)]
        backward += (len(ps) - 1) * [sweep(ps[0].turned, 3)]
    return {"forward": forward, "backward": backward, "step": forward + backward}


def minimum(*ps: Problem) -> dict[str, Kernel]:
    """The least of any design: the FLOPs of ``Case.theory``, each argument and result moved once; t is not kept."""
    base, low_rank = sum(gemm(p).flops for p in ps), sum(2.0 * p.m * p.r * (p.k + p.n) for p in ps)
    # One x, and one dx.
    own, shared = [p.moved(w=1, y=1, z=1, a=1, b=1) for p in ps], ps[0].moved(x=1)
    grads = sum(p.moved(a=1, b=1) for p in ps)
    forward = Kernel(base + low_rank, shared + sum(own))
    return {"forward": forward, "backward": Kernel(base + 2 * low_rank, 2 * shared + sum(own) + grads)}
