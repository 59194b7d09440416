"""How csrc/ is built: what is compiled again, what an install does without a compiler, what is in a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from csrc import build as csrc

ROOT = Path(__file__).resolve().parents[2]

# A small project: two kernels, and a header that one of them includes.
FILES = {
    "csrc/one.cu": '#include "shared.cuh"\nextern "C" int one(void) { return ONE; }\n',
    "csrc/two.cu": 'extern "C" int two(void) { return 2; }\n',
    "csrc/shared.cuh": "#define ONE 1\n",
}


@pytest.fixture
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLORA_BUILD_CUDA", raising=False)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csrc, "find_nvcc", lambda: None)


@pytest.fixture
def needs_nvcc(nothing_said: None) -> None:
    if reason := csrc.obstacle():
        pytest.skip(f"the CUDA kernels are not built here: {reason}")


def write_nvcc(folder: Path, about: str) -> str:
    """A compiler that only says what it is."""
    (folder / "bin").mkdir(parents=True)
    path = folder / "bin" / "nvcc"
    path.write_text(f"#!/bin/sh\necho '{about}'\n")
    path.chmod(0o755)
    return str(path)


# ---- What is compiled again


def compiled_again(project: Path) -> set[str]:
    """The objects that ninja would make now."""
    command = [csrc.find_ninja(), "-n", "-v", "-f", csrc.write_plan(csrc.find_nvcc(), project)]
    printed = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout
    return {Path(word).name for line in printed.splitlines() for word in line.split() if word.endswith(".cu")}


def edit(file: Path) -> None:
    file.write_text(file.read_text() + "// edited\n")


@pytest.mark.usefixtures("needs_nvcc")
def test_an_edit_compiles_its_users_alone(project: Path) -> None:
    library = project / "package" / "library.so"
    csrc.build(library, project)
    printed = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert printed == "", "names are hidden unless the header shows them, the runtime's too"
    assert [log.name for log in csrc.logs(project)] == ["one.log", "two.log"]
    assert all("ptxas info" in log.read_text() for log in csrc.logs(project))

    assert compiled_again(project) == set()
    edit(project / "csrc" / "two.cu")
    assert compiled_again(project) == {"two.cu"}
    csrc.build(library, project)
    edit(project / "csrc" / "shared.cuh")
    assert compiled_again(project) == {"one.cu"}
    csrc.build(library, project)
    assert compiled_again(project) == set()
    (project / csrc.FOLDER / "nvcc.txt").write_text("another compiler made these")
    assert compiled_again(project) == {"one.cu", "two.cu"}


@pytest.mark.usefixtures("needs_nvcc")
def test_what_does_not_compile_says_so_and_how_to_go_on(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "csrc" / "two.cu").write_text("int two(void) { return zwei; }\n")
    with pytest.raises(csrc.BuildError, match="do not compile, see above; FASTLORA_BUILD_CUDA=0 installs without them"):
        csrc.build(project / "library.so", project)
    assert 'identifier "zwei" is undefined' in capfd.readouterr().out
    assert not (project / "library.so").exists()


# ---- What stands in the way


@pytest.mark.usefixtures("nothing_said", "no_nvcc")
def test_without_nvcc_nothing_is_built() -> None:
    assert csrc.obstacle() == (
        "there is no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda: install the CUDA toolkit, 12.5 or newer"
    )


@pytest.mark.usefixtures("no_nvcc")
def test_insisting_without_nvcc_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BUILD_CUDA", "1")
    with pytest.raises(csrc.BuildError, match=r"FASTLORA_BUILD_CUDA=1, but there is no nvcc .*: install the CUDA"):
        csrc.obstacle()


def test_it_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BUILD_CUDA", "0")
    assert csrc.obstacle() == "FASTLORA_BUILD_CUDA=0"


def test_another_setting_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BUILD_CUDA", "yes")
    with pytest.raises(csrc.BuildError, match="FASTLORA_BUILD_CUDA='yes' is unknown: expected 0, 1, or nothing"):
        csrc.obstacle()


@pytest.mark.usefixtures("nothing_said")
def test_an_old_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_nvcc(tmp_path, "Cuda compilation tools, release 12.4, V12.4.131")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert csrc.obstacle() == f"{path} is of CUDA 12.4: install 12.5 or newer, and set CUDA_HOME to it"


@pytest.mark.usefixtures("nothing_said")
def test_an_nvcc_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_nvcc(tmp_path, "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert csrc.obstacle() == (f"{path} does not say its release: install CUDA 12.5 or newer, and set CUDA_HOME to it")


@pytest.mark.usefixtures("nothing_said")
def test_without_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nvcc(tmp_path, "Cuda compilation tools, release 13.0, V13.0.88")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(csrc, "find_ninja", lambda: None)
    assert csrc.obstacle() == "there is no ninja: pip install ninja"


@pytest.mark.usefixtures("nothing_said")
def test_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert csrc.obstacle() == "the CUDA kernels are for Linux, this is darwin"


def test_cuda_home_comes_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = write_nvcc(tmp_path / "home", "release 13.1")
    write_nvcc(tmp_path / "path", "release 12.9")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'path' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert csrc.find_nvcc() == csrc.Nvcc(chosen, "release 13.1\n")
    assert csrc.find_nvcc().release == (13, 1)


# ---- Installs


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what an install reads, with the small project's kernels for our own."""
    pytest.importorskip("setuptools", minversion="77.0.3")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fastlora", tmp_path / "fastlora", ignore=ignored)
    (tmp_path / "csrc").mkdir()
    for name in (Path("csrc", "build.py"), csrc.CPU_SOURCE):
        shutil.copy(ROOT / name, tmp_path / name)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def setup(tree: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``setup.py``, as pip's isolated build calls it in the end."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("FASTLORA_BUILD")} | variables
    return subprocess.run(
        [sys.executable, "setup.py", *command], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )


def wheel(tree: Path, **variables: str) -> tuple[str, set[str], str]:
    """The name of the wheel, what is in it, and what was printed."""
    done = setup(tree, "bdist_wheel", **variables)
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*.whl")
    return path.name, set(zipfile.ZipFile(path).namelist()), done.stdout


@pytest.mark.usefixtures("needs_nvcc")
def test_a_wheel_with_the_library_is_of_its_platform_and_of_any_python(tree: Path) -> None:
    name, files, _ = wheel(tree)
    assert name.startswith("fastlora_kernels-0.1.0-py3-none-linux_")
    assert {"fastlora/libfastlora_cuda.so", "fastlora/backends/cuda.py", "fastlora/kernels/tiles.py"} <= files
    assert not any(file.startswith("csrc") for file in files)


def test_a_wheel_without_it_is_pure_and_says_so_in_one_line(tree: Path) -> None:
    name, files, printed = wheel(tree, FASTLORA_BUILD_CUDA="0", FASTLORA_BUILD_CPU="0")
    assert name == "fastlora_kernels-0.1.0-py3-none-any.whl"
    assert "fastlora/backends/cuda.py" in files
    assert not any(file.endswith(".so") for file in files)
    assert [line for line in printed.splitlines() if "without" in line] == [
        "fastlora is installed without its CUDA kernels: FASTLORA_BUILD_CUDA=0",
        "fastlora is installed without its CPU code: FASTLORA_BUILD_CPU=0",
    ]


@pytest.mark.skipif(csrc.find_cxx() is None, reason="no C++ compiler")
def test_a_wheel_with_the_cpu_code_alone(tree: Path) -> None:
    name, files, _ = wheel(tree, FASTLORA_BUILD_CUDA="0")
    assert name.startswith("fastlora_kernels-0.1.0-py3-none-")
    assert not name.endswith("-any.whl")
    assert [file for file in files if file.endswith(".so")] == ["fastlora/libfastlora_cpu.so"]


def test_cpu_code_that_does_not_compile_ends_the_install_in_words(tree: Path) -> None:
    (tree / csrc.CPU_SOURCE).write_text("int one(void) { return eins; }\n")
    done = setup(tree, "bdist_wheel", FASTLORA_BUILD_CUDA="0", CXX=csrc.find_cxx()[0])
    assert done.returncode != 0
    assert "the CPU code does not compile, see above; FASTLORA_BUILD_CPU=0 installs without it" in done.stderr


def test_no_cpu_code_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    assert csrc.cpu_obstacle() == "there is no C++ compiler: install g++ or clang++, or set CXX"
    with pytest.raises(csrc.BuildError, match="there is no C"):
        csrc.build_cpu()


def test_an_unknown_setting_of_the_cpu_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BUILD_CPU", "yes")
    with pytest.raises(csrc.BuildError, match="FASTLORA_BUILD_CPU='yes' is unknown: expected 0, or 1 to build"):
        csrc.cpu_obstacle()


def test_a_setting_that_cannot_be_met_ends_the_install_in_words(tree: Path) -> None:
    for source in (tree / "csrc").glob("*.cu"):
        source.unlink()
    done = setup(tree, "bdist_wheel", FASTLORA_BUILD_CUDA="1")
    assert done.returncode != 0
    assert done.stderr.strip() == f"error: FASTLORA_BUILD_CUDA=1, but there is no kernel in {tree / 'csrc'}"


@pytest.mark.usefixtures("needs_nvcc")
def test_build_ext_in_place_puts_it_into_the_package(tree: Path) -> None:
    assert setup(tree, "build_ext", "--inplace").returncode == 0
    assert (tree / "fastlora" / "libfastlora_cuda.so").is_file()


def test_the_source_distribution_holds_the_kernels_and_what_builds_them(tree: Path) -> None:
    done = setup(tree, "sdist", "--formats=zip", FASTLORA_BUILD_CUDA="0")
    assert done.returncode == 0, done.stderr
    (path,) = (tree / "dist").glob("*.zip")
    files = {name.partition("/")[2] for name in zipfile.ZipFile(path).namelist()}
    assert {*FILES, "csrc/build.py", str(csrc.CPU_SOURCE), "setup.py", "fastlora/kernels/tiles.py"} <= files


def test_a_wheel_has_the_tables_of_gpus(tree: Path) -> None:
    tables = tree / "fastlora" / "backends" / "tables"
    tables.mkdir(exist_ok=True)
    (tables / "a-gpu.json").write_text("{}")
    _, files, _ = wheel(tree, FASTLORA_BUILD_CUDA="0", FASTLORA_BUILD_CPU="0")
    assert "fastlora/backends/tables/a-gpu.json" in files
