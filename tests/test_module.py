"""LoRALinear and LoRALinearGroup: parameters, start, wrapping, merging, and all that nn.Linear lets its owner do."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora import LoRALinear, LoRALinearGroup, lora_linear, lora_linear_group
from fastlora.accuracy import assert_close_to_oracle
from tests.cases import OpLog

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def trained(seed: int = 1, **options: object) -> LoRALinear:
    """A layer with an update that is not zero, in eval mode."""
    torch.manual_seed(seed)
    layer = LoRALinear(48, 29, **({"r": 6, "lora_alpha": 10} | options))
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer.eval()


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 7, 48, generator=torch.Generator().manual_seed(3)).to(dtype)


def effective_weight(layer: LoRALinear, dtype: torch.dtype = torch.float64) -> Tensor:
    """W + scale · B A of an unmerged layer."""
    return layer.weight.to(dtype) + layer.scale * layer.lora_B.to(dtype) @ layer.lora_A.to(dtype)


def saved_and_loaded(layer: LoRALinear) -> LoRALinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[LoRALinear], LoRALinear]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch_save": saved_and_loaded,
}


def test_state_dict_keys_are_those_of_linear_and_peft() -> None:
    shapes = {name: tuple(t.shape) for name, t in LoRALinear(48, 29, r=6).state_dict().items()}
    assert shapes == {"weight": (29, 48), "bias": (29,), "lora_A": (6, 48), "lora_B": (29, 6)}
    assert set(LoRALinear(48, 29, r=6, bias=False).state_dict()) == {"weight", "lora_A", "lora_B"}


def test_only_the_adapter_trains() -> None:
    assert [name for name, p in LoRALinear(48, 29).named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_base_starts_as_linear_and_update_at_zero() -> None:
    torch.manual_seed(7)
    linear = nn.Linear(48, 29)
    a = nn.init.kaiming_uniform_(torch.empty(8, 48), a=math.sqrt(5))
    torch.manual_seed(7)
    layer = LoRALinear(48, 29)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.bias, linear.bias)
    assert torch.equal(layer.lora_A, a)
    assert torch.equal(layer.lora_B, torch.zeros(29, 8))
    assert torch.equal(layer(inputs()), linear(inputs()))


@pytest.mark.parametrize("r", [1, 5, 12, 64])
def test_rank_need_not_be_a_power_of_two_nor_small(r: int) -> None:
    layer = trained(r=r)
    expected = F.linear(inputs().double(), effective_weight(layer), layer.bias.double())
    torch.testing.assert_close(layer(inputs()).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 2.5), (True, 5.0)], ids=["lora", "rslora"])
def test_scale(use_rslora: bool, scale: float) -> None:
    layer = trained(r=4, lora_alpha=10, use_rslora=use_rslora)
    assert layer.scale == scale
    expected = lora_linear(inputs(), layer.weight, layer.lora_A, layer.lora_B, scale=scale, bias=layer.bias)
    assert torch.equal(layer(inputs()), expected)


def test_scale_is_not_baked_into_the_adapter() -> None:
    layer = trained(lora_alpha=12)
    state = layer.state_dict()
    doubled = trained(seed=2, lora_alpha=24)
    doubled.load_state_dict(state)
    base = F.linear(inputs(), layer.weight, layer.bias)
    torch.testing.assert_close(doubled(inputs()) - base, 2 * (layer(inputs()) - base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_adapter_may_be_wider_than_the_base(dtype: torch.dtype) -> None:
    layer = trained(dtype=dtype, adapter_dtype=torch.float32)
    assert {name: p.dtype for name, p in layer.named_parameters()} == {
        "weight": dtype,
        "bias": dtype,
        "lora_A": torch.float32,
        "lora_B": torch.float32,
    }
    y = layer(inputs(dtype))
    y.sum().backward()
    assert y.dtype is dtype
    assert layer.lora_A.grad.dtype is layer.lora_B.grad.dtype is torch.float32


def test_optimiser_step_moves_the_adapter_alone() -> None:
    layer = trained()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer(inputs()).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    moved = [name for name, p in layer.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["lora_A", "lora_B"]
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_unfrozen_base_trains_as_linear_does() -> None:
    layer = trained().requires_grad_(True)
    linear = nn.Linear(48, 29)
    layer(inputs()).sum().backward()
    linear(inputs()).sum().backward()
    torch.testing.assert_close(layer.weight.grad, linear.weight.grad)
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)


def test_eval_switches_dropout_off_and_train_on() -> None:
    layer = trained(lora_dropout=0.5)
    still = layer(inputs())
    assert torch.equal(layer(inputs()), still)
    layer.train()
    assert not torch.equal(layer(inputs()), still)
    layer.eval()
    assert torch.equal(layer(inputs()), still)


def test_train_and_eval_return_the_layer() -> None:
    layer = LoRALinear(48, 29)
    assert layer.eval() is layer
    assert layer.train() is layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_from_linear_shares_storage_and_result(dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(48, 29, bias=bias, dtype=dtype)
    layer = LoRALinear.from_linear(linear, r=6, adapter_dtype=torch.float32)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert (layer.bias is None) == (not bias)
    if bias:
        assert layer.bias.data_ptr() == linear.bias.data_ptr()
    assert layer.lora_A.dtype is torch.float32
    assert torch.equal(layer(inputs(dtype)), linear(inputs(dtype)))


def test_from_linear_leaves_the_linear_untouched() -> None:
    linear = nn.Linear(48, 29)
    before = copy.deepcopy(linear.state_dict())
    layer = LoRALinear.from_linear(linear, r=6)
    nn.init.normal_(layer.lora_B)
    layer(inputs()).sum().backward()
    layer.merge()
    assert linear.weight.requires_grad
    assert linear.weight.grad is None
    for name, tensor in linear.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_from_linear_keeps_the_mode(training: bool) -> None:
    assert LoRALinear.from_linear(nn.Linear(48, 29).train(training)).training == training


def test_from_linear_passes_its_options_on() -> None:
    layer = LoRALinear.from_linear(nn.Linear(48, 29), r=5, lora_alpha=20, lora_dropout=0.1, use_rslora=True)
    assert str(layer) == str(LoRALinear(48, 29, r=5, lora_alpha=20, lora_dropout=0.1, use_rslora=True))
    assert layer.lora_A.abs().max() > 0
    assert torch.equal(layer.lora_B, torch.zeros(29, 5))


def test_from_linear_wraps_no_subclass() -> None:
    class Quantised(nn.Linear):
        pass

    with pytest.raises(TypeError, match="Quantised"):
        LoRALinear.from_linear(Quantised(48, 29))
    with pytest.raises(TypeError, match="LoRALinear"):
        LoRALinear.from_linear(LoRALinear(48, 29))


def test_two_adapters_on_one_linear_are_independent() -> None:
    linear = nn.Linear(48, 29)
    first, second = (LoRALinear.from_linear(linear, r=6) for _ in range(2))
    nn.init.normal_(first.lora_B)
    expected = second(inputs())
    first.merge()
    assert torch.equal(second(inputs()), expected)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_merged_weight_is_rounded_once(dtype: torch.dtype) -> None:
    layer = trained(dtype=dtype, adapter_dtype=torch.float32)
    oracle, baseline = effective_weight(layer), effective_weight(layer, torch.float32).to(dtype)
    assert_close_to_oracle(layer.merge().weight, oracle=oracle, baseline=baseline, name="merged weight")


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_unmerge_restores_every_bit(dtype: torch.dtype) -> None:
    layer = trained(dtype=dtype)
    base = layer.weight.detach().clone()
    layer.merge()
    assert not torch.equal(layer.weight, base)
    layer.unmerge()
    assert torch.equal(layer.weight, base)


def test_unmerge_restores_the_shared_storage() -> None:
    linear = nn.Linear(48, 29)
    layer = LoRALinear.from_linear(linear)
    layer.merge().unmerge()
    assert layer.weight.data_ptr() == linear.weight.data_ptr()


@pytest.mark.parametrize(
    "context", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode], ids=["autocast", "inference_mode"]
)
def test_merge_is_the_same_in_any_context(context: Callable[[], AbstractContextManager[object]]) -> None:
    layer = trained()
    expected = copy.deepcopy(layer).merge().weight
    with context():
        layer.merge()
    assert torch.equal(layer.weight, expected)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, expected.sum(0).expand_as(x))


def test_a_parametrised_weight_refuses_to_merge() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(trained(), "weight")
    with pytest.raises(RuntimeError, match=r"weight is parametrised.*remove_parametrizations"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("reset", [LoRALinear.reset_parameters, LoRALinear.reset_adapter])
def test_a_reset_unmerges_first(reset: Callable[[LoRALinear], None]) -> None:
    layer = trained().merge()
    reset(layer)
    assert not layer.merged
    assert torch.equal(layer.state_dict()["weight"], layer.weight)
    assert layer.lora_B.eq(0).all()


def test_merge_and_unmerge_twice_are_once() -> None:
    layer = trained()
    base = layer.weight.detach().clone()
    once = layer.merge().weight.detach().clone()
    assert layer.merged
    assert torch.equal(layer.merge().weight, once)
    assert not layer.unmerge().merged
    assert torch.equal(layer.unmerge().weight, base)


def test_merge_keeps_the_parameter_an_optimiser_may_hold() -> None:
    layer = trained()
    weight = layer.weight
    assert layer.merge().weight is weight
    assert layer.unmerge().weight is weight
    assert not weight.requires_grad


def test_merged_is_one_gemm() -> None:
    layer, x = trained().merge(), inputs().flatten(0, 1)
    with OpLog() as log, torch.no_grad():
        layer(x)
    assert [name for name, _, _ in log.calls if name != "aten::t"] == ["aten::addmm"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_merged_gives_the_output_without_dropout(training: bool) -> None:
    layer = trained(lora_dropout=0.5)
    expected = layer(inputs())
    torch.testing.assert_close(layer.train(training).merge()(inputs()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("into_merged", [True, False], ids=["into_merged", "into_unmerged"])
@pytest.mark.parametrize("from_merged", [True, False], ids=["from_merged", "from_unmerged"])
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
def test_state_dict_means_the_same_merged_or_not(from_merged: bool, into_merged: bool, assign: bool) -> None:
    source, target = trained(seed=1), trained(seed=2)
    expected, state = source(inputs()), source.state_dict()
    if from_merged:
        state = source.merge().state_dict()
    if into_merged:
        target.merge()
    target.load_state_dict(state, assign=assign)
    assert target.merged == into_merged
    torch.testing.assert_close(target(inputs()), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(target.unmerge()(inputs()), expected)


def test_state_dict_of_a_model_holds_the_base_under_its_prefix() -> None:
    model = nn.Sequential(nn.ReLU(), trained())
    base = model[1].weight.detach().clone()
    model[1].merge()
    assert torch.equal(model.state_dict()["1.weight"], base)
    assert set(model.state_dict()) == {"1.weight", "1.bias", "1.lora_A", "1.lora_B"}


def test_loading_after_eval_gives_the_same_outputs() -> None:
    source = trained()
    target = LoRALinear(48, 29, r=6, lora_alpha=10).eval()
    target(inputs())
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(inputs()), source(inputs()))


def test_loads_the_checkpoint_of_a_linear() -> None:
    linear, layer = nn.Linear(48, 29), LoRALinear(48, 29)
    keys = layer.load_state_dict(linear.state_dict(), strict=False)
    assert set(keys.missing_keys) == {"lora_A", "lora_B"}
    assert not keys.unexpected_keys
    assert torch.equal(layer(inputs()), linear(inputs()))


def test_failed_load_leaves_a_merged_layer_merged_and_its_base_whole() -> None:
    layer = trained()
    base = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.merge().load_state_dict(LoRALinear(47, 29, r=6).state_dict())
    assert layer.merged
    assert torch.equal(layer.unmerge().weight, base)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "unmerged"])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_compute_the_same(duplicate: Callable[[LoRALinear], LoRALinear], merged: bool) -> None:
    layer = trained(lora_dropout=0.3)
    unmerged = layer(inputs())
    if merged:
        layer.merge()
    twin = duplicate(layer)
    assert twin.merged == merged
    assert not twin.training
    assert torch.equal(twin(inputs()), layer(inputs()))
    assert torch.equal(twin.unmerge()(inputs()), unmerged)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_own_their_storage(duplicate: Callable[[LoRALinear], LoRALinear]) -> None:
    layer = trained()
    expected = layer(inputs())
    with torch.no_grad():
        for parameter in duplicate(layer).parameters():
            parameter.fill_(9)
    assert torch.equal(layer(inputs()), expected)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "unmerged"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_to_dtype_casts_every_tensor(dtype: torch.dtype, merged: bool) -> None:
    layer = trained()
    base = layer.weight.detach().to(dtype)
    if merged:
        layer.merge()
    assert layer.to(dtype) is layer
    assert layer(inputs(dtype)).dtype is dtype
    layer.unmerge()
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert torch.equal(layer.weight, base)


def test_to_device_moves_the_base_set_aside() -> None:
    layer = trained().merge().to("meta").unmerge()
    assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_starts_on_meta_and_is_materialised_later() -> None:
    layer = LoRALinear(48, 29, r=6, device="meta").to_empty(device="cpu")
    torch.manual_seed(4)
    layer.reset_parameters()
    torch.manual_seed(4)
    assert torch.equal(layer(inputs()), LoRALinear(48, 29, r=6)(inputs()))


def test_reset_adapter_forgets_the_update() -> None:
    layer = trained()
    layer.reset_adapter()
    assert torch.equal(layer(inputs()), F.linear(inputs(), layer.weight, layer.bias))


def test_prints_what_it_is() -> None:
    layer = LoRALinear(48, 29, r=6, lora_alpha=12, lora_dropout=0.1)
    line = "LoRALinear(in_features=48, out_features=29, bias=True, r=6, lora_alpha=12, lora_dropout=0.1)"
    assert str(layer) == line
    assert str(layer.merge()) == line.replace(")", ", merged=True)")
    assert "bias=False" in str(LoRALinear(4, 3, bias=False))
    assert "use_rslora=True" in str(LoRALinear(4, 3, use_rslora=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"r": -3}, "r must be at least 1, got -3"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be .* got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must be .* got -0.1"),
        ({"lora_dropout": math.nan}, r"lora_dropout must be .* got nan"),
    ],
    ids=str,
)
def test_constructor_names_the_bad_argument(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRALinear(48, 29, **options)
    with pytest.raises(ValueError, match=message):
        LoRALinear.from_linear(nn.Linear(48, 29), **options)


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "unmerged"])
def test_wrong_input_raises_as_linear_does(merged: bool) -> None:
    layer = trained().merge() if merged else trained()
    with pytest.raises(RuntimeError):
        layer(torch.randn(5, 47))
    with pytest.raises(RuntimeError):
        layer(torch.randn(5, 48, dtype=torch.float64))


# Groups.


def linears(**options: Any) -> list[nn.Linear]:
    """Queries, keys and values of grouped-query attention."""
    torch.manual_seed(2)
    settings = {"dtype": torch.float64} | options
    return [nn.Linear(48, 29, **settings), nn.Linear(48, 20, bias=False, **settings), nn.Linear(48, 20, **settings)]


def group(**options: Any) -> LoRALinearGroup:
    """Awake, and in float64, where whatever is not the same shows."""
    made = LoRALinearGroup.from_linears(linears(), **({"r": [6, 4, 3], "lora_alpha": [10, 8, 5]} | options))
    for layer in made.layers:
        nn.init.normal_(layer.lora_B, std=0.3)
    return made


def step_of(made: LoRALinearGroup, call: Callable[[Tensor], tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Outputs and gradients of a call of a group, or of its layers."""
    made.zero_grad()
    torch.manual_seed(5)
    x = inputs(torch.float64).requires_grad_()
    ys = call(x)
    sum((i + 1) * y.square().sum() for i, y in enumerate(ys)).backward()
    gradients = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | {"x": x.grad} | gradients


def assert_as_one_by_one(made: LoRALinearGroup, call: Callable[[Tensor], tuple[Tensor, ...]] | None = None) -> None:
    result = step_of(made, made if call is None else call)
    expected = step_of(made, lambda x: tuple(layer(x) for layer in made.layers))
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(result[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of lora_linear_group computed."""
    seen: list[int] = []

    def watched(x: Tensor, weights: Any, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        seen.append(len(weights))
        return lora_linear_group(x, weights, *arguments, **options)

    monkeypatch.setattr("fastlora.module_group.lora_linear_group", watched)
    return seen


@pytest.mark.parametrize("dropout", [0.0, 0.3, [0.3, 0.0, 0.1]], ids=str)
def test_a_group_is_its_layers_one_by_one(dropout: Any, widths: list[int]) -> None:
    made = group(lora_dropout=dropout)
    assert_as_one_by_one(made)
    assert_as_one_by_one(made.eval())
    assert widths == [3, 3]


def test_a_branch_has_options_of_its_own_or_those_of_all() -> None:
    made = group(lora_dropout=[0.1, 0.2, 0.0], use_rslora=True)
    assert [(layer.r, layer.lora_alpha, layer.lora_dropout) for layer in made.layers] == [
        (6, 10, 0.1),
        (4, 8, 0.2),
        (3, 5, 0.0),
    ]
    assert made.layers[1].scale == 4.0
    made = LoRALinearGroup.from_linears(linears(dtype=torch.bfloat16), r=5, adapter_dtype=torch.float32)
    assert [(layer.r, layer.lora_alpha, layer.lora_dropout) for layer in made.layers] == [(5, 8, 0.0)] * 3
    assert {layer.lora_A.dtype for layer in made.layers} == {torch.float32}
    assert [y.dtype for y in made(inputs(torch.bfloat16))] == [torch.bfloat16] * 3


def test_a_group_shares_the_storage_and_starts_with_the_result_of_its_linears() -> None:
    bases = linears()
    made = LoRALinearGroup.from_linears(bases)
    for linear, layer, y in zip(bases, made.layers, made(inputs(torch.float64)), strict=True):
        assert layer.weight.data_ptr() == linear.weight.data_ptr()
        torch.testing.assert_close(y, linear(inputs(torch.float64)))


def test_state_dict_of_a_group_is_that_of_its_layers() -> None:
    made, other = group(), LoRALinearGroup.from_linears(linears(), r=[6, 4, 3], lora_alpha=[10, 8, 5])
    names = [f"layers.{i}.{name}" for i in range(3) for name in ("weight", "bias", "lora_A", "lora_B")]
    names.remove("layers.1.bias")
    assert list(made.state_dict()) == names
    assert [name for name, p in made.named_parameters() if p.requires_grad] == [n for n in names if "lora_" in n]
    made.layers[2].merge()
    other.load_state_dict(made.state_dict())
    made.layers[2].unmerge()
    for copied in (other, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        for one, expected in zip(copied(inputs(torch.float64)), made(inputs(torch.float64)), strict=True):
            assert torch.equal(one, expected)


@pytest.mark.parametrize("merged", [(0,), (1, 2), (0, 1, 2)])
def test_a_merged_branch_is_one_gemm_and_the_others_stay_a_group(merged: tuple[int, ...], widths: list[int]) -> None:
    made = group(lora_dropout=0.3)
    before = made.eval()(inputs(torch.float64))
    for i in merged:
        made.layers[i].merge()
    for one, other in zip(made(inputs(torch.float64)), before, strict=True):
        torch.testing.assert_close(one, other)
    assert widths == [3] + [2] * (len(merged) == 1)
    assert_as_one_by_one(made.train())


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "global"])
def test_hooks_of_a_branch_fire(kind: str, widths: list[int]) -> None:
    made, fired = group(), []
    hooks: dict[str, Callable[..., Any]] = {
        "forward": lambda module, args, y: (fired.append(module), 2 * y)[1],
        "forward_pre": lambda module, args: (fired.append(module), (2 * args[0],))[1],
        "full_backward": lambda module, grad_input, grad_output: fired.append(module),
        "global": lambda module, args, y: fired.append(module),
    }
    if kind == "global":
        handle = torch.nn.modules.module.register_module_forward_hook(hooks[kind])
    else:
        handle = getattr(made.layers[1], f"register_{kind}_hook")(hooks[kind])
    try:
        step_of(made, made)
        assert [module for module in fired if module is not made] == (
            list(made.layers) if kind == "global" else [made.layers[1]]
        )
        assert_as_one_by_one(made)
    finally:
        handle.remove()
    assert widths == ([] if kind == "global" else [2, 2])


def test_a_branch_of_another_class_is_called() -> None:
    class Doubled(LoRALinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    made = LoRALinearGroup([group().layers[0], Doubled(48, 29, dtype=torch.float64)])
    assert_as_one_by_one(made)
    made = group()
    torch.nn.utils.parametrizations.weight_norm(made.layers[0], "weight")
    assert_as_one_by_one(made)


def test_one_branch_and_checkpoints_and_compiled_code() -> None:
    assert_as_one_by_one(LoRALinearGroup(group().layers[:1]))
    made = group(lora_dropout=0.3)
    assert_as_one_by_one(made, lambda x: torch.utils.checkpoint.checkpoint(made, x, use_reentrant=False))
    torch._dynamo.reset()
    assert_as_one_by_one(made.eval(), torch.compile(made, fullgraph=True, backend="aot_eager"))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LoRALinearGroup([]), ValueError, "at least one branch, got none"),
        (lambda: LoRALinearGroup.from_linears([]), ValueError, "at least one branch, got none"),
        (lambda: LoRALinearGroup([LoRALinear(48, 29), nn.Linear(48, 29)]), TypeError, "branch 1 must be a LoRALinear"),
        (
            lambda: LoRALinearGroup([LoRALinear(48, 29), LoRALinear(47, 29)]),
            ValueError,
            "branch 1 has in_features 47 and branch 0 48",
        ),
        (
            lambda: LoRALinearGroup.from_linears([nn.Linear(48, 29), nn.Linear(48, 29), nn.Linear(47, 29)]),
            ValueError,
            "branch 2 has in_features 47 and branch 0 48",
        ),
        (lambda: group(r=[4, 4]), ValueError, "r has 2 values for 3 branches"),
        (lambda: group(r=[4, 0, 4]), ValueError, "^branch 1: r must be at least 1, got 0"),
        (lambda: group(lora_dropout=[0.0, 0.0, 1.0]), ValueError, "^branch 2: lora_dropout must be .* got 1.0"),
        (
            lambda: LoRALinearGroup.from_linears([nn.Linear(48, 29), LoRALinear(48, 29)]),
            TypeError,
            "^branch 1: linear must be an nn.Linear itself, got LoRALinear",
        ),
        (
            lambda: group()(torch.randn(3, 47, dtype=torch.float64)),
            RuntimeError,
            r"^branch 0: x has shape \[3, 47\]",
        ),
    ],
)
def test_errors_of_a_group_name_the_branch(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
