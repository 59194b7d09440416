"""README's table by GPU and docs/gpu.md: what they say is what the code does, by name."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from benchmarks.layers.arms import arms
from fastlora import info
from fastlora.backends import dispatch
from tests import by_gpu

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
KERNELS = [kernel.name for kernel in dispatch.KERNELS["lora_matmul"]]


def test_the_readmes_table_is_what_dispatch_answers() -> None:
    found = README.split("<!-- by_gpu:start -->\n")[1].split("\n<!-- by_gpu:end -->")[0]
    assert found == by_gpu.table(), "README.md: put there what `python -m tests.by_gpu` prints"


def test_the_table_has_every_architecture_of_the_ledger() -> None:
    ledger = set(re.findall(r"\| (sm_\d+|gfx\w+) \|", by_gpu.LEDGER.read_text(encoding="utf-8")))
    named = {match[1] for row in by_gpu.rows() if (match := re.search(r"\((\w+)\)$", row.device))}
    assert ledger <= named


def test_the_words_around_the_table_say_what_has_run() -> None:
    """As soon as something has, the page and the README must say what."""
    if all(row.run == "nothing yet" for row in by_gpu.rows() if row.device != "CPU"):
        assert "Nothing of this has run on a GPU yet" in README
        assert "Nothing has run on a GPU yet" in PAGE
    else:
        assert "has run on a GPU yet" not in README + PAGE


@pytest.mark.parametrize(
    ("device", "default", "forced"),
    [
        ("T4, and older (sm_75)", "`library`", "nothing else"),
        ("A100 (sm_80)", "`triton-skinny`", "`triton-portable`, `library`"),
        ("B200 (sm_100)", "`triton-skinny`", "`triton-serial` (16-bit), `triton-portable`, `library`"),
    ],
)
def test_the_table_tells_architectures_apart(device: str, default: str, forced: str) -> None:
    row = next(row for row in by_gpu.rows() if row.device == device)
    assert (row.default, row.forced) == (default, forced)


def test_what_has_passed_on_a_gpu_is_in_its_row() -> None:
    row = "| {} | lora_matmul | sm_80 | {} | gate | {} |\n"
    ledger = row.format("triton-skinny", "bfloat16", "A100, 1a2b3c4: 9 checks passed")
    ledger += row.format("triton-portable", "bfloat16", "A100, 1a2b3c4: failed: nothing was passed")
    a100 = next(row for row in by_gpu.rows(ledger) if row.device == "A100 (sm_80)")
    assert (a100.proven, a100.run) == ("compiled", "`triton-skinny` (bfloat16)")


def variables() -> set[str]:
    """Every FASTLORA_ name that the package, its build and the benchmarks have as a whole string."""
    files = [ROOT / "setup.py", ROOT / "csrc" / "build.py"]
    files += [path for folder in ("fastlora", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    strings = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in strings if re.fullmatch(r"FASTLORA_[A-Z_]+", text)}


def test_the_page_has_every_variable_and_no_other() -> None:
    rows = re.findall(r"^\| `(FASTLORA_\w+)` \|", PAGE, re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == variables(), "docs/gpu.md: the table of environment variables"
    assert {name for name in info.VARIABLES if name.startswith("FASTLORA_")} <= set(rows)


def test_no_page_names_a_variable_that_nothing_reads() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "csrc").glob("*.*") if path.suffix != ".md"]
    known = variables() | set(re.findall(r"FASTLORA_[A-Z_0-9]+", "".join(sources)))
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "csrc" / "README.md"]
    named = {(page.name, name) for page in pages for name in re.findall(r"FASTLORA_[A-Z_]+", page.read_text())}
    assert {(page, name) for page, name in named if name not in known} == set()


def test_commands_and_arms_of_the_page_exist() -> None:
    commands = re.findall(r"^python -m ([\w.]+)(.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 7
    for module, options in commands:
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        folder = Path(spec.origin or "").parent
        sources = "".join(path.read_text(encoding="utf-8") for path in [*folder.rglob("*.py")])
        for option in re.findall(r"--[a-z]+", options):
            assert f'"{option}"' in sources, (module, option)
        if "--arm" in options:
            assert set(options.split("--arm")[1].split()) <= set(arms())
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in targets for target in re.findall(r"`make ([\w-]+)`", PAGE))


def test_kernels_and_extras_of_the_page_exist() -> None:
    for name in re.findall(r"`((?:triton|cuda)-[\w]+)`", PAGE):
        assert name in KERNELS
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    extras = re.findall(r"^(\w+) = ", project.split("\n[")[0], re.MULTILINE)
    assert re.findall(r"^\| `(\w+)` \| \S+", PAGE.split("## Extras")[1].split("\n## ")[0], re.MULTILINE) == extras
