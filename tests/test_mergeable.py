"""Mergeable: every kind of layer folds its update into its weight and out again, alike."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora import LoRALinear, loralib
from fastlora.mergeable import Mergeable, Update, folded
from fastlora.text import with_article
from tests.adapters.tiny_models import fill


def injected(linear: nn.Module) -> Mergeable:
    model = nn.Sequential(linear)
    fastlora.inject(model, ["0"], r=3, lora_alpha=7)
    return model[0]


def injected_conv1d() -> Mergeable:
    utils = pytest.importorskip("transformers.pytorch_utils")
    return injected(utils.Conv1D(20, 24))


LAYERS: dict[str, Callable[[], Mergeable]] = {
    "module": lambda: LoRALinear(24, 20, r=3, lora_alpha=7),
    "injected": lambda: injected(nn.Linear(24, 20)),
    "injected_conv1d": injected_conv1d,
    "loralib": lambda: loralib.Linear(24, 20, r=3, lora_alpha=7),
    "loralib_turned": lambda: loralib.Linear(24, 20, r=3, lora_alpha=7, fan_in_fan_out=True),
    "loralib_blocks": lambda: loralib.MergedLinear(24, 30, r=3, lora_alpha=7, enable_lora=[True, False, True]),
    "loralib_embedding": lambda: loralib.Embedding(20, 24, r=3, lora_alpha=7),
    "loralib_conv2d": lambda: loralib.Conv2d(24, 20, 3, r=3, lora_alpha=7),
    "loralib_conv2d_channels_last": lambda: loralib.Conv2d(24, 20, 3, r=3).to(memory_format=torch.channels_last),
    "loralib_conv3d": lambda: loralib.Conv3d(24, 20, 2, r=3, lora_alpha=7),
}


def made(name: str, seed: int = 1) -> Mergeable:
    """A layer with an update that is not zero."""
    torch.manual_seed(seed)
    layer = LAYERS[name]()
    fill(layer, seed)
    return layer


def inputs(name: str) -> Tensor:
    torch.manual_seed(3)
    if name == "loralib_embedding":
        return torch.randint(20, (7,))
    dimensions = int(name[12]) if name.startswith("loralib_conv") else 0
    return torch.randn(2, 24, *[5] * dimensions)


def weight_of(layer: Any) -> Tensor:
    return layer.conv.weight if isinstance(layer, loralib.ConvLoRA) else layer.weight


def through_a_file(layer: Mergeable) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


each_layer = pytest.mark.parametrize("name", LAYERS)
COPIES: dict[str, Callable[[Mergeable], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch_save": through_a_file,
}


@each_layer
def test_merged_is_unmerged_up_to_rounding_and_comes_back_to_the_bit(name: str) -> None:
    layer, x = made(name).double(), inputs(name)
    x = x.double() if x.is_floating_point() else x
    base, y = weight_of(layer).detach().clone(), layer(x)
    assert layer.merge() is layer
    assert layer.merged
    assert not torch.equal(weight_of(layer), base)
    torch.testing.assert_close(layer(x), y)
    assert layer.unmerge() is layer
    assert not layer.merged
    assert torch.equal(weight_of(layer), base)
    assert torch.equal(layer(x), y)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_merged_weight_keeps_its_parameter_dtype_shape_and_strides(name: str, dtype: torch.dtype) -> None:
    layer = made(name).to(dtype)
    weight = weight_of(layer)
    before = (weight.dtype, weight.shape, weight.stride())
    layer.merge()
    assert weight_of(layer) is weight
    assert (weight.dtype, weight.shape, weight.stride()) == before
    layer.unmerge()
    assert weight.stride() == before[2]


@each_layer
def test_a_state_dict_has_the_base_under_the_same_keys_in_the_same_order(name: str) -> None:
    model = nn.ModuleDict({"inside": made(name)})
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model["inside"].merge()
    for keep_vars in (False, True):
        state = model.state_dict(keep_vars=keep_vars)
        assert list(state) == list(before)
        assert all(torch.equal(tensor, before[key]) for key, tensor in state.items())


@each_layer
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_what_is_loaded_into_a_merged_layer_is_merged(name: str, assign: bool) -> None:
    model, other, x = nn.ModuleDict({"inside": made(name)}), nn.ModuleDict({"inside": made(name, seed=2)}), inputs(name)
    model["inside"].merge()
    state = copy.deepcopy(other.state_dict())
    model.load_state_dict(state, assign=assign)
    assert model["inside"].merged
    assert torch.equal(model["inside"](x), other["inside"].merge()(x))
    assert torch.equal(model["inside"].unmerge()(x), other["inside"].unmerge()(x))
    model.load_state_dict(state)
    assert not model["inside"].merged


@each_layer
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_a_merged_layer_are_layers_of_their_own(name: str, duplicate: Callable[[Mergeable], Any]) -> None:
    layer, x = made(name).merge(), inputs(name)
    y = layer(x)
    twin = duplicate(layer)
    assert twin.merged
    assert torch.equal(twin(x), y)
    twin.load_state_dict(made(name, seed=2).state_dict())
    assert torch.equal(twin(x), made(name, seed=2).merge()(x))
    assert torch.equal(twin.unmerge()(x), made(name, seed=2)(x))
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.unmerge()(x), made(name)(x))


@each_layer
def test_merging_compiles_to_a_second_graph_without_a_break(name: str) -> None:
    layer, x = made(name), inputs(name)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x), layer(x))
            layer.merge()
            assert torch.equal(compiled(x), layer(x))
            layer.unmerge()
    assert len(graphs) == 2


@pytest.mark.parametrize("shape", [(6, 10), (6, 5, 2), (6, 1, 5, 2), (3, 4, 5, 1, 1)], ids=str)
def test_folding_takes_a_weight_of_any_rank(shape: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    weight, a, b = torch.randn(shape), torch.randn(2, 10), torch.randn(6, 2)
    expected = weight + 0.7 * (b @ a).view(shape)
    torch.testing.assert_close(folded(weight, Update.of(a, b, 0.7)), expected)
    turned = torch.randn(10, 6)
    torch.testing.assert_close(folded(turned, Update.of(a, b, 0.7, turned=True)), turned + 0.7 * (b @ a).T)


def test_folding_keeps_the_strides_of_a_weight_that_is_a_view() -> None:
    weight = torch.randn(10, 6).T
    total = folded(weight, Update.of(torch.randn(2, 10), torch.randn(6, 2), 0.7))
    assert total.stride() == weight.stride() == (1, 6)


@pytest.mark.parametrize("turned", [False, True])
def test_a_magnitude_is_the_length_of_each_row(turned: bool) -> None:
    weight, a, b, m = torch.randn(20, 24), torch.randn(3, 24), torch.randn(20, 3), torch.rand(20) + 0.5
    total = weight.double() + 0.7 * b.double() @ a.double()
    expected = (m.double()[:, None] * total / total.norm(dim=1, keepdim=True)).float()
    update = Update.of(a, b, 0.7, turned, magnitude=m)
    made = folded(weight.T.contiguous() if turned else weight, update)
    torch.testing.assert_close(made.T if turned else made, expected)


class WithBias(LoRALinear):
    """A layer whose update has a part in the bias."""

    def _update(self) -> Update:
        return super()._update()._replace(bias=torch.arange(1.0, 21.0))


def test_a_bias_is_merged_and_put_back() -> None:
    layer = WithBias(24, 20, r=3, lora_alpha=7, dtype=torch.bfloat16)
    fill(layer, 1)
    assert layer.bias is not None
    before = layer.bias.clone()
    saved = {name: t.clone() for name, t in layer.state_dict().items()}
    layer.merge()
    assert torch.equal(layer.bias, (before.float() + torch.arange(1.0, 21.0)).bfloat16())
    assert all(torch.equal(t, saved[name]) for name, t in layer.state_dict().items())
    layer.unmerge()
    assert torch.equal(layer.bias, before)


def test_a_layer_without_a_bias_has_nowhere_to_put_one() -> None:
    layer = WithBias(24, 20, r=3, bias=False)
    before = layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"the bias of a WithBias \[20, 24\] is None.*give the layer a bias"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)


@each_layer
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_not_merged(name: str, value: float) -> None:
    layer: Any = made(name)
    before = weight_of(layer).detach().clone()
    with torch.no_grad():
        for adapter in (layer.lora_A, layer.lora_B):
            (adapter if isinstance(adapter, Tensor) else adapter["default"]).fill_(value)
    with pytest.raises(
        ValueError, match=rf"the weight of {with_article(type(layer).__name__)} \[.*\] merged is not finite in float32"
    ):
        layer.merge()
    assert not layer.merged
    assert torch.equal(weight_of(layer), before)
