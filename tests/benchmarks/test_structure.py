"""The drawers of benchmarks/: imports go down only, and never in a circle."""

from __future__ import annotations

import logging
from graphlib import TopologicalSorter

import pytest

import benchmarks

from ..test_repository import ROOT, imported_modules, module_of, package_of

# Top to bottom: a file imports from its own drawer and from lower floors.
FLOORS = (
    {"__main__", "hardware"},
    {"report", "test_layers"},
    {"paper"},
    {"model"},
    {"layers", "predict"},
    {"measure"},
    {"records"},
    {"cases"},
    {"names"},
)
FILES = {module_of(file): file for file in (ROOT / "benchmarks").rglob("*.py") if file.name != "__init__.py"}


def drawer_of(module: str) -> str:
    return module.split(".")[1]


def ours(module: str) -> set[str]:
    """The modules of benchmarks/ that a module imports."""
    return imported_modules(FILES[module], package_of(FILES[module])) & set(FILES) - {module}


def test_every_drawer_has_a_floor() -> None:
    assert {drawer_of(module) for module in FILES} == set().union(*FLOORS)


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down_only(module: str) -> None:
    drawer = drawer_of(module)
    floor = next(i for i, floor in enumerate(FLOORS) if drawer in floor)
    assert {drawer_of(name) for name in ours(module)} <= {drawer}.union(*FLOORS[floor + 1 :])


def test_no_import_cycles() -> None:
    TopologicalSorter({module: ours(module) for module in FILES}).prepare()


def test_a_warning_of_bitsandbytes_is_left_out() -> None:
    assert benchmarks.__name__ == "benchmarks"
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.ERROR
