"""The checklist for a new kernel: every place that must know the name of one, and a sentence where it does not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.hardware.stages import STAGES
from benchmarks.layers.arms import arms
from benchmarks.predict.cost import DESIGNS
from fastlora.backends import dispatch, measured
from fastlora.backends.request import Request

ROOT = Path(__file__).resolve().parent.parent


def read(*paths: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for name in paths for path in sorted(ROOT.glob(name)))


def rows() -> list[list[str]]:
    """The cells of CONTRIBUTING.md's table of kernels."""
    section = read("CONTRIBUTING.md").split("## Where a kernel is")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]


def row_of(kernel: str, verb: str) -> list[str] | None:
    first = f"`{kernel}`" + (" of rank_grad" if verb == "rank_grad" and kernel not in ("library", "reference") else "")
    return next((row for row in rows() if row[0] == first), None)


def missing(kernel: str, verb: str) -> Iterator[str]:
    """A sentence for each place that lacks a kernel: what to add, and where."""
    family, _, design = kernel.partition("-")
    row = row_of(kernel, verb)
    if row is None:
        yield f"CONTRIBUTING.md, 'Where a kernel is': add a row that begins with `{kernel}`"
    word = design if verb == "lora_matmul" and design else verb
    tests = re.findall(r"`([^`]+)`", row[3]) if row else ["tests/kernels/*.py", "tests/csrc/*.py"]
    if not re.search(rf"(?<![a-z]){word}(?![a-z])", read(*tests)):
        yield f"{', '.join(tests)}: add a test of {kernel} against the oracle that names {word}"
    if kernel != "reference" and verb == "lora_matmul":
        yield from missing_of_products(kernel)
    if kernel in ("library", "reference"):
        return
    if f"| {kernel} | {verb} | sm_" not in read("benchmarks/HARDWARE.md"):
        yield f"benchmarks/HARDWARE.md: add `| {kernel} | {verb} | ARCHITECTURE | DTYPE | ... |` for each that counts"
    if family == "cuda" and f"{verb}::kernels()" not in read("csrc/library.cu"):
        yield f"csrc/library.cu: fastlora_kernels() must tell the gate of {verb}"
    if family == "cuda" and design and f"FASTLORA_{design.upper()} " not in read("csrc/fastlora.h"):
        yield f"csrc/fastlora.h: add FASTLORA_{design.upper()}, the design of {kernel}"
    cases = f'"{kernel}"' if verb == "lora_matmul" else f'"{verb}"'
    if family != "cuda" and cases not in read("tests/kernels/compile_gate.py"):
        yield f"tests/kernels/compile_gate.py: add cases of {cases} to cases(), and its launches to Case"


def missing_of_products(kernel: str) -> Iterator[str]:
    """Of a kernel of lora_matmul that users may choose, which is timed by its name."""
    if f"fastlora-{kernel}" not in arms():
        yield f"benchmarks/layers/arms.py: add an arm fastlora-{kernel}; arm.KERNELS makes one of each"
    if f'"fastlora-{kernel}":' not in read("benchmarks/records/*.py"):
        yield f"benchmarks/records/plots.py: give fastlora-{kernel} a colour and a marker of its own"
    if kernel not in DESIGNS:
        yield f"benchmarks/predict/cost.py: add the launches of {kernel} to DESIGNS"
    if not any(kernel in stage.of for stage in STAGES):
        yield f"benchmarks/hardware/stages.py: name {kernel} in `of` of the stage that has its tests"
    if f"\n| `{kernel}` |" not in read("README.md").split("## The algebra")[1]:
        yield f"README.md, 'The algebra': add a row of what {kernel} is and where `auto` uses it"
    if kernel not in read("docs/tuning.md"):
        yield f"docs/tuning.md: the table that the tuner prints has {kernel} now"


@pytest.mark.parametrize(
    ("kernel", "verb"), [(kernel.name, verb) for verb, kernels in dispatch.KERNELS.items() for kernel in kernels]
)
def test_every_place_knows_the_kernel(kernel: str, verb: str) -> None:
    assert list(missing(kernel, verb)) == []


@pytest.mark.parametrize(
    ("kernel", "verb", "files"),
    [
        (
            "triton-woven",
            "lora_matmul",
            "CONTRIBUTING.md tests/kernels/*.py benchmarks/layers/arms.py benchmarks/records/plots.py "
            "benchmarks/predict/cost.py benchmarks/hardware/stages.py README.md docs/tuning.md benchmarks/HARDWARE.md "
            "tests/kernels/compile_gate.py",
        ),
        (
            "cuda-woven",
            "lora_matmul",
            "CONTRIBUTING.md tests/kernels/*.py benchmarks/layers/arms.py benchmarks/records/plots.py "
            "benchmarks/predict/cost.py benchmarks/hardware/stages.py README.md docs/tuning.md benchmarks/HARDWARE.md "
            "csrc/fastlora.h",
        ),
        (
            "cuda-woven",
            "rank_sum",
            "CONTRIBUTING.md tests/kernels/*.py benchmarks/HARDWARE.md csrc/library.cu csrc/fastlora.h",
        ),
    ],
)
def test_a_new_kernel_is_missed_in_each_place(kernel: str, verb: str, files: str) -> None:
    assert [re.split(r"[,:] ", sentence)[0] for sentence in missing(kernel, verb)] == files.split()


def test_auto_passes_a_new_kernel_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "sources_of", lambda device: ())
    cpu, half = torch.device("cpu"), torch.bfloat16
    for verb in dispatch.KERNELS:
        request = Request(verb, cpu, half, half, 512, 256, 128, 16, dropout=False)
        assert measured.unproven(request, "triton-woven") == "is not proven"


def test_the_table_of_kernels_names_what_exists() -> None:
    table = read("CONTRIBUTING.md").split("## Where a kernel is")[1].split("\n## ")[0]
    for path in set(re.findall(r"`((?:fastlora|kernels|csrc|tests)/[^`]+)`", table)):
        assert (ROOT / path).exists(), path
    launching = [
        path for path in (ROOT / "kernels").glob("*.py") if re.search(r"= Launch\(|return .*Launch\(", path.read_text())
    ]
    sources = {f"{path.parent.name}/{path.name}" for path in [*launching, *(ROOT / "csrc").glob("*_sm90.cu")]}
    assert {source for source in sources if f"`{source}`" not in table} == set()
    arms_named = re.findall(r"`(fastlora(?:-[\w-]+)?)`", table)
    assert set(arms_named) <= set(arms())
