"""Small eager calls, which are plain nodes of torch: what holds of the verbs holds of them, and where they run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastlora import lora_linear
from fastlora.backends import dispatch, library_small
from fastlora.backends.request import Product
from tests.cases import DTYPES, SCALE, Operands, check_against_reference, make, run

# The tests of the verbs that look at results alone, once more with small calls.
from tests.ops.test_linear import (  # noqa: F401
    test_accepts_parameters_and_views_of_parameters,
    test_backward_of_a_freed_graph_raises,
    test_backward_twice_accumulates,
    test_batched_input_in_any_layout,
    test_forward_and_gradients_at_every_shape,
    test_forward_and_gradients_in_every_dtype,
    test_gradcheck,
    test_gradient_of_a_sum_arrives_with_zero_strides,
    test_gradients_flow_exactly_where_asked,
    test_incoming_gradient_in_any_layout,
    test_keeps_nothing_without_grad,
    test_leading_dimensions,
    test_modifies_nothing_of_the_callers,
    test_nan_and_inf_pass_through,
    test_no_input_features_leaves_the_bias,
    test_no_tokens,
    test_operands_in_any_layout,
    test_output_is_the_callers_to_overwrite,
    test_overwriting_the_saved_input_is_noticed,
    test_same_bits_run_after_run,
    test_without_base_only_the_update_is_left,
)

pytestmark = pytest.mark.small_calls


def is_small(y: Tensor) -> bool:
    names = ("AddmmBackward0", "AddBackward0", "ViewBackward0")
    return y.grad_fn is not None and type(y.grad_fn).__name__ in names


@pytest.mark.parametrize("lead", [(5,), (), (2, 3)], ids=["2d", "1d", "3d"])
@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_small_calls_of_every_dtype(dtypes: tuple[torch.dtype, torch.dtype], p: float, lead: tuple[int, ...]) -> None:
    operands = make(lead=lead, k=48, n=40, r=8, dtype=dtypes[0], adapter_dtype=dtypes[1])
    assert is_small(operands.leaves()(dropout_p=p))
    check_against_reference(operands, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
def test_larger_calls_are_the_verbs(p: float, dtype: torch.dtype) -> None:
    most = library_small._KEPT if p else library_small._SMALL
    r = 64  # so much that in 16 bits too it is the work of no float32 product
    for m, small in ((most // 256, True), (most // 256 + 1, False)):
        operands = make(m, 256, 8, r, dtype=dtype)
        assert is_small(operands.leaves()(dropout_p=p)) is small
        check_against_reference(operands, p)


HALVES = {name: pair for name, pair in DTYPES.items() if pair[0].itemsize == 2}
half_dtypes = pytest.mark.parametrize("dtypes", HALVES.values(), ids=HALVES)
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
FP32 = torch.float32


def are_wide(y: Tensor) -> bool:
    """Whether the low-rank products were float32 beside a 16-bit base."""
    if type(y.grad_fn).__name__ != "AddBackward0":
        return False
    z = y.grad_fn.next_functions[1][0]._saved_self  # type: ignore[union-attr]
    return z.dtype is FP32


@HALF
@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize(("k", "n"), [(256, 8), (8, 256)], ids=["wide_x", "wide_y"])
def test_float32_adapters_stay_so_up_to_these_elements(k: int, n: int, p: float, dtype: torch.dtype) -> None:
    most = library_small._KEPT // 256
    for m, wide in ((most, True), (most + 1, False)):
        operands = make(m, k, n, 8, dtype=dtype, adapter_dtype=FP32)
        assert are_wide(operands.leaves()(dropout_p=p)) is wide
        check_against_reference(operands, p)


@HALF
def test_float32_adapters_stay_so_up_to_this_work(dtype: torch.dtype) -> None:
    m, k, n = 16, 96, 32
    r = library_small._WIDE_WORK // ((k + n) * (m + 16))
    for rank, wide in ((r, True), (r + 1, False)):
        assert are_wide(make(m, k, n, rank, dtype=dtype, adapter_dtype=FP32).leaves()()) is wide


@HALF
def test_half_adapters_are_cast_where_so_few_and_not_too_few(dtype: torch.dtype) -> None:
    k, n, tokens = 96, 32, library_small._CAST_TOKENS
    r = library_small._CAST // (k + n)
    least = library_small._WITHOUT_ONEDNN // (8 * k)  # at rank 8
    cases = [(tokens, r, True), (tokens + 1, r, False), (tokens, r + 1, False), (least, 8, False), (least + 1, 8, True)]
    for m, rank, wide in cases:
        operands = make(m, k, n, rank, dtype=dtype)
        assert are_wide(operands.leaves()()) is wide
        check_against_reference(operands)


@half_dtypes
def test_float32_low_rank_products_are_no_less_accurate(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """At scale 1 too, where z is not multiplied, and at other ranks than oneDNN's of 16 bits."""
    for r, scale in ((8, 1.0), (8, 0.3), (2, 1.7), (12, 1.0)):
        operands = make(30, 96, 40, r, dtype=dtypes[0], adapter_dtype=dtypes[1])
        assert are_wide(operands.leaves()(scale=scale))
        check_against_reference(operands, scale=scale)


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_a_group_knows_which_calls_are_small(dtypes: tuple[torch.dtype, torch.dtype], p: float) -> None:
    """Those alone are not grouped."""
    for m, k, n, r in ((1, 48, 40, 8), (64, 48, 40, 8), (300, 96, 40, 8), (40, 1000, 2000, 16), (3000, 96, 8, 64)):
        operands = make(lead=(1, m), k=k, n=n, r=r, dtype=dtypes[0], adapter_dtype=dtypes[1])
        small = is_small(operands.leaves()(dropout_p=p))
        x, w, a, b, bias = operands
        assert dispatch.is_small(Product(x, w, a, b, SCALE, bias, p)) is small


def assert_not_small(operands: Operands) -> None:
    assert not is_small(operands.leaves()())


def test_where_small_calls_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision that oneDNN may read out of bounds, autocast, another kernel forced."""
    assert is_small(make(4096, 48, 40, 8, dtype=torch.bfloat16).leaves()())
    assert_not_small(make(4096, 48, 40, 6, dtype=torch.bfloat16))
    assert_not_small(make(4096, 48, 40, 8, dtype=torch.bfloat16, adapter_dtype=torch.float32))
    for adapter_dtype in (torch.bfloat16, torch.float32):
        half = make(4, 48, 40, 8, dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
        assert_not_small(half._replace(x=torch.cat([half.x, half.x], 1)[:, :48]))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_not_small(make(4, 48, 40, 8, dtype=dtype))
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    for dtype in (torch.float32, torch.bfloat16):
        assert_not_small(make(4, 48, 40, 8, dtype=dtype))


def test_second_derivatives_are_right() -> None:
    operands = make(4, 7, 5, 3, dtype=torch.float64).leaves()
    assert torch.autograd.gradgradcheck(lambda *tensors: Operands(*tensors)(), tuple(operands.named().values()))


def test_the_same_seed_and_the_same_mask_as_the_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = make(9, 40, 24, 8).leaves()

    def once() -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return operands(dropout_p=0.4), torch.rand(())

    small, after_small = once()
    monkeypatch.setattr(dispatch, "small_of", lambda x: None)
    verbs, after_verbs = once()
    torch.testing.assert_close(small, verbs)
    assert torch.equal(after_small, after_verbs)


@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
def test_checkpointing_replays_a_small_call(p: float) -> None:
    operands = make(9, 40, 24, 8)

    def gradients(call: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(3)
        leaves = operands.leaves()
        call(leaves).square().sum().backward()
        return [t.grad for t in leaves.named().values()]

    def plain(leaves: Operands) -> Tensor:
        return leaves(dropout_p=p)

    def again(leaves: Operands) -> Tensor:
        return checkpoint(plain, leaves, use_reentrant=False)

    for once, twice in zip(gradients(plain), gradients(again), strict=True):
        assert torch.equal(once, twice)


def test_keeps_what_the_verbs_keep() -> None:
    operands = make(9, 40, 24, 8).leaves("lora_a", "lora_b", "x")
    ours = {t.untyped_storage().data_ptr() for t in operands.named().values()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        operands()
    assert {t.shape for t in saved if t.untyped_storage().data_ptr() not in ours} == {torch.Size((9, 8))}


@half_dtypes
@pytest.mark.parametrize("p", [0.0, 0.25], ids=["no_dropout", "dropout"])
def test_keeps_little_for_float32_products(p: float, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """x, or x masked and the mask, 512 kB each at most; z; a and b in float32 where they are not, 64 kB at most."""
    most = library_small._KEPT
    m = 8 if dtypes[1] is FP32 else 32
    operands = make(m, most // m, 40, 1, dtype=dtypes[0], adapter_dtype=dtypes[1]).leaves("lora_a", "lora_b", "x")
    ours = {t.untyped_storage().data_ptr() for t in operands.named().values()}
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in ours:
            saved[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        assert are_wide(operands(dropout_p=p))
    cast = 0 if dtypes[1] is torch.float32 else 4 * (operands.lora_a.numel() + operands.lora_b.numel())
    assert sum(saved.values()) == (2 if p else 1) * (512 << 10) + 4 * m + cast
    assert cast <= 64 << 10


def on_meta(operands: Operands, name: str) -> Operands:
    return operands._replace(**{name: operands.named()[name].to("meta")})


BAD: dict[str, Callable[[Operands], Operands]] = {
    "x of another width": lambda o: o._replace(x=o.x[:, :-1]),
    "x of no dimension": lambda o: o._replace(x=o.x[0, 0]),
    "x of integers": lambda o: o._replace(x=o.x.long()),
    "x of another dtype": lambda o: o._replace(x=o.x.double()),
    "x of half of it": lambda o: o._replace(x=o.x.half()),
    "x no tensor": lambda o: o._replace(x=[1.0]),
    "a weight of one dimension": lambda o: o._replace(weight=o.weight[0]),
    "a weight of another dtype": lambda o: o._replace(weight=o.weight.double()),
    "a weight of no dimension": lambda o: o._replace(weight=o.weight[0, 0]),
    "lora_a of no dimension": lambda o: o._replace(lora_a=o.lora_a[0, 0]),
    "lora_a of one dimension": lambda o: o._replace(lora_a=o.lora_a[0]),
    "lora_a of rank 0": lambda o: o._replace(lora_a=o.lora_a[:0], lora_b=o.lora_b[:, :0]),
    "lora_a of another rank": lambda o: o._replace(lora_a=o.lora_a[1:]),
    "lora_b of one row": lambda o: o._replace(lora_b=o.lora_b[:1]),
    "lora_b of one dimension": lambda o: o._replace(lora_b=o.lora_b[0]),
    "lora_b of no dimension": lambda o: o._replace(lora_b=o.lora_b[0, 0]),
    "lora_b of another dtype": lambda o: o._replace(lora_b=o.lora_b.double()),
    "adapters of another half precision": lambda o: o._replace(lora_a=o.lora_a.half(), lora_b=o.lora_b.half()),
    "adapters of integers": lambda o: o._replace(lora_a=o.lora_a.long(), lora_b=o.lora_b.long()),
    "a bias of one element": lambda o: o._replace(bias=o.bias[:1]),
    "a bias of no dimension": lambda o: o._replace(bias=o.bias[0]),
    "a bias of another dtype": lambda o: o._replace(bias=o.bias.double()),
} | {f"{name} on the meta device": functools.partial(on_meta, name=name) for name in Operands._fields}


@pytest.mark.parametrize("dtypes", [DTYPES[name] for name in ("fp32", "bf16", "bf16_fp32_adapters")], ids=str)
@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_errors_are_the_same(
    change: Callable[[Operands], Operands], dtypes: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = change(make(4, 48, 40, 8, dtype=dtypes[0], adapter_dtype=dtypes[1]))

    def error() -> str:
        with pytest.raises((TypeError, RuntimeError, ValueError)) as info:
            operands()
        return f"{info.type.__name__}: {info.value}"

    small = error()
    monkeypatch.setattr(dispatch, "small_of", lambda x: None)
    assert small == error()


@pytest.mark.parametrize(
    "options", [{"scale": "2"}, {"dropout_p": 1.0}, {"dropout_p": -0.1}, {"dropout_p": True}], ids=str
)
def test_errors_of_numbers_are_the_same(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(options))} must be"):
        make(4, 48, 40, 8)(**options)


def test_it_is_the_formula() -> None:
    operands = make(4, 48, 40, 8, dtype=torch.float64)
    x, w, a, b, bias = operands
    y = lora_linear(x, w, a, b, scale=SCALE, bias=bias)
    torch.testing.assert_close(y, F.linear(x, w, bias) + SCALE * x @ a.T @ b.T)
    assert set(run(operands.leaves())) == {"y", "x", "weight", "lora_a", "lora_b", "bias"}
