"""DoRA in a whole model: as PEFT has it, on dense and quantised bases, beside other adapters, merged and on disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.accuracy import assert_close_to_oracle, oracle_dora_step, reference_dora_step
from fastlora.backends.request import Product
from fastlora.merge import merge_folders
from fastlora.quantised import dense_dtype, dense_weight
from tests.adapters.test_inject import snapshot, untouched
from tests.adapters.tiny_models import adapted, fill, gpt2, llama, run, toy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PARTS = ("lora_A", "lora_B", "lora_magnitude")


def trained(model: nn.Module, *options: Any, **more: Any) -> nn.Module:
    """The model with a DoRA that has moved away from its start."""
    fastlora.inject(model, *options, r=3, lora_alpha=7, use_dora=True, **more)
    starts = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_magnitude" in name}
    fill(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in starts:
                parameter.add_(1).mul_(starts[name])
    return model


def dense_sum(layer: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """The weight [N, K] that the layer stands for."""
    a, b, m = (getattr(layer, part)["default"].to(dtype) for part in PARTS)
    weight = layer.weight.to(dtype)
    weight = weight.T if layer.fan_in_fan_out else weight
    total = weight + layer.scale["default"] * b @ a
    return total * (m / total.norm(dim=1).detach())[:, None]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_forward_and_gradients(dtype: torch.dtype) -> None:
    layer = trained(nn.Sequential(nn.Linear(24, 20, dtype=dtype)), ["0"])[0]
    x, dy = torch.randn(33, 24).to(dtype), torch.randn(33, 20).to(dtype)
    y = layer(x)
    y.backward(dy)
    a, b, magnitude = (getattr(layer, part)["default"] for part in PARTS)
    call = Product(x, layer.weight, a, b, layer.scale["default"], layer.bias)
    with torch.no_grad():
        oracle, baseline = (step(call, magnitude, dy) for step in (oracle_dora_step, reference_dora_step))
    ours = {"y": y, "da": a.grad, "db": b.grad, "dmagnitude": magnitude.grad}
    for name, tensor in ours.items():
        assert_close_to_oracle(tensor, oracle=getattr(oracle, name), baseline=getattr(baseline, name), name=name)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_it_starts_as_the_lengths_of_the_rows(init: Any) -> None:
    model, base = toy(), run(toy())
    fastlora.inject(model, ["up"], r=3, lora_alpha=7, use_dora=True, init_lora_weights=init)
    up = model.blocks[0]["up"]
    total = up.weight.double() + up.scale["default"] * up.lora_B["default"].double() @ up.lora_A["default"].double()
    plain = up.weight + up.scale["default"] * up.lora_B["default"] @ up.lora_A["default"]
    magnitude = up.lora_magnitude["default"]
    assert_close_to_oracle(magnitude, oracle=total.norm(dim=1), baseline=plain.norm(dim=1), name="magnitude")
    assert magnitude.requires_grad
    if init is not False:
        assert torch.equal(run(model), base)


def test_beside_other_adapters() -> None:
    model = trained(toy(), ["up"])
    up, dora = model.blocks[0]["up"], run(model)
    with fastlora.disable(model):
        base = run(model)
    fastlora.inject(model, ["up"], r=5, adapter_name="plain", init_lora_weights=False)
    assert sorted(name for name in model.state_dict() if "blocks.0.up.lora" in name) == [
        "blocks.0.up.lora_A.default", "blocks.0.up.lora_A.plain", "blocks.0.up.lora_B.default",
        "blocks.0.up.lora_B.plain", "blocks.0.up.lora_magnitude.default",
    ]  # fmt: skip
    fastlora.set_adapter(model, "plain")
    assert not up.lora_magnitude["default"].requires_grad
    assert not torch.equal(run(model), dora)
    before = snapshot(model)
    fastlora.merge_adapter(model)
    with pytest.raises(RuntimeError, match="use_dora: adapter 'plain' is merged into the base, and DoRA's magnitudes"):
        fastlora.inject(model, ["up"], adapter_name="third", use_dora=True)
    fastlora.unmerge_adapter(model)
    assert untouched(model, before)
    fastlora.set_adapter(model, "default")
    assert torch.equal(run(model), dora)
    fastlora.delete_adapter(model, "default")
    assert "lora_magnitude" not in up._modules
    fastlora.unload(model)
    assert torch.equal(run(model), base)


def test_it_is_in_no_group_and_in_no_gated_mlp() -> None:
    pytest.importorskip("transformers")
    model = trained(llama(), ["gate_proj", "up_proj", "down_proj", "q_proj", "k_proj"], mlp=True)
    x, before = torch.randn(200, 48), fastlora.siblings.counts()
    for layer in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].self_attn.q_proj):
        assert layer.lora_branch(x) is None
        layer(x)
    run(model)
    assert fastlora.siblings.counts() == before


def test_a_row_of_zeros_is_refused_before_anything_changes() -> None:
    model = toy()
    with torch.no_grad():
        model.blocks[1]["up"].weight[5] = 0
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"use_dora: row 5 of blocks\.1\.up\.weight is zero, .* leave bl"):
        fastlora.inject(model, ["up"], use_dora=True)
    assert untouched(model, before)


def test_norms_follow_a_base_that_is_loaded() -> None:
    model, other = trained(toy(), ["up"]), trained(toy(1), ["up"])
    run(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(run(model), run(other))
    model.load_state_dict({name: tensor.clone() for name, tensor in toy(2).state_dict().items()}, strict=False)
    again = toy(2)
    fastlora.inject(again, ["up"], r=3, lora_alpha=7, use_dora=True)
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(model), run(again))


def test_options_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="lora_bias=True and use_dora=True exclude each other"):
        fastlora.inject(toy(), ["up"], lora_bias=True, use_dora=True)


# Merged.


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_merged_and_out_again(make: Any, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    model = trained(make().to(dtype), "all-linear")
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_magnitude")}
    bases = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    exact, plain = (
        {n: dense_sum(layer, d).detach() for n, layer in layers.items()} for d in (torch.float64, torch.float32)
    )
    for each in fastlora.merge_adapter(model).layers:
        layer = layers[each.name]
        weight = layer.weight.T if layer.fan_in_fan_out else layer.weight
        baseline = plain[each.name].to(dtype)
        assert_close_to_oracle(weight, oracle=exact[each.name], baseline=baseline, name=each.name)
        base = bases[each.name].T if layer.fan_in_fan_out else bases[each.name]
        assert each.max_error == pytest.approx((weight.double() - exact[each.name]).abs().max().item(), rel=1e-6)
        update = (exact[each.name] - base.double()).square().mean().sqrt().item()
        assert each.rms_update == pytest.approx(update, rel=1e-9)
    fastlora.unmerge_adapter(model)
    assert all(torch.equal(layer.weight, bases[name]) for name, layer in layers.items())
    fastlora.merge_adapter(model)
    merged = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    fastlora.merge_and_unload(model)
    assert all(torch.equal(layer.weight, merged[name]) for name, layer in layers.items())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_folders(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    files = pytest.importorskip("safetensors.torch")
    model = make().bfloat16()
    model.save_pretrained(tmp_path / "base")
    fastlora.save_adapter(trained(model, "all-linear"), tmp_path / "adapter")
    merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    state = fastlora.merge_and_unload(model).state_dict()
    for name, tensor in files.load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, state[name]), name


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    model = trained(toy(), ["up"])
    fastlora.save_adapter(model, tmp_path)
    again = toy()
    fastlora.load_adapter(again, tmp_path)
    assert torch.equal(run(again), run(model))
    fastlora.load_adapter(again, tmp_path)  # into the adapter that is there
    plain = adapted(toy(), ["up"])
    with pytest.raises(ValueError, match="has lora_A, lora_B, lora_magnitude, and the model's adapter 'default'"):
        fastlora.load_adapter(plain, tmp_path)
    fastlora.merge_adapter(plain)
    before = snapshot(plain)
    with pytest.raises(RuntimeError, match="use_dora: adapter 'default' is merged into the base"):
        fastlora.load_adapter(plain, tmp_path, "dora")
    assert untouched(plain, before)
    key = "base_model.model.blocks.0.up.lora_magnitude_vector"
    file = tmp_path / "adapter_model.safetensors"
    whole = files.load_file(file)
    files.save_file(whole | {key: torch.ones(39)}, file)
    with pytest.raises(ValueError, match=r"lora_magnitude_vector has shape \[39\]: expected \[40\], the rows of"):
        fastlora.load_adapter(toy(), tmp_path)


# On a quantised base.


def nf4() -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    return nn.Sequential(bnb.nn.Linear4bit(64, 96, quant_type="nf4", compute_dtype=torch.bfloat16)).to("cpu").train()


def test_on_a_quantised_base(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model, x = nf4(), torch.randn(7, 64)
    fastlora.inject(model, ["0"], r=3, lora_alpha=7, use_dora=True)
    dense, magnitude = dense_weight(model[0]), model[0].lora_magnitude["default"]
    norms = dense.double().norm(dim=1)
    assert_close_to_oracle(magnitude, oracle=norms, baseline=dense.float().norm(dim=1), name="magnitude")
    trained(other := nf4(), ["0"])
    fastlora.save_adapter(other, tmp_path)
    fastlora.unload(model)
    fastlora.load_adapter(model, tmp_path)
    layer = model[0]
    linear = nn.Linear(64, 96, dtype=dense_dtype(layer))
    linear.weight.data, linear.bias.data = dense, layer.bias.data.to(dense.dtype)
    plain = nn.Sequential(linear)
    fastlora.load_adapter(plain, tmp_path)
    exact = copy.deepcopy(plain[0]).double()
    oracle = x.double() @ dense_sum(exact).T + exact.bias
    assert_close_to_oracle(model(x), oracle=oracle, baseline=plain(x.to(dense.dtype)).float(), name="y")
    model(x).sum().backward()
    assert all(getattr(layer, part)["default"].grad.abs().max() > 0 for part in PARTS)
    fastlora.merge_adapter(model)
    fastlora.merge_adapter(plain)
    assert torch.equal(layer._merged_weight, plain[0].weight)


def test_a_quantised_dora_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Loaded(nn.Sequential):
        is_loaded_in_4bit = True

    theirs = peft.get_peft_model(
        Loaded(*nf4()), peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=7, use_dora=True)
    )  # fmt: skip
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    model, x = nf4(), torch.randn(7, 64).bfloat16()
    fastlora.load_adapter(model, tmp_path)
    linear = nn.Linear(64, 96)
    linear.weight.data, linear.bias.data = dense_weight(model[0]).float(), model[0].bias.data
    exact = nn.Sequential(linear.double())
    fastlora.load_adapter(exact, tmp_path)
    assert_close_to_oracle(model(x), oracle=exact(x.double()), baseline=theirs(x), name="y")
