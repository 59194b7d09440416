"""What a LoRA layer must cost: FLOPs and bytes of each design, and the time they take on a device. All predictions.

    time of a kernel = max(FLOPs / P, bytes / β)          P, β: what the device sustains
    time of a design = sum over its kernels
    ratio            = over the frozen layer's time: x wᵀ in the forward, dy w in the backward, both in a step

A kernel reads each operand from memory once and writes each result once, z, t, a, b and their gradients included, and
adapters have the base's dtype. Left out: launch gaps; whole waves of tiles (where a schedule is simulated, the plain
GEMM has them too); what L2 keeps from one kernel to the next; a GEMM that falls short of P; the arithmetic of dropout's
masks; bias; the host.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from typing import NamedTuple, Protocol


class Device(NamedTuple):
    """What a GPU sustains: dense FLOP/s by dtype, bytes/s of its memory; ``basis`` says how that is known."""

    name: str
    basis: str
    flops: Mapping[str, float]
    bytes_per_s: float
    sms: int


class Sized(Protocol):
    """Anything with a LoRA layer's sizes: a case, a result's row."""

    @property
    def k(self) -> int:
        """in_features."""

    @property
    def n(self) -> int:
        """out_features."""

    @property
    def r(self) -> int:
        """Rank."""


def theory(case: Sized, mode: str) -> float:
    """The FLOP minimum over the frozen layer's FLOPs, on any device.

    forward 1 + R/N + R/K, backward 1 + 2R/N + 2R/K (t, t a, da and db), step their mean. No dropout, no bias.
    """
    share = case.r / case.n + case.r / case.k
    return 1 + {"forward": 1.0, "backward": 2.0, "step": 1.5}[mode] * share


class Kernel(NamedTuple):
    """One launch. ``stretch`` is what a simulated schedule makes of its arithmetic; 1 where none is simulated."""

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


def middle(p: Problem, passes: int = 1) -> Kernel:
    """z = x aᵀ, with so many reads of x."""
    return Kernel(2.0 * p.m * p.k * p.r, p.moved(x=passes, a=1, z=1))


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


# As built (kernels/tiles.py, kernels/rank_grad.py): the largest tile of y and how many rows of tiles go together; the
# tile of rank_grad and its CTAs; how much of the rank a skinny kernel holds, which reads x again for every such part.
TILE_M, TILE_N, GROUP_M = 128, 256, 8
GRAD_COLUMNS, GRAD_DEPTH, GRAD_CTAS, RANK_COLUMNS = 64, 64, 264, 64


def rank_blocks(p: Problem) -> int:
    """How often the skinny kernels as built read x."""
    return ceil(p.r / RANK_COLUMNS)


def grad_splits(p: Problem) -> int:
    """Into how many splits of M rank_grad as built divides da."""
    splits = max(1, min(GRAD_CTAS // (ceil(p.k / GRAD_COLUMNS) * rank_blocks(p)), ceil(p.m / (4 * GRAD_DEPTH))))
    return ceil(p.m / (ceil(ceil(p.m / splits) / GRAD_DEPTH) * GRAD_DEPTH))


def rank_grad_built(p: Problem) -> list[Kernel]:
    """da with its fp32 partial sums: written by one kernel, read and added up by another."""
    splits, flops = grad_splits(p), rank_grad(p).flops
    if splits == 1:
        return [Kernel(flops, p.moved(x=rank_blocks(p), z=1, a=1))]
    partial = 4.0 * splits * p.r * p.k
    return [Kernel(flops, p.moved(x=rank_blocks(p), z=1) + partial), Kernel(0.0, partial + p.moved(a=1))]


class Turn(NamedTuple):
    """One tile on one SM, times in whole tiles of the plain GEMM; ``waited`` for its row's z."""

    row: int
    column: int
    start: float
    waited: float
    end: float


def one_launch_schedule(p: Problem) -> Iterator[Turn]:
    """The persistent GEMM that makes z itself, each SM taking the next tile when it is free.

    All tiles of column 0 come first: their K loop also sums x aᵀ (never faster than 32 more columns would be), then
    releases the row. Other tiles, in groups of rows, acquire theirs before their last trip, which adds z bᵀ.
    """
    rows, columns = ceil(p.m / TILE_M), ceil(p.n / TILE_N)
    last_trip, with_z = p.trip / p.k, 1 + max(32, p.trip) / TILE_N
    groups = (range(first, min(rows, first + GROUP_M)) for first in range(0, rows, GROUP_M))
    order = [(row, 0) for row in range(rows)]
    order += [(row, column) for group in groups for column in range(1, columns) for row in group]
    free, released = [0.0] * p.sms, [0.0] * rows
    for row, column in order:
        start = free[0]
        summed = start + (1.0 if column else with_z)
        if column == 0:
            released[row] = summed
        waited = max(0.0, released[row] - summed)
        end = summed + waited + last_trip
        heapq.heapreplace(free, end)
        yield Turn(row, column, start, waited, end)


def waves(p: Problem) -> int:
    """How many tiles of the plain GEMM the busiest SM takes."""
    return ceil(ceil(p.m / TILE_M) * ceil(p.n / TILE_N) / p.sms)


def one_launch_makespan(p: Problem) -> float:
    """The schedule's end over that of the plain GEMM, which waits for whole waves too."""
    return max(turn.end for turn in one_launch_schedule(p)) / waves(p)


def one_launch(p: Problem) -> Kernel:
    """y and z in one launch, which takes the plain GEMM's time, stretched as the schedule is."""
    flops = gemm(p).flops + 2.0 * p.m * p.trip * (p.k + p.n)
    stretch = one_launch_makespan(p) * gemm(p).flops / flops
    return Kernel(flops, p.moved(x=1, w=1, y=1, z=2, a=1, b=1), stretch)


# As csrc/schedule.cuh has it: clusters of two CTAs; z for 128 rows takes so much of a tile, whatever K, where one SM
# streams 60 GB/s.
CLUSTER, Z_UNIT = 2, 0.39


def z_jobs_makespan(p: Problem) -> float:
    """The end of csrc's one launch over that of the plain GEMM in the same clusters.

    Jobs that make z, for one unit of rows or for two each, come first; tiles acquire their row's before the last trip.
    """
    clusters, units, columns = p.sms // CLUSTER, ceil(p.m / (CLUSTER * TILE_M)), ceil(p.n / TILE_N)
    idle = -units * columns % clusters
    run = 2 if idle < units <= 2 * idle else 1
    free, released = [0.0] * clusters, [0.0] * units
    for first in range(0, units, run):
        end = free[0]
        for unit in range(first, min(units, first + run)):
            end = released[unit] = end + Z_UNIT
        heapq.heapreplace(free, end)
    for group in range(0, units, GROUP_M):
        for _ in range(columns):
            for unit in range(group, min(units, group + GROUP_M)):
                heapq.heapreplace(free, max(free[0] + 1.0, released[unit]) + p.trip / p.k)
    return max(free) / ceil(units * columns / clusters)


def z_jobs(p: Problem) -> Kernel:
    """y and z in csrc's one launch, which reads x once more, in the plain GEMM's time, stretched as the schedule is.

    Never below its own arithmetic: the waves in which z hides are not counted in the floor.
    """
    flops = gemm(p).flops + 2.0 * p.m * p.trip * (p.k + p.n)
    stretch = max(1.0, z_jobs_makespan(p) * gemm(p).flops / flops)
    return Kernel(flops, p.moved(x=2, w=1, y=1, z=2, a=1, b=1), stretch)


def rank_grad_csrc(p: Problem) -> Kernel:
    """da as csrc makes it: in one kernel, with fp32 partial sums that its last CTA of each 128 columns adds up."""
    splits = max(1, min(p.sms // ceil(p.k / 128), ceil(p.m / 256)))
    splits = ceil(p.m / (64 * ceil(ceil(p.m / splits) / 64)))
    return Kernel(rank_grad(p).flops, p.moved(x=1, z=1, a=1) + 2 * 4.0 * splits * p.k * 8 * ceil(p.r / 8))


def in_whole_waves(p: Problem, device: Device, dtype: str, launch_s: float = 2e-6) -> dict[str, float]:
    """Forward over the plain GEMM, both in whole waves, with ``launch_s`` for serial's second launch.

    The one definition here that is not the ratio of the table: it says what tiles and a launch add to serial.
    """
    plain = waves(p) * gemm(p._replace(m=TILE_M, n=TILE_N)).flops * p.sms / device.flops[dtype]
    skinny = middle(p).seconds(device, dtype) + launch_s
    return {"serial": 1 + p.trip / p.k + skinny / plain, "one-launch": one_launch_makespan(p)}


class Design(NamedTuple):
    """One way to compute the layer: its kernels in the forward, and in the backward given the turned problem too."""

    about: str
    forward: Callable[[Problem], Sequence[Kernel]]
    backward: Callable[[Problem, Problem], Sequence[Kernel]]


DESIGNS = {
    "frozen": Design("x wᵀ, dy w: the floor", lambda p: [gemm(p)], lambda p, q: [gemm(q)]),
    "plain": Design(
        "eager PyTorch: y and dx pass through memory for the product, the scale and the sum",
        lambda p: [gemm(p), middle(p), product(p, 1), sweep(p, 2), sweep(p, 3)],
        lambda p, q: [gemm(q), sweep(p, 2), middle(q), rank_grad(q), product(q, 1), rank_grad(p), sweep(q, 3)],
    ),
    "addmm": Design(
        "three GEMMs of the vendor's, the product added to y and dx in place",
        lambda p: [middle(p), gemm(p), product(p, 2)],
        lambda p, q: [middle(q), gemm(q), product(q, 2), rank_grad(p), rank_grad(q)],
    ),
    "serial": Design(
        "z by a skinny kernel, then x wᵀ + z bᵀ; t and db from one read of dy: the best serial design on paper",
        lambda p: [middle(p), extended(p)],
        lambda p, q: [Kernel(2 * middle(q).flops, q.moved(x=1, a=2, z=2)), extended(q), rank_grad(p)],
    ),
    "serial-built": Design(
        "serial as built: t and db each read dy, da and db go through fp32 partial sums",
        lambda p: [middle(p, rank_blocks(p)), extended(p)],
        lambda p, q: [middle(q, rank_blocks(q)), extended(q), *rank_grad_built(p), *rank_grad_built(q)],
    ),
    "one-launch": Design(
        "z inside the persistent GEMM, simulated; da and db as built",
        lambda p: [one_launch(p)],
        lambda p, q: [one_launch(q), *rank_grad_built(p), *rank_grad_built(q)],
    ),
    "z_jobs": Design(
        "csrc: z by jobs of their own inside the persistent GEMM, simulated; da and db by a kernel each",
        lambda p: [z_jobs(p)],
        lambda p, q: [z_jobs(q), rank_grad_csrc(p), rank_grad_csrc(q)],
    ),
    "full": Design("full fine-tuning: dw is a third GEMM", lambda p: [gemm(p)], lambda p, q: [gemm(q), gemm(p)]),
}


def kernels(design: str, p: Problem) -> dict[str, list[Kernel]]:
    """A design's kernels by mode; ``p`` is the forward's problem, a step is a forward and a backward."""
    forward, backward = list(DESIGNS[design].forward(p)), list(DESIGNS[design].backward(p, p.turned))
    return {"forward": forward, "backward": backward, "step": forward + backward}


def minimum(p: Problem) -> dict[str, Kernel]:
    """What no design can avoid: :func:`theory`'s FLOPs, and each argument and result moved once; t need not be kept."""
    base, low_rank = gemm(p).flops, 2.0 * p.m * p.r * (p.k + p.n)
    forward = Kernel(base + low_rank, p.moved(x=1, w=1, y=1, z=1, a=1, b=1))
    backward = Kernel(base + 2 * low_rank, p.moved(x=2, w=1, y=1, z=1, a=2, b=2))
    return {"forward": forward, "backward": backward}
