"""An adapter's own bias: added in float32 and rounded once, trained, switched, saved, and merged into the base's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.accuracy import assert_close_to_oracle
from fastlora.adapters.layer import AdaptedLinear
from fastlora.merge import merge_folders
from tests.adapters.test_inject import snapshot, untouched
from tests.adapters.tiny_models import adapted, fill, gpt2, llama, run, toy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layer(dtype: torch.dtype = torch.float32, bias: bool = True, **options: Any) -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 20, bias=bias).to(dtype))
    return adapted(model, ["0"], lora_bias=True, **options)[0]


def oracle(layer: Any, x: Tensor) -> Tensor:
    a, b, added = (getattr(layer, part)["default"] for part in ("lora_A", "lora_B", "lora_bias"))
    bias = 0 if layer.bias is None else layer.bias
    return (
        x @ layer.weight.T + layer.scale["default"] * (x @ a.T.to(x.dtype) @ b.T.to(x.dtype) + added.to(x.dtype)) + bias
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_forward_and_gradients(dtype: torch.dtype, bias: bool) -> None:
    one = layer(dtype, bias)
    x, dy = torch.randn(7, 24).to(dtype), torch.randn(7, 20).to(dtype)
    wide = copy.deepcopy(one).double()
    exact, baseline = oracle(wide, x.double()), oracle(one, x)
    y = one(x)
    assert_close_to_oracle(y, oracle=exact, baseline=baseline, name="y")
    for of, gradient in ((y, dy), (exact, dy.double())):
        of.backward(gradient)
    again = copy.deepcopy(one)
    again.zero_grad()
    oracle(again, x).backward(dy)
    for part in ("lora_A", "lora_B", "lora_bias"):
        ours, theirs, plain = (getattr(each, part)["default"].grad for each in (one, wide, again))
        assert_close_to_oracle(ours, oracle=theirs, baseline=plain, name=part)


def test_under_autocast_the_bias_is_rounded_once() -> None:
    one, x = layer(), torch.randn(7, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = one(x)
    assert y.dtype is torch.bfloat16
    x = x.bfloat16()
    assert_close_to_oracle(
        y, oracle=oracle(copy.deepcopy(one).double(), x.double()), baseline=oracle(copy.deepcopy(one).bfloat16(), x),
        name="y",
    )  # fmt: skip


def test_without_it_a_layer_is_as_before() -> None:
    model = adapted(toy(), ["up"])
    assert not any("lora_bias" in name for name, _ in model.named_modules())
    fastlora.inject(model, ["up"], adapter_name="more", lora_bias=True)
    fastlora.delete_adapter(model, "more")
    assert not any("lora_bias" in name for name, _ in model.named_modules())
    assert sorted(name.split(".", 3)[-1] for name in model.state_dict() if "0.up" in name) == [
        "bias", "lora_A.default", "lora_B.default", "weight",
    ]  # fmt: skip


def test_it_starts_as_peft_has_it_trains_and_is_switched() -> None:
    model = toy()
    fastlora.inject(model, ["up"], lora_bias=True)
    up = model.blocks[0]["up"]
    assert torch.equal(up.lora_bias["default"], torch.zeros(40))
    assert up.lora_bias["default"].requires_grad
    fastlora.inject(model, ["up"], r=4, adapter_name="random", lora_bias=True, init_lora_weights=False)
    assert 0 < up.lora_bias["random"].abs().max() <= 0.5
    fill(model)
    fastlora.inject(model, ["up"], adapter_name="plain")
    with fastlora.disable(model):
        base = run(model)
    first = run(model)
    fastlora.set_adapter(model, "plain")
    assert not up.lora_bias["default"].requires_grad
    assert_close_to_oracle(run(model), oracle=base.double(), baseline=base, name="a new adapter changes nothing")
    fastlora.set_adapter(model, "random")
    assert not torch.equal(run(model), first)
    fastlora.unload(model)
    assert torch.equal(run(model), base)
    assert "lora_bias" not in up._modules


@pytest.mark.parametrize("options", [{"init_lora_weights": "gaussian"}, {"lora_bias": 1}], ids=["gaussian", "kind"])
def test_what_peft_refuses(options: dict[str, Any]) -> None:
    model = toy()
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match="lora_bias"):
        fastlora.inject(model, ["up"], **({"lora_bias": True} | options))
    assert untouched(model, before)


def test_siblings_with_it_compute_alone() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(64, 48), "k_proj": nn.Linear(64, 32)})
    adapted(model, ["q_proj", "k_proj"], lora_bias=True)
    before = fastlora.siblings.counts()
    x = torch.randn(300, 64)
    for part in model.values():
        baseline = oracle(part, x)
        exact = oracle(copy.deepcopy(part).double(), x.double())
        assert_close_to_oracle(part(x), oracle=exact, baseline=baseline, name="y")
        assert part.lora_branch(x) is None
    assert fastlora.siblings.counts() == before


# Merged.


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_merged_into_the_bias_and_out_again(dtype: torch.dtype) -> None:
    model = adapted(toy().to(dtype), ["up"], lora_bias=True)
    up = model.blocks[0]["up"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with fastlora.disable(model):
        base = run(model)
    fastlora.merge_adapter(model)
    exact = before["blocks.0.up.bias"].float() + up.scale["default"] * up.lora_bias["default"]
    assert torch.equal(up.bias, exact.to(dtype))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with fastlora.disable(model):
        assert torch.equal(run(model), base)
    fastlora.unmerge_adapter(model)
    assert torch.equal(up.bias, before["blocks.0.up.bias"])
    fastlora.merge_and_unload(model)
    assert torch.equal(up.bias, exact.to(dtype))
    assert type(up) is nn.Linear


def test_what_cannot_be_merged_is_said_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(toy(), ["up", "down"], lora_bias=True)
    assert "lora_bias cannot be merged into layers that have no bias: blocks.0.down" in caplog.text
    before = snapshot(model)
    for merge in (fastlora.merge_adapter, fastlora.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"blocks\.0\.down\.bias is None, and the adapter has a bias of its own"):
            merge(model)
        assert untouched(model, before)
    model = toy()
    model.blocks[1]["up"].bias = model.blocks[0]["up"].bias
    adapted(model, ["blocks.0.up"], lora_bias=True)
    with pytest.raises(ValueError, match=r"blocks\.0\.up\.bias is tied to blocks\.1\.up\.bias"):
        fastlora.merge_adapter(model)


# Files.


def test_folders(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    fastlora.save_adapter(adapted(model, lora_bias=True), tmp_path / "adapter")
    merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = type(model).from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in fastlora.merge_and_unload(model).state_dict().items():
        assert torch.equal(tensor, merged[name]), name

    model = llama()
    model.save_pretrained(tmp_path / "bare")
    fastlora.save_adapter(adapted(model, ["q_proj"], lora_bias=True), tmp_path / "of_bare")
    with pytest.raises(ValueError, match=r"the base has no model\.layers\.0\.self_attn\.q_proj\.bias to add it to"):
        merge_folders(tmp_path / "bare", tmp_path / "of_bare", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    model = adapted(toy(), ["up"], lora_bias=True)
    fastlora.save_adapter(model, tmp_path)
    again = toy()
    fastlora.load_adapter(again, tmp_path)
    assert torch.equal(run(again), run(model))
    assert all("lora_bias" in layer._modules for layer in again.modules() if isinstance(layer, AdaptedLinear))

    plain = adapted(toy(), ["up"])
    before = snapshot(plain)
    with pytest.raises(ValueError, match="has lora_A, lora_B, lora_bias, and the model's adapter 'default' lora_A, lo"):
        fastlora.load_adapter(plain, tmp_path)
    assert untouched(plain, before)

    key = "base_model.model.blocks.0.up.lora_B.bias"
    file = tmp_path / "adapter_model.safetensors"
    whole = files.load_file(file)
    for change, message in (
        ({key: torch.ones(39)}, r"up\.lora_B\.bias has shape \[39\]: expected \[40\], the rows of"),
        ({key: torch.ones(40, 1)}, r"float32 \[40, 1\]: expected a floating-point vector"),
    ):
        files.save_file(whole | change, file)
        with pytest.raises(ValueError, match=message):
            fastlora.load_adapter(toy(), tmp_path)
    files.save_file({name: tensor for name, tensor in whole.items() if name != key}, file)
    with pytest.raises(ValueError, match=f"has no {key}, the partner"):
        fastlora.load_adapter(toy(), tmp_path)
