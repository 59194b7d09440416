"""Compiles kernels for the host, on the model in host_model/: the source of csrc/, or others on the same headers."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
MODEL = Path(__file__).with_name("host_model")
HEADERS = (".cuh", ".h", ".hpp")

# No warnings of the kernels: nvcc's count. One would be that g++ before 4.6 passed such parameters otherwise.
COMPILE = ("g++", "-std=c++17", "-O2", "-fPIC", "-pthread")
COMPILE_KERNELS = ("-x", "c++", "-w", "-Wno-psabi")


def build(folder: Path, csrc: Path = CSRC, sources: Sequence[Path] | None = None, flags: Sequence[str] = ()) -> Path:
    """A shared library in ``folder`` of ``csrc/*.cu``, or of ``sources`` instead, and the host model.

    ``csrc`` may be a changed copy; the model itself is always compiled with the headers of this tree, and only once. An
    object whose source, headers and compiler have not changed is kept.
    """
    kernels = list(sources) if sources is not None else sorted(csrc.glob("*.cu"))
    model = ROOT / "build" / "host_model" / "-".join(["model", *(flag.lstrip("-") for flag in flags)])
    jobs = [(source, folder, csrc, (*flags, *COMPILE_KERNELS)) for source in kernels]
    jobs += [(source, model, CSRC, (*flags, "-Wall", "-Wextra")) for source in sorted(MODEL.glob("*.cpp"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    library = folder / "libfastlora_host.so"
    make(library, [*COMPILE, "-shared", *map(str, objects)], objects)
    return library


def _compile(source: Path, folder: Path, csrc: Path, flags: Sequence[str]) -> Path:
    """The object of one file."""
    headers = [path for include in (MODEL, csrc) for path in sorted(include.iterdir()) if path.suffix in HEADERS]
    made = folder / f"{source.stem}.o"
    make(made, [*COMPILE, *flags, "-I", str(MODEL), "-I", str(csrc), "-c", str(source)], [source, *headers])
    return made


def make(made: Path, command: list[str], inputs: Iterable[Path]) -> None:
    """Runs the command with ``-o made``, unless the last one that did was the same on inputs of the same content."""
    key = hashlib.sha256("\0".join([shutil.which(command[0]) or "", *command]).encode())
    for path in inputs:
        key.update(path.name.encode() + path.read_bytes())
    stamp = made.with_name(f"{made.name}.key")
    if made.exists() and stamp.exists() and stamp.read_text() == key.hexdigest():
        return
    made.parent.mkdir(parents=True, exist_ok=True)
    # Another run of the tests may be making or loading the same file.
    fresh = made.with_name(f"{made.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    fresh.replace(made)
    stamp.write_text(key.hexdigest())
