"""dora_linear: the formula, its chain rule, the factored norm, what is kept, and what torch lets one do around it."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastlora import dora_linear
from fastlora.accuracy import DoraStep, assert_close_to_oracle, oracle_dora_step, reference_dora_step
from fastlora.backends.dropout import Dropout
from fastlora.ops import dora_autograd, norms
from fastlora.ops.dora import forget_norms
from tests.cases import (
    DTYPES,
    LAYOUTS,
    SCALE,
    Operands,
    OpLog,
    gradient_of,
    make,
    upcoming_dropout,
)

F64 = torch.float64
M, K, N, R = 37, 48, 29, 6
DROPOUT = pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
TRACED = pytest.mark.parametrize("traced", [False, True], ids=["eager", "operators"])


class Call(NamedTuple):
    """The tensors of one call."""

    operands: Operands
    magnitude: Tensor

    def __call__(self, **options: Any) -> Tensor:
        x, weight, a, b, bias = self.operands
        return dora_linear(x, weight, a, b, self.magnitude, bias=bias, **({"scale": SCALE} | options))

    def named(self) -> dict[str, Tensor]:
        return self.operands.named() | {"magnitude": self.magnitude}

    def leaves(self, *names: str) -> Call:
        """The same values as new leaves; the named ones, or all where none is named, ask for a gradient."""
        wanted = not names or "magnitude" in names
        return Call(self.operands.leaves(*names), self.magnitude.detach().requires_grad_(wanted))

    def gradients(self) -> dict[str, Tensor]:
        return {name: t.grad for name, t in self.named().items() if t.grad is not None}


NAMES = (*Operands._fields, "magnitude")
PATTERNS = list(itertools.product((False, True), repeat=len(NAMES)))[1:]


def pattern_id(pattern: tuple[bool, ...]) -> str:
    return "+".join(itertools.compress(NAMES, pattern))


def call(*shape: int, **options: Any) -> Call:
    """A call whose g lies between a half and two."""
    operands = make(*shape, **options)
    _, weight, a, b, _ = operands
    norm = (weight.double() + SCALE * b.double() @ a.double()).norm(dim=1)
    spread = torch.rand(norm.shape, generator=torch.Generator().manual_seed(3), dtype=F64) * 2 - 1
    return Call(operands, (norm * 2**spread).to(a.dtype))


def results(step: DoraStep, dy: Tensor, like: Operands) -> dict[str, Tensor]:
    y, dx, dw, da, db, dmagnitude = step
    return {
        "y": y.view(dy.shape),
        "x": dx.view(like.x.shape),
        "weight": dw,
        "lora_a": da,
        "lora_b": db,
        "magnitude": dmagnitude,
        "bias": _rows(dy).sum(0),
    }


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def assert_right(actual: dict[str, Tensor], given: Call, dy: Tensor, dropout: Dropout | None = None) -> None:
    """Holds every tensor to the one error rule: oracle in float64, baseline in the tested dtype."""
    operands, magnitude, dy = given.operands.map(Tensor.detach), given.magnitude.detach(), dy.detach()
    product = operands.product(dropout)
    oracle = results(oracle_dora_step(product, magnitude, _rows(dy)), dy.double(), operands)
    baseline = results(reference_dora_step(product, magnitude, _rows(dy)), dy, operands)
    for name, tensor in actual.items():
        assert_close_to_oracle(tensor, oracle=oracle[name], baseline=baseline[name], name=name)


def check(given: Call, p: float = 0.0, dy: Tensor | None = None) -> None:
    """Forward and every gradient of one call."""
    dropout = upcoming_dropout(p)
    given = given.leaves()
    y = given(dropout_p=p)
    dy = gradient_of(y) if dy is None else dy
    y.backward(dy)
    assert_right({"y": y} | given.gradients(), given, dy, dropout)


def step(given: Call, p: float = 0.0, function: Callable[..., Tensor] | None = None) -> dict[str, Tensor]:
    """y and all gradients of one seeded step."""
    given = given.leaves()
    torch.manual_seed(5)
    y = (given if function is None else function)(*(() if function is None else (given,)), dropout_p=p)
    y.backward(gradient_of(y))
    return {"y": y.detach()} | given.gradients()


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler or a dispatch mode sees, without one."""
    for module in (dora_autograd, norms):
        monkeypatch.setattr(module, "is_eager", lambda: False)


@DROPOUT
def test_oracle_is_what_autograd_makes_of_the_formula(p: float) -> None:
    dropout = upcoming_dropout(p)
    given = call(dtype=F64).leaves()
    x, weight, a, b, bias = given.operands
    masked = x if dropout is None else x * dropout.keep(*x.shape) * dropout.rescale
    g = given.magnitude / (weight + SCALE * b @ a).norm(dim=1).detach()
    y = F.linear(x, weight, bias) + (g - 1) * F.linear(masked, weight) + g * SCALE * F.linear(F.linear(masked, a), b)
    dy = gradient_of(y)
    y.backward(dy)
    assert_right({"y": y} | given.gradients(), given, dy, dropout)


@DROPOUT
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtypes", [*DTYPES.values(), (F64, F64)], ids=[*DTYPES, "fp64"])
def test_forward_and_gradients_in_every_dtype(dtypes: tuple[torch.dtype, torch.dtype], bias: bool, p: float) -> None:
    check(call(dtype=dtypes[0], adapter_dtype=dtypes[1], bias=bias), p)


@DROPOUT
@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["bf16_fp32_adapters"]], ids=["fp32", "bf16_fp32_adapters"])
def test_operators_give_the_same_bits_as_eager_code(
    dtypes: tuple[torch.dtype, torch.dtype], p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = call(dtype=dtypes[0], adapter_dtype=dtypes[1])
    eager = step(given, p)
    as_traced(monkeypatch)
    assert_same_bits(step(given, p), eager)


@DROPOUT
@pytest.mark.parametrize(
    "shape",
    [
        (1, 33, 17, 4),
        (19, 24, 40, 1),
        (21, 5, 30, 9),
        (21, 30, 5, 9),
        (18, 26, 1, 3),
        (18, 1, 26, 3),
        (65, 127, 129, 17),
    ],
    ids=["one_token", "rank_1", "rank_above_k", "rank_above_n", "one_output", "one_input", "off_by_one"],
)
def test_forward_and_gradients_at_every_shape(shape: tuple[int, int, int, int], p: float) -> None:
    check(call(*shape, dtype=F64), p)


@DROPOUT
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_in_blocks(dtypes: tuple[torch.dtype, torch.dtype], p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dora_autograd._BLOCK, "cpu", 5 * N)
    monkeypatch.setitem(norms._BLOCK, "cpu", 7 * K)
    check(call(dtype=dtypes[0], adapter_dtype=dtypes[1]), p)


@DROPOUT
@pytest.mark.parametrize("lead", [(), (7,), (3, 5), (2, 3, 4)], ids=["1d", "2d", "3d", "4d"])
def test_leading_dimensions(lead: tuple[int, ...], p: float) -> None:
    check(call(lead=lead, dtype=F64), p)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operands_in_any_layout(layout: str) -> None:
    given = call(dtype=F64)
    for field in ("x", "weight", "lora_a", "lora_b"):
        held = LAYOUTS[layout](getattr(given.operands, field))
        check(given._replace(operands=given.operands._replace(**{field: held})), 0.2)
    check(given, 0.2, dy=LAYOUTS[layout](gradient_of(torch.empty(M, N, dtype=F64))))


@DROPOUT
@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
def test_no_tokens(lead: tuple[int, ...], p: float) -> None:
    given = call(lead=(3,))
    given = given._replace(operands=given.operands._replace(x=torch.empty(*lead, K))).leaves()
    y = given(dropout_p=p)
    assert y.shape == (*lead, N)
    y.sum().backward()
    for name, t in given.named().items():
        assert torch.equal(t.grad, torch.zeros_like(t)), name


@TRACED
@DROPOUT
@pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)
def test_gradients_flow_and_tensors_are_kept_exactly_where_asked(
    pattern: tuple[bool, ...], p: float, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if traced:
        as_traced(monkeypatch)
    asked = tuple(itertools.compress(NAMES, pattern))
    need_x, need_weight, need_a, need_b, _, need_magnitude = pattern
    dropout = upcoming_dropout(p)
    given = call(r=8).leaves(*asked)
    kept: dict[int, Tensor] = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = given(dropout_p=p)
    callers = {t.data_ptr(): name for name, t in given.named().items()}
    assert {callers[address] for address in kept if address in callers} == {
        name
        for name, needed in {
            "x": need_a or need_weight,
            "weight": need_x,
            "lora_a": need_x or need_a,
            "lora_b": need_x or need_a,
        }.items()
        if needed
    }
    own = sorted(t.untyped_storage().nbytes() for address, t in kept.items() if address not in callers)
    of_z, of_u, of_seed = M * 8 * 4 * need_b, M * N * 4 * need_magnitude, 16 * bool(p)
    of_rows = N * 4 * (any(pattern[:4]) + need_magnitude)
    assert sum(own) == of_z + of_u + of_rows + of_seed
    dy = gradient_of(y)
    y.backward(dy)
    actual = given.gradients()
    assert tuple(actual) == asked
    assert_right(actual, given, dy, dropout)


def test_keeps_nothing_and_gives_the_same_without_grad() -> None:
    given = call().leaves()
    for p in (0.0, 0.3):
        torch.manual_seed(5)
        expected = given(dropout_p=p)
        torch.manual_seed(5)
        with torch.no_grad():
            y = given(dropout_p=p)
        assert y.grad_fn is None
        assert torch.equal(y, expected)


def test_a_weight_first_used_in_inference_mode_trains() -> None:
    given = call(dtype=F64).leaves(*FROZEN)
    with torch.inference_mode():
        y = given()
    assert torch.equal(y, given())
    given().backward(dy := gradient_of(y))
    assert_right(given.gradients(), given, dy)


def test_a_weight_made_in_inference_mode() -> None:
    with torch.inference_mode():
        given = call(dtype=F64)
        for _ in range(2):
            assert_right({"y": (y := given())}, given, gradient_of(y))


def test_eval_switches_dropout_off() -> None:
    given = call()
    assert torch.equal(given(dropout_p=0.5, training=False), given())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
def test_nothing_as_large_as_the_weight_is_made(p: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(norms._BLOCK, "cpu", 2 * K)
    given = call(dtype=dtype, adapter_dtype=torch.float32, m=7).leaves("x", "lora_a", "lora_b", "magnitude")
    for module in (dora_autograd, norms):
        monkeypatch.setattr(module, "is_eager", lambda: True)
    weight = given.operands.weight.data_ptr()
    with OpLog() as log:
        given(dropout_p=p).sum().backward()
    made = [
        name
        for name, _, result in log.calls
        for t in (result if isinstance(result, (tuple, list)) else [result])
        if isinstance(t, Tensor) and t.numel() >= K * N and t.untyped_storage().data_ptr() != weight
    ]
    assert made == []
    assert any(name == "aten::linalg_vector_norm" for name, _, _ in log.calls)


def norm_error_rule(weight: Tensor, a: Tensor, b: Tensor) -> None:
    oracle = (weight.double() + SCALE * b.double() @ a.double()).norm(dim=1)
    wide = torch.promote_types(weight.dtype, torch.float32)
    # The sum of the formula in the tested dtype, its norm in the dtype of the result.
    baseline = (weight + (SCALE * b.to(weight.dtype)) @ a.to(weight.dtype)).to(wide).norm(dim=1)
    actual = norms.row_norms(weight, a, b, SCALE)
    assert_close_to_oracle(actual, oracle=oracle, baseline=baseline, name="norm")


@pytest.mark.parametrize("factor", [1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_norm_of_a_small_and_a_large_update(dtypes: tuple[torch.dtype, torch.dtype], factor: float) -> None:
    _, weight, a, b, _ = make(dtype=dtypes[0], adapter_dtype=dtypes[1])
    norm_error_rule(weight, a, b * factor)


@pytest.mark.skipif(not norms._has_tiles(), reason="needs a CPU with AMX")
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_product_by_tiles_has_sixteen_bits(factor: float) -> None:
    """The oracle's yardstick: the same product of operands that are rounded to 16 bits."""
    _, weight, a, _, _ = make(k=256, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    a = a * factor
    exact = weight.double() @ a.double().T
    rounded = (exact.float().view(torch.int32) + (1 << 7) & ~0xFF).view(torch.float32)
    assert_close_to_oracle(norms._times_by_tiles(weight, a.T), oracle=exact, baseline=rounded, name="w aᵀ")


@pytest.mark.parametrize("tiles", [False, True], ids=["widened", "tiles"])
def test_norm_of_bfloat16_by_either_way(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiles and not norms._has_tiles():
        pytest.skip("needs a CPU with AMX")
    monkeypatch.setattr(norms, "_has_tiles", lambda: tiles)
    _, weight, a, b, _ = make(dtype=torch.bfloat16, adapter_dtype=torch.float32)
    norm_error_rule(weight, a, b)
    # Half of what a row has lies along the update: none is made by its elements.
    norm_error_rule(weight - (0.5 * SCALE * b @ a).bfloat16(), a, b)


@pytest.mark.parametrize("left", [0.5, 0.1, 1e-3])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_norm_where_the_update_nearly_cancels_the_weight(
    dtypes: tuple[torch.dtype, torch.dtype], left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(norms._BLOCK, "cpu", 2 * K)
    _, weight, a, b, _ = make(dtype=dtypes[0], adapter_dtype=dtypes[1])
    rows = slice(3, 20)
    weight[rows] = -SCALE * (b[rows].double() @ a.double()).to(weight.dtype) + left * weight[rows]
    norm_error_rule(weight, a, b)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the weights whose squares are made from now on."""
    shapes: list[torch.Size] = []
    squares = norms._squares

    def noted(w: Tensor) -> Tensor:
        shapes.append(w.shape)
        return squares(w)

    monkeypatch.setattr(norms, "_squares", noted)
    return shapes


FROZEN = ("x", "lora_a", "lora_b", "magnitude", "bias")


def test_squares_of_a_frozen_weight_are_made_once(made: list[torch.Size]) -> None:
    given = call().leaves(*FROZEN)
    for _ in range(3):
        given().sum().backward()
    with torch.no_grad():
        given.operands.lora_b.mul_(2)
    given()
    assert len(made) == 1
    given._replace(operands=given.operands._replace(weight=given.operands.weight.clone()))()
    assert len(made) == 2


def test_squares_of_a_weight_that_is_stored_turned_are_made_once(made: list[torch.Size]) -> None:
    given = call(dtype=F64).leaves(*FROZEN)
    stored = given.operands.weight.T.contiguous()

    def turned() -> Any:
        return given._replace(operands=given.operands._replace(weight=stored.T))

    for _ in range(3):
        turned()()
    assert len(made) == 1
    stored.mul_(2)
    assert_right({"y": (y := turned()())}, turned(), gradient_of(y))
    assert len(made) == 2
    stored.data.mul_(2)
    forget_norms(stored.T)
    assert_right({"y": (y := turned()())}, turned(), gradient_of(y))


def test_changes_of_the_weight_are_noticed(made: list[torch.Size]) -> None:
    given = call(dtype=F64).leaves(*FROZEN)
    weight = given.operands.weight
    for change in (lambda: weight.mul_(2), lambda: weight.copy_(weight.flip(0)), lambda: weight.t_().t_()):
        check(given)
        given()
        with torch.no_grad():
            change()
        before = len(made)
        dy = gradient_of(y := given())
        assert len(made) == before + 1
        assert_right({"y": y}, given, dy)
    weight.data = weight.data * 3
    assert_right({"y": (y := given())}, given, gradient_of(y))


def test_changes_behind_the_version_are_forgotten_by_hand() -> None:
    given = call(dtype=F64).leaves(*FROZEN)
    y = given()
    given.operands.weight.data.mul_(2)
    forget_norms(given.operands.weight)
    assert_right({"y": (changed := given())}, given, gradient_of(y))
    assert not torch.equal(changed, y)


def test_a_weight_that_is_gone_is_kept_no_longer() -> None:
    gc.collect()
    before = len(norms._kept)
    given = call().leaves(*FROZEN)
    given().sum().backward()
    assert len(norms._kept) == before + 1
    del given
    gc.collect()
    assert len(norms._kept) == before


def test_squares_of_a_weight_that_trains_are_not_kept(made: list[torch.Size]) -> None:
    given = call().leaves()
    given()
    given()
    assert len(made) == 2


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_kept", {})
    monkeypatch.setattr(norms, "_MOST_KEPT", 2)
    calls = [call(dtype=F64) for _ in range(4)]
    for given in calls:
        given()
    assert len(norms._kept) == 2
    check(calls[0])


@DROPOUT
def test_gradcheck(p: float) -> None:
    """Of x, bias and magnitude: of the others the norm is a constant, which finite differences cannot know."""
    given = call(4, 7, 5, 3, dtype=F64).leaves("x", "bias", "magnitude")
    x, weight, a, b, bias = given.operands

    def function(x: Tensor, bias: Tensor, magnitude: Tensor) -> Tensor:
        torch.manual_seed(5)
        return dora_linear(x, weight, a, b, magnitude, scale=SCALE, bias=bias, dropout_p=p)

    assert torch.autograd.gradcheck(function, (x, bias, given.magnitude))


@DROPOUT
def test_gradcheck_with_the_norm_held(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    given = call(4, 7, 5, 3, dtype=F64).leaves()
    _, weight, a, b, _ = given.operands
    norm = norms.row_norms(weight, a, b, SCALE)
    monkeypatch.setattr("fastlora.ops.dora.row_norms", lambda *_: norm)

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(5)
        return Call(Operands(*tensors[:5]), tensors[5])(dropout_p=p)

    assert torch.autograd.gradcheck(function, tuple(given.named().values()))


def test_double_backward_raises() -> None:
    given = call().leaves()
    (dx,) = torch.autograd.grad(given().square().sum(), given.operands.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_output_is_the_callers_to_overwrite() -> None:
    given = call(lead=(3, 5), dtype=F64).leaves()
    torch.relu_(given()).sum().backward()
    positive = given.leaves()().detach() > 0
    assert_right(given.gradients(), given, positive.to(F64))


@DROPOUT
def test_modifies_nothing_of_the_callers(p: float) -> None:
    given = call().leaves()
    before = {name: (t._version, t.detach().clone()) for name, t in given.named().items()}
    y = given(dropout_p=p)
    dy = gradient_of(y)
    same = dy.clone()
    y.backward(dy, retain_graph=True)
    once = {name: t.clone() for name, t in given.gradients().items()}
    y.backward(dy)
    assert torch.equal(dy, same)
    for name, t in given.named().items():
        assert t._version == before[name][0], name
        assert torch.equal(t, before[name][1]), name
        assert torch.equal(t.grad, 2 * once[name]), name


@DROPOUT
def test_compiled_is_eager_code(p: float) -> None:
    torch._dynamo.reset()
    function = torch.compile(lambda given, dropout_p: given(dropout_p=dropout_p), backend="aot_eager", fullgraph=True)
    given = call()
    assert_same_bits(step(given, p, function), step(given, p))
    torch._dynamo.reset()


class Alphas(TorchDispatchMode):
    """The factors of sums."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::add", "aten::add_", "aten::sub", "aten::sub_"):
            self.seen.append((kwargs or {}).get("alpha", 1))
        return func(*args, **(kwargs or {}))


def test_no_sum_has_a_factor_that_inductor_would_lose() -> None:
    """torch 2.13's inductor makes add(mm(p, q), c, alpha=factor) an addmm without the factor: dx would be wrong."""
    given = call().leaves()
    with Alphas() as alphas:
        given(dropout_p=0.3).sum().backward()
    assert alphas.seen
    assert set(alphas.seen) == {1}


@DROPOUT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_is_the_rounded_base_with_full_adapters(dtype: torch.dtype, p: float) -> None:
    dropout = upcoming_dropout(p)
    given = call().leaves()
    with torch.autocast("cpu", dtype=dtype):
        y = given(dropout_p=p)
    dy = gradient_of(y)
    y.backward(dy)
    x, weight, a, b, bias = given.operands
    rounded = Call(Operands(x.to(dtype), weight.to(dtype), a, b, bias.to(dtype)), given.magnitude)
    actual = {name: t.to(rounded.named()[name].dtype) for name, t in given.gradients().items()} | {"y": y}
    assert_right(actual, rounded, dy, dropout)


def test_autocast_makes_the_squares_of_a_weight_once(made: list[torch.Size]) -> None:
    given = call().leaves(*FROZEN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            given()
    assert len(made) == 1


@DROPOUT
def test_checkpoint_replays_the_mask(p: float) -> None:
    def again(given: Call, dropout_p: float) -> Tensor:
        return checkpoint(lambda: given(dropout_p=dropout_p).tanh(), use_reentrant=False)

    given = call()
    assert_same_bits(step(given, p, again), step(given, p, lambda given, dropout_p: given(dropout_p=dropout_p).tanh()))


@DROPOUT
def test_flops_are_those_of_the_products(p: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    given = call(bias=False).leaves("x", "lora_a", "lora_b", "magnitude")
    base, down, up = M * K * N, M * K * R, M * R * N
    norm = R * (N * K + K * R + N * R)
    with FlopCounterMode(display=False) as forward:
        y = given(dropout_p=p)
    # With dropout the update is made for both of the products with the base.
    assert forward.get_total_flops() == 2 * (norm + (1 + bool(p)) * (base + down + up))
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * ((1 + bool(p)) * base + 2 * down + 2 * up)


class Masked(nn.Module):
    """A dropout that drops what ours does."""

    def __init__(self, dropout: Dropout) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return x * self.dropout.keep(*x.shape).to(x.dtype) * self.dropout.rescale


@DROPOUT
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16_fp32_adapters"])
def test_as_right_as_pefts_own_layer(dtypes: str, p: float) -> None:
    peft = pytest.importorskip("peft")
    dtype, adapter_dtype = DTYPES[dtypes]
    given = call(dtype=dtype, adapter_dtype=adapter_dtype)
    if dtype is not adapter_dtype:
        # PEFT then makes the update and what trains it in float32, fastlora in the dtype of the base.
        given.operands.lora_b.mul_(0.1)
    given = given.leaves()
    config = peft.LoraConfig(target_modules=["0"], r=R, lora_alpha=SCALE * R, use_dora=True, lora_dropout=p)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(K, N, dtype=dtype)), config, autocast_adapter_dtype=dtype is not adapter_dtype
    )
    layer = model.base_model.model[0]
    theirs = {
        "weight": layer.base_layer.weight,
        "bias": layer.base_layer.bias,
        "lora_a": layer.lora_A["default"].weight,
        "lora_b": layer.lora_B["default"].weight,
        "magnitude": layer.lora_magnitude_vector["default"].weight,
        "x": given.operands.x.detach().clone().requires_grad_(),
    }
    for name, tensor in theirs.items():
        tensor.data.copy_(given.named()[name])
        tensor.requires_grad_()
    dropout = upcoming_dropout(p)
    if dropout is not None:
        layer.lora_dropout["default"] = Masked(dropout)
    expected = layer(theirs["x"])
    dy = gradient_of(expected)
    expected.backward(dy)
    y = given(dropout_p=p)
    y.backward(dy)
    product = given.operands.map(Tensor.detach).product(dropout)
    oracle = results(oracle_dora_step(product, given.magnitude.detach(), dy), dy.double(), given.operands)
    baseline = {"y": expected} | {name: tensor.grad for name, tensor in theirs.items()}
    actual = {"y": y} | given.gradients()
    for name in actual.keys() - (set() if dtype is adapter_dtype else {"lora_a", "lora_b", "magnitude"}):
        assert_close_to_oracle(actual[name], oracle=oracle[name], baseline=baseline[name], name=name)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "magnitude_none": ({"magnitude": None}, TypeError, "magnitude must be a torch.Tensor, got NoneType"),
    "magnitude_length": ({"magnitude": torch.ones(30)}, RuntimeError, r"magnitude has shape \[30\]: expected \[29\]"),
    "magnitude_2d": ({"magnitude": torch.ones(1, 29)}, RuntimeError, r"magnitude has shape \[1, 29\]: expected \[29\]"),
    "magnitude_dtype": (
        {"magnitude": torch.ones(29, dtype=torch.bfloat16)},
        RuntimeError,
        "magnitude is bfloat16 and lora_a float32: expected one dtype",
    ),
    "magnitude_device": (
        {"magnitude": torch.ones(29, device="meta")},
        RuntimeError,
        "magnitude is on meta and x on cpu",
    ),
    "weight_numpy": ({"weight": "w"}, TypeError, "weight must be a torch.Tensor, got str"),
    "x_shape": ({"x": torch.ones(3, 47)}, RuntimeError, r"x has shape \[3, 47\]: expected \[\.\.\., 48\]"),
    "scale_none": ({"scale": None}, TypeError, "scale must be a float, got NoneType"),
    "dropout_one": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be .* below 1, got 1\.0"),
}


@pytest.mark.parametrize(("changes", "error", "message"), WRONG.values(), ids=WRONG)
def test_bad_calls(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = call()
    arguments = given.named() | {"scale": SCALE} | changes
    with pytest.raises(error, match=message):
        dora_linear(**arguments)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_dtensors_are_refused_in_words() -> None:
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        given = call()
        for name, tensor in given.named().items():
            with pytest.raises(RuntimeError, match=f"{name} is a DTensor: dora_linear takes plain tensors"):
                dora_linear(**(given.named() | {name: distribute_tensor(tensor, mesh)}), scale=SCALE)
    finally:
        dist.destroy_process_group()
