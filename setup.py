"""Installs fastlora: Python, and the CUDA kernels and CPU code (``csrc/build.py``) where there is a compiler for them.

``kernels/`` is installed as ``fastlora.kernels`` through the symlink ``fastlora/kernels``. ``FASTLORA_BUILD_CUDA=0|1``
keeps the CUDA kernels out or insists on them, ``FASTLORA_BUILD_CPU=0`` keeps the CPU code out.
"""

import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

_ROOT = Path(__file__).resolve().parent
_INIT = (_ROOT / "fastlora" / "__init__.py").read_text()

sys.path.insert(0, str(_ROOT))  # pip leaves it out
from csrc import build as csrc  # noqa: E402

try:
    _OBSTACLE, _CPU_OBSTACLE = csrc.obstacle(), csrc.cpu_obstacle()
except csrc.BuildError as error:
    sys.exit(f"error: {error}")


def _say_what_is_missing() -> None:
    if _OBSTACLE is not None:
        print(f"fastlora is installed without its CUDA kernels: {_OBSTACLE}")
    if _CPU_OBSTACLE is not None:
        print(f"fastlora is installed without its CPU code: {_CPU_OBSTACLE}")


class _BuildPython(build_py):
    def run(self) -> None:
        _say_what_is_missing()
        super().run()


class _BuildLibrary(build_ext):
    """The extensions are plain shared libraries, for ctypes: any Python loads them."""

    def run(self) -> None:
        if self.extensions:
            super().run()
        else:
            _say_what_is_missing()

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            if ext.name.endswith(csrc.CPU_NAME):
                csrc.build_cpu(library)
            else:
                csrc.build(library)
        except csrc.BuildError as error:
            sys.exit(f"error: {error}")

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


class _Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        platform: str = super().get_tag()[2]
        return "py3", "none", platform


setup(
    version=re.search(r'^__version__ = "(.+)"$', _INIT, re.MULTILINE).group(1),  # type: ignore[union-attr]
    packages=[
        "fastlora",
        "fastlora.adapters",
        "fastlora.backends",
        "fastlora.kernels",
        "fastlora.loralib",
        "fastlora.measure",
        "fastlora.ops",
        "fastlora.peft",
        "fastlora.tune",
    ],
    package_data={"fastlora": ["py.typed", "backends/tables/*.json"]},
    ext_modules=[
        Extension(f"fastlora.{name}", sources=[])
        for name, obstacle in ((csrc.NAME, _OBSTACLE), (csrc.CPU_NAME, _CPU_OBSTACLE))
        if obstacle is None
    ],
    cmdclass={"build_py": _BuildPython, "build_ext": _BuildLibrary, "bdist_wheel": _Wheel},
)
