"""``lora_bias=True``: y = x Wᵀ + scale · (D(x) Aᵀ Bᵀ + bias_B) + bias, on fastlora as in PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import get_peft_model
from torch import nn

import fastlora
from fastlora.accuracy import assert_close_to_oracle
from fastlora.peft import count_calls
from tests.cases import Operands, assert_matches_reference, gradient_of, upcoming_dropout
from tests.peft.peft_models import adapted, assert_as_good_as, config, first, step, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.lora_bias=True.", "ignore:fan_in_fan_out is set")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def biased(*targets: str, **options: Any) -> Any:
    """A model whose lora_B have biases as large as the base's."""
    model = adapted(*targets, lora_bias=True, **options)
    wake_biases(model)
    return model


def wake_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv1d": True},
        {"use_rslora": True},
        {"bias_trains": True},
        {"dtype": BF16, "autocast_adapter_dtype": False},
        {"dtype": FP16, "autocast_adapter_dtype": False},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_lora_bias_joins_the_base_bias(options: dict[str, Any]) -> None:
    model = biased(**options)
    reference = copy.deepcopy(model)
    assert len(fastlora.patch_peft(model).patched) == 2
    x = tokens(16, 9, dtype=options.get("dtype", FP32))
    with count_calls() as calls:
        actual = step(model, x)
    assert (calls.fast.total(), calls.fallback.total()) == (2, 0)
    assert any("lora_B.default.bias" in name for name in actual)
    assert_as_good_as(actual, reference, x)


@pytest.mark.parametrize("bias", [True, False], ids=["base bias", "no base bias"])
def test_lora_bias_alone_is_exact(bias: bool) -> None:
    """Without tokens' part, what is left of y is the bias, rounded once."""
    model = biased("first", bias=bias, dtype=BF16)
    fastlora.patch_peft(model)
    layer = first(model)
    with count_calls() as calls:
        y = layer(torch.zeros(2, 24, dtype=BF16))
    assert calls.fast.total() == 1
    expected = layer.scaling["default"] * layer.lora_B["default"].bias.float()
    if bias:
        expected = expected + layer.base_layer.bias.float()
    assert torch.equal(y[1], expected.to(BF16))


@pytest.mark.parametrize("base", [FP32, BF16], ids=["fp32 base", "bf16 base"])
def test_lora_bias_under_autocast(base: torch.dtype) -> None:
    """Float32 adapters, on a base of either kind."""
    model = biased("first", dtype=base)
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model, strict_dtype=True)
    x = tokens(16, 9, dtype=base)
    with torch.autocast("cpu", dtype=BF16):
        with count_calls() as calls:
            actual = step(first(model), x)
        assert (calls.fast.total(), calls.fallback.total()) == (1, 0)
        baseline = step(first(reference), x)
    oracle = step(copy.deepcopy(first(reference)).double(), x.double())
    assert actual.keys() == baseline.keys()
    for name in actual:
        assert_close_to_oracle(actual[name], oracle=oracle[name], baseline=baseline[name], name=name)


def test_lora_bias_with_dropout() -> None:
    """The bias is added whole; what is dropped is the adapter's input."""
    model = biased("first", lora_dropout=0.4)
    layer = first(model)
    fastlora.patch_peft(model)
    x = tokens().requires_grad_()
    dropout = upcoming_dropout(0.4)
    y = layer(x)
    dy = gradient_of(y)
    y.backward(dy)
    base, down, up, scale = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"], 10 / 6
    operands = Operands(x, base.weight, down.weight, up.weight, (base.bias.double() + scale * up.bias.double()).float())
    actual = {"y": y, "x": x.grad, "lora_a": down.weight.grad, "lora_b": up.weight.grad}
    assert_matches_reference(actual, operands, dy, scale=scale, dropout=dropout)
    whole = scale * dy.double().sum((0, 1))
    assert_close_to_oracle(up.bias.grad, oracle=whole, baseline=scale * dy.sum((0, 1)), name="bias of lora_B")


@pytest.mark.parametrize("alpha", [9, 25], ids=["one scaling", "two scalings"])
def test_lora_bias_of_several_adapters(alpha: int) -> None:
    """One adapter has a bias and the other none, or both have one."""
    for other in (False, True):
        model = adapted(r=2, lora_alpha=3, lora_bias=True)
        model.add_adapter("other", config(r=6, lora_alpha=alpha, lora_bias=other))
        model.base_model.set_adapter(["default", "other"])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        reference = copy.deepcopy(model)
        fastlora.patch_peft(model)
        with count_calls() as calls:
            actual = step(model, tokens())
        assert (calls.fast.total(), calls.fallback.total()) == (2, 0)
        assert_as_good_as(actual, reference, tokens())


class Two(nn.Module):
    """A gate and an up of one input, which would be a group."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(24, 36), nn.Linear(24, 36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate_proj(x) * self.up_proj(x)


def test_lora_bias_is_in_no_group() -> None:
    torch.manual_seed(4)
    model = get_peft_model(Two(), config("gate_proj", "up_proj", lora_bias=True))
    wake_biases(model)
    reference = copy.deepcopy(model)
    report = fastlora.patch_peft(model, groups=[("gate_proj", "up_proj")])
    assert report.groups == ()
    assert all("lora_B has a bias" in reason for reason in report.ungrouped.values())
    x = tokens(64, 9)
    with count_calls() as calls:
        actual = step(model, x)
    assert (calls.fast.total(), calls.groups.grouped) == (2, 0)
    assert_as_good_as(actual, reference, x)
