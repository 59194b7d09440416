"""The compile gate: every row of the tile table, compiled without a GPU and read back.

For each kernel, tile, architecture and feature it prints registers, spills, shared memory, matrix instructions, whether
the fence between copies and tensor cores is there, and how many wgmmas wait for the one before. It fails on

- a spill, or shared memory beyond the architecture's limit;
- a missing matrix instruction;
- wgmma or tcgen05.mma that may read what cp.async wrote with no fence of the async proxy between;
- wgmmas that ptxas runs one after another;
- an operand refilled under a running wgmma;
- a wgmma that takes an operand from registers (ptxas before 13.3 may reuse those registers too early).

What is compiled is the very ``Launch`` that the launchers would run.

    python tests/kernels/compile_gate.py [--arch sm_90 gfx942 ...] [--jobs N]
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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver

from fastlora.backends import reference, triton_skinny
from fastlora.backends import triton as backend
from fastlora.backends.dropout import Dropout
from fastlora.backends.request import Product, new_middle
from fastlora.kernels import branches, philox, rank_grad, swiglu, tiles
from fastlora.kernels.launch import Launch

ARCHITECTURES = (80, 86, 89, 90, 100, 120, 0x942, 0x950, 0x1100)
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
    bias: bool = False
    activation: str = ""

    def launches(self) -> list[Launch]:
        """The launches this call would run."""
        dropout = None if self.mask == "none" else Dropout(0.1, torch.zeros(2, dtype=torch.int64))
        if self.kernel == "rank_grad":
            p = torch.empty(self.m, self.r, dtype=self.dtype)
            q = torch.empty(self.m, self.n, dtype=self.dtype)
            if self.backward:
                p, q = q, p
            options = dict(capability=self.capability, precision=self.precision, dropout=dropout)
            return rank_grad.launches(p, q, dtype=self.adapter_dtype, **options)[1]
        if self.kernel == "triton-skinny":
            return self._skinny(dropout)
        if self.kernel == "swiglu":
            return self._swiglu()
        if self.kernel == "triton-skinny, group":
            return self._group(dropout)
        product = Product(
            x=torch.empty(self.m, self.k, dtype=self.dtype),
            w=_matrix(self.n, self.k, self.dtype, self.backward),
            a=_matrix(self.r, self.k, self.adapter_dtype, self.backward),
            b=_matrix(self.n, self.r, self.adapter_dtype, self.backward),
            scale=2.0,
            bias=torch.empty(self.n, dtype=self.dtype) if self.bias else None,
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

    def _swiglu(self) -> list[Launch]:
        """The activation's forward, or its backward, with h where there is a bias."""
        g, u, dh, du, h = (torch.empty(self.m, self.n, dtype=self.dtype) for _ in range(5))
        if not self.backward:
            return [swiglu.forward_launch(g, u, h, self.activation)]
        return [swiglu.backward_launch(g, u, dh, du, h if self.bias else None, self.activation)]

    def _group(self, dropout: Dropout | None) -> list[Launch]:
        """The launches of a forward or a backward of three branches with one input."""
        x, dy = torch.empty(self.m, self.k, dtype=self.dtype), torch.empty(self.m, self.n, dtype=self.dtype)
        a = torch.empty(self.r, self.k, dtype=self.adapter_dtype)
        b = torch.empty(self.n, self.r, dtype=self.adapter_dtype)
        product = Product(x, None, a, b, 2.0, None, 0.1, None if dropout is None else dropout.seed)
        products = [product._replace(a=a.clone()) for _ in range(3)]
        if self.backward:
            zs = branches.views(torch.empty(self.m, branches.begins([self.r] * 3)[1], dtype=self.dtype), [self.r] * 3)
            return triton_skinny.group_gradient_launches(products, [dy] * 3, zs, self.capability, self.precision)[3]
        return triton_skinny.group_launches(products, self.capability, self.precision)[2]


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
    fence: str
    serialised: int
    faults: tuple[str, ...]


class Code(NamedTuple):
    """What the compiler made of a launch, read back from its output."""

    registers: int
    spilled: str
    spills: int
    matrix: tuple[str, ...]
    fence: str
    serialised: int
    faults: tuple[str, ...]


# What this process has read back, by the compiler's own key: many cases share a launch.
_codes: dict[str, Code] = {}


class _NoGpuDriver:
    """Tells Triton's own launch path that a GPU of this architecture is there, up to the launch itself."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        if tiles.is_amd(capability):
            self._target = GPUTarget("hip", tiles.architecture(capability), tiles.warp_size(capability))
        else:
            self._target = GPUTarget("cuda", capability, tiles.warp_size(capability))

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._capability

    def get_current_stream(self, device: int) -> int:
        return 0


def cases(architectures: tuple[int, ...]) -> Iterator[Case]:
    """Every tile row on every architecture it is meant for, with the features that change its code."""
    half, other, full = torch.bfloat16, torch.float16, torch.float32
    for capability in architectures:
        for kind, (r, dtype, adapter_dtype, mask, backward, bias) in itertools.product(
            (None, "ragged"),
            (
                (16, half, half, "none", False, True),
                (16, half, half, "none", False, False),
                (8, half, half, "none", True, False),
                (16, half, half, "none", True, True),
                (64, other, full, "none", False, True),
                (64, half, half, "product", True, False),
                (8, half, full, "product", True, False),
            ),
        ):
            for tile in tiles.portable_rows(capability, kind, masked=mask == "product"):
                shape = _shape_for(tile, kind == "ragged")
                yield Case("triton-portable", capability, *shape, r, dtype, adapter_dtype, mask, backward, bias=bias)
        # AMD's tensor cores have no tf32 that all of its architectures share.
        tf32 = () if tiles.is_amd(capability) else ("tf32",)
        for precision, mask in itertools.product((*tf32, "ieee"), ("none", "product")):
            for tile in tiles.portable_rows(capability, precision, masked=mask == "product"):
                shape, backward = _shape_for(tile), mask == "product"
                yield Case(
                    "triton-portable", capability, *shape, 64, full, full, mask, backward, precision, not backward
                )
        # What the middle kernel and rank_grad compile to depends on the rank and the features, not on M, K and N.
        precisions = ((half, "ieee"), (other, "ieee"), (full, "ieee"), *((full, precision) for precision in tf32))
        for r, (dtype, precision), k, mask in itertools.product((8, 64), precisions, (512, 511), ("none", "input")):
            yield Case("triton-portable", capability, 64, k, 64, r, dtype, full, mask, False, precision)
        for r, (dtype, precision), mask, backward in itertools.product(
            (8, 64), precisions, ("none", "input"), (False, True)
        ):
            if not (mask == "input" and backward):
                yield Case("rank_grad", capability, 8192, 0, 1024, r, dtype, full, mask, backward, precision)
        # Strides that no vector load can follow, where every element holds an address.
        yield Case("triton-portable", capability, 64, 511, 64, 128, half, full, "input", False)
        for r, dtype in ((64, half), (12, full)):
            yield Case("rank_grad", capability, 8192, 0, 1023, r, dtype, full, "input", False)
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
            if precision in ("ieee", *tf32) and (mask == "none" or r in (8, 64, 128)):
                shape = (2048, 2048, 1024)
                yield Case("triton-skinny", capability, *shape, r, dtype, adapter_dtype, mask, backward, precision)
                group = "triton-skinny, group"
                yield Case(group, capability, *shape, r, dtype, adapter_dtype, mask, backward, precision)
        # x in strides that no vector load can follow.
        for (r, dtype), mask, backward in itertools.product(
            ((16, half), (64, half), (12, full)), ("none", "input"), (False, True)
        ):
            yield Case("triton-skinny, group", capability, 2048, 2047, 1024, r, dtype, full, mask, backward)
        # Elements no multiple of a vector, too.
        for activation, dtype, (backward, with_h), (m, n) in itertools.product(
            reference.ACTIVATIONS,
            (half, other, full),
            ((False, False), (True, True), (True, False)),
            ((64, 64), (63, 63)),
        ):
            if dtype is not other or n == 64:
                shape = (m, 0, n)
                yield Case("swiglu", capability, *shape, 0, dtype, dtype, "none", backward, "ieee", with_h, activation)
        if capability not in tiles.TMA_CAPABILITIES:
            continue
        # The mask on the input is the middle kernel's alone. A bias does not meet w K-by-N in a backward, but in the
        # forward of a transposed layer.
        features = (("none", False, True), ("none", False, False), ("none", True, False), ("product", True, False))
        dtypes = ((half, half), (half, full), (other, other))
        for r, (dtype, adapter_dtype), (mask, backward, bias) in itertools.product(
            (8, 16, 64), dtypes, (*features, ("none", True, True))
        ):
            if (dtype is other or adapter_dtype is full) and bias == backward and mask == "none":
                continue
            # float16 compiles to what bfloat16 does: one rank of it. A rank above 64 is more trips of the same code.
            if dtype is other and r != 16:
                continue
            for tile in tiles.tma_rows():
                shape = _shape_for(tile)
                yield Case("triton-serial", capability, *shape, r, dtype, adapter_dtype, mask, backward, bias=bias)


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
    launches = case.launches()
    return [_examine(case, launch.on_amd() if tiles.is_amd(case.capability) else launch) for launch in launches]


def _examine(case: Case, launch: Launch) -> Finding:
    arguments = launch.arguments
    compiled = launch.kernel.run(grid=launch.grid, warmup=True, **arguments, **launch.options)
    code = _codes.get(compiled.hash)
    if code is None:
        code = _amd_code(compiled.asm["amdgcn"]) if tiles.is_amd(case.capability) else _nvidia_code(compiled)
        _codes[compiled.hash] = code
    shared = compiled.metadata.shared

    name = launch.kernel.fn.__name__.strip("_")
    faults = [f"spills: {code.spilled}"] if code.spilled else []
    limit = tiles.shared_memory(case.capability)
    if shared > limit:
        faults.append(f"shared memory {shared} B, limit {limit} B")
    expected = _expected_instructions(case, launch)
    if expected and not expected & set(code.matrix):
        faults.append(f"no {' or '.join(sorted(expected))}")
    blocks = [
        str(arguments[name])
        for name in ("BLOCK_M", "BLOCK_N", "BLOCK_C", "BLOCK_K", "BLOCK_R", "BLOCK")
        if name in arguments
    ]
    return Finding(
        name,
        "x".join(blocks),
        case.capability,
        "any" if "sum_splits" in name else _features(case),
        code.registers,
        code.spills,
        shared,
        "+".join(code.matrix) or "fma",
        code.fence,
        code.serialised,
        (*faults, *code.faults),
    )


def _nvidia_code(compiled: Any) -> Code:
    """Reads PTX, the machine code and what ptxas said."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    ptx = compiled.asm["ptx"]
    matrix = _matrix_instructions(ptx, wgmma=r"wgmma\.mma_async", tcgen05=r"tcgen05\.mma", mma=r"\bmma\.sync")
    lacks_fence = _lacks_fence(ptx)
    serialised = _serialised(sass)
    said = _words_on_serialised_wgmma(ptx, compiled.metadata.target.arch) if "wgmma" in matrix else []

    faults = []
    if lacks_fence:
        faults.append("no fence.proxy.async between cp.async's data and the tensor cores")
    if serialised or said:
        faults.append(f"{serialised} wgmmas wait for the one before; ptxas: {' '.join(said) or 'not a word'}")
    if re.search(r"HGMMA\S* R\d+, R\d+,", sass):
        faults.append("wgmma with an operand in registers")
    if _refills_under_wgmma(compiled.asm["ttgir"]):
        faults.append("shared memory refilled while a wgmma may still read it")
    copied = "cp.async.wait_group" in ptx and {"wgmma", "tcgen05"} & set(matrix)
    spilled = f"{stack} B of stack, {spills} loads and stores of local memory" if stack or spills else ""
    fence = "-" if not copied else "missing" if lacks_fence else "yes"
    return Code(registers, spilled, spills, matrix, fence, serialised, tuple(faults))


def _amd_code(amdgcn: str) -> Code:
    """Reads AMD's assembly, whose end says what the kernel takes."""

    def value(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", amdgcn, re.MULTILINE)
        assert found, f"the assembly does not say {name}"
        return int(found[1])

    spills, scratch = value("vgpr_spill_count"), value("private_segment_fixed_size")
    matrix = _matrix_instructions(amdgcn, mfma=r"\bv_mfma_", wmma=r"\bv_wmma_")
    spilled = f"{spills} registers, {scratch} B of scratch memory" if spills or scratch else ""
    return Code(value("vgpr_count"), spilled, spills, matrix, "-", 0, ())


def _matrix_instructions(assembly: str, **patterns: str) -> tuple[str, ...]:
    return tuple(name for name, pattern in patterns.items() if re.search(pattern, assembly))


def _features(case: Case) -> str:
    """What this case asks for beyond the tile."""
    features = [case.activation or f"R={case.r}", str(case.dtype).removeprefix("torch.")]
    if case.adapter_dtype != case.dtype:
        features.append("fp32 adapters")
    if case.dtype is torch.float32 and not case.activation:
        features.append(case.precision)
    features += [f"mask on {case.mask}"] if case.mask != "none" else []
    features += ["backward"] if case.backward else []
    features += ["with h" if case.activation else "bias"] if case.bias else []
    features += ["ragged"] if case.k % 2 or case.n % 2 else []
    return ", ".join(features)


def _expected_instructions(case: Case, launch: Launch) -> set[str]:
    """The matrix instructions of which a product of this kernel must have become one; none for plain arithmetic."""
    name = launch.kernel.fn.__name__
    plain = ("sum_splits", "keep_bits", "swiglu")
    if any(word in name for word in plain) or (case.dtype is torch.float32 and case.precision == "ieee"):
        return set()
    if tiles.is_amd(case.capability):
        return {"mfma" if tiles.warp_size(case.capability) == 64 else "wmma"}
    if any(skinny in name for skinny in ("middle", "rank_grad", "rank_update", "group")):
        # Fewer than 64 rows or memory-bound: any matrix instruction will do.
        return {"mma"} if case.r < 64 else {"mma", "wgmma", "tcgen05"}
    return {{90: "wgmma", 100: "tcgen05"}.get(case.capability, "mma")}


def _lacks_fence(ptx: str) -> bool:
    """Whether a wgmma or tcgen05.mma may read what cp.async wrote with no fence of the async proxy between the two.

    cp.async writes through the generic proxy, those read through the async proxy, and neither a wait nor a barrier
    orders the two (PTX ISA, memory consistency model). Every path of the control flow is followed.
    """
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L")}
    paths, seen = [(0, False)], set()
    while paths:
        i, unfenced = paths.pop()
        while i < len(lines) and (i, unfenced) not in seen:
            seen.add((i, unfenced))
            line = lines[i].strip()
            if line.startswith(("cp.async.wait_", "cp.async.mbarrier.")):
                unfenced = True
            elif line.startswith("fence.proxy.async"):
                unfenced = False
            elif unfenced and re.search(r"\b(?:wgmma\.mma_async|tcgen05\.mma)\.", line):
                return True
            elif branch := re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line):
                paths.append((labels[branch[1]], unfenced))
                if not line.startswith("@"):
                    break
            i += 1
    return False


def _serialised(sass: str) -> int:
    """How many wgmmas wait, in straight code, until the one before is over; of a good kernel none."""
    count, state = 0, ""
    for line in sass.splitlines():
        if line.lstrip().startswith(".L_") or re.search(r"\b(?:BRA|BAR)\b", line):
            state = ""
        elif "HGMMA" in line:
            count += state == "waited"
            state = "running"
        elif state == "running" and re.search(r"DEPBAR\.LE gsb0, 0x0\b", line):
            state = "waited"
    return count


def _words_on_serialised_wgmma(ptx: str, capability: int) -> list[str]:
    """The numbers (C7510 to C7519) under which ptxas says that it runs wgmmas one after another, and why."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}a", file.name, "-o", os.devnull]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(set(re.findall(r"\bC75\d\d\b", run.stdout + run.stderr)))


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


def _tell(done: int, of: int) -> None:
    """Counts in place on a terminal; in a pipe or a log a line for each tenth."""
    if sys.stderr.isatty():
        print(f"\r{done}/{of} compiled", end="\n" if done == of else "", file=sys.stderr, flush=True)
    elif done * 10 // of > (done - 1) * 10 // of:
        print(f"{done}/{of} compiled", file=sys.stderr, flush=True)


def main() -> int:
    """Runs the gate, prints its table, and returns the number of faulty kernels as an exit status of 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = {tiles.architecture(capability): capability for capability in ARCHITECTURES}
    parser.add_argument("--arch", nargs="+", default=list(named), choices=list(named))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args()

    start = time.monotonic()
    work = list(dict.fromkeys(cases(tuple(named[name] for name in options.arch))))
    print(f"compiling {len(work)} cases in {options.jobs} processes", file=sys.stderr, flush=True)
    context = multiprocessing.get_context("spawn")
    findings: dict[tuple, Finding] = {}
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for done, batch in enumerate(pool.map(examine, work, chunksize=4), 1):
            findings |= {finding[:4]: finding for finding in batch}
            _tell(done, len(work))
    rows = sorted(findings.values(), key=lambda f: (f.kernel, f.capability))
    print(
        f"{'kernel':<24}{'tile':<16}{'arch':<9}{'regs':>4}{'spills':>7}{'shared':>8}{'fence':>8}{'serial':>7}"
        f"  {'matrix':<8}features"
    )
    for f in rows:
        print(
            f"{f.kernel:<24}{f.tile:<16}{tiles.architecture(f.capability):<9}{f.registers:>4}{f.spills:>7}{f.shared:>8}"
            f"{f.fence:>8}{f.serialised:>7}  {f.matrix:<8}{f.features}{''.join(f'  FAULT: {x}' for x in f.faults)}"
        )
    faulty = sum(bool(f.faults) for f in rows)
    print(
        f"{len(rows)} kernels compiled with Triton {triton.__version__} in {time.monotonic() - start:.0f} s: "
        f"{len(rows) - faulty} pass, {faulty} faulty"
    )
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
