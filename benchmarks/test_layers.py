"""pytest-benchmark cases for regressions: ``pytest benchmarks``, then ``pytest-benchmark compare``.

Tiny layers on a CPU, real ones where there is a GPU. Each arm passes the accuracy gate first. The clock stops when
the device is done; ``extra_info`` holds the device's own time and the environment. No time is asserted.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastlora.clock import Clock, Hold, Work

from .cases import MODES, Case
from .layers.arms import arms
from .layers.gate import Gate
from .layers.operands import make_operands
from .layers.work import broken, prepare
from .measure.failures import AbsentError
from .records import environment
from .records.rows import Spread

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CASES = (
    [Case("llama3-8b.q", 8192, 16, "bf16", 0.0), Case("llama3-8b.kv", 8192, 16, "bf16", 0.1)]
    if ON_GPU
    else [
        Case("64x48", 40, 8, "fp32", 0.0),
        Case("256x192+64", 40, 8, "fp32", 0.0),
        Case("roberta-base.query", 64, 8, "bf16", 0.1),
    ]
)
ROUNDS = 31 if ON_GPU else 5
WARM_UP = 3
ARMS = [name for name, arm in arms().items() if not arm.by_name_only]


@functools.cache
def _environment() -> dict[str, Any]:
    return environment.describe(DEVICE, "pytest", {"rounds": ROUNDS}, len(CASES))


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _synchronised(work: Work) -> None:
    work()
    _wait()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(case: Case, name: str, mode: str, benchmark: BenchmarkFixture) -> None:
    """One arm in one mode of one case."""
    arm, operands, clock = arms()[name], make_operands(case, DEVICE), Clock(DEVICE)
    hold = Hold()
    if reason := arm.absence(DEVICE):
        pytest.skip(reason)
    calls = itertools.count()
    with arm.turn():
        try:
            errors = Gate(case, operands).check(arm)
            built = arm.build(case, operands, case.dropout)
        except AbsentError as absent:
            pytest.skip(str(absent))
        assert [f"{result}: {error}" for result, error in errors.items() if not error.ok] == []
        benchmark.group = f"{case}  {mode}"
        assert broken(built, operands) is None

        def set_up() -> tuple[tuple[Work], dict[str, object]]:
            work = prepare(mode, built, operands, next(calls))
            _wait()
            return (work,), {}

        benchmark.pedantic(  # type: ignore[no-untyped-call]
            _synchronised,
            setup=set_up,
            rounds=ROUNDS,
            warmup_rounds=WARM_UP,
        )
        samples = [clock.device(prepare(mode, built, operands, next(calls)), hold) for _ in range(ROUNDS)]
    times = [ms for ms in samples if ms is not None]
    benchmark.extra_info.update(
        kernel=built.kernel,
        device_ms=Spread.of(times)._asdict() if times else None,
        environment=_environment(),
    )
