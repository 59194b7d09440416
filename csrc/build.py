"""Builds the CUDA kernels: every ``csrc/*.cu`` by nvcc, through ninja, into one shared library with a C ABI.

    python csrc/build.py    for development: compiles what changed, puts the libraries into the package

And, where there is a C++ compiler, ``csrc/dropout_cpu.cpp`` into a library of its own, by :func:`build_cpu`.
``FASTLORA_BUILD_CPU=0`` leaves it out; without it dropout on a CPU takes torch's operators, and longer.

``setup.py`` calls both for an install. It needs Linux, nvcc (from ``CUDA_HOME``, ``CUDA_PATH``, ``PATH`` or
``/usr/local/cuda``), the C++ compiler that nvcc calls, and ninja; nothing of torch. Where one is missing the package is
pure Python. ``FASTLORA_BUILD_CUDA=1`` makes that an error, ``0`` builds nothing.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NAME = "libfastlora_cuda"
LIBRARY = ROOT / "fastlora" / f"{NAME}.so"
CPU_NAME = "libfastlora_cpu"
CPU_LIBRARY = ROOT / "fastlora" / f"{CPU_NAME}.so"
CPU_SOURCE = Path("csrc", "dropout_cpu.cpp")

# Objects, the compiler's messages (``*.log``) and build.ninja, below the root.
FOLDER = Path("build", "csrc")

# The first with cudaGetDriverEntryPointByVersion.
OLDEST_NVCC = (12, 5)

_TARGET = "-gencode=arch=compute_90a,code=sm_90a"
_COMPILE = f"-std=c++17 -O3 -I csrc {_TARGET} -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"
_COMPILE_CPU = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread")
# The runtime inside, and its names hidden: torch brings another one into the same process.
_LINK = f"-shared {_TARGET} -cudart static -Xlinker --exclude-libs,ALL -Xlinker -z,defs"

_NINJA = """\
# Written by csrc/build.py.
ninja_required_version = 1.10
builddir = {folder}
nvcc = {nvcc}

rule compile
  command = $nvcc {compile} -MD -MF $out.d -c $in -o $out > $log 2>&1 || {{ cat $log; false; }}
  deps = gcc
  depfile = $out.d
  description = nvcc $in

rule link
  command = $nvcc {link} $in -o $out
  description = link $out

{edges}
"""


class BuildError(RuntimeError):
    """The library was asked for and cannot be built; the message gives the reason and the remedy."""


class Nvcc(NamedTuple):
    """A CUDA compiler: its path and what ``nvcc --version`` prints."""

    path: str
    about: str

    @property
    def release(self) -> tuple[int, int] | None:
        """Such as (13, 0); None where it does not run."""
        found = re.search(r"release (\d+)\.(\d+)", self.about)
        return (int(found[1]), int(found[2])) if found else None


def obstacle(root: Path = ROOT) -> str | None:
    """Gives the reason why no library is built here, in one line, or None where one is.

    Raises:
        BuildError: ``FASTLORA_BUILD_CUDA`` is 1 and something is missing, or it is neither 0 nor 1.
    """
    setting = os.environ.get("FASTLORA_BUILD_CUDA", "")
    if setting not in ("", "0", "1"):
        raise BuildError(
            f"FASTLORA_BUILD_CUDA={setting!r} is unknown: expected 0, 1, or nothing to build where nvcc is"
        )
    if setting == "0":
        return "FASTLORA_BUILD_CUDA=0"
    missing = _missing(root)
    if missing is not None and setting == "1":
        raise BuildError(f"FASTLORA_BUILD_CUDA=1, but {missing}")
    return missing


def build(library: Path = LIBRARY, root: Path = ROOT) -> None:
    """Compiles what changed and puts the library where it is asked for.

    Raises:
        BuildError: something is missing, or nvcc failed; its messages are printed before.
    """
    nvcc, ninja = find_nvcc(), find_ninja()
    if nvcc is None or ninja is None:
        raise BuildError(str(_missing(root)))
    plan = write_plan(nvcc, root)
    if subprocess.run([ninja, "-f", plan], cwd=root, check=False).returncode != 0:
        raise BuildError("the CUDA kernels do not compile, see above; FASTLORA_BUILD_CUDA=0 installs without them")
    # By a new file in its place: a process may be running the old one.
    library.parent.mkdir(parents=True, exist_ok=True)
    fresh = library.with_name(f"{library.name}.new")
    shutil.copy2(root / FOLDER / f"{NAME}.so", fresh)
    fresh.replace(library)


def cpu_obstacle() -> str | None:
    """Gives the reason why no library of CPU code is built here, in one line, or None where one is.

    Raises:
        BuildError: ``FASTLORA_BUILD_CPU`` is neither 0 nor 1.
    """
    setting = os.environ.get("FASTLORA_BUILD_CPU", "1")
    if setting not in ("0", "1"):
        raise BuildError(f"FASTLORA_BUILD_CPU={setting!r} is unknown: expected 0, or 1 to build where a compiler is")
    if setting == "0":
        return "FASTLORA_BUILD_CPU=0"
    return None if find_cxx() else "there is no C++ compiler: install g++ or clang++, or set CXX"


def build_cpu(library: Path = CPU_LIBRARY, root: Path = ROOT) -> None:
    """Compiles the CPU code and puts the library where it is asked for.

    Raises:
        BuildError: there is no compiler, or it failed; its messages are printed before.
    """
    compiler = find_cxx()
    if compiler is None:
        raise BuildError(str(cpu_obstacle()))
    library.parent.mkdir(parents=True, exist_ok=True)
    fresh = library.with_name(f"{library.name}.new")
    command = [*compiler, *_COMPILE_CPU, str(root / CPU_SOURCE), "-o", str(fresh)]
    if subprocess.run(command, check=False).returncode != 0:
        raise BuildError("the CPU code does not compile, see above; FASTLORA_BUILD_CPU=0 installs without it")
    fresh.replace(library)


def find_cxx() -> list[str] | None:
    """The C++ compiler of this machine, as the words of a command."""
    names = [named] if (named := os.environ.get("CXX")) else ["c++", "g++", "clang++"]
    for words in map(shlex.split, names):
        if words and shutil.which(words[0]):
            return words
    return None


def write_plan(nvcc: Nvcc, root: Path = ROOT) -> Path:
    """Writes build.ninja; its path, relative to the root. Objects depend on what they include and on the compiler."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    compiler = FOLDER / "nvcc.txt"
    _write(root / compiler, f"{nvcc.path}\n{nvcc.about}")

    objects, edges = [], []
    for source in sources(root):
        made, log = FOLDER / f"{source.stem}.o", FOLDER / f"{source.stem}.log"
        objects.append(str(made))
        edges.append(f"build {made} | {log}: compile csrc/{source.name} | {compiler}\n  log = {log}")
    edges.append(f"build {FOLDER / NAME}.so: link {' '.join(objects)}")
    text = _NINJA.format(
        folder=FOLDER,
        nvcc=shlex.quote(nvcc.path).replace("$", "$$"),
        compile=_COMPILE,
        link=_LINK,
        edges="\n".join(edges),
    )
    _write(folder / "build.ninja", text)
    return FOLDER / "build.ninja"


def sources(root: Path = ROOT) -> list[Path]:
    """The files that are compiled."""
    return sorted((root / "csrc").glob("*.cu"))


def logs(root: Path = ROOT) -> list[Path]:
    """The logs in which ptxas reports on each of them."""
    return [root / FOLDER / f"{source.stem}.log" for source in sources(root)]


def find_nvcc() -> Nvcc | None:
    """The CUDA compiler of this machine."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    folders = [str(Path(home, "bin")) for home in homes if home]
    path = os.pathsep.join([*folders, os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
    found = shutil.which("nvcc", path=path)
    if found is None:
        return None
    return Nvcc(found, subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout)


def find_ninja() -> str | None:
    """Ninja, from its package or from PATH."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=BIN_DIR) or shutil.which("ninja")


def _missing(root: Path) -> str | None:
    if not sys.platform.startswith("linux"):
        return f"the CUDA kernels are for Linux, this is {sys.platform}"
    if not sources(root):
        return f"there is no kernel in {root / 'csrc'}"
    oldest = ".".join(map(str, OLDEST_NVCC))
    nvcc = find_nvcc()
    if nvcc is None:
        return (
            f"there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda: install the CUDA toolkit, {oldest} or newer"
        )
    if nvcc.release is None:
        return f"{nvcc.path} does not say its release: install CUDA {oldest} or newer, and set CUDA_HOME to it"
    if nvcc.release < OLDEST_NVCC:
        release = ".".join(map(str, nvcc.release))
        return f"{nvcc.path} is of CUDA {release}: install {oldest} or newer, and set CUDA_HOME to it"
    if find_ninja() is None:
        return "there is no ninja: pip install ninja"
    return None


def _write(path: Path, text: str) -> None:
    """Writes a file unless it has this text already, so that nothing is made again for it."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def main() -> int:
    """Builds into the package, or prints in one line why not."""
    try:
        if (reason := cpu_obstacle()) is None:
            build_cpu()
        print(f"{CPU_LIBRARY} is up to date" if reason is None else f"fastlora's CPU code is not built: {reason}")
        reason = obstacle()
        if reason is None:
            build()
        print(f"{LIBRARY} is up to date" if reason is None else f"fastlora's CUDA kernels are not built: {reason}")
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
