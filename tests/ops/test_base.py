"""Stored weights: dense where a product needs them, as good as a dense weight, and kept nowhere in between."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora import Branch, StoredWeight, lora_linear, lora_linear_group, lora_swiglu_mlp
from fastlora.accuracy import (
    assert_close_to_oracle,
    oracle_mlp_step,
    oracle_step,
    reference_mlp_step,
    reference_step,
)
from fastlora.backends.dropout import draw_seed
from fastlora.backends.request import Product
from fastlora.ops import base
from tests.cases import (
    DTYPES,
    SCALE,
    Operands,
    OpLog,
    assert_matches_reference,
    gradient_of,
    make,
    upcoming_dropout,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
K = 48


class Rows(StoredWeight):
    """W in int8, with a factor for each row; it notes what it gave."""

    def __init__(self, weight: Tensor, computes_in: torch.dtype | None = None) -> None:
        self.factors = weight.float().abs().amax(1, keepdim=True) / 127
        self.rows = (weight.float() / self.factors).round().to(torch.int8)
        self.computes_in = computes_in
        self.shape, self.device = weight.shape, weight.device
        self.asked = 0
        self.given: list[weakref.ref[Tensor]] = []
        self.places: list[int] = []

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        made = (self.rows * self.factors).to(dtype) if out is None else out.copy_(self.rows * self.factors)
        self.asked += 1
        self.given.append(weakref.ref(made))
        self.places.append(made.data_ptr())
        return made

    def state(self) -> Hashable:
        return id(self.rows), self.rows._version

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        return super().compute_dtype(x) if self.computes_in is None else self.computes_in


class Filling(Rows):
    fills = True


class Multiplying(Rows):
    """With a product of its own for a few tokens."""

    most = 10**6

    def multiplies(self, m: int) -> bool:
        return 0 < m <= self.most

    def product(self, x_mk: Tensor, bias: Tensor | None) -> Tensor:
        self.multiplied = getattr(self, "multiplied", 0) + 1
        return F.linear(x_mk, (self.rows * self.factors).to(x_mk.dtype), bias)


KINDS: dict[str, type[Rows]] = {"plain": Rows, "fills": Filling, "multiplies": Multiplying}
ALL_KINDS = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture(autouse=True)
def no_workspaces() -> Iterator[None]:
    base.forget_workspaces()
    yield
    base.forget_workspaces()


def dense_of(stored: Rows, dtype: torch.dtype) -> Tensor:
    return (stored.rows * stored.factors).to(dtype)


def call(operands: Operands, stored: Any, **options: Any) -> Tensor:
    x, _, a, b, bias = operands
    return lora_linear(x, stored, a, b, bias=bias, **({"scale": SCALE} | options))


def taken(operands: Operands, *names: str) -> Operands:
    """Leaves of which the named ones ask for a gradient: x and the adapters where none is named."""
    return operands.leaves(*(names or ("x", "lora_a", "lora_b")))


def step(function: Callable[[Tensor], Tensor], operands: Operands, dy: Tensor | None = None) -> dict[str, Tensor]:
    """y and gradients of a function of x, seeded."""
    torch.manual_seed(5)
    y = function(operands.x)
    trained = {name: t for name, t in operands.named().items() if t.requires_grad}
    found = torch.autograd.grad(y, list(trained.values()), gradient_of(y) if dy is None else dy)
    return {"y": y.detach()} | dict(zip(trained, found, strict=True))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@ALL_KINDS
@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_every_tensor_meets_the_rule(kind: type[Rows], p: float, dtypes: str) -> None:
    dtype, adapter_dtype = DTYPES[dtypes]
    operands = taken(make(dtype=dtype, adapter_dtype=adapter_dtype), "x", "lora_a", "lora_b", "bias")
    stored, dropout = kind(operands.weight), upcoming_dropout(p)
    y = call(operands, stored, dropout_p=p)
    dy = gradient_of(y)
    y.backward(dy)
    gradients = {name: t.grad for name, t in operands.named().items() if t.grad is not None}
    assert gradients.keys() == {"x", "lora_a", "lora_b", "bias"}
    equal = operands._replace(weight=dense_of(stored, dtype))
    assert_matches_reference({"y": y} | gradients, equal, dy, dropout=dropout)


@ALL_KINDS
@pytest.mark.parametrize("lead", [(), (1,), (0,), (2, 3), (2, 0), (2, 1, 5)], ids=str)
def test_leading_dimensions_are_those_of_a_dense_weight(kind: type[Rows], lead: tuple[int, ...]) -> None:
    operands = taken(make(lead=lead), "x", "lora_a", "lora_b", "bias")
    stored = kind(operands.weight)
    found = step(lambda x: call(operands, stored), operands)
    expected = step(lambda x: call(operands, dense_of(stored, F32)), operands)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("kind", [Rows, Filling])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("names", [("x",), ("lora_a",), ("lora_b",), ("x", "lora_b"), ("lora_a", "lora_b")], ids=str)
def test_gradients_that_are_asked_for_are_bit_for_bit_those_of_the_dense_weight(
    kind: type[Rows], bias: bool, names: tuple[str, ...]
) -> None:
    operands = taken(make(bias=bias), *names)
    stored = kind(operands.weight)
    found = step(lambda x: call(operands, stored, dropout_p=0.3), operands)
    assert stored.asked == (2 if "x" in names else 1)
    assert_same(found, step(lambda x: call(operands, dense_of(stored, F32), dropout_p=0.3), operands))


@ALL_KINDS
@pytest.mark.parametrize("x_dtype", [F32, BF16, F16], ids=str)
def test_a_weight_computes_in_a_dtype_of_its_own(kind: type[Rows], x_dtype: torch.dtype) -> None:
    operands = taken(make(dtype=x_dtype, adapter_dtype=F32))
    stored = kind(operands.weight, BF16)
    y = call(operands, stored)
    dy = gradient_of(y.detach().bfloat16()).to(x_dtype)
    y.backward(dy)
    assert y.dtype is operands.x.grad.dtype is x_dtype
    x, _, a, b, bias = operands
    rounded = Operands(x.bfloat16(), dense_of(stored, BF16), a, b, bias.bfloat16())
    actual = {"lora_a": a.grad, "lora_b": b.grad}
    if x_dtype is not F16:  # whose range would cut what bfloat16 holds
        actual |= {"y": y.bfloat16(), "x": x.grad.bfloat16()}
    assert_matches_reference(actual, rounded, dy.bfloat16())


def test_narrower_adapters_are_widened_to_it() -> None:
    operands = taken(make(dtype=BF16))
    y = call(operands, Rows(operands.weight, F32))
    y.sum().backward()
    assert y.dtype is operands.lora_a.grad.dtype is operands.lora_b.grad.dtype is BF16


@ALL_KINDS
def test_autocast_says_in_which_dtype_and_not_what_comes_out(kind: type[Rows]) -> None:
    operands = taken(make())
    stored = kind(operands.weight)
    with torch.autocast("cpu", dtype=BF16):
        found = step(lambda x: call(operands, stored), operands)
    own = kind(operands.weight, BF16)
    own.rows, own.factors = stored.rows, stored.factors
    assert_same(found, step(lambda x: call(operands, own), operands))
    assert {t.dtype for t in found.values()} == {F32}


@pytest.mark.parametrize("kind", [Rows, Filling])
def test_a_backward_under_autocast_is_that_without(kind: type[Rows]) -> None:
    operands = taken(make())
    stored = kind(operands.weight)
    expected = step(lambda x: call(operands, stored), operands)
    y = call(operands, stored)
    with torch.autocast("cpu", dtype=BF16):
        y.backward(gradient_of(y))
    assert_same({name: getattr(operands, name).grad for name in ("x", "lora_a", "lora_b")}, {
        name: t for name, t in expected.items() if name != "y"
    })  # fmt: skip


@ALL_KINDS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(kind: type[Rows], mode: Callable[[], Any]) -> None:
    operands = taken(make(lead=(2, 5)))
    stored = kind(operands.weight)
    with mode():
        y = call(operands, stored)
    assert not y.requires_grad
    assert torch.equal(y, call(operands, stored))
    y, operands = call(operands, stored), taken(operands)
    y.sum().backward()  # of a workspace that an inference began


@ALL_KINDS
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_replay_the_mask(kind: type[Rows], use_reentrant: bool) -> None:
    operands = taken(make())
    stored = kind(operands.weight)

    def layer(x: Tensor) -> Tensor:
        return call(operands._replace(x=x), stored, dropout_p=0.3).tanh()

    def grads(function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(5)
        fresh = {name: getattr(operands, name) for name in ("x", "lora_a", "lora_b")}
        for t in fresh.values():
            t.grad = None
        y = function(operands.x)
        y.backward(gradient_of(y))
        return {name: t.grad for name, t in fresh.items()}

    assert_same(grads(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)), grads(layer))


def test_dispatch_modes_see_the_operators() -> None:
    operands = taken(make())
    stored = Filling(operands.weight)
    expected = step(lambda x: call(operands, stored), operands)
    with OpLog() as log:
        found = step(lambda x: call(operands, stored), operands)
    assert log.count(["fastlora::lora_matmul", "fastlora::rank_grad"]) == {
        "fastlora::lora_matmul": 2,
        "fastlora::rank_grad": 2,
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


@ALL_KINDS
def test_flops_are_those_of_a_dense_weight(kind: type[Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import flop_counter

    operands = taken(make())
    stored = kind(operands.weight)
    monkeypatch.setattr(flop_counter, "flop_registry", dict(flop_counter.flop_registry))
    for operator in (torch.ops.fastlora.lora_matmul, torch.ops.fastlora.rank_grad):
        flop_counter.flop_registry.pop(operator, None)

    def flops(weight: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            step(lambda x: call(operands, weight), operands)
        return counter.get_total_flops()

    assert flops(stored) == flops(dense_of(stored, F32)) > 0


def test_explain_tells_of_the_dense_product() -> None:
    x, weight, a, b, bias = make(dtype=BF16)
    stored = Filling(weight)
    told = fastlora.explain(x, stored, a, b, bias=bias)
    assert told.chosen == fastlora.explain(x, dense_of(stored, BF16), a, b, bias=bias).chosen


@ALL_KINDS
def test_a_double_backward_raises_as_for_dense_weights(kind: type[Rows]) -> None:
    operands = taken(make())
    for weight in (operands.weight, kind(operands.weight)):
        (dx,) = torch.autograd.grad(call(operands, weight).square().sum(), operands.x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_functorch_is_refused_as_for_dense_weights(transform: str) -> None:
    operands = make(lead=(3, 5))
    said = []
    for weight in (operands.weight, Rows(operands.weight)):

        def f(x: Tensor, weight: Any = weight) -> Tensor:
            return call(operands._replace(x=x), weight).sum()

        with pytest.raises(RuntimeError) as caught:
            getattr(torch.func, transform)(f)(operands.x)
        said.append(str(caught.value).splitlines()[0])
    assert said[0] == said[1]


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "shape": ({"weight": Rows(torch.ones(29, 47))}, RuntimeError, r"x has shape \[37, 48\]: expected \[\.\.\., 47\]"),
    "shape_of_b": (
        {"weight": Rows(torch.ones(30, 48))},
        RuntimeError,
        r"lora_b has shape \[29, 6\]: expected \[30, 6\]",
    ),
    "x_integer": ({"x": torch.ones(37, 48, dtype=torch.int64)}, RuntimeError, "x is int64: expected one of"),
    "x_integer_for_another_dtype": (
        {"x": torch.ones(37, 48, dtype=torch.int64), "weight": Rows(torch.ones(29, 48), BF16)},
        RuntimeError,
        "x is int64: expected one of",
    ),
    "adapters_integer": (
        {"lora_a": torch.ones(6, 48, dtype=torch.int64), "lora_b": torch.ones(29, 6, dtype=torch.int64)},
        RuntimeError,
        "lora_a and lora_b are int64 and x float32",
    ),
    "bias_integer": ({"bias": torch.ones(29, dtype=torch.int64)}, RuntimeError, "bias is int64 and x float32"),
    "adapters_wide": (
        {"lora_a": torch.ones(6, 48, dtype=F64), "lora_b": torch.ones(29, 6, dtype=F64)},
        RuntimeError,
        "lora_a and lora_b are float64 and x float32",
    ),
    "adapters_differ": ({"lora_b": torch.ones(29, 6, dtype=F64)}, RuntimeError, "lora_a is float32 and lora_b float64"),
    "no_stored_weight": ({"weight": object()}, TypeError, "weight must be a torch.Tensor, got object"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize(
    "entrance", [lora_linear, fastlora.explain, "group", "mlp"], ids=["lora_linear", "explain", "group", "mlp"]
)
def test_errors_are_those_of_a_dense_weight(entrance: Any, case: str) -> None:
    changes, error, message = ERRORS[case]
    good = make()
    arguments = {**good._asdict(), "weight": Rows(good.weight), **changes}
    x, weight, a, b, bias = arguments.values()

    def enter() -> None:
        if entrance == "group":
            lora_linear_group(x, [weight, weight], [a, a], [b, b], scales=[SCALE] * 2, biases=[bias, bias])
        elif entrance == "mlp":
            branch = Branch(weight, a, b, SCALE, bias)
            down = make(k=getattr(weight, "shape", [29])[0])
            lora_swiglu_mlp(x, branch, branch, Branch(Rows(down.weight), down.lora_a, down.lora_b, SCALE))
        else:
            entrance(x, weight, a, b, scale=SCALE, bias=bias)

    with pytest.raises(error, match=message) as caught:
        enter()
    assert caught.type is error


def test_a_weight_elsewhere_is_refused() -> None:
    stored = Rows(make().weight)
    stored.device = torch.device("meta")
    with pytest.raises(RuntimeError, match="weight is on meta and x on cpu"):
        call(make(), stored)


def test_a_weight_of_three_dimensions_is_refused() -> None:
    stored = Rows(make().weight)
    stored.shape = torch.Size((1, 29, 48))
    with pytest.raises(RuntimeError, match=r"weight has shape \[1, 29, 48\]: expected two dimensions"):
        call(make(), stored)


@pytest.mark.parametrize("wrong", ["shape", "dtype"])
def test_a_weight_that_gives_what_it_does_not_say_is_refused(wrong: str) -> None:
    class Wrong(Rows):
        def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
            return torch.ones(28, 48) if wrong == "shape" else torch.ones(29, 48, dtype=F16)

    said = r"Wrong\.dense gave \[2\d, 48\] in float\d\d: expected \[29, 48\], its shape, in float32"
    with pytest.raises(RuntimeError, match=said):
        call(make(), Wrong(make().weight))


def test_nothing_dense_is_kept_between_forward_and_backward() -> None:
    operands = taken(make())
    stored = Rows(operands.weight)
    packed: list[torch.Size] = []
    with saved_tensors_hooks(lambda t: (packed.append(t.shape), t)[1], lambda t: t):
        y = call(operands, stored)
    assert [gone() for gone in stored.given] == [None]
    assert operands.weight.shape not in packed
    y.sum().backward()
    assert [gone() for gone in stored.given] == [None, None]


@pytest.mark.parametrize("names", [("x", "lora_a", "lora_b"), ("lora_a", "lora_b")], ids=str)
def test_nothing_dense_is_kept_by_groups_and_mlps(names: tuple[str, ...]) -> None:
    for function in (group_of, mlp_of):
        x, branches, stored = function(Rows, train_x="x" in names)
        packed: list[torch.Size] = []
        with saved_tensors_hooks(lambda t, seen=packed: (seen.append(t.shape), t)[1], lambda t: t):
            total = sum(y.sum() for y in outputs_of(function, x, branches))
        assert [w.asked for w in stored] == [1] * len(stored)
        assert not {w.shape for w in stored} & set(packed)
        total.backward()
        assert not any(gone() is not None for w in stored for gone in w.given)
        # The gradient of an MLP's h wants that of down.
        again = [1 + ("x" in names or (function is mlp_of and i == 2)) for i in range(len(stored))]
        assert [w.asked for w in stored] == again


# N, R, scale, dropout, bias of each branch.
BRANCHES = ((40, 6, 1.7, 0.1, True), (24, 4, 0.5, 0.3, False), (24, 8, 1.3, 0.0, True))


def group_of(
    kind: type[Rows] = Rows,
    dtype: torch.dtype = F32,
    adapter_dtype: torch.dtype | None = None,
    dropout: bool = False,
    computes_in: Sequence[torch.dtype | None] = (None, None, None),
    train_x: bool = True,
) -> tuple[Tensor, list[Branch], list[Rows]]:
    branches = []
    for i, (n, r, scale, p, bias) in enumerate(BRANCHES):
        made = taken(make(5, K, n, r, dtype=dtype, adapter_dtype=adapter_dtype, bias=bias, seed=i), "lora_a", "lora_b")
        stored = kind(made.weight, computes_in[i])
        branches.append(Branch(stored, made.lora_a, made.lora_b, scale, made.bias, p if dropout else 0.0))
    x = make(k=K, lead=(4, 5), dtype=dtype, seed=9).x.requires_grad_(train_x)
    return x, branches, [branch.weight for branch in branches]


def mlp_of(
    kind: type[Rows] = Rows,
    dtype: torch.dtype = F32,
    adapter_dtype: torch.dtype | None = None,
    dropout: bool = False,
    computes_in: Sequence[torch.dtype | None] = (None, None, None),
    train_x: bool = True,
) -> tuple[Tensor, list[Branch], list[Rows]]:
    branches = []
    for i, (n, k, r) in enumerate(((72, K, 6), (72, K, 8), (40, 72, 4))):
        made = taken(make(5, k, n, r, dtype=dtype, adapter_dtype=adapter_dtype, seed=i), "lora_a", "lora_b")
        stored, p = kind(made.weight, computes_in[i]), 0.2 if dropout else 0.0
        branches.append(Branch(stored, made.lora_a, made.lora_b, SCALE - 0.3 * i, made.bias, p))
    x = make(k=K, lead=(4, 5), dtype=dtype, seed=9).x.requires_grad_(train_x)
    return x, branches, [branch.weight for branch in branches]


def outputs_of(function: Any, x: Tensor, branches: Sequence[Branch]) -> tuple[Tensor, ...]:
    if function is mlp_of:
        return (lora_swiglu_mlp(x, *branches),)
    ws, a_s, bs, scales, biases, ps = zip(*branches, strict=True)
    return lora_linear_group(x, ws, a_s, bs, scales=scales, biases=biases, dropout_ps=ps)


def gradients_of(function: Any, x: Tensor, branches: Sequence[Branch]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of x, and of a and b of each branch, of a seeded step; and the outputs' gradients."""
    torch.manual_seed(3)
    ys = outputs_of(function, x, branches)
    dys = [gradient_of(y, i) for i, y in enumerate(ys)]
    trained = [x, *(t for branch in branches for t in branch[1:3])]
    return [*ys, *torch.autograd.grad(ys, trained, dys)], dys


def products_of(x: Tensor, branches: Sequence[Branch], dtype: torch.dtype) -> list[Product]:
    torch.manual_seed(3)
    x = x.detach().reshape(-1, x.shape[-1]).to(dtype)
    return [
        Product(
            x, dense_of(w, dtype), a.detach(), b.detach(), scale, bias if bias is None else bias.to(dtype), p,
            draw_seed(x.device) if p else None,
        )
        for w, a, b, scale, bias, p in branches
    ]  # fmt: skip


@ALL_KINDS
@pytest.mark.parametrize("dropout", [False, True], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_groups_meet_the_rule(kind: type[Rows], dropout: bool, dtypes: str) -> None:
    dtype, adapter_dtype = DTYPES[dtypes]
    x, branches, _ = group_of(kind, dtype, adapter_dtype, dropout)
    found, dys = gradients_of(group_of, x, branches)
    products = products_of(x, branches, dtype)
    flat = [dy.reshape(20, -1) for dy in dys]
    oracles, baselines = (
        [of(p, dy) for p, dy in zip(products, flat, strict=True)] for of in (oracle_step, reference_step)
    )
    n = len(branches)
    for i in range(n):
        for name, tensor in {"y": found[i], "da": found[n + 1 + 2 * i], "db": found[n + 2 + 2 * i]}.items():
            oracle, baseline = (getattr(steps[i], name) for steps in (oracles, baselines))
            assert_close_to_oracle(
                tensor.detach().reshape(baseline.shape), oracle=oracle, baseline=baseline, name=f"{name} of {i}"
            )
    dx = [torch.stack([s.dx for s in steps]).sum(0) for steps in (oracles, baselines)]
    assert_close_to_oracle(found[n].reshape(-1, K), oracle=dx[0], baseline=dx[1], name="dx")


@ALL_KINDS
@pytest.mark.parametrize("dropout", [False, True], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_mlps_meet_the_rule(kind: type[Rows], dropout: bool, dtypes: str) -> None:
    dtype, adapter_dtype = DTYPES[dtypes]
    x, branches, _ = mlp_of(kind, dtype, adapter_dtype, dropout)
    found, (dy,) = gradients_of(mlp_of, x, branches)
    products = products_of(x, branches, dtype)
    oracle, baseline = (of(*products, dy.reshape(20, -1), "silu") for of in (oracle_mlp_step, reference_mlp_step))
    y, dx, *others = found
    for name, tensor, i in [("das", t, i) for i, t in enumerate(others[::2])] + [
        ("dbs", t, i) for i, t in enumerate(others[1::2])
    ]:
        assert_close_to_oracle(
            tensor, oracle=getattr(oracle, name)[i], baseline=getattr(baseline, name)[i], name=f"{name} {i}"
        )
    assert_close_to_oracle(y.detach().reshape(20, -1), oracle=oracle.y, baseline=baseline.y, name="y")
    assert_close_to_oracle(dx.reshape(20, -1), oracle=oracle.dx, baseline=baseline.dx, name="dx")


MIXTURES: dict[str, tuple[tuple[torch.dtype | None, ...], tuple[int, ...]]] = {
    "dtypes": ((BF16, None, F32), ()),
    "with_dense": ((None, None, None), (1,)),
    "with_dense_and_dtypes": ((BF16, None, None), (2,)),
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("function", [group_of, mlp_of])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_mixtures_are_their_layers_one_by_one(function: Any, mixture: str, autocast: bool) -> None:
    computes_in, dense = MIXTURES[mixture]
    x, branches, stored = function(Filling, computes_in=computes_in)
    for i in dense:
        branches[i] = branches[i]._replace(weight=dense_of(stored[i], F32))

    def alone(x: Tensor) -> tuple[Tensor, ...]:
        def layer(x: Tensor, branch: Branch) -> Tensor:
            return lora_linear(x, *branch[:3], scale=branch.scale, bias=branch.bias)

        if function is group_of:
            return tuple(layer(x, branch) for branch in branches)
        return (layer(F.silu(layer(x, branches[0])) * layer(x, branches[1]), branches[2]),)

    trained = [x, *(t for branch in branches for t in branch[1:3])]
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        ys, others = outputs_of(function, x, branches), alone(x)
    assert [y.dtype for y in ys] == [y.dtype for y in others]
    dys = [gradient_of(y, i) for i, y in enumerate(ys)]
    found, expected = (torch.autograd.grad(outputs, trained, dys) for outputs in (ys, others))
    for one, other in zip((*ys, *found), (*others, *expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("function", [group_of, mlp_of])
@pytest.mark.parametrize("by", ["autocast", "their_own"])
def test_one_dtype_for_all_is_that_of_an_input_cast_to_it(function: Any, by: str) -> None:
    x, branches, stored = function(Filling, computes_in=[BF16 if by == "their_own" else None] * 3)
    with torch.autocast("cpu", dtype=BF16, enabled=by == "autocast"):
        found, _ = gradients_of(function, x, branches)
    assert [w.asked for w in stored] == [2, 2, 2]
    for w in stored:
        w.computes_in = None
    expected, _ = gradients_of(function, x.detach().bfloat16().requires_grad_(), branches)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype is F32
        assert torch.equal(one, other.float()), i


def test_workspaces_are_used_again_and_each_branch_has_its_own() -> None:
    operands = taken(make())
    first, second, wider = Filling(operands.weight), Filling(2 * operands.weight), Filling(torch.ones(30, K))
    for stored in (first, second):
        step(lambda x, w=stored: call(operands, w), operands)
    assert len({*first.places, *second.places}) == 1
    call(make(n=30), wider)
    call(make(dtype=BF16), other := Filling(operands.weight))
    assert len({first.places[0], wider.places[0], other.places[0]}) == 3

    x, branches, stored = group_of(Filling)
    gradients_of(group_of, x, branches)
    assert [len(set(w.places)) for w in stored] == [1, 1, 1]
    assert len({w.places[0] for w in stored}) == 3


def test_a_workspace_belongs_to_a_thread() -> None:
    operands = make()
    stored = Filling(operands.weight)
    call(operands, stored)
    kept = dict(base._workspaces.by_place)
    thread = threading.Thread(target=call, args=(operands, stored))
    thread.start()
    thread.join()
    assert len(kept) == 1
    assert base._workspaces.by_place == kept
    assert stored.asked == 2
    assert stored.places[0] != stored.places[1]
    base.forget_workspaces()
    assert not base._workspaces.by_place


def test_no_workspace_where_somebody_looks_on() -> None:
    operands = taken(make())
    with OpLog():
        step(lambda x: call(operands, Filling(operands.weight)), operands)
    assert not base._workspaces.by_place


@pytest.mark.parametrize("function", [group_of, mlp_of])
def test_what_is_left_in_a_workspace_is_never_read(function: Any) -> None:
    x, branches, _ = function(Filling, dropout=True)
    expected, dys = gradients_of(function, x, branches)
    torch.manual_seed(3)
    ys = outputs_of(function, x, branches)
    for memory in base._workspaces.by_place.values():
        memory.fill_(torch.nan)
    trained = [x, *(t for branch in branches for t in branch[1:3])]
    for found, one in zip([*ys, *torch.autograd.grad(ys, trained, dys)], expected, strict=True):
        assert torch.equal(found, one)


def test_layers_that_share_a_workspace_do_not_mix() -> None:
    """Two layers of one shape, whose backwards come after both forwards."""
    operands = taken(make(n=K))
    first, second = Filling(operands.weight), Filling(operands.weight.flip(0))

    def chain(one: Any, other: Any) -> dict[str, Tensor]:
        return step(lambda x: call(operands._replace(x=call(operands, one)), other), operands)

    expected = chain(dense_of(first, F32), dense_of(second, F32))
    assert_same(chain(first, second), expected)
    assert len({*first.places, *second.places}) == 1


def test_a_product_of_its_own_is_asked_for_by_the_number_of_tokens() -> None:
    operands = taken(make())
    stored = Multiplying(operands.weight)
    call(operands, stored)
    assert (stored.multiplied, stored.asked) == (1, 0)
    stored.most = 36
    call(operands, stored)
    assert (stored.multiplied, stored.asked) == (1, 1)


class Unnoted(Rows):
    """One that takes no notes, which a compiler would refuse to trace."""

    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return (self.rows * self.factors).to(dtype) if out is None else out.copy_(self.rows * self.factors)


class UnnotedFilling(Unnoted):
    fills = True


class UnnotedMultiplying(Unnoted):
    def multiplies(self, m: int) -> bool:
        return m > 0

    def product(self, x_mk: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x_mk, self.dense(x_mk.dtype), bias)


@pytest.mark.parametrize("kind", [Unnoted, UnnotedFilling, UnnotedMultiplying])
def test_compiled_without_a_break_and_equal_to_eager(kind: type[Rows]) -> None:
    torch._dynamo.reset()
    operands = taken(make())
    stored = kind(operands.weight)

    def layer(x: Tensor) -> Tensor:
        return call(operands._replace(x=x), stored, dropout_p=0.3)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert_same(step(compiled, operands), step(layer, operands))
    torch._dynamo.reset()
