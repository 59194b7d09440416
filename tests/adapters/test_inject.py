"""fastlora.inject: PEFT's matching, a base that stays what it was, several adapters, and what is refused."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastlora
from fastlora.accuracy import assert_close_to_oracle, oracle_step, reference_step
from fastlora.adapters.layer import AdaptedConv1D, AdaptedLinear
from fastlora.adapters.matching import all_linear, first_match, is_target
from fastlora.backends.request import Product
from tests.adapters.tiny_models import IDS, adapted, fill, gpt2, llama, run, toy
from tests.cases import DTYPES, OpLog

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]

NAMES = [
    "q_proj", "lm_head", "model.embed_tokens", "model.norm", "proj", "model.layers", "model.layers.0", "score",
    *(f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1, 2, 10, 11, 21) for n in "qkvo"),
    *(f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1, 12) for n in ("gate", "up", "down")),
    *(f"model.layers.{i}.mlp.experts.{j}.w{k}" for i in (0, 3) for j in (0, 1, 3) for k in (1, 2)),
    *(f"transformer.h.{i}.{n}" for i in (0, 1, 11) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_proj", "mlp.c_fc")),
    *(f"encoder.block.{i}.layer.{j}.SelfAttention.q" for i in (0, 1) for j in (0, 1)),
    "bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.attention.output.dense", "classifier.dense",
    "layers.0.q_proj", "0", "0.q_proj", "blocks.0.0", "xq_proj", "model.q_proj_extra", "model.layers.1.q_proj.inner",
]  # fmt: skip

MATCHING: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj", "c_attn", "query", "q"]},
    {"target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "proj", "0", "dense"]},
    {"target_modules": "q_proj"},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"model\.layers\.[01]\.self_attn\..*"},
    {"target_modules": r".*"},
    {"target_modules": r".*proj|lm_head"},
    {"target_modules": ["q_proj", "c_fc"], "exclude_modules": ["model.layers.1.self_attn.q_proj", "h.0.mlp.c_fc"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": r".*_proj", "exclude_modules": ["self_attn.k_proj", "lm_head"]},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up_proj", "c_proj", "w1", "query", "q"], "layers_to_transform": [0, 11]},
    {"target_modules": ["q_proj", "model.layers.0.self_attn.k_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "c_attn", "w1"], "layers_to_transform": [0, 3], "layers_pattern": ["h", "experts"]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "w2"], "layers_to_transform": [1], "layers_pattern": []},
    {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["block", "layer"]},
    {"target_modules": ["w1", "w2"], "layers_to_transform": [3], "layers_pattern": "experts"},
]


@pytest.mark.parametrize("options", MATCHING, ids=str)
def test_names_match_as_in_peft(options: dict[str, Any]) -> None:
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    config = peft.LoraConfig(**options)
    for name in NAMES:
        theirs = check_target_module_exists(config, name)
        assert is_target(name, **options) == (bool(theirs) and not isinstance(theirs, _ExcludedModule)), name


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 1},
        {"layers.0.self_attn.q_proj": 1, "q_proj": 2, "proj": 3},
        {r"model\.layers\.[0-9]\..*": 1, ".*": 2},
        {r"layers\.1\.self_attn\.(q|k)_proj": 1, "^model.layers.0.self_attn.q_proj": 2},
        {"c_attn|c_proj": 1},
        {"_proj": 1, "q": 2, "0": 3},
    ],
    ids=str,
)
def test_the_first_pattern_counts_as_in_peft(patterns: dict[str, int]) -> None:
    from peft.utils.other import get_pattern_key

    for name in NAMES:
        assert first_match(patterns, name, 9) == patterns.get(get_pattern_key(patterns.keys(), name), 9), name


def roberta_classifier() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=36,
        max_position_embeddings=20,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS", "CAUSAL_LM"])
@pytest.mark.parametrize("make", [toy, llama, gpt2, roberta_classifier], ids=lambda make: make.__name__)
def test_all_linear_is_peft_s(make: Callable[[], nn.Module], task_type: str | None) -> None:
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    model = make()
    config = peft.LoraConfig(target_modules="all-linear", task_type=task_type)
    assert set(all_linear(model, task_type)) == _maybe_include_all_linear_layers(config, model).target_modules


def test_all_linear_of_a_model_with_adapters_is_the_same() -> None:
    for make in (llama, gpt2):
        assert all_linear(adapted(make())) == all_linear(make())


# The base stays what it was.


@pytest.mark.parametrize("make", [toy, llama, gpt2], ids=lambda make: make.__name__)
def test_base_keeps_its_modules_parameters_keys_and_result(make: Callable[[], nn.Module]) -> None:
    model = make()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    before, state = run(model), {name: t.clone() for name, t in model.state_dict().items()}
    fastlora.inject(model, "all-linear", r=3)
    assert torch.equal(run(model), before)  # b is zero here and nowhere else
    for name, module in modules.items():
        assert model.get_submodule(name) is module
    for name, parameter in parameters.items():
        assert model.get_parameter(name) is parameter
    extra = set(model.state_dict()) - set(state)
    assert extra
    assert all(re.search(r"\.lora_[AB]\.default$", key) for key in extra)
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    fastlora.unload(model)
    assert set(model.state_dict()) == set(state)
    assert torch.equal(run(model), before)
    assert not [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def test_unload_leaves_no_trace() -> None:
    model, untouched = gpt2(), gpt2()
    linear, fresh = nn.Sequential(nn.Linear(4, 3)), nn.Linear(4, 3)
    for each in (model, linear):
        adapted(each)
        fastlora.unload(each)
    assert linear[0].__dict__.keys() == fresh.__dict__.keys()
    assert str(model) == str(untouched)
    for (name, one), other in zip(model.named_modules(), untouched.modules(), strict=True):
        assert type(one) is type(other), name
        assert one.__dict__.keys() == other.__dict__.keys(), name
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in untouched.parameters()]


def attributes(module: nn.Module) -> dict[str, Any]:
    """All that a module keeps of its own, hooks in their order; of parameters and children the names."""
    kept = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        kept[name] = list(kept[name])
    return {name: list(value.items()) if isinstance(value, dict) else value for name, value in kept.items()}


def see_state_dict(*_: Any) -> None:
    """A hook of somebody else's."""


@pytest.mark.parametrize("merge_first", [False, True], ids=["unmerged", "merged"])
@pytest.mark.parametrize(
    "leave",
    [fastlora.unload, fastlora.merge_and_unload, lambda model: fastlora.delete_adapter(model, "default")],
    ids=["unload", "merge_and_unload", "delete"],
)
def test_nothing_is_left_in_a_layer_and_others_hooks_stay(leave: Callable[[nn.Module], Any], merge_first: bool) -> None:
    for make in (lambda: nn.Sequential(nn.Linear(4, 3)), gpt2):
        model = make()
        layers = {name: layer for name, layer in model.named_modules() if type(layer).__name__ in ("Linear", "Conv1D")}
        for layer in layers.values():
            layer.register_state_dict_post_hook(see_state_dict)
            layer.register_load_state_dict_post_hook(see_state_dict)
        before = {name: attributes(module) for name, module in model.named_modules()}
        adapted(model)
        for layer in layers.values():
            layer.register_state_dict_pre_hook(see_state_dict)
        if merge_first:
            fastlora.merge_adapter(model)
            model.load_state_dict(model.state_dict())
        leave(model)
        for layer in layers.values():
            assert layer._state_dict_pre_hooks.popitem()[1] is see_state_dict
        assert {name: attributes(module) for name, module in model.named_modules()} == before


def test_what_was_frozen_stays_frozen_after_unload() -> None:
    model = toy()
    model.embed.weight.requires_grad_(False)
    adapted(model)
    fastlora.unload(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["embed.weight"]


def test_ties_survive() -> None:
    model = adapted(toy(), ["up", "head"])
    assert model.head.weight is model.embed.weight
    assert isinstance(model.head, AdaptedLinear)


def test_hooks_survive_and_see_the_adapted_output() -> None:
    model = toy()
    seen: list[Tensor] = []
    model.blocks[0]["up"].register_forward_hook(lambda module, args, y: seen.append(y))
    run(model)
    adapted(model, ["up"])
    run(model)
    assert not torch.equal(seen[0], seen[1])


def test_only_the_adapter_trains() -> None:
    model = adapted(toy(), ["up", "down"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"blocks.{i}.{n}.lora_{c}.default" for i in range(3) for n in ("up", "down") for c in "AB"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(IDS).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained


# The maths, against the formula in float64.


def plain(model: nn.Module) -> nn.Module:
    """A copy whose layers are torch's operators alone: the layer, then the adapter, then the sum."""
    other = copy.deepcopy(model)
    for layer in [module for module in other.modules() if isinstance(module, AdaptedLinear)]:
        name: Any = layer.active_adapter

        def forward(x: Tensor, layer: Any = layer, name: str = name) -> Tensor:
            weight = layer.weight.T if isinstance(layer, AdaptedConv1D) else layer.weight
            update = x @ layer.lora_A[name].T @ layer.lora_B[name].T
            return nn.functional.linear(x, weight, layer.bias) + layer.scale[name] * update

        layer.forward = forward
    return other


@pytest.mark.parametrize("use_rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("make", [toy, llama, gpt2], ids=lambda make: make.__name__)
def test_outputs_and_gradients_of_models_are_the_formula_s(make: Callable[[], nn.Module], use_rslora: bool) -> None:
    """In float64, where what plain torch loses is next to nothing: every layer gets its own adapter, rank and scale."""
    options = {"rank_pattern": {r"(up|q_proj|c_attn)": 5}, "alpha_pattern": {"down|v_proj|c_fc": 11}}
    ours = adapted(make().double(), use_rslora=use_rslora, **options)
    grads = {}
    for name, model in (("ours", ours), ("oracle", plain(ours))):
        y = model(IDS)
        y = y if isinstance(y, Tensor) else y.logits
        y.square().mean().backward()
        grads[name] = {"y": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert len(grads["ours"]) > 6
    for name, grad in grads["ours"].items():
        assert_close_to_oracle(grad, oracle=grads["oracle"][name], baseline=grads["oracle"][name], name=name)


@pytest.mark.parametrize("turned", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_outputs_and_gradients_of_a_layer(dtypes: tuple[torch.dtype, torch.dtype], turned: bool) -> None:
    from transformers.pytorch_utils import Conv1D

    dtype, adapter_dtype = dtypes
    model = nn.Sequential(Conv1D(29, 48) if turned else nn.Linear(48, 29)).to(dtype)
    fastlora.inject(model, ["0"], 6, 10, adapter_dtype=adapter_dtype)
    fill(model)
    layer, x, dy = model[0], torch.randn(37, 48).to(dtype).requires_grad_(), torch.randn(37, 29).to(dtype)
    weight = layer.weight.T if turned else layer.weight
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    y = model(x)
    y.backward(dy)
    product = Product(x, weight, a, b, 10 / 6, layer.bias).map(Tensor.detach)
    oracle, baseline = oracle_step(product, dy), reference_step(product, dy)
    for name, actual in (("y", y), ("dx", x.grad), ("da", a.grad), ("db", b.grad)):
        assert_close_to_oracle(actual, oracle=getattr(oracle, name), baseline=getattr(baseline, name), name=name)


def test_rank_scale_and_report() -> None:
    model = llama()
    report = fastlora.inject(
        model, ["q_proj", "v_proj"], 4, 10, use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 6},
        alpha_pattern={"v_proj": 3},
    )  # fmt: skip
    found = {layer.name: layer[1:] for layer in report.layers}
    prefix = "model.layers.{}.self_attn.{}_proj".format
    assert found == {
        prefix(0, "q"): (48, 48, 4, 5.0),
        prefix(1, "q"): (48, 48, 6, 10 / math.sqrt(6)),
        prefix(0, "v"): (48, 24, 4, 1.5),
        prefix(1, "v"): (48, 24, 4, 1.5),
    }
    assert (
        report.trainable
        == 4 * 96 + 6 * 96 + 2 * 4 * 72
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
    )
    assert report.total == sum(p.numel() for p in model.parameters())
    text = str(report)
    assert text.startswith(f"adapter 'default': 4 layers; 1,536 of {report.total:,} parameters train (")
    assert "2 x model.layers.*.self_attn.v_proj: 48 -> 24, r=4, scale=1.5" in text


def test_layers_print_their_sizes_and_adapters() -> None:
    model = two()
    layer = model.blocks[0]["up"]
    line = "in_features=24, out_features=40, bias=True, adapters: 'default' r=3, 'other' r=5, active: 'default'"
    assert str(layer).split("\n")[1].strip() == line
    fastlora.merge_adapter(model)
    fastlora.disable(model)
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # what FSDP1 and ZeRO-3 leave on a rank
    assert "in_features=24, out_features=40, bias=True, adapters: " in str(layer)
    assert ", active: 'default', disabled, merged\n" in str(layer)
    conv = next(module for module in adapted(gpt2()).modules() if isinstance(module, AdaptedConv1D))
    before = set(conv.__dict__)
    assert "in_features=48, out_features=144, bias=True, adapters: 'default' r=3, active: 'default'\n" in str(conv)
    assert set(conv.__dict__) == before


def test_starts() -> None:
    shapes = {}
    for init in (True, "gaussian", False):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(400, 90))
        fastlora.inject(model, "all-linear", 8, init_lora_weights=init)
        shapes[init] = model[0].lora_A["default"], model[0].lora_B["default"]
    bound = math.sqrt(6 / (1 + 5) / 400)
    for init in (True, False):
        a = shapes[init][0]
        assert bound * 0.98 < a.abs().max() <= bound
    assert shapes["gaussian"][0].std().item() == pytest.approx(1 / 8, rel=0.05)
    assert not shapes[True][1].any()
    assert not shapes["gaussian"][1].any()
    assert shapes[False][1].any()


@pytest.mark.parametrize(
    ("base", "asked", "got"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float64, None, torch.float64),
    ],
    ids=str,
)
def test_dtype_of_the_adapter(base: torch.dtype, asked: torch.dtype | None, got: torch.dtype) -> None:
    model = toy().to(base)
    fastlora.inject(model, ["up"], adapter_dtype=asked)
    assert model.blocks[0]["up"].lora_A["default"].dtype is got


def test_dropout_acts_in_training_alone() -> None:
    model = adapted(toy(), ["up"], lora_dropout=0.5)
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.equal(run(model), run(model))


# Several adapters.


def two(make: Callable[[], nn.Module] = toy) -> nn.Module:
    model = adapted(make(), ["up", "down"])
    fastlora.inject(model, ["up"], r=5, lora_alpha=2, adapter_name="other")
    fill(model, seed=8)
    return model


def test_a_second_adapter_waits_and_changes_nothing() -> None:
    model = adapted(toy(), ["up"])
    model.blocks[0]["norm"].requires_grad_(True)
    before, trained = run(model), {n for n, p in model.named_parameters() if p.requires_grad}
    fastlora.inject(model, ["up", "down"], adapter_name="other", init_lora_weights=False)
    assert torch.equal(run(model), before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_each_adapter_is_as_if_it_were_alone() -> None:
    model = two()
    alone = {}
    for name, targets, options in (
        ("default", ["up", "down"], {"r": 3, "lora_alpha": 7}),
        ("other", ["up"], {"r": 5, "lora_alpha": 2}),
    ):
        single = toy()
        fastlora.inject(single, targets, **options)
        values = {k.replace(f".{name}", ".default"): v for k, v in model.state_dict().items() if k.endswith(f".{name}")}
        assert not single.load_state_dict(values, strict=False).unexpected_keys
        alone[name] = run(single)
    for name in ("default", "other", "default"):
        fastlora.set_adapter(model, name)
        assert torch.equal(run(model), alone[name])
        assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {name}
    fastlora.set_adapter(model, None)
    assert torch.equal(run(model), run(toy()))
    assert not [p for p in model.parameters() if p.requires_grad]


def test_switching_copies_nothing() -> None:
    model = two()
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    with OpLog() as log:
        for name in ("other", None, "default"):
            fastlora.set_adapter(model, name)
    assert not log.calls
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers


def test_disable_as_a_block_and_for_good() -> None:
    model, base = two(), run(toy())
    y = run(model)
    with fastlora.disable(model):
        assert torch.equal(run(model), base)
        with fastlora.disable(model):
            assert torch.equal(run(model), base)
        assert torch.equal(run(model), base)
    assert torch.equal(run(model), y)
    fastlora.disable(model)
    assert torch.equal(run(model), base)
    fastlora.inject(model, ["down"], adapter_name="late", init_lora_weights=False)
    fastlora.set_adapter(model, "late")
    assert torch.equal(run(model), base)
    fastlora.enable(model)
    assert not torch.equal(run(model), base)


def test_disable_of_a_merged_model_is_the_base_to_the_bit() -> None:
    for make in (toy, gpt2):
        model = adapted(make(), ["up", "c_attn", "c_fc"])
        fastlora.merge_adapter(model)
        with fastlora.disable(model):
            assert torch.equal(run(model), run(make()))


def test_disable_ends_with_an_exception() -> None:
    model = two()
    y = run(model)
    with pytest.raises(KeyError), fastlora.disable(model):
        raise KeyError
    assert torch.equal(run(model), y)


def test_disable_survives_what_happens_inside() -> None:
    model, base = two(), run(toy())
    y = run(model)
    with fastlora.disable(model):
        fastlora.enable(model)
        assert torch.equal(run(model), y)
    assert torch.equal(run(model), y)
    fastlora.disable(model)
    with fastlora.disable(model):
        fastlora.enable(model)
    assert torch.equal(run(model), base)  # as before the block
    fastlora.enable(model)
    with fastlora.disable(model):
        fastlora.set_adapter(model, "other")
        fastlora.delete_adapter(model, "default")
        assert torch.equal(run(model), base)
    assert not torch.equal(run(model), base)
    with fastlora.disable(model):
        fastlora.unload(model)
        fastlora.inject(model, ["up"], init_lora_weights=False)
        assert not torch.equal(run(model), base)
    assert not torch.equal(run(model), base)
    switched_off = fastlora.disable(model)
    assert torch.equal(run(model), base)
    with switched_off:
        assert torch.equal(run(model), base)
    assert not torch.equal(run(model), base)


def states(model: nn.Module) -> set[int]:
    """The identities of all states that layers of the model read."""
    return {id(layer._state) for layer in model.modules() if isinstance(layer, AdaptedLinear)}


def test_the_layers_read_the_state_of_their_model() -> None:
    model = two()
    for act in (
        lambda: fastlora.set_adapter(model, "other"),
        lambda: fastlora.inject(model, ["head", "down"], adapter_name="late"),
        lambda: fastlora.disable(model),
        lambda: fastlora.delete_adapter(model, "other"),
    ):
        act()
        assert states(model) == {id(model._fastlora)}
    layer = model.head
    assert (layer.active_adapter, layer.adapters_disabled) == (None, True)
    fastlora.set_adapter(model, "late")
    fastlora.enable(model)
    assert (layer.active_adapter, layer.adapters_disabled) == ("late", False)


def test_a_copied_block_follows_the_model_it_is_put_into() -> None:
    model = two()
    model.blocks[1] = copy.deepcopy(model.blocks[0])
    assert len(states(model)) == 2
    with fastlora.disable(model):
        assert len(states(model)) == 1
        disabled = run(model)
    fastlora.unload(model)
    assert torch.equal(run(model), disabled)


def test_a_copied_layer_keeps_the_switches_it_had() -> None:
    model, x = two(), torch.randn(5, 24)
    layer = model.blocks[0]["up"]
    y = layer(x)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    fastlora.set_adapter(model, None)
    assert not torch.equal(layer(x), y)
    assert torch.equal(twin(x), y)
    assert torch.equal(twin.merge().unmerge()(x), y)


class Pair(nn.Module):
    """A part that may have adapters of its own, and one that has those of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.rest = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.part(x))


@pytest.mark.parametrize("part_first", [True, False], ids=["part_first", "whole_first"])
@pytest.mark.parametrize("name", ["default", "own"], ids=["same_name", "own_name"])
def test_a_part_with_adapters_of_its_own(part_first: bool, name: str) -> None:
    def on() -> tuple[bool, bool]:
        """Two flags: the part computes with an adapter, and the rest does."""
        h = model.part[0](x)
        return not torch.equal(h, nn.functional.linear(x, model.part[0].weight, model.part[0].bias)), not torch.equal(
            model.rest(h), nn.functional.linear(h, model.rest.weight, model.rest.bias)
        )

    torch.manual_seed(2)
    model, x = Pair(), torch.randn(3, 6)
    acts = [
        lambda: fastlora.inject(model.part, ["0"], adapter_name=name, init_lora_weights=False),
        lambda: fastlora.inject(model, ["rest"], init_lora_weights=False),
    ]
    for act in acts if part_first else reversed(acts):
        act()
    # The whole, injected later, speaks for its parts: an adapter of another name is no longer active there.
    assert on() == (not part_first or name == "default", True)
    fastlora.set_adapter(model.part, name)
    assert on() == (True, True)
    with fastlora.disable(model):
        assert on() == (False, False)
        with fastlora.disable(model.part):
            pass
        fastlora.enable(model.part)
        assert on() == (True, False)
    assert on() == (True, True)
    with fastlora.disable(model.part):
        assert on() == (False, True)
    fastlora.set_adapter(model.part, None)
    assert on() == (False, True)
    fastlora.set_adapter(model, None)
    fastlora.set_adapter(model.part, name)
    assert on() == (True, False)
    other = copy.deepcopy(model)
    assert len(states(other)) == 2
    assert not states(other) & states(model)
    fastlora.set_adapter(model, "default")
    fastlora.unload(model.part)
    assert on() == (False, True)
    assert type(model.part[0]) is nn.Linear
    fastlora.unload(other)
    assert not states(other)
    assert not [module for module in other.modules() if "_fastlora" in module.__dict__]
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_whole_leaves_what_is_merged_in_a_part() -> None:
    model = Pair()
    fastlora.inject(model.part, ["0"], adapter_name="own")
    fastlora.merge_adapter(model.part)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"adapter 'own' is merged into the base: call fastlora\.unmerge_adapter"):
        fastlora.inject(model, ["rest"])
    assert untouched(model, before)


def test_delete() -> None:
    model, y = two(), run(two())
    fastlora.delete_adapter(model, "other")
    assert torch.equal(run(model), y)
    assert not [key for key in model.state_dict() if "other" in key]
    fastlora.inject(model, ["down"], adapter_name="other")
    fastlora.delete_adapter(model, "default")
    assert torch.equal(run(model), run(toy()))
    assert type(model.blocks[0]["up"]) is nn.Linear
    fastlora.delete_adapter(model, "other")
    assert "_fastlora" not in model.__dict__
    assert all(p.requires_grad for p in model.parameters())


# What torch lets a module's owner do.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(copied: Callable[[nn.Module], nn.Module]) -> None:
    for make in (toy, gpt2):
        model = adapted(make())
        other = copied(model)
        assert torch.equal(run(other), run(model))
        y = run(model)
        assert states(other) == {id(other._fastlora)} != states(model)
        fastlora.disable(other)
        fill(other, seed=9)
        assert torch.equal(run(model), y)
        assert torch.equal(run(other), run(make()))
        fastlora.unload(other)
        assert torch.equal(run(other), run(make()))


def test_compiles_without_a_graph_break() -> None:
    for make in (toy, gpt2):
        model = adapted(make())
        layer = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
        x = torch.randn(5, 24 if make is toy else 48, requires_grad=True)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))


def test_disable_compiles_inside_a_function() -> None:
    model = two()

    def kept_close(ids: Tensor) -> tuple[Tensor, Tensor]:
        y = model(ids)
        with fastlora.disable(model):
            reference = model(ids)
        return y - reference, model(ids)

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(kept_close, fullgraph=True, backend="eager")(IDS)
        assert all(torch.equal(one, other) for one, other in zip(found, kept_close(IDS), strict=True))
        assert found[0].abs().max() > 0


def test_a_compiled_model_follows_every_switch_and_compiles_once_for_each() -> None:
    model, base, graphs = two(), run(toy()), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(3):
        fastlora.set_adapter(model, "default")
        y = run(model)
        assert torch.equal(run(compiled), y)
        with fastlora.disable(compiled):
            assert torch.equal(run(compiled), base)
        assert torch.equal(run(compiled), y)
        fastlora.merge_adapter(compiled)
        assert torch.equal(run(compiled), run(model))
        fastlora.unmerge_adapter(compiled)
        fastlora.set_adapter(compiled, "other")
        assert torch.equal(run(compiled), run(model))
        assert not torch.equal(run(compiled), y)
    assert len(graphs) == 4


def test_state_dict_loads_into_a_merged_model() -> None:
    model, other = adapted(toy(), ["up"]), adapted(toy(), ["up"])
    fill(other, seed=9)
    fastlora.merge_adapter(model)
    model.load_state_dict(other.state_dict())
    fastlora.merge_adapter(other)
    assert torch.equal(run(model), run(other))
    fastlora.unmerge_adapter(model)
    fastlora.unmerge_adapter(other)
    assert torch.equal(run(model), run(other))


def test_a_dropped_model_is_freed() -> None:
    import weakref

    model = two()
    weak = weakref.ref(model.blocks[0]["up"].weight)
    with fastlora.disable(model):
        pass
    del model
    gc.collect()
    assert weak() is None


# What cannot be done is said, and nothing is changed.


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    return (
        [(name, type(module), module.__dict__.keys()) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()],
        copy.deepcopy(model.__dict__.get("_fastlora")),
    )


def untouched(model: nn.Module, before: tuple[Any, ...]) -> bool:
    after = snapshot(model)
    same = [x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(after[1], before[1], strict=True)]
    return after[0] == before[0] and all(same) and after[2] == before[2]


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nothing_matches": ({"target_modules": ["q_proj"]}, ValueError, r"\['q_proj'\] matches none .*\.\*\.up, head"),
    "regex_matches_nothing": ({"target_modules": "up"}, ValueError, "'up' matches none"),
    "nothing_can": ({"target_modules": ["norm", "embed"]}, ValueError, "embed: Embedding is no linear layer"),
    "no_targets": ({"target_modules": []}, ValueError, "target_modules must name at least one module"),
    "targets_none": ({"target_modules": None}, TypeError, "target_modules must be a list .* got None"),
    "targets_numbers": ({"target_modules": [1]}, TypeError, r"target_modules must be a list .* got \[1\]"),
    "bad_regex": ({"target_modules": "("}, ValueError, r"target_modules: '\(' is no regular expression"),
    "bad_exclude": ({"exclude_modules": 3}, TypeError, "exclude_modules must be a list .* got 3"),
    "r_0": ({"r": 0}, ValueError, "r must be at least 1, got 0"),
    "r_float": ({"r": 2.0}, TypeError, r"r must be an integer, got 2\.0"),
    "r_bool": ({"r": True}, TypeError, "r must be an integer, got True"),
    "alpha": ({"lora_alpha": "8"}, TypeError, "lora_alpha must be a number, got '8'"),
    "alpha_nan": ({"lora_alpha": math.nan}, ValueError, "lora_alpha must be finite, got nan"),
    "dropout": ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be at least 0 and below 1, got 1\.0"),
    "rslora": ({"use_rslora": "yes"}, TypeError, "use_rslora must be True or False, got 'yes'"),
    "rank_pattern": ({"rank_pattern": {"up": 0}}, ValueError, r"rank_pattern\['up'\] must be at least 1, got 0"),
    "rank_pattern_key": ({"rank_pattern": {"(": 2}}, ValueError, r"rank_pattern: '\(' is no regular expression"),
    "alpha_pattern": ({"alpha_pattern": {"up": None}}, TypeError, r"alpha_pattern\['up'\] must be a number, got None"),
    "layers_with_regex": ({"target_modules": ".*up", "layers_to_transform": 1}, ValueError, "layers_to_transform goes"),
    "pattern_alone": ({"layers_pattern": "blocks"}, ValueError, "layers_pattern='blocks' needs layers_to_transform"),
    "init": ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be one of .*, got 'pissa'"),
    "name_dot": ({"adapter_name": "a.b"}, ValueError, "adapter_name must be a word without dots, got 'a.b'"),
    "name_empty": ({"adapter_name": ""}, ValueError, "adapter_name must be a word without dots, got ''"),
    "name_of_torch": ({"adapter_name": "keys"}, ValueError, "adapter_name must not be 'keys'"),
    "dtype": ({"adapter_dtype": torch.bfloat16}, ValueError, "adapter_dtype must be .*got torch.bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS)
@pytest.mark.parametrize("with_adapter", [False, True], ids=["bare", "adapted"])
def test_bad_options(case: str, with_adapter: bool) -> None:
    changes, exception, message = BAD_OPTIONS[case]
    model = adapted(toy(), ["up"], adapter_name="first") if with_adapter else toy()
    before = snapshot(model)
    with pytest.raises(exception, match=message):
        fastlora.inject(model, **({"target_modules": ["up"]} | changes))
    assert untouched(model, before)


def test_a_name_is_given_once() -> None:
    model = adapted(toy(), ["up"])
    with pytest.raises(ValueError, match="the model has an adapter 'default' already: delete_adapter"):
        fastlora.inject(model, ["down"])


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_memory_that_runs_out_leaves_the_model_whole(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy()
    before, calls, empty = snapshot(model), itertools.count(), torch.empty

    def scarce(*args: Any, **kwargs: Any) -> Tensor:
        if next(calls) == fails_at:
            raise torch.OutOfMemoryError("no memory left")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        fastlora.inject(model, ["up", "down"])
    monkeypatch.undo()
    assert untouched(model, before)


class Quantised(nn.Linear):
    pass


class Packed(Tensor):
    pass


def _odd_layers() -> dict[str, tuple[nn.Module, str]]:
    replaced = nn.Linear(4, 3)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    packed = nn.Linear(4, 3)
    packed.weight = nn.Parameter(packed.weight.detach().as_subclass(Packed))
    partitioned = nn.Linear(4, 3)
    partitioned.weight.ds_id = 1
    integer = nn.Linear(4, 3)
    integer.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    shared = nn.Linear(4, 4)
    old_norm = nn.Linear(4, 3)
    weight = old_norm.weight
    del old_norm._parameters["weight"]
    old_norm.weight = weight.detach()
    return {
        "subclass": (Quantised(4, 3), "Quantised is a subclass"),
        "parametrised": (
            torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
            "Parametrized\\w+ is a subclass",
        ),
        "computed": (old_norm, "its weight is no Parameter of its own"),
        "replaced": (replaced, "its forward was replaced"),
        "packed": (packed, "its weight is Packed, not a plain tensor|its weight is Tensor"),
        "partitioned": (partitioned, "its weight belongs to DeepSpeed ZeRO-3: inject before"),
        "integer": (integer, "its weight is int8"),
        "conv": (nn.Conv1d(4, 3, 1), "Conv1d is no linear layer"),
        "lora": (fastlora.LoRALinear(4, 3, r=2), "LoRALinear is no linear layer"),
        "shared": (nn.Sequential(shared, shared), "one module in several places"),
    }


@pytest.mark.parametrize("case", ["subclass", "parametrised", "computed", "replaced", "packed", "partitioned",
                                  "integer", "conv", "lora", "shared"])  # fmt: skip
def test_what_cannot_have_an_adapter_is_left_alone_with_the_reason(case: str, caplog: pytest.LogCaptureFixture) -> None:
    odd, reason = _odd_layers()[case]
    model = nn.ModuleDict({"odd": odd, "plain": nn.Linear(4, 3)})
    with caplog.at_level(logging.WARNING, logger="fastlora"):
        report = fastlora.inject(model, r"odd(\.0)?|plain", r=2)
    assert [layer.name for layer in report.layers] == ["plain"]
    assert list(report.refused)[-1] in ("odd", "odd.0")
    assert re.search(reason, list(report.refused.values())[-1])
    assert report.refused.items() <= {r.args[1]: r.args[2] for r in caplog.records}.items()
    assert f"left alone: {list(report.refused)[-1]}: " in str(report)


def test_layers_that_torch_reads_without_calling_them() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    with pytest.raises(ValueError, match=r"linear1: nn.TransformerEncoderLayer reads .*set_fastpath_enabled\(False\)"):
        fastlora.inject(model, ["linear1", "linear2"])
    with pytest.raises(
        ValueError, match=r"self_attn\.out_proj: nn\.MultiheadAttention reads its weight without calling"
    ):
        fastlora.inject(model, ["out_proj"])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            before = model(x)
            fastlora.inject(model, ["linear1", "linear2"], init_lora_weights=False)
            assert not torch.equal(model(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_shapes_that_are_not_known_yet() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(5))
    with pytest.raises(ValueError, match=r"1\.weight has no shape yet: run one batch through the model first"):
        fastlora.inject(model, ["0"])
    assert "_fastlora" not in model.__dict__
    assert type(model[0]) is nn.Linear


def test_models_of_others() -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="model has PEFT's adapters already"):
        fastlora.inject(theirs, ["v_proj"])
    with pytest.raises(ValueError, match="model has PEFT's adapters, not fastlora's"):
        fastlora.set_adapter(theirs, "default")
    with pytest.raises(ValueError, match="wrapped in DataParallel, which would not know the new Parameters: call this"):
        fastlora.inject(torch.compile(nn.DataParallel(toy())), ["up"])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        fastlora.inject("llama", ["up"])


@pytest.mark.parametrize(
    "act",
    [
        fastlora.unload, fastlora.disable, fastlora.enable, fastlora.merge_adapter, fastlora.unmerge_adapter,
        fastlora.merge_and_unload, lambda m: fastlora.set_adapter(m, "default"),
        lambda m: fastlora.delete_adapter(m, "default"), fastlora.adapter_status,
    ],
)  # fmt: skip
def test_a_model_without_adapters(act: Callable[[nn.Module], Any]) -> None:
    model = toy()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model has no adapters: call fastlora\.inject or fastlora\.load_adapter"):
        act(model)
    assert untouched(model, before)


def test_unknown_names_and_switching_while_merged() -> None:
    model = two()
    for act in (fastlora.set_adapter, fastlora.delete_adapter):
        with pytest.raises(ValueError, match="adapter_name 'third' is unknown: the model has default, other"):
            act(model, "third")
    fastlora.merge_adapter(model)
    with pytest.raises(
        RuntimeError, match=r"adapter 'default' is merged into the base: call fastlora\.unmerge_adapter"
    ):
        fastlora.set_adapter(model, "other")


def test_mamba_reads_these_weights_itself() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = type("Config", (), {"model_type": "mamba"})()
            self.in_proj, self.out_proj = nn.Linear(4, 6), nn.Linear(6, 4)

    report = fastlora.inject(Mixer(), ["in_proj", "out_proj"])
    assert report.refused == {"out_proj": "Mamba reads its weight without calling it"}


def test_the_wrapped_model_is_reached_through_its_wrapper() -> None:
    model = adapted(toy(), ["up"])
    compiled = torch.compile(model, backend="eager")
    fastlora.set_adapter(compiled, None)
    assert torch.equal(run(model), run(toy()))
    assert fastlora.unload(compiled) is model


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/inject.md: its Python blocks one after the other, and what the first report prints."""
    page = (ROOT / "docs" / "inject.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for number, (language, block) in enumerate(blocks):
        if language == "python":
            capsys.readouterr()
            exec(compile(block, f"docs/inject.md, block {number}", "exec"), names)
        elif language == "text":
            assert capsys.readouterr().out == block
    assert sum(language == "python" for language, _ in blocks) >= 6
    peft.PeftModel.from_pretrained(names["build_model"](), tmp_path / "adapter")


def test_a_refusal_names_a_class_by_its_module_where_the_name_is_another_s_too() -> None:
    foreign = torch.ao.nn.qat.Linear(8, 4, qconfig=torch.ao.quantization.default_qat_qconfig)
    model = nn.Sequential(foreign, nn.Linear(4, 6))
    report = fastlora.inject(model, ["0", "1"])
    assert "torch.ao.nn.qat.modules.linear.Linear is a subclass" in report.refused["0"]
    with pytest.raises(TypeError, match=r"an nn.Linear itself, got torch\.ao\.nn\.qat\.modules\.linear\.Linear"):
        fastlora.LoRALinear.from_linear(foreign)
