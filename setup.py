"""Installs fastlora; ``kernels/`` is installed as ``fastlora.kernels`` through the symlink ``fastlora/kernels``."""

import re
from pathlib import Path

from setuptools import setup

_INIT = (Path(__file__).parent / "fastlora" / "__init__.py").read_text()

setup(
    version=re.search(r'^__version__ = "(.+)"$', _INIT, re.MULTILINE).group(1),  # type: ignore[union-attr]
    packages=["fastlora", "fastlora.kernels"],
    package_data={"fastlora": ["py.typed"]},
)
