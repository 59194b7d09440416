"""Builds the stubs with the machine's own compilers, and starts the processes that launch into them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from csrc import build as csrc
from tests.csrc.host_library import make

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
FOLDER = ROOT / "build" / "stub_gpu"
LIBRARY = FOLDER / "libfastlora_stub.so"
FAULTS = FOLDER / "libfaults.so"

_FLAGS = ("-std=c++17", "-O1", "-shared", "-I", str(HERE))


def driver_obstacle() -> str | None:
    """The reason why Triton cannot launch into the stub driver here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if shutil.which("g++") and shutil.which("gcc") else "no gcc and g++ on PATH"


def runtime_obstacle() -> str | None:
    """The reason why csrc cannot be linked to the stub runtime here, or None."""
    if csrc.find_nvcc() is None or csrc.find_ninja() is None:
        return "no nvcc and ninja to build csrc"
    return None if shutil.which("g++") else "no g++ on PATH"


def driver() -> Path:
    """The folder of a ``libcuda.so.1`` that launches nothing."""
    import triton

    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    made = FOLDER / "driver" / "libcuda.so.1"
    sources = [str(HERE / name) for name in ("checks.cpp", "driver.cpp")]
    host = ("-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden", "-Wl,-soname,libcuda.so.1", "-Wl,-z,defs")
    make(made, ["g++", *_FLAGS, *host, "-isystem", str(headers), *sources], _read(sources))
    return made.parent


def library() -> Path:
    """csrc's own objects linked to the stub runtime."""
    csrc.build(FOLDER / "libfastlora_cuda.so")
    objects = [str(ROOT / csrc.FOLDER / f"{source.stem}.o") for source in csrc.sources()]
    return _nvcc(objects, LIBRARY)


def faults() -> Path:
    """Launches that are wrong on purpose, through csrc/launch.cuh, linked to the stub runtime."""
    return _nvcc([str(HERE / "faults.cu")], FAULTS)


def _nvcc(inputs: Sequence[str], made: Path) -> Path:
    nvcc = csrc.find_nvcc()
    assert nvcc is not None
    sources = [str(HERE / name) for name in ("checks.cpp", "runtime.cpp")]
    device = ("-gencode=arch=compute_90a,code=sm_90a", "-cudart", "none", "-I", str(ROOT / "csrc"))
    host = ("-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker", "-z,defs,-Bsymbolic")
    make(made, [nvcc.path, *_FLAGS, *device, *host, *sources, *inputs], _read([*sources, *inputs]))
    return made


def _read(sources: Sequence[str]) -> list[Path]:
    """The sources, and the headers that they may include."""
    return [*map(Path, sources), *sorted(HERE.glob("*.hpp")), *sorted((ROOT / "csrc").glob("*.cuh"))]


def start(module: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Starts ``python -m module`` as on a machine whose driver is the stub: no interpreter, nothing forced."""
    dropped = ("TRITON_INTERPRET", "FASTLORA_BACKEND", "FASTLORA_CUDA_LIBRARY")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    folder = str(FOLDER / "driver")
    environment |= {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (folder, os.environ.get("LD_LIBRARY_PATH")))),
        "TRITON_LIBCUDA_PATH": folder,
        "TRITON_CACHE_DIR": str(FOLDER / "triton"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], seconds: float = 600) -> str:
    """What a process printed; its errors where it failed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, process.args))} ended with {process.returncode}\n{out}\n{err}")
    return out
