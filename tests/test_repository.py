"""What must stay true of the tree itself: what imports what, what an import costs, and what the ledger proves."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

from fastlora.backends import measured
from fastlora.backends.machine import Machine
from fastlora.backends.measured import Bucket, Proof, Table

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastlora"
KERNELS = ROOT / "kernels"
LEDGER = ROOT / "benchmarks" / "HARDWARE.md"

# Top to bottom: a file imports from its own folder and from lower floors, and wings never name each other.
FLOORS: tuple[set[str], ...] = (
    {"__main__"},
    {"info", "measure", "merge", "module_group", "parallel", "tune", "while_merged"},
    {"module", "adapters", "peft", "loralib"},
    {"gated"},
    {"mergeable", "accuracy", "siblings", "sibling_names"},
    {"ownership", "quantised"},
    {"ops"},
    {"backends"},
    {"described", "error_rule"},
    {"kernels", "atomic", "clock", "dtypes", "eager", "memory", "start", "text", "variables"},
)

# Files that import an optional dependency as they load, and so are imported inside functions only.
NEEDS = {
    "fastlora.adapters.trainer": {"transformers"},
    "fastlora.peft.layer": {"peft", "transformers"},
    "fastlora.peft.dora": {"peft"},
    "fastlora.peft.quantised": {"peft"},
}


def run_python(code: str) -> str:
    """What a fresh interpreter, started at the root of the repository, prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_modules(path: Path, package: str) -> set[str]:
    """Full names of everything the file imports, anywhere in it, relative imports resolved."""
    return names_imported(ast.parse(path.read_text(encoding="utf-8")), package)


def names_imported(tree: ast.Module, package: str) -> set[str]:
    """Full names of everything a syntax tree imports, relative imports resolved."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def package_of(file: Path) -> str:
    """What relative imports in a file of fastlora/ are relative to."""
    return ".".join(file.relative_to(ROOT).parent.parts)


def module_of(file: Path) -> str:
    """The full name of a file of fastlora/, that of its folder for an ``__init__.py``."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    """The folder or file right inside fastlora/ that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


PACKAGE_FILES = sorted(file for file in PACKAGE.rglob("*.py") if "kernels" not in file.parts)
MODULES = {module_of(file): file for file in PACKAGE_FILES}
SUBPACKAGES = sorted(file.parent.name for file in PACKAGE.glob("*/__init__.py"))
KERNEL_FILES = sorted(KERNELS.glob("*.py"))


def test_the_tests_look_at_files_that_exist() -> None:
    assert {"fastlora", "fastlora.module", "fastlora.ops.autograd", "fastlora.backends.dispatch"} <= set(MODULES)
    assert {part_of(module) for module in MODULES} | {"kernels"} == {"__init__"}.union(*FLOORS)


def test_every_package_is_installed() -> None:
    packages = re.search(r"packages=(\[.*?\])", (ROOT / "setup.py").read_text(encoding="utf-8"), re.DOTALL).group(1)
    assert set(ast.literal_eval(packages)) == {"fastlora", "fastlora.kernels", *(f"fastlora.{p}" for p in SUBPACKAGES)}


def test_kernels_is_a_namespace_folder_reached_through_a_symlink() -> None:
    """With an ``__init__.py`` it would be a top-level package that shadows the one of Hugging Face."""
    assert not (KERNELS / "__init__.py").exists()
    assert (PACKAGE / "kernels").is_symlink()
    assert (PACKAGE / "kernels").resolve() == KERNELS
    paths = run_python("import fastlora.kernels as k; print(k.__file__, *k.__path__)").split()
    assert paths == ["None", str(PACKAGE / "kernels")]


def test_import_brings_nothing_but_torch_and_touches_no_gpu() -> None:
    printed = run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastlora\n"
        "print(*sorted(name for name in set(sys.modules) - before if not name.startswith('fastlora')))\n"
        "print('triton' in sys.modules, torch.cuda.is_initialized())\n"
    )
    extra, facts = printed.split("\n")[:2]
    assert [name for name in extra.split() if name.split(".")[0] not in {*sys.stdlib_module_names, "torch"}] == []
    assert facts == "False False"


def test_public_names() -> None:
    import fastlora

    assert fastlora.__all__ == [
        "AdapterStatus",
        "Branch",
        "LoRALinear",
        "LoRALinearGroup",
        "PatchReport",
        "StoredWeight",
        "__version__",
        "adapter_status",
        "delete_adapter",
        "disable",
        "dora_linear",
        "enable",
        "explain",
        "inject",
        "load_adapter",
        "lora_linear",
        "lora_linear_group",
        "lora_swiglu_mlp",
        "measure",
        "merge_adapter",
        "merge_and_unload",
        "merged",
        "patch_peft",
        "patched_peft",
        "save_adapter",
        "set_adapter",
        "tune_model",
        "unload",
        "unmerge_adapter",
        "unpatch_peft",
    ]
    assert all(hasattr(fastlora, name) for name in fastlora.__all__)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_transformers_imports_from_the_root() -> None:
    printed = run_python("from transformers import LlamaConfig, LlamaForCausalLM; print(LlamaForCausalLM.__name__)")
    assert printed.split() == ["LlamaForCausalLM"]


@pytest.mark.parametrize("module", [name for name in MODULES if name != "fastlora"])
def test_imports_go_down_only(module: str) -> None:
    part = part_of(module)
    floor = next(i for i, floor in enumerate(FLOORS) if part in floor)
    imported = {name for name in imported_modules(MODULES[module], package_of(MODULES[module])) if "fastlora." in name}
    allowed = {part, "__version__"}.union(*FLOORS[floor + 1 :])
    assert {part_of(name) for name in imported} <= allowed


def test_nothing_is_measured_inside_of_a_step() -> None:
    """The clock is for the tuner, for ``measure`` and for the benchmarks: nothing that a step runs imports it."""
    meters = {"fastlora.clock", "fastlora.memory"}
    metered = {name for name, file in MODULES.items() if meters & imported_modules(file, package_of(file))}
    assert {part_of(module) for module in metered} == {"measure", "tune"}


def test_no_import_cycles() -> None:
    files = {module: file for module, file in MODULES.items() if file.stem != "__init__"}
    graph = {module: imported_modules(file, package_of(file)) & set(files) - {module} for module, file in files.items()}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("file", PACKAGE_FILES + KERNEL_FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_package_imports_neither_tests_nor_benchmarks(file: Path) -> None:
    tops = {name.split(".")[0] for name in imported_modules(file, package_of(file))}
    assert tops & {"benchmarks", "tests", "pytest", "hypothesis", "numpy"} == set()


@pytest.mark.parametrize("file", KERNEL_FILES, ids=lambda file: file.stem)
def test_kernels_import_nothing_above_them(file: Path) -> None:
    ours = {name for name in imported_modules(file, "fastlora.kernels") if name.split(".")[0] == "fastlora"}
    assert all(name.startswith("fastlora.kernels") for name in ours), ours


def imported_at_the_top(path: Path) -> set[str]:
    """Full names of what loading the file imports: not what its functions, ``try`` and ``if`` blocks do."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return names_imported(tree, package_of(path))


@pytest.mark.parametrize("file", PACKAGE_FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_optional_dependencies_are_not_imported_at_the_top(file: Path) -> None:
    """A backend imports its compiler inside a function or under ``try``, never on the way to ``import fastlora``."""
    roots = {name.split(".")[0] for name in imported_at_the_top(file)}
    assert roots <= {*sys.stdlib_module_names, "torch", "fastlora"} | NEEDS.get(module_of(file), set())


def test_import_fastlora_reaches_no_file_with_an_optional_dependency() -> None:
    reached: set[str] = set()
    new = {"fastlora"}
    while new:
        reached |= new
        new = set().union(*(imported_at_the_top(MODULES[module]) for module in new)) & set(MODULES) - reached
    assert {"fastlora.module", "fastlora.ops.autograd", "fastlora.peft.patch", "fastlora.adapters.saving"} <= reached
    assert reached & set(NEEDS) == set()


class Line(NamedTuple):
    """What a line of the ledger begins with."""

    kernel: str
    verb: str
    capability: str
    dtype: str


def is_proven(ledger: str, line: Line) -> bool:
    """Whether a row is of this very kernel, verb, architecture and dtype, and the run it reports passed."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in ledger.splitlines() if row[:1] == "|"]
    passed = re.compile(r"[^:]+: (\d+ checks (of fastlora\.tune )?)?passed")
    return any(row[:4] == list(line) and passed.fullmatch(row[-1]) is not None for row in rows)


def lacking(tables: Path, ledger: str) -> list[Line]:
    """The proofs in the package's tables that no line of the ledger shows, and the kernels that win without one."""
    found = []
    for path in sorted(tables.glob("*.json")):
        table = Table.parse(path.read_text(encoding="utf-8"))
        assert path.stem == table.machine.slug
        capability = table.machine.capability
        proven = {Line(p.kernel, p.verb, capability, p.dtype) for p in table.proofs if p.passed}
        winning = {Line(b.best.partition(":")[0], b.verb, capability, b.dtype) for b in table.buckets if b.best}
        found += [line for line in proven | winning if line.kernel != "library" and not is_proven(ledger, line)]
    return sorted(set(found))


def test_every_table_of_the_package_has_its_lines_in_the_ledger() -> None:
    assert lacking(measured.PACKAGE_TABLES, LEDGER.read_text(encoding="utf-8")) == []


def test_a_table_without_its_lines_is_found(tmp_path: Path) -> None:
    machine = Machine("NVIDIA H200", "sm_90", "570", "2.13.0", "3.6.0", "", "0123456789ab")
    proof = Proof("lora_matmul", "triton-serial", "bfloat16", 9, True, "", "2026-11-25")
    failed = proof._replace(kernel="cuda-serial", passed=False)
    bucket = Bucket(
        "lora_matmul", "forward", "bfloat16", "bfloat16", False, 64, 64, 64, 8, {}, "library", "cuda-z_jobs", 1.2, ""
    )
    (tmp_path / "nvidia-h200.json").write_text(Table(machine, (proof, failed), (bucket,)).text())
    z_jobs = LINE._replace(kernel="cuda-z_jobs")
    assert lacking(tmp_path, "") == [z_jobs, LINE]
    row = "| {} | {} | {} | {} | gate | H200, 1a2b3c4: passed |\n"
    assert lacking(tmp_path, row.format(*LINE)) == [z_jobs]
    assert lacking(tmp_path, row.format(*LINE) + row.format(*z_jobs)) == []


LINE = Line("triton-serial", "lora_matmul", "sm_90", "bfloat16")


@pytest.mark.parametrize(
    ("row", "proven"),
    [
        ("| triton-serial | lora_matmul | sm_90 | bfloat16 | gate | H200, 1a2b3c4: passed |", True),
        ("| triton-serial | lora_matmul | sm_90 | bfloat16 | gate | not yet run on hardware |", False),
        ("| triton-serial | lora_matmul | sm_90 | bfloat16 | gate | H200, 1a2b3c4: 9 checks passed |", True),
        ("| triton-serial | lora_matmul | sm_90 | bfloat16 | gate | H200, 1a2b3c4: 1 of 9 checks failed |", False),
        (
            "| triton-serial | lora_matmul | sm_90 | bfloat16 | gate | H200, 1a2b: 9 checks of fastlora.tune passed |",
            True,
        ),
        ("| triton-serial | lora_matmul | sm_90 | bfloat16 | gate | H200, 1a2b: failed: nothing was passed |", False),
        ("| triton-portable | lora_matmul | sm_90 | bfloat16 | gate | H200, 1a2b3c4: passed |", False),
        ("| triton | rank_grad | sm_90 | bfloat16 | gate | H200, 1a2b3c4: passed |", False),
        ("| triton-serial | rank_grad | sm_90 | bfloat16 | gate | H200, 1a2b3c4: passed |", False),
        ("| triton-serial | lora_matmul | sm_80 | bfloat16 | gate | A100, 1a2b3c4: passed |", False),
        ("| triton-serial | lora_matmul | sm_90 | float16 | gate | H200, 1a2b3c4: passed |", False),
        ("triton-serial lora_matmul on sm_90 in bfloat16 is mentioned in passing", False),
    ],
)
def test_only_a_kernels_own_line_proves_it(row: str, proven: bool) -> None:
    assert is_proven(f"# Ledger\n\n{row}\n", LINE) == proven
