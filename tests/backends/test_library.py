"""The library's forms: each gives what the reference gives, whatever the dtypes, shapes, strides and mask."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Size, Tensor

from fastlora.accuracy import assert_close_to_oracle, oracle_step, reference_step
from fastlora.backends.request import Kernel, Product
from tests.backends.test_dispatch import DROPOUTS, check_lora_matmul, check_rank_grad, some_dropout, turned
from tests.cases import DTYPES, LAYOUTS, Operands, OpLog, gradient_of, kernel_named, make

PRODUCTS, RANK_GRADS = kernel_named("library"), kernel_named("library", "rank_grad")
FORWARD = PRODUCTS.ways("run")[1:]
BACKWARD = PRODUCTS.ways("gradients")[1:]
SIDES = RANK_GRADS.ways("run")[1:]

PAIRS = {**DTYPES, "fp64": (torch.float64, torch.float64)}
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def each(name: str, kernels: tuple[Kernel, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, kernels, ids=[kernel.name.partition(":")[2] for kernel in kernels])


def check_product(form: Kernel, operands: Operands, p: float | None = None, on_product: bool = False) -> None:
    check_lora_matmul(SimpleNamespace(lora_matmul=form.run), operands, p, on_product)


def check_gradients(form: Kernel, operands: Operands, p: float | None = None, dy: Tensor | None = None) -> None:
    product = operands.product(some_dropout(p))
    dy = gradient_of(torch.empty(len(product.x), len(operands.weight), dtype=product.x.dtype)) if dy is None else dy
    oracle, baseline = oracle_step(product, dy)[1:], reference_step(product, dy)[1:]
    actual = form.gradients(product, dy, PRODUCTS.run(product)[1])
    for name, tensor, exact, plain in zip(("dx", "da", "db"), actual, oracle, baseline, strict=True):
        assert_close_to_oracle(tensor, oracle=exact, baseline=plain, name=name)


def check_sides(form: Kernel, left: Tensor, right: Tensor, dtype: torch.dtype, p: float | None = None) -> None:
    check_rank_grad(SimpleNamespace(rank_grad=form.run), left, right, dtype, p)


def operators(function: Callable[..., object], *operands: object, **options: object) -> list[tuple[str, list[Size]]]:
    """What a call runs in torch: each operator with the shapes that go into it."""
    with OpLog() as log:
        function(*operands, **options)
    assert log.calls
    return [(name, [t.shape for t in args if isinstance(t, Tensor)]) for name, args, _ in log.calls]


def test_the_ways_of_a_direction_are_those_that_differ_in_it() -> None:
    names = [way.name.partition(":")[2] for way in PRODUCTS.ways("run")]
    assert names == ["", "addmm", "last", "addmm,last"]
    names = [way.name.partition(":")[2] for way in PRODUCTS.ways("gradients")]
    assert names == ["", "last", "narrow", "wide", "last,narrow", "last,wide"]
    assert [way.name for way in RANK_GRADS.ways("run")] == ["library", "library:narrow", "library:wide"]


@pytest.mark.parametrize("kernel", [PRODUCTS, RANK_GRADS], ids=["lora_matmul", "rank_grad"])
def test_a_form_is_named_after_its_kernel(kernel: Kernel) -> None:
    names = [form.name for form in kernel.forms]
    assert all(name.startswith(f"{kernel.name}:") for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", [form.name for form in PRODUCTS.forms])
def test_a_form_does_what_its_words_say_in_each_direction(name: str) -> None:
    """Forward and backward separately: a word that has no meaning in a direction changes nothing there."""
    form, words = next(form for form in PRODUCTS.forms if form.name == name), set(name.partition(":")[2].split(","))
    for field, meant in {"run": {"addmm", "last"}, "gradients": {"last", "narrow", "wide"}}.items():
        same = next(way for way in PRODUCTS.ways(field) if getattr(way, field) is getattr(form, field))
        assert set(same.name.partition(":")[2].split(",")) - {""} == words & meant


@pytest.mark.parametrize(("m", "rule"), [(37, "wide"), (131, "narrow")])
def test_each_way_multiplies_in_an_order_of_its_own(m: int, rule: str) -> None:
    """But db's sides, of which the kernel itself takes the narrow one first from so many tokens on."""
    product = make(m).product()
    y, z = PRODUCTS.run(product)
    ran = [operators(way.run, product) for way in PRODUCTS.ways("run")]
    assert all(one not in ran[:i] for i, one in enumerate(ran))
    ran = {way.name.partition(":")[2]: operators(way.gradients, product, y, z) for way in PRODUCTS.ways("gradients")}
    assert ran.pop("") == ran[rule]
    assert ran.pop("last") == ran[f"last,{rule}"]
    assert all(one not in [*ran.values()][:i] for i, one in enumerate(ran.values()))
    ran = {way.name: operators(way.run, y, z, dtype=y.dtype) for way in RANK_GRADS.ways("run")}
    assert ran.pop("library") == ran[f"library:{rule}"]
    assert ran["library:narrow"] != ran["library:wide"]
    ran = {way.name: operators(way.run, z, y, dtype=y.dtype) for way in RANK_GRADS.ways("run")}
    assert ran["library"] == ran["library:narrow"] != ran["library:wide"]


@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("r", [1, 5, 8, 16])
@pytest.mark.parametrize("dtypes", PAIRS.values(), ids=PAIRS)
@each("form", FORWARD)
def test_product(
    form: Kernel, dtypes: tuple[torch.dtype, torch.dtype], r: int, bias: bool, dropout: tuple[float | None, bool]
) -> None:
    operands = make(r=r, dtype=dtypes[0], adapter_dtype=dtypes[1], bias=bias)
    check_product(form, operands, *dropout)
    if not bias:
        check_product(form, turned(operands), *dropout)


@pytest.mark.parametrize("p", [None, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("r", [1, 5, 8, 16])
@pytest.mark.parametrize("dtypes", PAIRS.values(), ids=PAIRS)
@each("form", BACKWARD)
def test_gradients(form: Kernel, dtypes: tuple[torch.dtype, torch.dtype], r: int, p: float | None) -> None:
    check_gradients(form, make(131, r=r, dtype=dtypes[0], adapter_dtype=dtypes[1]), p)


@pytest.mark.parametrize("p", [None, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("r", [1, 5, 8, 16])
@pytest.mark.parametrize("dtypes", PAIRS.values(), ids=PAIRS)
@each("form", SIDES)
def test_rank_grad(form: Kernel, dtypes: tuple[torch.dtype, torch.dtype], r: int, p: float | None) -> None:
    narrow, wide = make(131, r, dtype=dtypes[0]).x, make(131, 48, dtype=dtypes[0], seed=3).x
    check_sides(form, narrow, wide, dtypes[1], p)
    check_sides(form, wide, narrow, dtypes[1], p)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("field", Operands._fields[:4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@each("form", PRODUCTS.forms)
def test_any_layout(form: Kernel, dtype: torch.dtype, field: str, layout: str) -> None:
    operands = make(r=5, dtype=dtype)
    operands = operands._replace(**{field: LAYOUTS[layout](getattr(operands, field))})
    for dropout in DROPOUTS.values():
        check_product(form, operands, *dropout)
    for p in (None, 0.25):
        check_gradients(form, operands, p)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@each("form", BACKWARD)
def test_gradients_of_dy_in_any_layout(form: Kernel, dtype: torch.dtype, layout: str) -> None:
    check_gradients(form, make(r=5, dtype=dtype), dy=LAYOUTS[layout](gradient_of(torch.empty(37, 29, dtype=dtype))))


@pytest.mark.parametrize("r", [3, 12, 33])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@each("form", FORWARD)
def test_nothing_between_the_rows_is_seen(form: Kernel, dtype: torch.dtype, r: int) -> None:
    """Behind each row of x, and of z where its rank is padded, memory may hold NaN, which times zero is NaN."""
    garbage = [torch.full((size,), torch.nan, dtype=dtype) for size in (64, 256, 1024, 4096) for _ in range(8)]
    del garbage
    operands = make(40, 41, 80, r, dtype=dtype)
    operands = operands._replace(x=LAYOUTS["sliced"](operands.x))
    for dropout in DROPOUTS.values():
        check_product(form, operands, *dropout)


@pytest.mark.parametrize("r", [3, 12, 33])
@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@each("form", BACKWARD)
def test_nothing_between_the_rows_of_a_gradient_is_seen(form: Kernel, dtype: torch.dtype, r: int) -> None:
    dy = LAYOUTS["sliced"](gradient_of(torch.empty(40, 41, dtype=dtype)))
    operands = make(40, 80, 41, r, dtype=dtype)
    for p in (None, 0.25):
        check_gradients(form, operands, p, dy)
        check_gradients(form, operands._replace(x=LAYOUTS["sliced"](operands.x)), p, dy)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@each("form", SIDES)
def test_nothing_between_the_rows_of_a_side_is_seen(form: Kernel, dtype: torch.dtype) -> None:
    right = make(40, 80, dtype=dtype).x
    left = LAYOUTS["sliced"](make(40, 41, dtype=dtype).x)
    for side in (left, left.T.contiguous().T, LAYOUTS["sliced"](left.T).T):
        check_sides(form, side, right, dtype)
        check_sides(form, right, side, dtype)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@each("form", FORWARD)
def test_z_starts_its_rows_on_16_bytes_with_zeros_behind_them(form: Kernel, dtype: torch.dtype) -> None:
    for dropout in (None, some_dropout()):
        _, z = form.run(make(r=5, dtype=dtype).product(dropout))
        assert z.stride() == (8, 1)
        assert not z.as_strided((37, 3), (8, 1), 5).any()


@pytest.mark.parametrize("chunk", [1, 100, 1000])
@each("form", PRODUCTS.forms)
def test_many_chunks(form: Kernel, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora.backends.dropout._CHUNK", {"cpu": chunk})
    for on_product in (True, False):
        check_product(form, make(), 0.25, on_product)
    for dtype, adapter_dtype in PAIRS.values():
        check_gradients(form, make(r=8, dtype=dtype, adapter_dtype=adapter_dtype), 0.25)


@pytest.mark.parametrize("chunk", [1, 100, 1000])
@each("form", SIDES)
def test_many_chunks_of_a_side(form: Kernel, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora.backends.dropout._CHUNK", {"cpu": chunk})
    operands = make()
    check_sides(form, operands.x[:, :6], operands.x, torch.float32, 0.25)


@pytest.mark.parametrize("shape", [(0, 48, 29), (37, 0, 29), (37, 48, 0)], ids=["no_rows", "no_input", "no_output"])
@each("form", PRODUCTS.forms)
def test_nothing_to_multiply(form: Kernel, shape: tuple[int, int, int]) -> None:
    for dropout in DROPOUTS.values():
        check_product(form, make(*shape), *dropout)
    check_gradients(form, make(*shape))


@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
@each("form", FORWARD)
def test_without_weight_z_alone_is_made(form: Kernel, dropout: tuple[float | None, bool]) -> None:
    product = make().product(some_dropout(dropout[0]), on_product=dropout[1])
    nothing, z = form.run(product._replace(w=None))
    assert nothing is None
    assert torch.equal(z, form.run(product)[1])


@pytest.mark.parametrize("p", [None, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtypes", PAIRS.values(), ids=PAIRS)
@each("form", BACKWARD)
def test_gradients_are_the_verbs_of_the_same_words(
    form: Kernel, dtypes: tuple[torch.dtype, torch.dtype], p: float | None
) -> None:
    product = make(131, r=8, dtype=dtypes[0], adapter_dtype=dtypes[1], bias=False).product(some_dropout(p))
    x, w, a, b, scale, *_ = product
    dy = gradient_of(torch.empty(131, 29, dtype=dtypes[0]))
    z = PRODUCTS.run(product)[1]
    dx, t = form.run(Product(dy, w.T, b.T, a.T, scale, None, product.dropout_p, product.seed, on_product=True))
    da = RANK_GRADS.run(t, x, dtype=dtypes[1], dropout=product.mask_x)
    side = next((k for k in SIDES if k.name.partition(":")[2] in form.name), RANK_GRADS)
    db = side.run(dy, z, dtype=dtypes[1])
    assert all(torch.equal(*pair) for pair in zip(form.gradients(product, dy, z), (dx, da, db), strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_elsewhere_than_on_a_cpu_all_forms_are_one(bias: bool) -> None:
    product = make(bias=bias).map(lambda t: t.to("meta")).product()
    left, right = product.x[:, :6], product.x

    assert all(operators(form.run, product) == operators(PRODUCTS.run, product) for form in PRODUCTS.forms)
    for sides in ((left, right), (right, left)):
        expected = operators(RANK_GRADS.run, *sides, dtype=torch.float32)
        assert all(operators(form.run, *sides, dtype=torch.float32) == expected for form in RANK_GRADS.forms)
