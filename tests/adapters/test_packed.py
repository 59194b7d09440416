"""Adapters on bitsandbytes' layers: the same as on the dequantised weight, and the packed one comes back to the bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.accuracy import assert_close_to_oracle
from fastlora.adapters.packed import AdaptedQuantised
from fastlora.quantised import dense_dtype, dense_weight, stored_weight
from tests.adapters.test_inject import snapshot, untouched
from tests.adapters.tiny_models import adapted, fill

bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

K, N = 64, 96
BF16 = torch.bfloat16
KINDS: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: bnb.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=BF16),
    "fp4": lambda: bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=torch.float32, compress_statistics=False),
    "linear_nf4": lambda: bnb.nn.LinearNF4(K, N),
    "linear_fp4": lambda: bnb.nn.LinearFP4(K, N, compute_dtype=torch.float16),
    "bf16_storage": lambda: bnb.nn.Linear4bit(K, N, compute_dtype=BF16, quant_storage=BF16),
    "int8": lambda: bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def quantised(kind: str) -> Any:
    torch.manual_seed(1)
    return KINDS[kind]().to("cpu").eval()


class Mixed(nn.Module):
    """Quantised layers and one that is not, as a language model's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = quantised(kind)
        self.second = nn.Linear(N, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def mixed(kind: str, **options: Any) -> Any:
    return adapted(Mixed(kind), "all-linear", **options)


def dense(layer: Any, dtype: torch.dtype) -> Any:
    """The adapted layer on the dequantised weight, as plain modules."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=dtype)
    linear.weight.data = stored_weight(layer).dense(dtype)
    if layer.bias is not None:
        linear.bias.data = layer.bias.detach().to(dtype)
    model = nn.Sequential(linear)
    fastlora.inject(model, ["0"], 3, lora_alpha=7, adapter_dtype=dtype)
    for part in ("lora_A", "lora_B"):
        getattr(model[0], part)["default"].data = getattr(layer, part)["default"].detach().to(dtype, copy=True)
    return model[0]


def packed(layer: Any) -> list[Tensor]:
    """The bits of a quantised layer: weight, and what it is dequantised with."""
    weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
    factors = state.absmax if state is not None else weight.SCB if weight.SCB is not None else layer.state.SCB
    return [t.detach().clone().view(torch.uint8) for t in (weight.data, factors)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@each_kind
def test_forward_and_gradients_are_those_on_the_dequantised_weight(kind: str) -> None:
    layer = adapted(nn.Sequential(quantised(kind)), ["0"])[0].train()
    dtype = torch.float32 if kind in ("linear_nf4", "int8") else dense_dtype(layer)
    x, dy = torch.randn(7, K).to(dtype), torch.randn(7, N).to(dtype)
    layers = [layer, dense(layer, torch.float64), dense(layer, dtype)]
    results = []
    for each in layers:
        own = each.lora_A["default"].dtype if each is not layer else dtype
        here = x.detach().clone().to(own).requires_grad_()
        y = each(here)
        y.backward(dy.to(own))
        results.append((y, here.grad, each.lora_A["default"].grad, each.lora_B["default"].grad))
    for name, ours, exact, plain in zip(("y", "dx", "da", "db"), *results, strict=True):
        assert_close_to_oracle(ours, oracle=exact, baseline=plain.to(ours.dtype), name=f"{kind} {name}")
    assert layer.weight.grad is None


@each_kind
def test_off_and_on_again_whatever_mode_it_runs_in(kind: str) -> None:
    """bitsandbytes packs a 4-bit weight anew on some CPUs, in eval mode without gradients: not while it is adapted."""
    model = mixed(kind)
    bits, x = packed(model.first), torch.randn(7, K)
    with torch.no_grad():
        y = model(x)
    with fastlora.disable(model), torch.no_grad():
        base = model(x)
        plain = Mixed(kind)
        plain.load_state_dict(model.second.state_dict(), strict=False)
        plain.second = copy.deepcopy(model.second)
        plain.first.support_avx512bf16_for_cpu = False
        assert torch.equal(plain(x), base)
    assert same(packed(model.first), bits)
    with torch.no_grad():
        assert torch.equal(model(x), y)
    model.train()
    model(x).sum().backward()
    assert model.first.lora_A["default"].grad.abs().max() > 0
    fastlora.set_adapter(model, None)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), base)
    assert same(packed(model.first), bits)


@each_kind
def test_merged_out_again_and_unloaded(kind: str) -> None:
    model, x = mixed(kind), torch.randn(7, K)
    layer, bits = model.first, packed(model.first)
    with torch.no_grad():
        with fastlora.disable(model):
            base = model(x)  # bitsandbytes gives the bias the dtype in which it computes
        y = model(x)
    keys = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = fastlora.merge_adapter(model)
    first, second = report.layers
    name = {"nf4": "nf4", "linear_nf4": "nf4", "int8": "int8"}.get(kind, "fp4")
    assert (first.into, second.into) == (f"dequantised {name}", "")
    assert f"1 into the dequantised {name} weight, in " in str(report)
    weight = dense_weight(layer).double()
    exact = weight + layer.scale["default"] * layer.lora_B["default"].double() @ layer.lora_A["default"].double()
    error = (layer._merged_weight.double() - exact).abs().max().item()
    assert first.max_error == pytest.approx(error, rel=1e-9)
    assert first.dtype is layer._merged_weight.dtype is dense_dtype(layer)
    with torch.no_grad():
        merged = model(x)
        assert merged.dtype is x.dtype
        wide, narrow = (dense(layer, dtype) for dtype in (torch.float64, first.dtype))
        wide.weight.data, narrow.weight.data = exact, exact.to(first.dtype)
        wide.lora_B["default"].zero_()
        narrow.lora_B["default"].zero_()
        oracle, baseline = wide(x.double()), narrow(x.to(first.dtype)).float()
        assert_close_to_oracle(layer(x), oracle=oracle, baseline=baseline, name="merged")
        with fastlora.disable(model):
            assert torch.equal(model(x), base)
    assert same(packed(layer), bits)
    assert model.state_dict().keys() == keys.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), keys[name].view(torch.uint8)), name
    fastlora.unmerge_adapter(model)
    assert layer._merged_weight is None
    with torch.no_grad():
        assert torch.equal(model(x), y)
    fastlora.merge_adapter(model)
    assert fastlora.unload(model) is model
    assert type(layer) is type(quantised(kind))
    assert same(packed(layer), bits)
    assert layer.__dict__.keys() == quantised(kind).__dict__.keys()


@each_kind
@pytest.mark.parametrize("before", [False, True], ids=["unmerged", "merged"])
def test_merged_for_good_a_layer_is_dense(kind: str, before: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = mixed(kind)
    layer, dtype = model.first, dense_dtype(model.first)
    expected = copy.deepcopy(model)
    fastlora.merge_adapter(expected)
    if before:
        fastlora.merge_adapter(model)
    assert fastlora.merge_and_unload(model) is model
    assert "1 layers are dense now, nn.Linear in" in caplog.text
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, expected.first._merged_weight)
    assert layer.weight.dtype is dtype
    assert layer.bias is None or layer.bias.dtype is dtype
    assert layer.__dict__.keys() == nn.Linear(3, 4).__dict__.keys()
    assert not layer._load_state_dict_pre_hooks
    again = nn.Linear(K, N, bias=layer.bias is not None, dtype=dtype)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(7, K, dtype=dtype)
    assert torch.equal(again(x), pickle.loads(pickle.dumps(layer))(x))


def test_merged_for_good_in_the_dtype_of_the_other_layers() -> None:
    model = mixed("int8")
    layer = model.first
    exact = layer.scale["default"] * layer.lora_B["default"].double() @ layer.lora_A["default"].double()
    base = dense_weight(layer)
    fastlora.merge_adapter(model)
    fastlora.merge_and_unload(model, dtype=BF16)
    oracle = base.double() + exact
    assert layer.bias.dtype is BF16
    assert_close_to_oracle(layer.weight, oracle=oracle, baseline=oracle.to(BF16), name="weight")
    assert model.second.weight.dtype is torch.float32


@each_kind
def test_copies(kind: str) -> None:
    model, x = mixed(kind), torch.randn(7, K)
    with torch.no_grad():
        y = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied.first, AdaptedQuantised)
        assert type(copied.first) is type(model.first)
        with torch.no_grad():
            assert torch.equal(copied(x), y)
        fastlora.merge_adapter(copied)
        fastlora.unload(copied)
        assert type(copied.first) is type(quantised(kind))
    assert repr(model.first).startswith(f"Adapted{type(quantised(kind)).__name__}(")
    assert f"in_features={K}, out_features={N}" in repr(model.first)


@each_kind
def test_a_whole_state_dict_is_loaded(kind: str) -> None:
    model, other, x = mixed(kind), mixed(kind), torch.randn(7, K)
    with torch.no_grad():
        other.first = adapted(nn.Sequential(KINDS[kind]().to("cpu")), ["0"])[0].eval()
        other.first._state = other.second._state
        y = other(x)
        model(x)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), y)
        fastlora.merge_adapter(model)
        model.load_state_dict(other.state_dict())
        fastlora.unmerge_adapter(model)
        assert torch.equal(model(x), y)


def test_an_adapter_of_its_own_bias() -> None:
    model, x = mixed("nf4", lora_bias=True), torch.randn(7, K)
    layer, base = model.first, model.first.bias.clone()
    with torch.no_grad():
        with fastlora.disable(model):
            off = model(x)
        y = layer(x)
        added = layer.scale["default"] * layer.lora_bias["default"]
        exact = dense(layer, torch.float64)
        exact.bias.data += added
        plain = dense(layer, BF16)
        plain.bias.data = (base + added).to(BF16)
        assert_close_to_oracle(y, oracle=exact(x.double()), baseline=plain(x.to(BF16)).float(), name="y")
        fastlora.merge_adapter(model)
        with fastlora.disable(model):
            assert torch.equal(model(x), off)
    fastlora.unmerge_adapter(model)
    assert torch.equal(layer.bias.float(), base.to(BF16).float())


# What cannot have one, and options.


def test_what_is_refused_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(layer: nn.Module, message: str) -> None:
        model = nn.Sequential(layer)
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            fastlora.inject(model, ["0"])
        assert untouched(model, before)

    class Own(bnb.nn.Linear4bit):
        pass

    reason(bnb.nn.Linear4bit(K, N), "no quantisation state: move the layer to a device, or load it, first")
    reason(bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False), "no quantisation state: move the layer")
    reason(bnb.nn.Linear8bitLt(K, N).to("cpu"), "has_fp16_weights=True")
    reason(Own(K, N).to("cpu"), "Own is a subclass")
    layer = quantised("nf4")
    layer.weight.quant_state.packing_format_for_cpu = True
    reason(
        layer,
        "packed anew for this CPU, with other factors, by a call .* without gradients: load it again, and",
    )
    model = mixed("nf4")
    model.first.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="an adapted Linear4bit cannot compute: its 4-bit weight was packed anew"):
        model(torch.randn(7, K))
    monkeypatch.setattr(bnb, "__version__", "0.43.1")
    reason(quantised("nf4"), r"bitsandbytes 0\.43\.1 is too old: pip install 'bitsandbytes>=")


def test_dtypes_and_counts() -> None:
    report = fastlora.inject(model := Mixed("nf4"), ["first"], r=4)
    assert model.first.lora_A["default"].dtype is torch.float32
    assert report.total == K * N + N + 40 * N + 40 + 4 * (K + N)
    assert (report.layers[0].in_features, report.layers[0].out_features) == (K, N)
    for kind, dtype in (("nf4", BF16), ("int8", BF16), ("int8", torch.float16)):
        fastlora.inject(model := Mixed(kind), ["first"], adapter_dtype=dtype)
        assert model.first.lora_A["default"].dtype is dtype
        assert model.first(torch.randn(7, K, dtype=dtype)).dtype is dtype
    with pytest.raises(ValueError, match=r"adapter_dtype must be torch.bfloat16 or torch.float32, first being"):
        fastlora.inject(Mixed("nf4"), ["first"], adapter_dtype=torch.float16)


# Groups and gated MLPs.


class MLP(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = quantised(kind), quantised(kind)
        self.down_proj = nn.Linear(N, 40)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("mlp", [False, True], ids=["groups", "mlp"])
def test_groups_and_gated_mlps(kind: str, mlp: bool) -> None:
    model = nn.ModuleDict({"mlp": MLP(kind)}).train()
    alone = copy.deepcopy(model)
    report = fastlora.inject(model, "all-linear", 3, lora_alpha=7, mlp=mlp)
    fastlora.inject(alone, "all-linear", 3, lora_alpha=7, groups=None)
    for each in (model, alone):
        fill(each)
    assert report.groups == (("mlp.gate_proj", "mlp.up_proj"),)
    assert report.mlps == (("mlp",) if mlp else ())
    exact = copy.deepcopy(alone)
    for name in ("gate_proj", "up_proj"):
        setattr(exact["mlp"], name, dense(getattr(alone["mlp"], name), torch.float64))
    exact["mlp"].down_proj.double()
    x, results = torch.randn(300, K), []
    before = fastlora.siblings.counts().taken
    for each, dtype in ((model["mlp"], torch.float32), (exact["mlp"], torch.float64), (alone["mlp"], torch.float32)):
        here = x.to(dtype, copy=True).requires_grad_()
        y = each(here)
        y.square().sum().backward()
        results.append((y, here.grad, each.gate_proj.lora_A["default"].grad, each.up_proj.lora_B["default"].grad))
    assert fastlora.siblings.counts().taken == before + (not mlp)
    for name, ours, oracle, baseline in zip(("y", "dx", "da", "db"), *results, strict=True):
        assert_close_to_oracle(ours, oracle=oracle, baseline=baseline, name=name)


# Both ways with PEFT.


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = quantised("nf4"), quantised("int8")
        self.out = nn.Linear(N, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q_proj(x)) * self.k_proj(x))


def test_adapters_of_peft_both_ways(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("safetensors")

    class Loaded(Tiny):
        is_loaded_in_4bit = is_loaded_in_8bit = True

    theirs = peft.get_peft_model(
        Loaded(), peft.LoraConfig(target_modules=["q_proj", "k_proj"], r=3, lora_alpha=7)
    ).train()
    fill(theirs)
    torch.manual_seed(2)
    theirs.base_model.model.out.reset_parameters()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Tiny().train()
    ours.out.load_state_dict(theirs.base_model.model.out.state_dict())
    report = fastlora.load_adapter(ours, tmp_path / "theirs")
    assert [layer.name for layer in report.layers] == ["q_proj", "k_proj"]
    x = torch.randn(9, K)
    for name in ("q_proj", "k_proj"):
        layer, other = getattr(ours, name), getattr(theirs.base_model.model, name)
        own = dense(layer, torch.float64)
        assert_close_to_oracle(layer(x), oracle=own(x.double()), baseline=other(x), name=name)
    fastlora.save_adapter(ours, tmp_path / "ours")
    one, other = ((tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs"))
    assert one == other
    back = peft.PeftModel.from_pretrained(Loaded(), tmp_path / "ours").train()
    back.base_model.model.out.load_state_dict(ours.out.state_dict())
    assert torch.equal(back(x), theirs(x))
