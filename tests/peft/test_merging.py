"""``fastlora.merged`` on PEFT's layers, patched or not, and what PEFT's own methods do in its block."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

import fastlora
from fastlora.accuracy import assert_close_to_oracle
from fastlora.mergeable import Update, folded
from fastlora.peft import count_calls
from tests.adapters.tiny_models import llama
from tests.peft.peft_models import adapted, add_adapter, config, first, tokens, wake
from tests.test_while_merged import Snapshot, each_dtype, each_keep

FIRST = "base_model.model.first"


def two(**options: Any) -> PeftModel:
    """Two active adapters of different rank and scaling, and one that is not active."""
    model = adapted(**options)
    for name, r in (("other", 5), ("asleep", 2)):
        add_adapter(model, name, config("first", r=r, lora_alpha=3))
    model.base_model.set_adapter(["default", "other"])
    wake(model)
    return model


def dora(**options: Any) -> PeftModel:
    """DoRA whose lengths are not those of the base."""
    model = adapted(use_dora=True, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.linspace(0.5, 1.5, parameter.numel()))
    return model


MODELS: dict[str, Callable[..., PeftModel]] = {
    "plain": adapted,
    "no bias": lambda **options: adapted("first", bias=False, **options),
    "Conv1D": lambda **options: adapted("first", conv1d=True, **options),
    "several": two,
    "DoRA": dora,
    "DoRA on Conv1D": lambda **options: dora(conv1d=True, **options),
    "lora_bias": lambda **options: adapted(lora_bias=True, **options),
    "rsLoRA": lambda **options: adapted(use_rslora=True, **options),
}


def by_hand(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The folded weight and bias of PEFT's layer."""
    base, scaling = layer.base_layer, layer.scaling
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) == 1:
        a, b, scale = layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight, scaling[names[0]]
    else:
        a = torch.cat([layer.lora_A[name].weight.float() for name in names])
        b, scale = torch.cat([layer.lora_B[name].weight.float() * scaling[name] for name in names], dim=1), 1.0
    magnitude = layer.lora_magnitude_vector[names[0]].weight if layer.lora_variant else None
    weight = folded(base.weight, Update.of(a, b, scale, type(base) is Conv1D, magnitude))
    bias = None if base.bias is None else base.bias.detach()
    if layer.lora_bias[names[0]]:
        bias = (bias.float() + scale * layer.lora_B[names[0]].bias.float()).to(bias.dtype)
    return weight, bias


def plain(model: PeftModel) -> nn.Module:
    """The network without PEFT, with what :func:`by_hand` gives."""
    network = copy.deepcopy(model).base_model.model
    for name in ("first", "second"):
        layer = getattr(network, name)
        if isinstance(layer, BaseTunerLayer):
            weight, bias = by_hand(layer)
            layer.base_layer.weight = nn.Parameter(weight)
            layer.base_layer.bias = None if bias is None else nn.Parameter(bias)
            setattr(network, name, layer.base_layer)
    return network


@each_keep
@each_dtype
@pytest.mark.parametrize("patched", [False, True], ids=["peft", "patched"])
@pytest.mark.parametrize("name", MODELS)
def test_in_the_block_a_layer_is_plain_and_afterwards_what_it_was(
    name: str, patched: bool, dtype: torch.dtype, keep: Any
) -> None:
    model = MODELS[name](dtype=dtype, autocast_adapter_dtype=False).eval()
    if patched and "DoRA" not in name and name != "lora_bias":
        fastlora.patch_peft(model)
    x = tokens(dtype=dtype)
    before, expected = Snapshot(model), plain(model)
    written = {f"{FIRST}.base_layer.weight"} | ({f"{FIRST}.base_layer.bias"} if name == "lora_bias" else set())
    with torch.no_grad():
        unmerged, exact = model(x), copy.deepcopy(model).double()(x.double())
        with fastlora.merged(model, keep=keep), count_calls() as calls:
            y = model(x)
            assert written <= before.changed() <= written | {key.replace("first", "second") for key in written}
            assert before.moved() == (before.changed() if keep == "device" else set())
        assert calls.fast.total() == 0
        assert torch.equal(y, expected(x))
        assert_close_to_oracle(y, oracle=exact, baseline=unmerged, name="y")
        before.check()
        assert torch.equal(model(x), unmerged)
    assert first(model).merged_adapters == []
    assert not {"unmerge"} & set(first(model).__dict__)
    assert not first(model)._state_dict_hooks
    assert not first(model)._load_state_dict_pre_hooks


@each_keep
def test_fifty_cycles_change_no_bit_where_pefts_own_drift(keep: Any) -> None:
    """PEFT adds to a bfloat16 weight and subtracts again, fifty times: docs/peft.md says how far that goes."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")
    largest, drift = re.search(r"no weight above ([0-9.]+)\) by more than ([0-9.]+)\. ", page).groups()
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(256, 320)).bfloat16(), LoraConfig(r=8, target_modules=["0"]))
    wake(model)
    layer = model.base_model.model[0]
    before, base = Snapshot(model), layer.base_layer.weight.detach().clone()
    for _ in range(50):
        with fastlora.merged(model, keep=keep):
            pass
    before.check()
    for _ in range(50):
        model.merge_adapter()
        model.unmerge_adapter()
    assert base.abs().max() < float(largest)
    assert (layer.base_layer.weight - base).abs().max() > float(drift)


@each_keep
def test_what_pefts_methods_do_in_the_block_finds_the_base(keep: Any) -> None:
    model = two().eval()
    x = tokens()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    before = Snapshot(model)
    with torch.no_grad():
        unmerged = model(x)
        with model.disable_adapter():
            base = model(x)
        with fastlora.merged(model, keep=keep):
            assert list(model.state_dict()) == list(state)
            assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
            with model.disable_adapter():
                assert torch.equal(model(x), base)
            assert torch.equal(model(x), unmerged)
            before.check()
        with fastlora.merged(model, keep=keep):
            model.unmerge_adapter()
            before.check()
        with fastlora.merged(model, keep=keep):
            model.load_state_dict(state)
            before.check()
            assert torch.equal(model(x), unmerged)
        with fastlora.merged(model, keep=keep):
            model.base_model.set_adapter("default")
            before.check()


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_pefts_merge_is_refused_in_the_block_and_works_afterwards(method: str) -> None:
    """The end of the block would take out what it merged, and the adapter would be lost."""
    model, x = adapted().eval(), tokens()
    before = Snapshot(model)
    with torch.no_grad():
        with fastlora.merged(model):
            merged = model(x)
            with pytest.raises(RuntimeError, match="outside"):
                getattr(model, method)()
            assert torch.equal(model(x), merged)
        before.check()
        getattr(model, method)()
    assert "merge" not in first(adapted()).__dict__


def test_copies_made_in_the_block_stand_on_their_own() -> None:
    model, x = adapted().eval(), tokens()
    with torch.no_grad():
        unmerged = model(x)
        with fastlora.merged(model):
            y = model(x)
            twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            assert torch.equal(twin(x), y)
            twin.unmerge_adapter()
            assert torch.equal(twin(x), unmerged)


def test_merged_by_peft_stays_so_and_disabled_runs_the_base() -> None:
    model = adapted().eval()
    model.merge_adapter()
    before = Snapshot(model)
    with fastlora.merged(model):
        before.check()
    assert first(model).merged_adapters == ["default"]
    model.unmerge_adapter()
    before = Snapshot(model)
    with model.disable_adapter(), fastlora.merged(model):
        before.check()


@each_keep
def test_a_layer_that_fails_is_named_and_all_is_put_back(keep: Any) -> None:
    model = adapted()
    with torch.no_grad():
        model.base_model.model.second.lora_B["default"].weight[3, 1] = float("inf")
    before = Snapshot(model)
    with (
        pytest.raises(ValueError, match=r"the weight of base_model\.model\.second merged is not finite"),
        fastlora.merged(model, keep=keep),
    ):
        raise AssertionError("the block ran")
    before.check()
    assert first(model).merged_adapters == []


class Scaled(nn.Linear):
    """A base of which nobody knows what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=1)


def of(module: nn.Module, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return get_peft_model(nn.ModuleDict({"first": module}), config("first", **options))

    return build


def dora_among_several() -> nn.Module:
    model = two()
    model.add_adapter("dora", config("first", use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    return model


def replaced_forward() -> nn.Module:
    model = adapted()
    first(model).forward = lambda x: x
    return model


def parametrised() -> nn.Module:
    model = adapted()
    torch.nn.utils.parametrizations.weight_norm(first(model).base_layer)
    return model


def partitioned() -> nn.Module:
    model = adapted()
    first(model).base_layer.weight.ds_id = 1
    return model


def offloaded() -> nn.Module:
    model = adapted()
    first(model).base_layer.to("meta")
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (of(nn.Embedding(11, 24)), r"a peft\.tuners\.lora\.layer\.Embedding is none of the layers that can be"),
        (of(nn.Conv1d(24, 20, 1)), r"a peft\.tuners\.lora\.layer\.Conv1d is none of the layers that can be"),
        (of(Scaled(24, 20)), "base_layer is a Scaled, whose forward is not known"),
        (
            of(nn.Linear(24, 20), alora_invocation_tokens=[1, 2]),
            "adapter 'default' is a ALoraLinearVariant: only plain",
        ),
        (of(nn.Linear(24, 20, bias=False), lora_bias=True), "the bias of .*first is None"),
        (dora_among_several, r"adapters \['default', 'dora'\] are active together and one is DoRA"),
        (replaced_forward, "its forward was replaced on the instance"),
        (parametrised, "first cannot be merged: weight is parametrised"),
        (partitioned, "first cannot be merged: weight belongs to DeepSpeed ZeRO-3"),
        (offloaded, "first cannot be merged: its weight is on the meta device"),
    ],
)
def test_what_is_no_sum_is_refused(build: Callable[[], nn.Module], why: str) -> None:
    model = build()
    before = Snapshot(model) if why.find("meta") < 0 else None
    with pytest.raises(RuntimeError, match=why), fastlora.merged(model):
        raise AssertionError("the block ran")
    if before is not None:
        before.check()


def test_an_adapter_of_another_kind_is_no_lora() -> None:
    from peft import IA3Config

    model = get_peft_model(nn.Sequential(nn.Linear(24, 20)), IA3Config(target_modules=["0"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="model has no adapters: expected layers of PEFT's LoRA"):
        fastlora.merged(model).__enter__()


def test_a_tied_head_is_refused() -> None:
    model = get_peft_model(llama(tie_word_embeddings=True), config("lm_head", "q_proj"))
    wake(model)
    before = Snapshot(model)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight is tied to .*embed_tokens\.weight"),
        fastlora.merged(model),
    ):
        raise AssertionError("the block ran")
    before.check()


@pytest.mark.parametrize("patched", [False, True], ids=["peft", "patched"])
def test_generation_in_the_block_is_that_outside_of_it(patched: bool) -> None:
    model = get_peft_model(llama(), config("q_proj", "v_proj", "up_proj", "down_proj")).eval()
    wake(model)
    if patched:
        fastlora.patch_peft(model, mlp=True)
    options = dict(input_ids=torch.arange(5, 12)[None], max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = model.generate(**options)
    with fastlora.merged(model):
        assert torch.equal(model.generate(**options), expected)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**options), expected)


def quantised(bits: int, **options: Any) -> PeftModel:
    bitsandbytes = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(3)
    if bits == 4:
        base = bitsandbytes.Linear4bit(64, 128, compute_dtype=torch.bfloat16, quant_type="nf4")
    else:
        base = bitsandbytes.Linear8bitLt(64, 128, has_fp16_weights=False)
    model = nn.ModuleDict({"first": base}).to("cpu")
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
    model = get_peft_model(model, config("first", **options))
    wake(model)
    return model


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "DoRA", "lora_bias"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_waits_packed_beside_a_dense_sum(bits: int, options: dict[str, Any]) -> None:
    model = quantised(bits, **options).train()
    layer, x = first(model), torch.randn(7, 64)
    assert type(layer) in (lora.Linear4bit, lora.Linear8bitLt)
    packed, state = layer.base_layer, {name: copy.deepcopy(t) for name, t in model.state_dict().items()}
    weight = packed.weight.data.clone()
    with torch.no_grad(), fastlora.merged(model):
        dense = layer.base_layer
        assert isinstance(dense, nn.Linear)
        assert type(dense).__name__ == "DenseBase"
        assert dense.weight.dtype is (torch.bfloat16 if bits == 4 else torch.float16)
        y = layer(x)
        assert y.dtype is torch.float32
        expected = nn.functional.linear(x.to(dense.weight.dtype), dense.weight, dense.bias).float()
        assert torch.equal(y, expected)
        now = model.state_dict()
        assert list(now) == list(state)
        assert all(torch.equal(t, state[name]) for name, t in now.items() if isinstance(t, Tensor))
        with model.disable_adapter():
            layer(x)
            assert layer.base_layer is packed
    assert layer.base_layer is packed
    assert torch.equal(packed.weight.data, weight)
    assert layer.merged_adapters == []


@pytest.mark.parametrize("bits", [4, 8])
def test_the_dense_sum_is_that_of_the_dequantised_weight(bits: int) -> None:
    from fastlora.quantised import dense_weight

    model = quantised(bits)
    layer = first(model)
    update = Update.of(layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"])
    dense = dense_weight(layer.base_layer)
    expected, x = folded(dense, update), torch.randn(7, 64).to(dense.dtype)
    exact = dense.double() + update.scale * update.left.double() @ update.right.double()
    oracle = nn.functional.linear(x.double(), exact, layer.base_layer.bias.double())
    with torch.no_grad():
        unmerged = layer(x)
        with fastlora.merged(model):
            assert torch.equal(layer.base_layer.weight, expected)
            assert_close_to_oracle(layer(x), oracle=oracle, baseline=unmerged, name="y")
        assert torch.equal(layer(x), unmerged)
