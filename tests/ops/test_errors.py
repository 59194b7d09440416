"""Bad calls: one exception at the border, of the kind torch users expect, that names the argument and what came."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastlora
from fastlora import lora_linear
from tests.cases import SCALE, make

ENTRANCES = {"lora_linear": lora_linear, "explain": fastlora.explain}

# What is changed in a good call (x [37, 48], weight [29, 48], lora_a [6, 48], lora_b [29, 6], bias [29]), the
# exception, and what its message must say.
KINDS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x_list": ({"x": [1.0, 2.0]}, TypeError, "x must be a torch.Tensor, got list"),
    "x_none": ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
    "weight_numpy": ({"weight": np.zeros((29, 48))}, TypeError, "weight must be a torch.Tensor, got ndarray"),
    "lora_a_none": ({"lora_a": None}, TypeError, "lora_a must be a torch.Tensor, got NoneType"),
    "lora_b_float": ({"lora_b": 0.0}, TypeError, "lora_b must be a torch.Tensor, got float"),
    "bias_bool": ({"bias": True}, TypeError, "bias must be a torch.Tensor, got bool"),
    "scale_none": ({"scale": None}, TypeError, "scale must be a float, got NoneType"),
    "scale_tensor": ({"scale": torch.tensor(2.0)}, TypeError, "scale must be a float, got Tensor"),
    "scale_string": ({"scale": "2"}, TypeError, "scale must be a float, got str"),
    "dropout_none": ({"dropout_p": None}, TypeError, "dropout_p must be a float, got NoneType"),
    "dropout_bool": ({"dropout_p": True}, TypeError, "dropout_p must be a float, got bool"),
    "dropout_negative": ({"dropout_p": -0.1}, ValueError, r"dropout_p must be .* below 1, got -0\.1"),
    "dropout_one": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be .* below 1, got 1\.0"),
    "dropout_nan": ({"dropout_p": math.nan}, ValueError, "dropout_p must be .* below 1, got nan"),
    "dropout_bad_in_eval": ({"dropout_p": 2, "training": False}, ValueError, "dropout_p must be .* below 1, got 2"),
}

SHAPES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "x_width": ({"x": (37, 47)}, r"x has shape \[37, 47\]: expected \[\.\.\., 48\]"),
    "x_scalar": ({"x": ()}, r"x has shape \[\]: expected \[\.\.\., 48\]"),
    "weight_1d": ({"weight": (48,)}, r"weight has shape \[48\]: expected two dimensions"),
    "weight_3d": ({"weight": (1, 29, 48)}, r"weight has shape \[1, 29, 48\]: expected two dimensions"),
    "lora_a_1d": ({"lora_a": (48,)}, r"lora_a has shape \[48\]: expected two dimensions"),
    "lora_a_width": ({"lora_a": (6, 49)}, r"lora_a has shape \[6, 49\]: expected \[rank >= 1, 48\]"),
    "lora_a_turned": ({"lora_a": (48, 6)}, r"lora_a has shape \[48, 6\]: expected \[rank >= 1, 48\]"),
    "rank_0": ({"lora_a": (0, 48), "lora_b": (29, 0)}, r"lora_a has shape \[0, 48\]: expected \[rank >= 1, 48\]"),
    "lora_b_rank": ({"lora_b": (29, 7)}, r"lora_b has shape \[29, 7\]: expected \[29, 6\]"),
    "lora_b_turned": ({"lora_b": (6, 29)}, r"lora_b has shape \[6, 29\]: expected \[29, 6\]"),
    "bias_length": ({"bias": (30,)}, r"bias has shape \[30\]: expected \[29\]"),
    "bias_broadcastable": ({"bias": (1,)}, r"bias has shape \[1\]: expected \[29\]"),
    "bias_2d": ({"bias": (1, 29)}, r"bias has shape \[1, 29\]: expected \[29\]"),
}

F16, BF16, F32, F64, I64 = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64
ALL = ("x", "weight", "lora_a", "lora_b", "bias")
DTYPES: dict[str, tuple[dict[str, torch.dtype], str]] = {
    "integer": (dict.fromkeys(ALL, I64), r"x is int64: expected one of .*float32"),
    "bool": (dict.fromkeys(ALL, torch.bool), r"x is bool: expected one of .*float32"),
    "complex": (dict.fromkeys(ALL, torch.complex64), r"x is complex64: expected one of .*float32"),
    "x_integer": ({"x": I64}, r"x is int64: expected one of .*float32"),
    "weight_half": ({"weight": F16}, "weight is float16 and x float32"),
    "weight_integer": ({"weight": I64}, "weight is int64 and x float32"),
    "x_half": ({"x": BF16}, "weight is float32 and x bfloat16"),
    "bias_double": ({"bias": F64}, "bias is float64 and x float32"),
    "adapters_differ": ({"lora_b": F16}, "lora_a is float32 and lora_b float16"),
    "adapters_half_on_single": ({"lora_a": F16, "lora_b": F16}, "lora_a and lora_b are float16 and x float32"),
    "adapters_integer": ({"lora_a": I64, "lora_b": I64}, "lora_a and lora_b are int64 and x float32"),
    "adapters_single_on_double": (
        {"x": F64, "weight": F64, "bias": F64},
        "lora_a and lora_b are float32 and x float64",
    ),
}


def raised(entrance: Callable[..., Any], exception: type[Exception], message: str, changes: dict[str, Any]) -> None:
    """Calls with one thing wrong; the exception must be the border's own, not one that came up from inside."""
    x, weight, lora_a, lora_b, bias = make()
    arguments = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "bias": bias, "scale": SCALE} | changes
    with pytest.raises(exception, match=message) as caught:
        entrance(**arguments)
    assert caught.type is exception
    assert caught.value.__context__ is None


@pytest.fixture(params=ENTRANCES.values(), ids=ENTRANCES)
def entrance(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param


@pytest.mark.parametrize("case", KINDS)
def test_wrong_kind_or_value(entrance: Callable[..., Any], case: str) -> None:
    changes, exception, message = KINDS[case]
    raised(entrance, exception, message, changes)


@pytest.mark.parametrize("case", SHAPES)
def test_wrong_shape(entrance: Callable[..., Any], case: str) -> None:
    shapes, message = SHAPES[case]
    raised(entrance, RuntimeError, message, {name: torch.randn(shape) for name, shape in shapes.items()})


def test_wrong_shape_shows_all_shapes(entrance: Callable[..., Any]) -> None:
    shapes = r"x \[37, 48\], weight \[29, 48\], lora_a \[6, 47\], lora_b \[29, 6\], bias \[29\]"
    raised(entrance, RuntimeError, shapes, {"lora_a": torch.randn(6, 47)})


@pytest.mark.parametrize("case", DTYPES)
def test_wrong_dtype(entrance: Callable[..., Any], case: str) -> None:
    dtypes, message = DTYPES[case]
    operands = make().named()
    raised(entrance, RuntimeError, message, {name: operands[name].to(dtype) for name, dtype in dtypes.items()})


@pytest.mark.parametrize("field", ALL[1:])
def test_wrong_device(entrance: Callable[..., Any], field: str) -> None:
    moved = {field: make().named()[field].to("meta")}
    raised(entrance, RuntimeError, f"{field} is on meta and x on cpu", moved)


def test_meta_tensors_hold_no_data(entrance: Callable[..., Any]) -> None:
    raised(entrance, RuntimeError, "x is on the meta device", {n: t.to("meta") for n, t in make().named().items()})


@pytest.mark.parametrize("bad", [{"dropout_p": 1.0}, {"scale": None}, {"training": True, "lora_b": None}], ids=str)
def test_a_refused_call_draws_no_random_numbers(bad: dict[str, Any]) -> None:
    x, weight, lora_a, lora_b, bias = make()
    arguments = {"lora_b": lora_b, "bias": bias, "scale": SCALE, "dropout_p": 0.5} | bad
    before = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError)):
        lora_linear(x, weight, lora_a, **arguments)
    assert torch.equal(torch.get_rng_state(), before)


def test_numbers_may_be_ints_and_numpy_floats() -> None:
    def call(scale: Any, dropout_p: Any) -> Tensor:
        torch.manual_seed(1)
        return make()(scale=scale, dropout_p=dropout_p)

    assert torch.equal(call(2, np.float64(0.5)), call(2.0, 0.5))
    assert torch.equal(call(np.float64(2), 0), call(2.0, 0.0))


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match="positional"):
        lora_linear(*make()[:4], SCALE)
    with pytest.raises(TypeError, match="scale"):
        lora_linear(*make()[:4])
