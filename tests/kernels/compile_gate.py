"""The compile gate: every row of the tile table, compiled without a GPU and read back.

For each kernel, tile, architecture and feature it prints registers, spills, shared memory and matrix instructions, and
fails on a spill, on shared memory beyond the architecture's limit, on a missing matrix instruction, and on a wgmma that
takes an operand from registers (ptxas before 13.3 may reuse those registers too early). What is compiled is the very
``Launch`` that the launchers would run.

    python tests/kernels/compile_gate.py [--arch 90 ...] [--jobs N]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastlora.backends import triton as backend
from fastlora.backends import triton_skinny
from fastlora.backends.dropout import Dropout
from fastlora.backends.request import Product, new_middle
from fastlora.kernels import philox, rank_grad, tiles
from fastlora.kernels.launch import Launch

ARCHITECTURES = (80, 90, 100, 120)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Case(NamedTuple):
    """One launcher call: what is asked of it, not how it answers."""

    kernel: str
    capability: int
    m: int
    k: int
    n: int
    r: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    mask: str
    backward: bool
    precision: str = "ieee"

    def launches(self) -> list[Launch]:
        """The launches this call would run."""
        dropout = None if self.mask == "none" else Dropout(0.1, torch.zeros(2, dtype=torch.int64))
        if self.kernel == "rank_grad":
            p = torch.empty(self.m, self.r, dtype=self.dtype)
            q = torch.empty(self.m, self.n, dtype=self.dtype)
            if self.backward:
                p, q = q, p
            return rank_grad.launches(p, q, dtype=self.adapter_dtype, precision=self.precision, dropout=dropout)[1]
        if self.kernel == "triton-skinny":
            return self._skinny(dropout)
        product = Product(
            x=torch.empty(self.m, self.k, dtype=self.dtype),
            w=_matrix(self.n, self.k, self.dtype, self.backward),
            a=_matrix(self.r, self.k, self.adapter_dtype, self.backward),
            b=_matrix(self.n, self.r, self.adapter_dtype, self.backward),
            scale=2.0,
            bias=None if self.backward else torch.empty(self.n, dtype=self.dtype),
            dropout_p=0.0 if dropout is None else dropout.p,
            seed=None if dropout is None else dropout.seed,
            on_product=self.mask == "product",
        )
        launches = backend.launches_serial if self.kernel == "triton-serial" else backend.launches_portable
        return launches(product, self.capability, self.precision)[2]

    def _skinny(self, dropout: Dropout | None) -> list[Launch]:
        """The launches of a forward or a backward; with dropout those of the mask alone, too."""
        x, dy = torch.empty(self.m, self.k, dtype=self.dtype), torch.empty(self.m, self.n, dtype=self.dtype)
        a = torch.empty(self.r, self.k, dtype=self.adapter_dtype)
        b = torch.empty(self.n, self.r, dtype=self.adapter_dtype)
        w, bias = torch.empty(self.n, self.k, dtype=self.dtype), torch.empty(self.n, dtype=self.dtype)
        product = Product(x, w, a, b, 2.0, bias, 0.1, None if dropout is None else dropout.seed)
        if self.backward:
            z = new_middle(dy, self.r)
            return triton_skinny.gradient_launches(product, dy, z, self.capability, self.precision)[3]
        bits = [] if dropout is None else [philox.launch(dropout, torch.empty(64, self.k, dtype=torch.int16), 0)]
        return [*triton_skinny.launches(product, self.capability, self.precision)[2], *bits]


class Finding(NamedTuple):
    """One compiled kernel, read back; ``faults`` is empty when it passes."""

    kernel: str
    tile: str
    capability: int
    features: str
    registers: int
    spills: int
    shared: int
    matrix: str
    faults: tuple[str, ...]


class _NoGpuDriver:
    """Tells Triton's own launch path that a GPU of this architecture is there, up to the launch itself."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def cases(architectures: tuple[int, ...]) -> Iterator[Case]:
    """Every tile row on every architecture it is meant for, with the features that change its code."""
    half, other, full = torch.bfloat16, torch.float16, torch.float32
    for capability in architectures:
        for kind, (r, dtype, adapter_dtype, mask, backward) in itertools.product(
            (None, "ragged"),
            (
                (16, half, half, "none", False),
                (8, half, half, "none", True),
                (64, other, full, "none", False),
                (64, half, half, "product", True),
                (8, half, full, "product", True),
            ),
        ):
            for tile in tiles.portable_rows(capability, kind, masked=mask == "product"):
                shape = _shape_for(tile, kind == "ragged")
                yield Case("triton-portable", capability, *shape, r, dtype, adapter_dtype, mask, backward)
        for precision, mask in itertools.product(("tf32", "ieee"), ("none", "product")):
            for tile in tiles.portable_rows(capability, precision, masked=mask == "product"):
                shape = _shape_for(tile)
                yield Case("triton-portable", capability, *shape, 64, full, full, mask, mask == "product", precision)
        # What the middle kernel and rank_grad compile to depends on the rank and the features, not on M, K and N.
        precisions = ((half, "ieee"), (other, "ieee"), (full, "ieee"), (full, "tf32"))
        for r, (dtype, precision), k, mask in itertools.product((8, 64), precisions, (512, 511), ("none", "input")):
            yield Case("triton-portable", capability, 64, k, 64, r, dtype, full, mask, False, precision)
        for r, (dtype, precision), mask, backward in itertools.product(
            (8, 64), precisions, ("none", "input"), (False, True)
        ):
            if not (mask == "input" and backward):
                yield Case("rank_grad", capability, 8192, 0, 1024, r, dtype, full, mask, backward, precision)
        for (r, dtype, adapter_dtype, precision), mask, backward in itertools.product(
            (
                (8, half, half, "ieee"),
                (8, half, full, "ieee"),
                (12, other, other, "ieee"),
                (16, half, half, "ieee"),
                (32, half, half, "ieee"),
                (32, half, full, "ieee"),
                (64, half, full, "ieee"),
                (64, full, full, "ieee"),
                (64, full, full, "tf32"),
                (128, half, full, "ieee"),
            ),
            ("none", "input"),
            (False, True),
        ):
            if mask == "none" or r in (8, 64, 128):
                shape = (2048, 2048, 1024)
                yield Case("triton-skinny", capability, *shape, r, dtype, adapter_dtype, mask, backward, precision)
        if capability not in tiles.TMA_CAPABILITIES:
            continue
        # The mask on the input is the middle kernel's alone.
        features = (("none", False), ("none", True), ("product", True))
        dtypes = ((half, half), (half, full), (other, other))
        for r, (dtype, adapter_dtype), (mask, backward) in itertools.product((8, 16, 64, 128), dtypes, features):
            for tile in tiles.tma_rows():
                shape = _shape_for(tile)
                yield Case("triton-serial", capability, *shape, r, dtype, adapter_dtype, mask, backward)


def _shape_for(tile: tiles.Tile, ragged: bool = False) -> tuple[int, int, int]:
    """M, K, N for which the table answers with this row: one wave of its tiles, half a wave of the next larger."""
    m, n = 12 * tile.rows, 9 * tile.columns
    return (m - 1, 511, n - 1) if ragged else (m, 512, n)


def _matrix(rows: int, columns: int, dtype: torch.dtype, transposed: bool) -> torch.Tensor:
    """[rows, columns]; in the backward the operands are transposed views."""
    return torch.empty(columns, rows, dtype=dtype).T if transposed else torch.empty(rows, columns, dtype=dtype)


def examine(case: Case) -> list[Finding]:
    """Compiles every launch of a case and reads the machine code."""
    driver.set_active(_NoGpuDriver(case.capability))
    return [_examine(case, launch) for launch in case.launches()]


def _examine(case: Case, launch: Launch) -> Finding:
    arguments = launch.arguments
    compiled = launch.kernel.run(grid=launch.grid, warmup=True, **arguments, **launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    shared = compiled.metadata.shared
    ptx = compiled.asm["ptx"]
    instructions = [
        name
        for name, pattern in (("wgmma", r"wgmma\.mma_async"), ("tcgen05", r"tcgen05\.mma"), ("mma", r"\bmma\.sync"))
        if re.search(pattern, ptx)
    ]

    faults = []
    if stack or spills:
        faults.append(f"spills: {stack} B of stack, {spills} loads and stores of local memory")
    limit = tiles.shared_memory(case.capability)
    if shared > limit:
        faults.append(f"shared memory {shared} B, limit {limit} B")
    expected = _expected_instructions(case, launch)
    if expected and not expected & set(instructions):
        faults.append(f"no {' or '.join(sorted(expected))}")
    if re.search(r"HGMMA\S* R\d+, R\d+,", sass):
        faults.append("wgmma with an operand in registers")
    if _refills_under_wgmma(compiled.asm["ttgir"]):
        faults.append("shared memory refilled while a wgmma may still read it")
    blocks = [
        str(arguments[name])
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_C", "BLOCK_K", "BLOCK_R", "BLOCK")
        if name in arguments
    ]
    return Finding(
        launch.kernel.fn.__name__.strip("_"),
        "x".join(blocks),
        case.capability,
        "any" if "BLOCK" in arguments else _features(case),
        registers,
        spills,
        shared,
        "+".join(instructions) or "fma",
        tuple(faults),
    )


def _features(case: Case) -> str:
    """What this case asks for beyond the tile."""
    features = [f"R={case.r}", str(case.dtype).removeprefix("torch.")]
    if case.adapter_dtype != case.dtype:
        features.append("fp32 adapters")
    if case.dtype is torch.float32:
        features.append(case.precision)
    features += [f"mask on {case.mask}"] if case.mask != "none" else []
    features += ["backward"] if case.backward else []
    features += ["ragged"] if case.k % 2 else []
    return ", ".join(features)


def _expected_instructions(case: Case, launch: Launch) -> set[str]:
    """The matrix instructions of which a product of this kernel must have become one; none for plain arithmetic."""
    name = launch.kernel.fn.__name__
    if "sum_splits" in name or "keep_bits" in name or (case.dtype is torch.float32 and case.precision == "ieee"):
        return set()
    if any(skinny in name for skinny in ("middle", "rank_grad", "rank_update")):
        # Fewer than 64 rows or memory-bound: any matrix instruction will do.
        return {"mma"} if case.r < 64 else {"mma", "wgmma", "tcgen05"}
    return {{90: "wgmma", 100: "tcgen05"}.get(case.capability, "mma")}


def _refills_under_wgmma(ttgir: str) -> bool:
    """Whether a loop refills the ring of an operand while the wgmma that reads it may still run (triton issue 6691).

    With as many trips prefetched as the ring has buffers, a refill goes into the buffer of the trip at hand; then that
    trip's wgmma must be over, so the wait before the refill must leave none pending.
    """
    ring: dict[str, int] = {}
    prefetched: dict[str, int] = {}
    source: dict[str, str] = {}
    operands: set[str] = set()
    pending = loop_indent = None

    def ring_of(value: str) -> str:
        while value in source:
            value = source[value]
        return value

    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        if found := re.search(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x", line):
            ring[found[1]], prefetched[found[1]] = int(found[2]), 0
        elif found := re.search(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", line):
            source[found[1]] = found[2]
        elif "scf.for" in line:
            loop_indent, pending, operands = indent, None, set()
        elif loop_indent is not None and indent == loop_indent and line.lstrip().startswith("}"):
            loop_indent = None
        elif found := re.search(r"warp_group_dot (%\w+), (%\w+).*isAsync = true", line):
            operands |= {ring_of(found[1]), ring_of(found[2])}
            pending = 1
        elif found := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line):
            pending = int(found[1])
        elif found := re.search(r"async_(?:tma_)?copy_global_to_local %\w+(?:\[[^\]]*\])?,? (%\w+)", line):
            buffer = ring_of(found[1])
            if loop_indent is None:
                prefetched[buffer] = prefetched.get(buffer, 0) + 1
            elif pending and buffer in operands and prefetched.get(buffer, 0) >= ring.get(buffer, sys.maxsize):
                return True
    return False


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    """Runs the gate, prints its table, and returns the number of faulty kernels as an exit status of 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args()

    work = list(dict.fromkeys(cases(tuple(options.arch))))
    context = multiprocessing.get_context("spawn")
    findings: dict[tuple, Finding] = {}
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for done, batch in enumerate(pool.map(examine, work, chunksize=4), 1):
            findings |= {finding[:4]: finding for finding in batch}
            if sys.stderr.isatty():
                print(f"\r{done}/{len(work)} compiled", end="", file=sys.stderr)
    rows = sorted(findings.values(), key=lambda f: (f.kernel, f.capability))
    print(f"{'kernel':<24}{'tile':<16}{'arch':<8}{'regs':>5}{'spills':>7}{'shared':>8}  {'matrix':<10}features")
    for f in rows:
        print(
            f"{f.kernel:<24}{f.tile:<16}{f'sm_{f.capability}':<8}{f.registers:>5}{f.spills:>7}{f.shared:>8}  "
            f"{f.matrix:<10}{f.features}{''.join(f'  FAULT: {fault}' for fault in f.faults)}"
        )
    faulty = sum(bool(f.faults) for f in rows)
    print(f"{len(rows)} kernels compiled with Triton {triton.__version__}: {len(rows) - faulty} pass, {faulty} faulty")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
