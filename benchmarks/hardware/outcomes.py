"""What the tests of a run say of each kernel: read from the log that tests/conftest.py writes as they end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fastlora.backends import cuda, dispatch

STARTED, PASSED, SKIPPED = "started", "passed", "skipped"
# Those that take the process with them.
FATAL = ("crashed", "hung", "lost")

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_AROUND = "tests/test_gpu_integration.py"
_REAL = "tests/test_gpu.py::test_step_against_the_oracle"


class Outcome(NamedTuple):
    """How one test ended, and for a failure why, in a line."""

    test: str
    outcome: str
    why: str = ""

    @property
    def is_failure(self) -> bool:
        """True for anything but passed and skipped."""
        return self.outcome not in (PASSED, SKIPPED, STARTED)

    def __str__(self) -> str:
        return f"{self.outcome.upper()} {self.test}{f': {self.why}' if self.why else ''}"


class Check(NamedTuple):
    """What one test proves something about."""

    verb: str
    kernel: str
    dtype: str


def read(path: Path) -> list[Outcome]:
    """The lines of a log, the last one left out where it is cut off."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [Outcome(**json.loads(line)) for line in lines if line.endswith("\n")]


def by_test(outcomes: Iterable[Outcome]) -> dict[str, Outcome]:
    """One outcome a test: ``started`` alone where it never ended, and of several endings the worst."""
    worst: dict[str, Outcome] = {}
    for outcome in outcomes:
        before = worst.get(outcome.test)
        if before is None or _rank(outcome) >= _rank(before):
            worst[outcome.test] = outcome
    return worst


def _rank(outcome: Outcome) -> int:
    # Of a worker that a lost GPU ended, xdist says no more than that it is gone.
    return {STARTED: 0, SKIPPED: 1, PASSED: 1, "lost": 4}.get(outcome.outcome, 3 if outcome.outcome in FATAL else 2)


def checks(test: str) -> Iterator[Check]:
    """What a test is about, by its id: its kernels, or ``rank_grad`` of a family, in one dtype."""
    file, _, name = test.partition("::")
    function, _, parameters = name.partition("[")
    dtype = _dtype(function, parameters)
    if "test_rank_grad" in function:
        yield Check("rank_grad", "cuda" if "csrc" in file else "triton", dtype)
        return
    for kernel in _kernels(file, function, parameters):
        yield Check("lora_matmul", kernel, dtype)


def _dtype(function: str, parameters: str) -> str:
    words = re.findall(r"(?:^|-)(bf16|fp16|fp32)(?=[-_\]])", parameters)
    if not words and function in ("test_fp32_operands", "test_float32_operands"):
        words = ["fp32"]
    return _DTYPES[words[0] if words else "bf16"]


def _kernels(file: str, function: str, parameters: str) -> list[str]:
    names = [kernel.name for kernel in dispatch.KERNELS["lora_matmul"] if kernel.name != "reference"]
    if "csrc" in file:
        named = [f"cuda-{design}" for design in cuda.DESIGNS if _is_word(design, parameters)]
        return named or [name for name in names if name.startswith("cuda")]
    named = [name for name in names if _is_word(name, parameters)]
    if named:
        return named
    triton = [name for name in names if name.startswith("triton")]
    if "mask_bits" in function or _is_word("triton", parameters):
        return triton
    if file.endswith(("test_skinny.py", "test_skinny_group.py")):
        return ["triton-skinny"]
    if file.endswith("test_kernels.py"):
        own = "triton-serial" if function == "test_every_tile_row" else None
        return [name for name in triton if name == own or name.removeprefix("triton-") in function]
    return ["library"] if "library" in function else []


def _is_word(name: str, parameters: str) -> bool:
    """Whether a name is one of the parameters of an id, which are joined by hyphens."""
    return re.search(rf"(?:^|-){re.escape(name)}(?=[-\]])", parameters) is not None


class Tally(NamedTuple):
    """Of one kernel, verb and dtype: checks that passed and failed, and how many of the passed are whole real steps."""

    passed: int = 0
    failed: int = 0
    real: int = 0


def tallies(outcomes: Mapping[str, Outcome]) -> dict[Check, Tally]:
    """The checks that ran, counted.

    For ``rank_grad`` a whole step of its family counts as a real size, not as a check.
    """
    found: dict[Check, Tally] = {}
    for test, outcome in outcomes.items():
        if outcome.outcome in (SKIPPED, STARTED):
            continue
        for check in checks(test):
            tally = found.get(check, Tally())
            passed = outcome.outcome == PASSED
            real = passed and test.startswith(_REAL)
            found[check] = Tally(tally.passed + passed, tally.failed + (not passed), tally.real + real)
            if real and check.kernel != "library":
                family = check._replace(verb="rank_grad", kernel=check.kernel.partition("-")[0])
                tally = found.get(family, Tally())
                found[family] = tally._replace(real=tally.real + 1)
    return found


def unfit(outcomes: Mapping[str, Outcome]) -> dict[str, str]:
    """The kernels that are not to be timed, which is done in bfloat16, and the first reason of each.

    Wrong in bfloat16, or ended a process in any dtype; a family's ``rank_grad`` counts for all of its kernels. What
    runs around the kernels, such as torch.compile, may fail.
    """
    found: dict[str, str] = {}
    for test, outcome in outcomes.items():
        if not outcome.is_failure:
            continue
        for check in checks(test):
            may_fail = check.dtype != "bfloat16" or test.startswith(_AROUND)
            if may_fail and outcome.outcome not in FATAL:
                continue
            of_family = check.verb == "rank_grad"
            for kernel in dispatch.KERNELS["lora_matmul"]:
                if kernel.name == check.kernel or (of_family and kernel.name.startswith(f"{check.kernel}-")):
                    found.setdefault(kernel.name, str(outcome))
    return found
