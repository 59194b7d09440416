"""The seam: every backend gives the reference's verbs, and dispatch picks one for reasons it can state."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlora
from fastlora.accuracy import assert_close_to_oracle
from fastlora.backends import dispatch, reference
from fastlora.backends.dropout import Dropout
from fastlora.backends.request import Kernel, Product, Request
from tests.cases import (
    DTYPES,
    LAYOUTS,
    SCALE,
    Operands,
    OpLog,
    check_against_reference,
    count_runs,
    gradient_of,
    make,
    replace_kernel,
)

CPU = torch.device("cpu")

# The backends that run everywhere; those that need a GPU or an interpreter have tests of their own.
EVERYWHERE = ("reference", "library")

DROPOUTS = {"no_dropout": (None, False), "on_input": (0.25, False), "on_product": (0.25, True)}


@pytest.fixture(params=EVERYWHERE)
def backend(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"fastlora.backends.{request.param}")


def some_dropout(p: float | None = 0.25) -> Dropout | None:
    return None if p is None else Dropout(p, torch.tensor([11, 22]))


def check_lora_matmul(
    backend: ModuleType, operands: Operands, p: float | None = None, on_product: bool = False
) -> None:
    product = operands.product(some_dropout(p), on_product=on_product)
    oracle, baseline = reference.lora_matmul(product.map(Tensor.double)), reference.lora_matmul(product)
    for name, actual, exact, plain in zip("yz", backend.lora_matmul(product), oracle, baseline, strict=True):
        assert_close_to_oracle(actual, oracle=exact, baseline=plain, name=name)


def check_rank_grad(backend: ModuleType, p: Tensor, q: Tensor, dtype: torch.dtype, dropped: float | None) -> None:
    dropout = some_dropout(dropped)
    oracle = reference.rank_grad(p.double(), q.double(), dtype=torch.float64, dropout=dropout)
    baseline = reference.rank_grad(p, q, dtype=dtype, dropout=dropout)
    actual = backend.rank_grad(p, q, dtype=dtype, dropout=dropout)
    assert_close_to_oracle(actual, oracle=oracle, baseline=baseline, name="g")


def turned(operands: Operands) -> Operands:
    """The operands of the backward: dy for x, and every weight as its transposed view."""
    dy = gradient_of(torch.empty(len(operands.x), len(operands.weight), dtype=operands.x.dtype))
    return Operands(dy, operands.weight.T, operands.lora_b.T, operands.lora_a.T)


@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_lora_matmul(
    backend: ModuleType, dtypes: tuple[torch.dtype, torch.dtype], bias: bool, dropout: tuple[float | None, bool]
) -> None:
    check_lora_matmul(backend, make(dtype=dtypes[0], adapter_dtype=dtypes[1], bias=bias), *dropout)


@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_lora_matmul_turned_for_the_backward(
    backend: ModuleType, dtypes: tuple[torch.dtype, torch.dtype], dropout: tuple[float | None, bool]
) -> None:
    check_lora_matmul(backend, turned(make(dtype=dtypes[0], adapter_dtype=dtypes[1])), *dropout)


@pytest.mark.parametrize("zeroed", ["weight", "lora_b"])
@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
def test_each_half_alone(backend: ModuleType, dropout: tuple[float | None, bool], zeroed: str) -> None:
    operands = make(bias=False)
    check_lora_matmul(backend, operands._replace(**{zeroed: torch.zeros_like(getattr(operands, zeroed))}), *dropout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("field", Operands._fields[:4])
@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
def test_lora_matmul_in_any_layout(
    backend: ModuleType, dropout: tuple[float | None, bool], field: str, layout: str
) -> None:
    operands = make(dtype=torch.float64)
    held = LAYOUTS[layout](getattr(operands, field))
    check_lora_matmul(backend, operands._replace(**{field: held}), *dropout)


@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
def test_without_weight_z_alone_is_made(backend: ModuleType, dropout: tuple[float | None, bool]) -> None:
    product = make().product(some_dropout(dropout[0]), on_product=dropout[1])
    nothing, z = backend.lora_matmul(product._replace(w=None))
    assert nothing is None
    assert torch.equal(z, backend.lora_matmul(product)[1])


@pytest.mark.parametrize("p", [None, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_rank_grad(backend: ModuleType, dtypes: tuple[torch.dtype, torch.dtype], p: float | None) -> None:
    operands = make(131, 48, 29, 6, dtype=dtypes[0])
    check_rank_grad(backend, operands.x[:, :6], operands.x, dtypes[1], p)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("p", [None, 0.25], ids=["no_dropout", "dropout"])
def test_rank_grad_in_any_layout(backend: ModuleType, p: float | None, layout: str) -> None:
    left, right = make(61, 7, dtype=torch.float64).x, make(61, 45, dtype=torch.float64, seed=3).x
    check_rank_grad(backend, LAYOUTS[layout](left), LAYOUTS[layout](right), torch.float64, p)


@pytest.mark.parametrize("p", [None, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_library_in_many_chunks(chunk: int, p: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora.backends.dropout._CHUNK", {"cpu": chunk})
    library = importlib.import_module("fastlora.backends.library")
    operands = make()
    for on_product in (True, False):
        check_lora_matmul(library, operands, p, on_product)
    check_rank_grad(library, operands.x[:, :6], operands.x, torch.float32, p)


@pytest.mark.parametrize("r", [3, 12, 33])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_nothing_between_the_rows_is_seen(backend: ModuleType, dtype: torch.dtype, r: int) -> None:
    """Behind each row of x, and of z where its rank is padded, memory may hold NaN, which times zero is NaN."""
    garbage = [torch.full((size,), torch.nan, dtype=dtype) for size in (64, 256, 1024, 4096) for _ in range(8)]
    del garbage
    operands = make(40, 41, 80, r, dtype=dtype)
    check_lora_matmul(backend, operands._replace(x=LAYOUTS["sliced"](operands.x)))
    left, right = LAYOUTS["sliced"](make(40, 41, dtype=dtype).x), make(40, 80, dtype=dtype).x
    for p in (left, left.T.contiguous().T, LAYOUTS["sliced"](left.T).T):
        check_rank_grad(backend, p, right, dtype, None)
        check_rank_grad(backend, right, p, dtype, None)


def test_dropped_inputs_are_not_seen(backend: ModuleType) -> None:
    """Zero times infinity is NaN: the mask must select, not multiply."""
    dropout = some_dropout()
    x = torch.where(dropout.keep(40, 24), 1.0, torch.inf)
    operands = Operands(x, torch.zeros(29, 24), torch.ones(3, 24), torch.ones(29, 3))
    _, z = backend.lora_matmul(operands.product(dropout)._replace(w=None))
    assert z.isfinite().all()


def test_dropped_products_are_not_seen(backend: ModuleType) -> None:
    dropout = some_dropout()
    operands = Operands(torch.ones(40, 24), torch.zeros(29, 24), torch.ones(1, 24), torch.full((29, 1), 3e38))
    y, _ = backend.lora_matmul(operands.product(dropout, on_product=True))
    assert torch.equal(y, torch.where(dropout.keep(40, 29), torch.inf, 0.0))


@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
def test_same_bits_run_after_run(backend: ModuleType, dropout: tuple[float | None, bool]) -> None:
    def once() -> tuple[Tensor, ...]:
        mask = some_dropout(dropout[0])
        product = make(129, 200, 77, 16).product(mask, on_product=dropout[1])
        y, z = backend.lora_matmul(product)
        return y, z, backend.rank_grad(z, product.x, dtype=torch.float32, dropout=mask)

    assert all(torch.equal(first, second) for first, second in zip(once(), once(), strict=True))


@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
def test_library_allocates_no_second_output(
    dropout: tuple[float | None, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """y is the one tensor of its size; with dropout the masked operand exists a few rows at a time."""
    monkeypatch.setattr("fastlora.backends.dropout._CHUNK", {"cpu": 300})
    library = importlib.import_module("fastlora.backends.library")
    operands = make(64, 100, 90, 4)
    p, on_product = dropout
    with OpLog() as log:
        y, _ = library.lora_matmul(operands.product(some_dropout(p), on_product=on_product))
    callers = {t.data_ptr() for t in operands}
    made = {
        result.untyped_storage().data_ptr(): result.untyped_storage().nbytes()
        for _, _, result in log.calls
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in callers
    }
    assert made.pop(y.data_ptr()) == 64 * 90 * 4
    assert max(made.values()) < 64 * 90 * 4


@pytest.mark.parametrize("verb", ["lora_matmul", "rank_grad"])
def test_fp32_adapters_never_widen_the_input(backend: ModuleType, verb: str) -> None:
    operands = make(64, 100, 90, 4, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    x = operands.x
    with OpLog() as log:
        if verb == "lora_matmul":
            backend.lora_matmul(operands.product())
        else:
            backend.rank_grad(x[:, :4], x, dtype=torch.float32)
    wide = [name for name, _, result in log.calls if result.dtype is torch.float32 and result.numel() >= x.numel()]
    assert wide == []


def test_the_forced_kernel_runs_and_may_change_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = {name: count_runs(monkeypatch, name) for name in EVERYWHERE}
    for forced in ("reference", "library", "reference", "auto"):
        monkeypatch.setenv("FASTLORA_BACKEND", forced)
        make()()
    assert {name: len(shapes) for name, shapes in ran.items()} == {"reference": 2, "library": 2}


def test_auto_takes_the_library_on_a_cpu() -> None:
    explanation = fastlora.explain(*make()[:4], scale=SCALE)
    assert explanation.chosen == "library"
    assert explanation.tile is None
    assert [verdict.kernel for verdict in explanation.verdicts] == [k.name for k in dispatch.KERNELS["lora_matmul"]]
    reasons = dict(explanation.verdicts)
    assert all(reasons[name] is None for name in EVERYWHERE)


@pytest.mark.parametrize("lead", [(), (7,), (3, 5)], ids=["1d", "2d", "3d"])
def test_explain_describes_the_call(lead: tuple[int, ...]) -> None:
    operands = make(lead=lead, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    request = fastlora.explain(*operands[:4], scale=SCALE, bias=operands.bias, dropout_p=0.1).request
    m = operands.x.numel() // 48
    assert request._replace(unaligned=None) == Request(
        "lora_matmul", CPU, torch.bfloat16, torch.float32, m=m, k=48, n=29, r=6, dropout=True
    )
    assert request.unaligned.startswith("N = 29: ")


def test_explain_describes_what_autocast_would_run() -> None:
    operands = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        request = fastlora.explain(*operands[:4], scale=SCALE).request
    assert request.dtype is torch.bfloat16


def test_explain_knows_that_eval_has_no_dropout() -> None:
    explanation = fastlora.explain(*make()[:4], scale=SCALE, dropout_p=0.1, training=False)
    assert not explanation.request.dropout


def test_explanation_prints_request_choice_and_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_kernel(monkeypatch, "reference", refuses=lambda request: "is on holiday")
    lines = str(fastlora.explain(*make()[:4], scale=SCALE)).splitlines()
    assert lines[0] == ("lora_matmul on cpu: M=37 K=48 N=29 R=6 float32, adapters float32, no dropout -> library")
    assert any(line.split() == ["reference", "is", "on", "holiday"] for line in lines)
    assert any(line.split() == ["library", "can", "run"] for line in lines)


@pytest.mark.parametrize("call", [lambda: make()(), lambda: fastlora.explain(*make()[:4])], ids=["call", "explain"])
def test_an_unknown_kernel_lists_the_known(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "triton-serail")
    with pytest.raises(RuntimeError, match="FASTLORA_BACKEND='triton-serail' is unknown: expected auto, ") as caught:
        call()
    assert all(kernel.name in str(caught.value) for kernel in dispatch.KERNELS["lora_matmul"])


FAMILY = ("fused-first", "fused-second")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Product]]:
    """Two more kernels of lora_matmul and the one of rank_grad that serves both; the products that each ran."""
    ran: dict[str, list[Any]] = {name: [] for name in (*FAMILY, "fused")}

    def kernel(name: str, run: Callable[..., object]) -> Kernel:
        def noted(*args: Any, **options: Any) -> object:
            ran[name].append(args)
            return run(*args, **options)

        refuses = (lambda request: f"takes no rank {request.r}") if name == "fused-first" else (lambda request: None)
        return Kernel(name, refuses, noted)

    first = tuple(kernel(name, reference.lora_matmul) for name in FAMILY)
    monkeypatch.setitem(dispatch.KERNELS, "lora_matmul", (*first, *dispatch.KERNELS["lora_matmul"]))
    grads = (kernel("fused", reference.rank_grad), *dispatch.KERNELS["rank_grad"])
    monkeypatch.setitem(dispatch.KERNELS, "rank_grad", grads)
    return ran


@pytest.mark.parametrize("forced", ["fused", "fused-second"])
def test_a_name_or_its_beginning_forces_a_kernel_and_its_family(
    forced: str, fused: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", forced)
    check_against_reference(make())
    assert {name: len(products) for name, products in fused.items()} == {
        "fused-first": 0,
        "fused-second": 2,
        "fused": 2,
    }


def test_a_name_forces_this_kernel_alone(fused: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "fused-first")
    with pytest.raises(RuntimeError, match="FASTLORA_BACKEND=fused-first cannot run this call") as caught:
        make()()
    assert "takes no rank 6" in str(caught.value)


@pytest.mark.usefixtures("fused")
def test_a_beginning_is_a_whole_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "fus")
    with pytest.raises(RuntimeError, match="FASTLORA_BACKEND='fus' is unknown"):
        make()()


def test_a_forced_kernel_that_refuses_raises_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    replace_kernel(monkeypatch, "reference", refuses=lambda request: f"takes no rank {request.r}")
    with pytest.raises(RuntimeError, match="FASTLORA_BACKEND=reference cannot run this call") as caught:
        make()()
    assert "takes no rank 6" in str(caught.value)
    assert "library" in str(caught.value)


def test_explain_of_a_forced_refusal_chooses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    replace_kernel(monkeypatch, "reference", refuses=lambda request: "is on holiday")
    explanation = fastlora.explain(*make()[:4], scale=SCALE)
    assert explanation.chosen is None
    assert "-> nothing" in str(explanation)


GPU = Request("lora_matmul", torch.device("cuda", 0), torch.bfloat16, torch.bfloat16, 64, 64, 64, 8, False)


@pytest.fixture
def sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")


@pytest.mark.usefixtures("sm_90")
def test_unproven_names_the_command_the_page_and_the_way_round() -> None:
    reason = str(dispatch.unproven("triton-serial", GPU))
    assert "is not proven on sm_90 in bfloat16" in reason
    assert "`python -m fastlora.tune`, docs/tuning.md" in reason
    assert "FASTLORA_BACKEND=triton-serial" in reason
    assert dispatch.unproven("library", GPU) is None


@pytest.mark.usefixtures("sm_90")
def test_auto_takes_no_kernel_that_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda-z_jobs", "triton-serial", "triton-portable"):
        replace_kernel(monkeypatch, name, refuses=lambda request: None)
    assert dispatch._explain(GPU, "auto").chosen == "library"


def test_request_of_rank_grad() -> None:
    p, q = torch.empty(37, 8, dtype=torch.bfloat16)[:, :6], torch.empty(37, 48, dtype=torch.bfloat16)
    request = Request.of_rank_grad(p, q, torch.float32, True)
    assert request == Request("rank_grad", CPU, torch.bfloat16, torch.float32, m=37, k=6, n=48, r=6, dropout=True)


def half(rows: int, columns: int) -> Tensor:
    return torch.empty(rows, columns, dtype=torch.float16)


ROWS = "rows must be contiguous and start on 16 bytes, a multiple of 8 elements"
ADDRESS = "starts at an address that is no multiple of 16 bytes: pass a copy of it"

# x [7, 48], w [24, 48] with one thing changed, and what a request says of it.
ALIGNMENTS: dict[str, tuple[dict[str, Tensor | None], str | None]] = {
    "aligned": ({}, None),
    "w_turned": ({"w": half(48, 24).T}, None),
    "no_w": ({"w": None, "b": half(29, 4)}, None),
    "x_sliced": ({"x": half(7, 64)[:, 8:56]}, None),
    "x_row_stride": ({"x": half(7, 49)[:, :48]}, f"x has strides (49, 1): {ROWS}"),
    "x_turned": ({"x": half(48, 7).T}, f"x has strides (1, 7): {ROWS}"),
    "x_expanded": ({"x": half(1, 48).expand(7, 48)}, f"x has strides (0, 1): {ROWS}"),
    "x_address": ({"x": half(7, 64)[:, 1:49]}, f"x {ADDRESS}"),
    "w_row_stride": ({"w": half(24, 50)[:, :48]}, f"w has strides (50, 1): {ROWS}"),
    "w_turned_row_stride": ({"w": half(48, 25)[:, :24].T}, f"wᵀ has strides (25, 1): {ROWS}"),
    "w_every_second": ({"w": half(24, 96)[:, ::2]}, f"wᵀ has strides (2, 96): {ROWS}"),
    "w_address": ({"w": half(48, 32)[:, 4:28].T}, f"wᵀ {ADDRESS}"),
    "n": (
        {"w": half(29, 48), "b": half(29, 4)},
        "N = 29: rows of y must start on 16 bytes, a multiple of 8 elements",
    ),
}


@pytest.mark.parametrize("case", ALIGNMENTS)
def test_a_request_knows_what_tensor_copies_cannot_read(case: str) -> None:
    changes, expected = ALIGNMENTS[case]
    operands = {"x": half(7, 48), "w": half(24, 48), "a": half(4, 48), "b": half(24, 4)} | changes
    assert Request.of_lora_matmul(Product(**operands, scale=1.0)).unaligned == expected


def test_alignment_is_a_fact_of_16_bit_operands() -> None:
    assert Request.of_lora_matmul(make(7, 49, 29, 3).product()).unaligned is None


@pytest.mark.parametrize(("name", "p", "q"), [("p", half(7, 6), half(7, 48)), ("q", half(7, 8), half(7, 49))])
def test_a_request_knows_what_rank_grad_cannot_read(name: str, p: Tensor, q: Tensor) -> None:
    unaligned = Request.of_rank_grad(p, q, torch.float32, False).unaligned
    assert unaligned == f"{name} has strides {(p if name == 'p' else q).stride()}: {ROWS}"
