"""The table of README.md that says by GPU what runs: asked of ``dispatch`` itself, and of the ledger.

``python -m tests.by_gpu`` prints it, and ``tests/test_gpu_page.py`` holds the README to it. Each kernel is asked
whether it refuses a request on such a GPU, as a call would ask it, with Triton installed and the CUDA kernels built.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch

from fastlora.backends import cuda_abi, dispatch, first_use, measured, triton
from fastlora.backends.measured import Table
from fastlora.backends.request import Request
from fastlora.kernels.tiles import amd_capability, architecture, is_amd
from tests.test_repository import LEDGER, Line, is_proven

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# An architecture is a number as in kernels/tiles.py; None is the CPU.
DEVICES: dict[str, int | None] = {
    "CPU": None,
    "T4, and older": 75,
    "A100": 80,
    "A10, A40, RTX 30": 86,
    "L4, L40S, RTX 40": 89,
    "H100, H200": 90,
    "B200": 100,
    "RTX 50": 120,
    "AMD MI300": amd_capability("gfx942"),
    "AMD MI350": amd_capability("gfx950"),
    "AMD RX 7900": amd_capability("gfx1100"),
}


class Row(NamedTuple):
    """What runs on one device.

    ``default`` and ``forced`` are kernels of lora_matmul, with the dtypes in brackets where these are not all three;
    ``proven`` is what was shown for this architecture without a GPU, ``run`` which kernels passed on one.
    """

    device: str
    default: str
    forced: str
    proven: str
    run: str

    def __str__(self) -> str:
        return f"| {' | '.join(self)} |"


HEAD = ("GPU", "by default", "can be forced", "shown without a GPU", "run on it")


def rows(ledger: str | None = None) -> list[Row]:
    """A row for each device, by the ledger's text; by default that of the repository."""
    ledger = LEDGER.read_text(encoding="utf-8") if ledger is None else ledger
    return [_row(name, capability, ledger) for name, capability in DEVICES.items()]


def table() -> str:
    """The table in Markdown."""
    return "\n".join([f"| {' | '.join(HEAD)} |", "|---|---|---|---|---|", *map(str, rows())])


def _row(name: str, capability: int | None, ledger: str) -> Row:
    chosen: dict[str, list[str]] = {}
    able: dict[str, list[str]] = {}
    with _on(capability):
        for dtype, kind in DTYPES.items():
            device = torch.device("cpu" if capability is None else "cuda")
            request = Request("lora_matmul", device, kind, kind, 8192, 4096, 4096, 16, dropout=False)
            chosen.setdefault(dispatch.rule(request), []).append(dtype)
            for kernel in dispatch.KERNELS["lora_matmul"]:
                if kernel.name != "reference" and kernel.refuses(request) is None:
                    able.setdefault(kernel.name, []).append(dtype)
    forced = ", ".join(_with_dtypes(kernel, able[kernel]) for kernel in able if kernel not in chosen) or "nothing else"
    default = ", ".join(_with_dtypes(kernel, dtypes) for kernel, dtypes in chosen.items())
    if capability is None:
        return Row(name, default, forced, "all tests", "the tests, and the tables below")
    arch = architecture(capability)
    passed: dict[str, list[str]] = {}
    for kernel in dispatch.named("lora_matmul"):
        for dtype in DTYPES:
            if is_proven(ledger, Line(kernel, "lora_matmul", arch, dtype)):
                passed.setdefault(kernel, []).append(dtype)
    ran = ", ".join(_with_dtypes(kernel, dtypes) for kernel, dtypes in passed.items()) or "nothing yet"
    return Row(f"{name} ({arch})", default + _fastest(arch), forced, _shown(ledger, arch), ran)


def _with_dtypes(kernel: str, dtypes: list[str]) -> str:
    if len(dtypes) == len(DTYPES):
        return f"`{kernel}`"
    return f"`{kernel}` ({'16-bit' if dtypes == ['bfloat16', 'float16'] else ', '.join(dtypes)})"


def _fastest(arch: str) -> str:
    """The kernels that the package's own tables of such GPUs prefer to the rule."""
    tables = (Table.parse(path.read_text(encoding="utf-8")) for path in measured.PACKAGE_TABLES.glob("*.json"))
    best = {bucket.best for table in tables if table.machine.capability == arch for bucket in table.buckets}
    return "".join(f", `{kernel}` where measured" for kernel in sorted(best - {None}))


def _shown(ledger: str, arch: str) -> str:
    """What every line of the ledger for an architecture has of what says something about the architecture."""
    cells = re.findall(rf"^\| \S+ \| \w+ \| {arch} \| \w+ \| ([^|]+) \|", ledger, re.MULTILINE)
    words = {"gate": "compiled", "stub": "launched into a stub"}
    shown = [word for mark, word in words.items() if cells and all(mark in cell for cell in cells)]
    return ", ".join(shown) or "nothing"


@contextmanager
def _on(capability: int | None) -> Iterator[None]:
    """Makes ``dispatch`` see a GPU without a table, and no interpreter."""
    amd = capability is not None and is_amd(capability)
    numbers = (0, 0) if capability is None or amd else divmod(capability, 10)
    verb = cuda_abi.Verb(lambda call: 0, lambda *arguments: None)
    built = cuda_abi.Library(verb, verb, lambda call, device: None, "cuda", None)
    with ExitStack() as fakes:
        fakes.enter_context(mock.patch.dict(os.environ, {"TRITON_INTERPRET": "0"}))
        os.environ.pop("FASTLORA_CUDA_LIBRARY", None)
        for owner, name, fake in (
            (torch.version, "hip", "7.0" if amd else None),
            (torch.cuda, "get_device_capability", lambda device: numbers),
            (triton, "capability_of", lambda device: capability),
            (triton, "_installed", lambda: True),
            (cuda_abi, "find_library", lambda: built),
            (measured, "sources_of", lambda device: ()),
            (first_use, "objection", lambda request: None),
        ):
            fakes.enter_context(mock.patch.object(owner, name, fake))
        yield


if __name__ == "__main__":
    print(table())
