"""The machine that a proof and a time hold for: a GPU or CPU, what drives it, and the kernels' own sources."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
from pathlib import Path
from typing import NamedTuple

import torch

from ..kernels.tiles import architecture
from . import cuda_abi, triton

_PACKAGE = Path(__file__).parents[1]

# The modules of this folder that make results; the others choose among them, or check them.
_MAKERS = (
    "cuda", "cuda_abi", "dropout",
    "library", "library_group", "library_products", "library_small",
    "masks", "replay", "request", "triton", "triton_skinny",
)  # fmt: skip


class Machine(NamedTuple):
    """What must be the same for a table to hold; all in words, empty where there is none.

    Attributes:
        device: the GPU's or the CPU's name.
        capability: ``sm_90``, ``gfx942``, or the vector instructions of a CPU.
        driver: the version of the GPU's.
        torch: its version.
        triton: its version.
        threads: of torch on a CPU.
        kernels: a hash of the kernels' sources, and of the CUDA kernels as built.
    """

    device: str
    capability: str
    driver: str
    torch: str
    triton: str
    threads: str
    kernels: str

    @property
    def slug(self) -> str:
        """The device's name as part of a file's name, such as ``nvidia-h200``."""
        return slug_of(self.device) or "unknown"

    @property
    def key(self) -> str:
        """Twelve letters that tell this machine from others."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]

    def differences(self, other: Machine) -> str:
        """What another machine has instead, in words; empty where they are the same."""
        return ", ".join(
            f"{name} {theirs or 'none'} instead of {mine or 'none'}"
            for name, mine, theirs in zip(self._fields, self, other, strict=True)
            if mine != theirs
        )


def machine_of(device: torch.device) -> Machine:
    """The machine of a device, as it is now."""
    is_gpu = device.type == "cuda"
    return Machine(
        torch.cuda.get_device_name(device) if is_gpu else cpu_name(),
        architecture(triton.capability_of(device)) if is_gpu else torch.backends.cpu.get_cpu_capability(),
        _driver() if is_gpu else "",
        str(torch.__version__),
        version("triton") or "",
        "" if is_gpu else str(torch.get_num_threads()),
        _sources(),
    )


def slug_of(name: str) -> str:
    """A device's name in letters that any file system takes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_name() -> str:
    """The maker's name of this CPU, or its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.machine()


def _driver() -> str:
    """The driver's own version, or the newest CUDA that it runs; asks no other program."""
    if torch.version.hip:
        return f"hip {torch.version.hip}"
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        text = ""
    if version := re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text):
        return version[1]
    newest = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "" if newest is None else f"CUDA {newest()}"


def version(package: str) -> str | None:
    """The version of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _sources() -> str:
    made = hashlib.sha256()
    makers = [Path(__file__).with_name(f"{name}.py") for name in _MAKERS]
    for path in (*sorted((_PACKAGE / "kernels").glob("*.py")), *makers, cuda_abi.library_path()):
        if path.is_file():
            made.update(path.name.encode())
            made.update(path.read_bytes())
    return made.hexdigest()[:12]
