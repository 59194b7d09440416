"""lora_linear: the formula, its chain rule, and what a call computes, keeps and leaves alone."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import lora_linear
from fastlora.accuracy import oracle_step
from fastlora.backends.dropout import Dropout
from fastlora.backends.request import Product
from fastlora.ops import autograd
from tests.cases import (
    DTYPES,
    LAYOUTS,
    SCALE,
    Operands,
    OpLog,
    assert_matches_reference,
    check_against_reference,
    gradient_of,
    kernel_named,
    make,
    replace_kernel,
    run,
    upcoming_dropout,
)

FIELDS = Operands._fields

# Where a test is about indexing, float64 leaves no error to hide in; the dtypes themselves have a test of their own.
F64 = torch.float64

# (M, K, N, R), each for what a careless kernel or stride would get wrong there.
SHAPES = {
    "plain": (37, 48, 29, 6),
    "one_token": (1, 33, 17, 4),
    "rank_1": (19, 24, 40, 1),
    "rank_12": (23, 64, 31, 12),
    "rank_above_k": (21, 5, 30, 9),
    "rank_above_n": (21, 30, 5, 9),
    "one_output": (18, 26, 1, 3),
    "one_input": (18, 1, 26, 3),
    "off_by_one": (65, 127, 129, 17),
}

PATTERNS = list(itertools.product((False, True), repeat=len(FIELDS)))


def pattern_id(pattern: tuple[bool, ...]) -> str:
    return "+".join(itertools.compress(FIELDS, pattern)) or "none"


def formula(operands: Operands, dropout: Dropout | None = None, scale: float = SCALE) -> Tensor:
    """Equation (3) of the paper in plain torch, for autograd to differentiate."""
    x, weight, a, b, bias = operands
    masked = x if dropout is None else x * dropout.keep(*x.shape) * dropout.rescale
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(masked, a), b)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_oracle_is_what_autograd_makes_of_the_formula(p: float) -> None:
    dropout = upcoming_dropout(p)
    operands = make(dtype=F64).leaves()
    x, _, a, b, _ = operands
    y = formula(operands, dropout)
    dy = gradient_of(y)
    y.backward(dy)
    with torch.no_grad():
        step = oracle_step(operands.product(dropout), dy)
    for actual, expected in zip(step, (y, x.grad, a.grad, b.grad), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_forward_and_gradients_in_every_dtype(dtypes: tuple[torch.dtype, torch.dtype], bias: bool, p: float) -> None:
    check_against_reference(make(dtype=dtypes[0], adapter_dtype=dtypes[1], bias=bias), p)


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_and_gradients_at_every_shape(shape: tuple[int, int, int, int], p: float) -> None:
    check_against_reference(make(*shape, dtype=F64), p)


@pytest.mark.parametrize("lead", [(), (7,), (3, 5), (2, 3, 4)], ids=["1d", "2d", "3d", "4d"])
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    check_against_reference(make(lead=lead, dtype=F64), 0.2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("field", FIELDS[:4])
def test_operands_in_any_layout(field: str, layout: str) -> None:
    operands = make(dtype=F64)
    held = LAYOUTS[layout](getattr(operands, field))
    assert not held.is_contiguous()
    check_against_reference(operands._replace(**{field: held}), 0.2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batched_input_in_any_layout(layout: str) -> None:
    operands = make(lead=(3, 4, 5), dtype=F64)
    check_against_reference(operands._replace(x=LAYOUTS[layout](operands.x)), 0.2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_incoming_gradient_in_any_layout(layout: str) -> None:
    check_against_reference(make(dtype=F64), 0.2, dy=LAYOUTS[layout](gradient_of(torch.empty(37, 29, dtype=F64))))


def test_gradient_of_a_sum_arrives_with_zero_strides() -> None:
    operands = make(dtype=F64).leaves()
    operands().sum().backward()
    actual = {name: t.grad for name, t in operands.named().items()}
    assert_matches_reference(actual, operands, torch.ones(37, 29, dtype=F64))


@pytest.mark.parametrize("by_operators", [False, True], ids=["eager", "operators"])
def test_no_kernel_meets_the_zero_strides_of_a_sum(by_operators: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that copies rows would refuse them, after its forward has run."""
    strides: list[tuple[int, ...]] = []
    run, gradients = kernel_named("library").run, kernel_named("library").gradients

    def noted(p: Product) -> object:
        strides.append(p.x.stride())
        return run(p)

    def noted_gradients(p: Product, dy: Tensor, z: Tensor) -> object:
        strides.append(dy.stride())
        return gradients(p, dy, z)

    replace_kernel(monkeypatch, "library", run=noted, gradients=noted_gradients)
    if by_operators:
        monkeypatch.setattr(autograd, "is_eager", lambda: False)
    make(lead=(3, 5)).leaves()().sum().backward()
    assert strides == [(48, 1), (29, 1)]


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("backend", ["library", "reference"])
@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens(lead: tuple[int, ...], backend: str, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", backend)
    operands = make(lead=lead).leaves()
    results = run(operands, dropout_p=p)
    assert results["y"].shape == (*lead, 29)
    for name, operand in operands.named().items():
        assert torch.equal(results[name], torch.zeros_like(operand)), name


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
def test_no_input_features_leaves_the_bias(p: float) -> None:
    operands = make(5, 0, 7, 3)
    assert torch.equal(operands(dropout_p=p), operands.bias.expand(5, 7))


@pytest.mark.parametrize("scale", [0.0, -0.6, 3, 1e-3])
def test_scale_multiplies_the_update(scale: float) -> None:
    operands = make(dtype=F64).leaves()
    results = run(operands, scale=scale)
    expected = operands.leaves()
    y = formula(expected, scale=scale)
    y.backward(gradient_of(y))
    torch.testing.assert_close(results["y"], y.detach())
    for name, operand in expected.named().items():
        torch.testing.assert_close(results[name], operand.grad, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_without_update_it_is_linear_bit_for_bit(dtype: torch.dtype, p: float) -> None:
    operands = make(dtype=dtype)
    operands = operands._replace(lora_b=torch.zeros_like(operands.lora_b))
    assert torch.equal(operands(dropout_p=p), F.linear(operands.x, operands.weight, operands.bias))


@pytest.mark.parametrize("p", [0.0, 0.5], ids=["no_dropout", "dropout"])
def test_without_base_only_the_update_is_left(p: float) -> None:
    operands = make(bias=False)
    check_against_reference(operands._replace(weight=torch.zeros_like(operands.weight)), p)


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)
def test_gradients_flow_exactly_where_asked(pattern: tuple[bool, ...], p: float) -> None:
    asked = tuple(itertools.compress(FIELDS, pattern))
    dropout = upcoming_dropout(p)
    operands = make().leaves(*(asked or ("",)))
    y = operands(dropout_p=p)
    assert y.requires_grad == bool(asked)
    if asked:
        dy = gradient_of(y)
        y.backward(dy)
        actual = {name: t.grad for name, t in operands.named().items() if t.grad is not None}
        assert tuple(actual) == asked
        assert_matches_reference(actual, operands, dy, dropout=dropout)


@pytest.mark.parametrize("pattern", PATTERNS[1:], ids=pattern_id)
def test_backward_runs_only_what_is_asked(pattern: tuple[bool, ...]) -> None:
    need_x, need_weight, need_a, need_b, need_bias = pattern
    y = make().leaves(*itertools.compress(FIELDS, pattern))(dropout_p=0.25)
    dy = gradient_of(y)
    with OpLog() as log:
        y.backward(dy)
    assert log.count(["fastlora::lora_matmul", "fastlora::rank_grad", "aten::mm", "aten::sum"]) == {
        "fastlora::lora_matmul": need_x or need_a,
        "fastlora::rank_grad": need_a + need_b,
        "aten::mm": need_weight,
        "aten::sum": need_bias,
    }
    base_products = [args[1] is not None for name, args, _ in log.calls if name == "fastlora::lora_matmul"]
    assert any(base_products) == need_x


def test_adapter_gradients_leave_the_accumulator_in_the_adapters_dtype() -> None:
    y = make(dtype=torch.bfloat16, adapter_dtype=torch.float32).leaves()()
    with OpLog() as log:
        y.sum().backward()
    made = [result.dtype for name, _, result in log.calls if name == "fastlora::rank_grad"]
    assert made == [torch.float32, torch.float32]


def saved_storages(operands: Operands, **options: float) -> dict[int, int]:
    """Address and bytes of every storage that autograd keeps for the backward."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        operands(**options)
    return saved


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("pattern", PATTERNS[1:], ids=pattern_id)
def test_saves_the_rank_r_middle_and_nothing_else(pattern: tuple[bool, ...], p: float) -> None:
    need_x, need_weight, need_a, need_b, _ = pattern
    operands = make(dtype=torch.bfloat16, adapter_dtype=torch.float32).leaves(*itertools.compress(FIELDS, pattern))
    saved = saved_storages(operands, dropout_p=p)
    callers = {t.data_ptr() for t in operands.named().values()}
    middle = 37 * 8 * 2 if need_b else 0  # rank 6, in rows of whole 16 bytes
    seed = 16 if p else 0
    assert sum(size for address, size in saved.items() if address not in callers) == middle + seed
    assert (operands.x.data_ptr() in saved) == (need_a or need_weight)
    assert (operands.weight.data_ptr() in saved) == need_x


def test_keeps_nothing_without_grad() -> None:
    operands = make().leaves()
    with torch.no_grad():
        assert not saved_storages(operands, dropout_p=0.25)
        assert operands().grad_fn is None


@pytest.mark.parametrize("backend", ["library", "reference"])
@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
def test_modifies_nothing_of_the_callers(p: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_BACKEND", backend)
    operands = make().leaves()
    dy = gradient_of(torch.empty(37, 29))
    before = {name: (t._version, t.detach().clone()) for name, t in (operands.named() | {"dy": dy}).items()}
    run(operands, dy, dropout_p=p)
    for name, tensor in (operands.named() | {"dy": dy}).items():
        version, value = before[name]
        assert tensor._version == version, name
        assert torch.equal(tensor, value), name


def test_output_is_the_callers_to_overwrite() -> None:
    """An in-place activation after the layer, as ``nn.Linear`` allows."""
    operands = make(dtype=F64).leaves()
    torch.relu_(operands()).sum().backward()
    positive = operands.leaves()().detach() > 0
    actual = {name: t.grad for name, t in operands.named().items()}
    assert_matches_reference(actual, operands, positive.to(F64))


def test_overwriting_the_saved_input_is_noticed() -> None:
    x = torch.randn(37, 48)
    operands = make()._replace(x=x).leaves("lora_a")
    y = operands()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
def test_backward_twice_accumulates(p: float) -> None:
    operands = make().leaves()
    y = operands(dropout_p=p)
    dy = gradient_of(y)
    y.backward(dy, retain_graph=True)
    once = {name: t.grad.clone() for name, t in operands.named().items()}
    y.backward(dy)
    for name, tensor in operands.named().items():
        assert torch.equal(tensor.grad, 2 * once[name]), name


def test_backward_of_a_freed_graph_raises() -> None:
    y = make().leaves()()
    y.sum().backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


def test_double_backward_raises() -> None:
    operands = make().leaves()
    (dx,) = torch.autograd.grad(operands().square().sum(), operands.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_gradcheck(p: float, bias: bool) -> None:
    operands = make(4, 7, 5, 3, dtype=F64, bias=bias).leaves()

    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(5)
        return Operands(*tensors)(dropout_p=p)

    assert torch.autograd.gradcheck(call, tuple(operands.named().values()))


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_same_bits_run_after_run(dtype: torch.dtype, p: float) -> None:
    def once() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return run(make(129, 200, 77, 16, dtype=dtype).leaves(), dropout_p=p)

    first, second = once(), once()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", FIELDS)
def test_nan_and_inf_pass_through(field: str, value: float) -> None:
    operands = make(5, 9, 7, 3, dtype=F64)
    tensor = getattr(operands, field).clone()
    tensor.view(-1)[4] = value
    operands = operands._replace(**{field: tensor}).leaves()
    expected = operands.leaves()
    y = formula(expected)
    y.backward(gradient_of(y))
    results = run(operands, gradient_of(y))
    torch.testing.assert_close(results["y"], y.detach(), equal_nan=True)
    for name, operand in expected.named().items():
        torch.testing.assert_close(results[name], operand.grad, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def test_accepts_parameters_and_views_of_parameters() -> None:
    operands = make()
    packed = torch.nn.Parameter(torch.cat([operands.lora_a, operands.lora_a + 1]))
    y = lora_linear(operands.x, operands.weight, packed[:6], operands.lora_b, scale=SCALE, bias=operands.bias)
    y.sum().backward()
    assert torch.equal(y, operands())
    assert packed.grad[:6].abs().min() > 0
    assert torch.equal(packed.grad[6:], torch.zeros(6, 48))


def test_numpy_numbers_are_numbers() -> None:
    """They are what configurations often hold."""
    operands = make()
    assert torch.equal(operands(scale=np.float32(0.5)), operands(scale=0.5))
    with torch.random.fork_rng(devices=[]):
        dropped = operands(dropout_p=np.float32(0.25))
    assert torch.equal(dropped, operands(dropout_p=0.25))
