"""What the worker does, in this process: faults of a kernel are seen, and times are of what runs in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora.backends import dispatch, library
from fastlora.backends.request import Kernel, Product
from fastlora.tune import plan, work
from fastlora.tune.layers import Layer
from fastlora.tune.plan import Case, Size
from tests.cases import kernel_named

CPU = torch.device("cpu")
CASE = Case(33, 40, 24, 5, "float32", "float32", True, True, repeats=20)
LIBRARY = {verb: kernel_named("library", verb) for verb in dispatch.KERNELS}
CASES = [
    CASE,
    CASE._replace(dropout=False, bias=False, repeats=1),
    CASE._replace(dtype="bfloat16", adapter_dtype="bfloat16", r=16),
    CASE._replace(dtype="float16"),
    CASE._replace(m=1, repeats=1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("verb", dispatch.KERNELS)
def test_what_is_right_passes(verb: str, case: Case) -> None:
    for kernel in LIBRARY[verb].ways("run"):
        assert work.check(verb, kernel, case, CPU) == ("passed", "")


def changed(change: Callable[[Tensor], object], of: int = 0) -> Kernel:
    """The library with one result of ``run`` changed: y or dx, or z or t."""

    def run(p: Product) -> tuple[Any, ...]:
        made = library.lora_matmul(p)
        change(made[of])  # type: ignore[arg-type]
        return made

    return LIBRARY["lora_matmul"]._replace(run=run)


def off_by_one_element(t: Tensor) -> None:
    t[-1, -1] += 0.1


def other_bits_now_and_then() -> Callable[[Tensor], None]:
    calls = iter(range(10_000))

    def change(t: Tensor) -> None:
        # Within the error rule: only the bits tell.
        if next(calls) == 30:
            t[0, 0] = torch.nextafter(t[0, 0], torch.tensor(torch.inf))

    return change


@pytest.mark.parametrize("of", [0, 1])
def test_one_wrong_element_fails(of: int) -> None:
    outcome, why = work.check("lora_matmul", changed(off_by_one_element, of), CASE, CPU)
    assert outcome == "failed"
    assert why.startswith(("y: rms error", "z: rms error")[of])


def test_other_bits_in_one_of_twenty_runs_fail() -> None:
    outcome, why = work.check("lora_matmul", changed(other_bits_now_and_then()), CASE, CPU)
    assert (outcome, why) == ("failed", "y has other bits in run 16")


def test_memory_that_nobody_wrote_fails() -> None:
    def run(p: Product) -> tuple[Any, ...]:
        y, z = library.lora_matmul(p)
        assert y is not None
        made = torch.empty_like(y)
        made[:, 1:] = y[:, 1:]
        return made, z

    outcome, why = work.check("lora_matmul", LIBRARY["lora_matmul"]._replace(run=run), CASE, CPU)
    assert outcome == "failed"
    assert why.startswith("y: is nan at (0, 0), oracle ")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_kernels_own_gradients_are_checked() -> None:
    def gradients(p: Product, dy: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dx, da, db = library.gradients(p, dy, z)
        off_by_one_element(db)
        return dx, da, db

    outcome, why = work.check("lora_matmul", LIBRARY["lora_matmul"]._replace(gradients=gradients), CASE, CPU)
    assert outcome == "failed"
    assert why.startswith("db of gradients: rms error")


def test_a_wrong_adapter_gradient_fails() -> None:
    def run(p: Tensor, q: Tensor, **options: Any) -> Tensor:
        return library.rank_grad(p, q, **options).mul_(1.01)

    outcome, why = work.check("rank_grad", LIBRARY["rank_grad"]._replace(run=run), CASE, CPU)
    assert outcome == "failed"
    assert why.startswith("da: rms error")


def test_a_mask_that_is_left_out_fails() -> None:
    kernel = LIBRARY["lora_matmul"]._replace(run=lambda p: library.lora_matmul(p._replace(seed=None)), gradients=None)
    assert work.check("lora_matmul", kernel, CASE, CPU).outcome == "failed"
    assert work.check("lora_matmul", kernel, CASE._replace(dropout=False), CPU).outcome == "passed"


def test_a_refusal_is_no_failure() -> None:
    kernel = LIBRARY["lora_matmul"]._replace(refuses=lambda request: "not today" if request.backward else None)
    assert work.check("lora_matmul", kernel, CASE, CPU) == ("refused", "not today")


LAYER = Layer(40, 24, 5, torch.float32, torch.float32, True, False)
SIZES = plan.sizes_of(LAYER, 33, dropout=True)
GRADS = {"da": "library", "db": "library:narrow"}


@pytest.mark.parametrize("direction", SIZES)
def test_every_way_is_timed_in_every_round(direction: str) -> None:
    size = SIZES[direction]
    ways = LIBRARY[size.verb].ways("gradients" if direction == "backward" else "run")
    names = [kernel.name for kernel in ways]
    told: list[str] = []
    times = work.measure(size, names, "library", GRADS, CPU, 0.0, told.append)
    assert list(times.samples) == names
    assert {len(samples) for samples in (*times.samples.values(), times.again)} == {7}
    assert min(min(samples) for samples in times.samples.values()) > 0
    assert times.wrong == {}
    assert list(dict.fromkeys(told)) == names


def replace(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """Puts a kernel beside the others, under the name of one that is not timed here."""
    others = tuple(k for k in dispatch.KERNELS["lora_matmul"] if k.name != "triton-portable")
    monkeypatch.setitem(dispatch.KERNELS, "lora_matmul", (*others, kernel._replace(name="triton-portable", forms=())))


def test_what_is_wrong_at_the_size_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, changed(off_by_one_element))
    size = SIZES["forward"]
    times = work.measure(size, ["library", "triton-portable"], "library", GRADS, CPU, 0.0, lambda name: None)
    assert list(times.samples) == ["library"]
    assert times.wrong["triton-portable"].startswith("y: rms error")


def test_a_backward_is_timed_as_eager_code_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    size = SIZES["backward"]
    runs: list[str] = []

    def noted(kernel: Kernel, word: str) -> Kernel:
        return kernel._replace(run=lambda *p, **options: runs.append(word) or kernel.run(*p, **options))

    replace(monkeypatch, noted(LIBRARY["lora_matmul"], "dx")._replace(gradients=None))
    grad = LIBRARY["rank_grad"]
    forms = tuple(noted(form, form.name) for form in grad.forms)
    monkeypatch.setitem(dispatch.KERNELS, "rank_grad", (noted(grad, "library")._replace(forms=forms),))
    work.measure(size, ["triton-portable"], "triton-portable", GRADS, CPU, 0.0, lambda name: None)
    assert runs[:3] == ["dx", "library", "library:narrow"]
    assert len(runs) % 3 == 0


def test_too_little_memory_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(p: Product) -> tuple[Any, ...]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more words")

    replace(monkeypatch, LIBRARY["lora_matmul"]._replace(run=run))
    size = Size("lora_matmul", "forward", 8, 40, 24, 4, "float32", "float32", False)
    times = work.measure(size, ["library", "triton-portable"], "library", GRADS, CPU, 0.0, lambda name: None)
    assert list(times.samples) == ["library"]
    assert times.wrong == {}
