"""PEFT's DoRA layers on fastlora: as good as PEFT where one adapter is active, else PEFT's own forward, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import get_peft_model
from peft.tuners.lora.variants import DoraLinearVariant

import fastlora
from fastlora.accuracy import assert_close_to_oracle, oracle_dora_step, reference_dora_step
from fastlora.peft import count_calls
from tests.cases import Operands, gradient_of, upcoming_dropout
from tests.peft.peft_models import adapted, assert_same_bits, config, first, step, tokens, wake

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set", "ignore:Already unmerged")

BF16, FP32 = torch.bfloat16, torch.float32


def awake(model: Any) -> Any:
    """The model with magnitudes that are no longer the norms of its rows."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_((1 + 0.4 * torch.rand(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def run(model: Any, x: Tensor, autocast: torch.dtype | None = None) -> tuple[dict[str, Tensor], Any]:
    """A step, and the calls in it."""
    with count_calls() as calls, torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        return step(model, x), calls


def assert_as_good_as(actual: dict[str, Tensor], model: Any, x: Tensor, autocast: torch.dtype | None = None) -> None:
    """Holds a step to the one error rule: the unpatched model is the baseline, its float64 copy the oracle."""
    oracle = step(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        baseline = step(model, x)
    assert actual.keys() == baseline.keys() == oracle.keys()
    for name in actual:
        assert_close_to_oracle(actual[name], oracle=oracle[name], baseline=baseline[name], name=name)


FAST: dict[str, tuple[dict[str, Any], torch.dtype, torch.dtype | None]] = {
    "nn.Linear": ({}, FP32, None),
    "no bias": ({"bias": False}, FP32, None),
    "Conv1D": ({"conv1d": True}, FP32, None),
    "rsLoRA": ({"use_rslora": True}, FP32, None),
    "bf16": ({"dtype": BF16, "autocast_adapter_dtype": False}, BF16, None),
    "float64": ({"dtype": torch.float64}, torch.float64, None),
    "autocast": ({}, FP32, BF16),
    "autocast, bf16 base": ({"dtype": BF16}, BF16, BF16),
}


@pytest.mark.parametrize("case", FAST)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dora(case: str, training: bool) -> None:
    options, dtype, autocast = FAST[case]
    model = awake(adapted(use_dora=True, **options)).train(training)
    reference = copy.deepcopy(model)
    assert len(fastlora.patch_peft(model).patched) == 2
    x = tokens(16, 9, dtype=dtype, seed=2)
    actual, calls = run(model, x, autocast)
    assert (calls.fast.total(), calls.fallback.total()) == (2, 0)
    assert any("magnitude" in name for name in actual)
    assert_as_good_as(actual, reference, x, autocast)


QUANTISED: dict[str, tuple[dict[str, Any], torch.dtype, torch.dtype | None]] = {
    "4 bits": ({}, FP32, None),
    "4 bits, compute bf16, autocast, x fp32": ({"compute": BF16}, FP32, BF16),
    "4 bits, compute bf16, autocast": ({"compute": BF16}, BF16, BF16),
    "4 bits, bf16": ({"compute": BF16, "adapter_dtype": BF16}, BF16, None),
    "4 bits, adapters bf16": ({"adapter_dtype": BF16}, BF16, None),
    "8 bits": ({"bits": 8}, FP32, None),
    "8 bits, bf16": ({"bits": 8, "adapter_dtype": BF16}, BF16, None),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_dora_on_quantised_bases(case: str) -> None:
    """In training: in eval mode PEFT loses the factors of an 8-bit weight after a step."""
    pytest.importorskip("bitsandbytes")
    from tests.peft import quantised_models

    options, dtype, autocast = QUANTISED[case]
    model = awake(quantised_models.adapted(use_dora=True, **options))
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    x = tokens(16, 9, k=quantised_models.K, dtype=dtype, seed=2)
    actual, calls = run(model, x, autocast)
    assert (calls.fast.total(), calls.fallback.total()) == (2, 0)
    quantised_models.assert_as_good_as(actual, reference, x, autocast)


def assert_right(model: Any, x: Tensor, p: float) -> None:
    """One step of the first layer, with a mask or without one, against the reference."""
    layer = first(model)
    x = x.detach().requires_grad_()
    dropout = upcoming_dropout(p)
    with count_calls() as calls:
        y = layer(x)
    assert (calls.fast.total(), calls.fallback.total()) == (1, 0)
    dy = gradient_of(y)
    y.backward(dy)
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    operands = Operands(x, base.weight, a, b, base.bias).map(Tensor.detach)
    rows, (m, n) = dy.flatten(0, -2), (magnitude.detach(), dy.shape[-1])
    actual = [y.reshape(-1, n), x.grad.flatten(0, -2), a.grad, b.grad, magnitude.grad]
    product = operands.product(dropout, scale=layer.scaling["default"])
    names = ("y", "dx", "da", "db", "dmagnitude")
    oracle, baseline = oracle_dora_step(product, m, rows), reference_dora_step(product, m, rows)
    for name, found in zip(names, actual, strict=True):
        assert_close_to_oracle(found, oracle=getattr(oracle, name), baseline=getattr(baseline, name), name=name)


def test_dora_with_dropout() -> None:
    model = awake(adapted("first", use_dora=True, lora_dropout=0.4))
    fastlora.patch_peft(model)
    assert_right(model, tokens(16, 9), 0.4)


@pytest.mark.parametrize("whose", ["layer", "dropout"])
def test_dora_drops_nothing_unless_layer_and_dropout_train(whose: str) -> None:
    model = awake(adapted("first", use_dora=True, lora_dropout=0.4))
    fastlora.patch_peft(model)
    layer = first(model)
    if whose == "layer":
        layer.training = False
    else:
        layer.lora_dropout.eval()
    assert_right(model, tokens(16, 9), 0.0)


def test_dora_with_float32_adapters_on_half_precision() -> None:
    model = awake(adapted("first", use_dora=True, dtype=BF16))
    strict = copy.deepcopy(model)
    fastlora.patch_peft(model)
    assert_right(model, tokens(16, 9, dtype=BF16), 0.0)
    expected = step(strict, tokens(dtype=BF16))
    fastlora.patch_peft(strict, strict_dtype=True)
    actual, calls = run(strict, tokens(dtype=BF16))
    assert "strict_dtype" in str(calls)
    assert_same_bits(actual, expected)


class OtherVariant(DoraLinearVariant):
    """A variant that is not DoRA itself."""


def hooked(layer: Any) -> None:
    layer.lora_magnitude_vector["default"].register_forward_hook(lambda module, args, y: 1.5 * y)


def narrow(layer: Any) -> None:
    layer.lora_magnitude_vector.to(BF16)


def two(layer: Any) -> None:
    layer.set_adapter(["default", "other"])


def other_variant(layer: Any) -> None:
    layer.lora_variant["default"] = OtherVariant()


FALLBACK: dict[str, tuple[Callable[[Any], None], str]] = {
    "DoRA among several adapters": (two, "several adapters are active, and DoRA among them"),
    "another variant": (other_variant, "variant of LoRA (OtherVariant)"),
    "hook on the magnitude": (hooked, "lora_magnitude_vector has hooks"),
    "magnitude in another dtype": (narrow, "lora_magnitude_vector is bfloat16 and lora_A float32"),
    "DoRA, merged": (lambda layer: layer.merge(), "merged into the base"),
}


@pytest.mark.parametrize("case", FALLBACK)
def test_dora_falls_back_bit_for_bit(case: str) -> None:
    change, reason = FALLBACK[case]
    model = adapted("first", use_dora=True)
    model.add_adapter("other", config("first", r=3))
    wake(awake(model))
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    for each in (model, reference):
        change(first(each))
    actual, calls = run(model, tokens())
    assert calls.fast.total() == 0
    assert reason in str(calls)
    assert_same_bits(actual, step(reference, tokens()))


def test_dora_that_is_added_to_a_patched_layer() -> None:
    model = adapted()
    fastlora.patch_peft(model)
    model.add_adapter("dora", config("first", "second", use_dora=True))
    model.set_adapter("dora")
    wake(awake(model))
    reference = copy.deepcopy(model)
    fastlora.unpatch_peft(reference)
    actual, calls = run(model, tokens(16, 9))
    assert calls.fast.total() == 2
    assert_as_good_as(actual, reference, tokens(16, 9))


@pytest.mark.parametrize("safe", [True, False])
def test_norms_are_made_anew_after_a_merge(safe: bool) -> None:
    """PEFT changes a weight behind its version: here one that grows threefold while it is merged."""
    model = awake(adapted("first", use_dora=True))
    fastlora.patch_peft(model)
    run(model, tokens())
    layer = first(model)
    layer.merge(safe_merge=safe)
    _, calls = run(model, tokens())
    assert calls.fast.total() == 0
    layer.unmerge()
    layer.base_layer.weight.data.mul_(3)
    reference = copy.deepcopy(model)
    fastlora.unpatch_peft(reference)
    actual, calls = run(model, tokens())
    assert calls.fast.total() == 1
    assert_as_good_as(actual, reference, tokens())


class Pair(nn.Module):
    """Siblings by name."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(24, 36), nn.Linear(24, 36)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate_proj(x) * self.up_proj(x)


def test_dora_layers_compute_alone() -> None:
    torch.manual_seed(4)
    model = awake(get_peft_model(Pair(), config("gate_proj", "up_proj", use_dora=True)))
    wake(model)
    reference = copy.deepcopy(model)
    assert fastlora.patch_peft(model).groups == ()
    report = fastlora.patch_peft(model, groups=[("gate_proj", "up_proj")])
    assert set(report.ungrouped.values()) == {"DoRA layers compute alone"}
    actual, calls = run(model, tokens(64, 5))
    assert (calls.fast.total(), calls.groups.grouped) == (2, 0)
    assert_as_good_as(actual, reference, tokens(64, 5))


def test_a_sibling_that_turns_to_dora_leaves_the_group() -> None:
    torch.manual_seed(4)
    model = get_peft_model(Pair(), config("gate_proj", "up_proj"))
    assert len(fastlora.patch_peft(model).groups) == 1
    model.add_adapter("dora", config("up_proj", use_dora=True))
    wake(awake(model))
    model.base_model.model.up_proj.set_adapter("dora")
    reference = copy.deepcopy(model)
    fastlora.unpatch_peft(reference)
    actual, calls = run(model, tokens(64, 5))
    assert (calls.fast.total(), calls.groups.grouped) == (2, 0)
    assert_as_good_as(actual, reference, tokens(64, 5))


@pytest.mark.parametrize("quantised", [False, True], ids=["dense", "4 bits"])
def test_dora_compiles_into_one_graph(quantised: bool) -> None:
    if quantised:
        pytest.importorskip("bitsandbytes")
        from tests.peft import quantised_models

        model, k = awake(quantised_models.adapted("first", use_dora=True)), quantised_models.K
        check = quantised_models.assert_as_good_as
    else:
        model, k, check = awake(adapted("first", use_dora=True)), 24, assert_as_good_as
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    torch._dynamo.reset()
    x = tokens(16, 9, k=k)
    found = step(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    check({name.removeprefix("_orig_mod."): t for name, t in found.items()}, reference, x)
    torch._dynamo.reset()
