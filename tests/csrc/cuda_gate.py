"""The gate on the CUDA kernels: ``csrc/`` compiled for sm_90a, on a machine without a GPU, and read back.

For each kernel it prints registers, spills, stack, shared memory, wgmmas and instructions, and fails on

- a word of ptxas about its performance: wgmmas that it runs one after another, a setmaxnreg that it ignores;
- a spill, a stack, or a load or store of local memory in the machine code;
- a kernel that should multiply on the matrix unit and has no HGMMA, or one with an operand in registers (ptxas before
  13.3 may reuse those too early);
- a fence of the whole GPU in a loop that multiplies, which every trip would wait for;
- an instruction that names a sum of a wgmma in flight, between the wgmma and the wait for all;
- a store into the shared memory of a cluster (STAS) in a kernel that is launched with clusters of one CTA, where the
  PTX ISA leaves it undefined;
- more registers than its threads can have at launch, or more shared memory than a CTA of sm_90 can;
- a kernel that ``fastlora_kernels()`` does not tell of, or tells of and is not there.

    python tests/csrc/cuda_gate.py
"""

from __future__ import annotations

import ctypes
import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from csrc import build as csrc  # noqa: E402

ARCHITECTURE = "sm_90a"
REGISTER_FILE = 65536
MOST_REGISTERS = 255
SHARED_BYTES = 232_448


class Plan(NamedTuple):
    """What the launchers say of the kernels whose names match: a line of ``fastlora_kernels()``."""

    pattern: str
    threads: int
    shared: int
    wgmma: bool
    cluster: int

    @property
    def registers(self) -> int:
        """What each thread can have when the kernel starts."""
        return min(REGISTER_FILE // self.threads // 8 * 8, MOST_REGISTERS)


class Usage(NamedTuple):
    """What ``ptxas -v`` says of one kernel; ``spills`` in bytes, ``shared`` the static part."""

    registers: int
    stack: int
    spills: int
    shared: int


class Code(NamedTuple):
    """What the machine code of one kernel has.

    ``local`` are the loads and stores of local memory, ``fences`` those of the whole GPU in loops with wgmmas,
    ``remote`` the asynchronous stores into the cluster's shared memory, ``touched`` what names a sum in flight.
    """

    instructions: int
    wgmmas: int
    wgmmas_on_registers: int
    local: int
    fences: int = 0
    remote: int = 0
    touched: int = 0


class Finding(NamedTuple):
    """One kernel, read back; ``faults`` is empty where it passes."""

    kernel: str
    usage: Usage
    code: Code
    shared: int
    faults: tuple[str, ...]


def read_plans(text: str) -> list[Plan]:
    """Lines of ``pattern threads shared_bytes wgmma cluster``; a pattern may have spaces."""
    plans = []
    for line in text.splitlines():
        pattern, threads, shared, wgmma, cluster = line.rsplit(maxsplit=4)
        plans.append(Plan(pattern, int(threads), int(shared), wgmma == "1", int(cluster)))
    return plans


def read_log(text: str) -> dict[str, Usage]:
    """By the mangled name of each kernel, what ptxas used for it."""
    usages = {}
    for part in re.split(r"Compiling entry function ", text)[1:]:
        name = re.match(r"'(\w+)'", part)[1]
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        usages[name] = Usage(registers, stack, stores + loads, int(shared[1]) if shared else 0)
    return usages


def complaints(text: str) -> list[str]:
    """The lines in which a compiler warns, or tells of performance lost: ptxas numbers these C75xx."""
    return [line.strip() for line in text.splitlines() if re.search(r"\(C75\d\d\)|\bwarning\b", line)]


def read_sass(text: str) -> dict[str, Code]:
    """By the mangled name of each kernel, what its machine code has."""
    codes = {}
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        name = part.split(maxsplit=1)[0]
        places = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", part, re.MULTILINE)
        instructions = [line for _, line in places]
        codes[name] = Code(
            len(instructions),
            sum("HGMMA" in line for line in instructions),
            sum(bool(re.search(r"HGMMA\S* R\d+, R\d+,", line)) for line in instructions),
            sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in instructions),
            _fences_beside_wgmmas([(int(address, 16), line) for address, line in places]),
            sum(bool(re.search(r"\bSTAS\b", line)) for line in instructions),
            _touched_sums(instructions),
        )
    return codes


def _touched_sums(instructions: list[str]) -> int:
    """Instructions other than wgmmas that name a sum in flight, in the order of the text.

    Sums start at a multiple of 8, and what is wider than a register at a multiple of its width: the names tell.
    """
    running: set[int] = set()
    found = 0
    for line in instructions:
        if wgmma := re.search(r"HGMMA\.64x(\d+)x16\S* R(\d+),", line):
            first = int(wgmma[2])
            running |= set(range(first, first + int(wgmma[1]) // 2))
        elif re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0\b", line):
            running = set()
        else:
            found += not running.isdisjoint(map(int, re.findall(r"\bR(\d+)\b", line)))
    return found


def _fences_beside_wgmmas(places: list[tuple[int, str]]) -> int:
    """Fences of the whole GPU in the innermost loops that hold a wgmma; a loop is what a branch backwards encloses."""
    loops = []
    for address, line in places:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    found = 0
    for first, last in loops:
        if any(first <= inner and end <= last and (inner, end) != (first, last) for inner, end in loops):
            continue
        body = [line for address, line in places if first <= address <= last]
        if any("HGMMA" in line for line in body):
            found += sum(bool(re.search(r"\bMEMBAR\.\S*GPU", line)) for line in body)
    return found


def plain_name(demangled: str) -> str:
    """Such as ``lora_matmul_kernel<BF16, 256, 2, false>``: without namespaces, result and arguments."""
    short = re.sub(r"(\w+|\(anonymous namespace\))::", "", demangled).removeprefix("void ")
    return short.partition("(")[0]


def judge(kernel: str, usage: Usage, code: Code, plans: list[Plan], said: list[str]) -> Finding:
    """Holds one kernel to the list in the module docstring; ``said`` are complaints about it."""
    faults = [f"ptxas: {line}" for line in said]
    matching = [plan for plan in plans if fnmatch.fnmatchcase(kernel, plan.pattern)]
    shared = usage.shared
    if len(matching) != 1:
        faults.append(f"{len(matching)} lines of fastlora_kernels() match it, expected one")
    else:
        plan = matching[0]
        shared += plan.shared
        if plan.wgmma and not code.wgmmas:
            faults.append("no HGMMA")
        if usage.registers > plan.registers:
            faults.append(f"{usage.registers} registers, {plan.threads} threads can have {plan.registers}")
        if plan.cluster == 1 and code.remote:
            faults.append(f"{code.remote} STAS in a cluster of one CTA")
    if shared > SHARED_BYTES:
        faults.append(f"{shared} B of shared memory, a CTA can have {SHARED_BYTES}")
    if usage.spills or usage.stack or code.local:
        faults.append(f"{usage.spills} B of spills, {usage.stack} B of stack, {code.local} LDL and STL")
    if code.fences:
        faults.append(f"{code.fences} fences of the whole GPU in a loop that multiplies")
    if code.touched:
        faults.append(f"{code.touched} instructions that name a sum of a wgmma in flight")
    if code.wgmmas_on_registers:
        faults.append(f"{code.wgmmas_on_registers} HGMMA with an operand in registers")
    return Finding(kernel, usage, code, shared, tuple(faults))


def examine(logs: list[str], sass: str, plans: list[Plan]) -> tuple[list[Finding], list[str]]:
    """Every kernel of the library with its faults, and the faults that belong to no kernel."""
    usages = {name: usage for log in logs for name, usage in read_log(log).items()}
    codes = read_sass(sass)
    said = [line for log in logs for line in complaints(log)]
    names = dict(zip(usages, _demangled(list(usages)), strict=True))

    faults = [f"ptxas: {line}" for line in said if not any(name in line for name in usages)]
    faults += [f"an architecture other than {ARCHITECTURE}: {a}" for a in _architectures(sass) if a != ARCHITECTURE]
    faults += [f"{name}: ptxas or the machine code does not have it" for name in usages.keys() ^ codes.keys()]
    findings = [
        judge(names[name], usages[name], codes[name], plans, [line for line in said if name in line])
        for name in usages
        if name in codes
    ]
    for plan in plans:
        if not any(fnmatch.fnmatchcase(finding.kernel, plan.pattern) for finding in findings):
            faults.append(f"fastlora_kernels() tells of {plan.pattern}, and there is no such kernel")
    return sorted(findings), faults


def _architectures(sass: str) -> list[str]:
    return sorted(set(re.findall(r"^arch = (\w+)", sass, re.MULTILINE)))


def _demangled(names: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [plain_name(line) for line in done.stdout.splitlines()]


def _cuobjdump() -> str:
    """That of the toolkit, or the one that Triton brings."""
    nvcc = csrc.find_nvcc()
    beside = shutil.which("cuobjdump", path=str(Path(nvcc.path).parent)) if nvcc else None
    if found := beside or shutil.which("cuobjdump"):
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def table(findings: list[Finding]) -> str:
    """What the gate prints."""
    width = max(len(finding.kernel) for finding in findings) + 2
    lines = [f"{'kernel':<{width}}{'regs':>5}{'spills':>7}{'stack':>6}{'shared':>8}{'HGMMA':>6}{'instructions':>13}"]
    for f in findings:
        lines.append(
            f"{f.kernel:<{width}}{f.usage.registers:>5}{f.usage.spills:>7}{f.usage.stack:>6}{f.shared:>8}"
            f"{f.code.wgmmas:>6}{f.code.instructions:>13}{''.join(f'  FAULT: {fault}' for fault in f.faults)}"
        )
    return "\n".join(lines)


def main() -> int:
    """Builds, prints the table, and returns 1 where something is faulty."""
    try:
        if reason := csrc.obstacle():
            print(f"the CUDA kernels are not compiled here: {reason}")
            return 0
        csrc.build()
    except csrc.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    library = ctypes.CDLL(str(csrc.LIBRARY))
    library.fastlora_kernels.restype = ctypes.c_char_p
    plans = read_plans(library.fastlora_kernels().decode())
    logs = [log.read_text() for log in csrc.logs()]
    sass = subprocess.run([_cuobjdump(), "-sass", csrc.LIBRARY], capture_output=True, text=True, check=True).stdout
    findings, faults = examine(logs, sass, plans)
    print(table(findings))
    for fault in faults:
        print(f"FAULT: {fault}")
    faulty = sum(bool(finding.faults) for finding in findings)
    release = ".".join(map(str, csrc.find_nvcc().release))
    print(f"{len(findings)} kernels compiled with nvcc {release}: {len(findings) - faulty} pass, {faulty} faulty")
    return 1 if faulty or faults or not findings else 0


if __name__ == "__main__":
    sys.exit(main())
