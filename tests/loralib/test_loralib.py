"""fastlora.loralib beside the real loralib 0.1.2: one start, outputs, gradients, training, files; defects fixed."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora.loralib as ours
from fastlora import LoRALinear
from fastlora.accuracy import assert_close_to_oracle
from tests.cases import OpLog, gradient_of, upcoming_dropout

theirs = pytest.importorskip("loralib")

NAMES = (
    *("LoRALayer", "Linear", "MergedLinear", "Embedding", "ConvLoRA", "Conv1d", "Conv2d", "Conv3d"),
    *("mark_only_lora_as_trainable", "lora_state_dict"),
)


class Case(NamedTuple):
    """A layer that both packages can run, and an input for it."""

    name: str
    arguments: tuple[int, ...]
    options: dict[str, Any]
    shape: tuple[int, ...] = (5, 7, 48)

    def layer(self, package: ModuleType, seed: int = 1, **options: Any) -> Any:
        """As constructed."""
        torch.manual_seed(seed)
        return getattr(package, self.name)(*self.arguments, **(self.options | options))

    def trained(self, package: ModuleType, seed: int = 1, **options: Any) -> Any:
        """With an update that is not zero."""
        layer = self.layer(package, seed, **options)
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
        return layer

    def inputs(self, seed: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.name == "Embedding":
            return torch.randint(self.arguments[0], self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)


FULL = {"r": 6, "lora_alpha": 10}
QV = {"r": 4, "lora_alpha": 10, "enable_lora": [True, False, True]}
CASES = {
    "linear": Case("Linear", (48, 29), FULL),
    "linear_no_bias": Case("Linear", (48, 29), {**FULL, "bias": False}),
    "linear_turned": Case("Linear", (48, 29), {**FULL, "fan_in_fan_out": True}),
    "linear_1d": Case("Linear", (48, 29), FULL, shape=(48,)),
    "merged_qv": Case("MergedLinear", (48, 60), QV),
    "merged_qv_turned": Case("MergedLinear", (48, 60), {**QV, "fan_in_fan_out": True}),
    "merged_all": Case("MergedLinear", (48, 60), {**QV, "enable_lora": [True] * 4}),
    "merged_last": Case("MergedLinear", (48, 60), {**QV, "enable_lora": [False, False, True]}),
    "merged_one_block": Case("MergedLinear", (48, 29), {**QV, "enable_lora": [True]}),
    "embedding": Case("Embedding", (31, 20), FULL, shape=(5, 7)),
    "embedding_padded": Case("Embedding", (31, 20), {**FULL, "padding_idx": 3, "scale_grad_by_freq": True}, (40,)),
    "conv2d": Case("Conv2d", (6, 8, 3), {**FULL, "padding": 1}, shape=(2, 6, 9, 7)),
    "conv2d_groups": Case("Conv2d", (6, 8, 3), {**FULL, "groups": 2, "stride": 2, "bias": False}, (2, 6, 9, 7)),
}
PLAIN = {
    "linear": Case("Linear", (48, 29), {}),
    "linear_turned": Case("Linear", (48, 29), {"fan_in_fan_out": True}),
    "merged": Case("MergedLinear", (48, 60), {"enable_lora": [True, False, True]}),
    "embedding": Case("Embedding", (31, 20), {}, shape=(5, 7)),
    "conv2d": Case("Conv2d", (6, 8, 3), {}, shape=(2, 6, 9, 7)),
}
# Of one, two and three dimensions: loralib runs the second only.
CONVOLUTIONS = {
    "conv1d": Case("Conv1d", (6, 8, 3), {**FULL, "stride": 2}, shape=(2, 6, 9)),
    "conv1d_groups": Case(
        "Conv1d", (6, 8, 3), {**FULL, "groups": 2, "padding_mode": "circular", "padding": 1}, (2, 6, 9)
    ),
    "conv2d": CASES["conv2d"],
    "conv3d": Case("Conv3d", (6, 8, 3), FULL, shape=(2, 6, 5, 4, 6)),
    "conv3d_groups": Case("Conv3d", (6, 8, 3), {**FULL, "groups": 2}, shape=(2, 6, 5, 4, 6)),
}
EVERY = CASES | CONVOLUTIONS

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_case = pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)


def step(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """y and every gradient, dx included."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = layer(x)
    if y.requires_grad:  # not for a merged embedding
        y.backward(gradient_of(y.float()).to(y.dtype))
    found = {"y": y.detach()} | ({"x": x.grad} if x.requires_grad else {})
    return found | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}


def like(x: Tensor, layer: nn.Module) -> Tensor:
    return x.to(next(layer.parameters()).dtype) if x.is_floating_point() else x


def assert_same(actual: dict[str, Tensor], oracle: dict[str, Tensor], baseline: dict[str, Tensor]) -> None:
    assert set(actual) == set(oracle) == set(baseline)
    for name, tensor in actual.items():
        assert_close_to_oracle(tensor, oracle=oracle[name], baseline=baseline[name], name=name)


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def weight_of(layer: Any) -> Tensor:
    """The frozen weight."""
    return layer.conv.weight if isinstance(layer, ours.ConvLoRA) else layer.weight


# What is the same


def test_the_names_are_loralibs() -> None:
    own = {name for name, value in vars(theirs).items() if getattr(value, "__module__", "").startswith("loralib")}
    assert own == set(NAMES)
    assert set(ours.__all__) == set(NAMES)
    assert all(hasattr(ours, name) for name in NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"Conv1d", "Conv2d", "Conv3d"}])
def test_parameters_come_in_the_same_order_with_the_same_defaults(name: str) -> None:
    def parameters(package: ModuleType) -> list[tuple[str, Any]]:
        found = inspect.signature(getattr(package, name)).parameters.values()
        return [(p.name, list(p.default) if p.name == "enable_lora" else p.default) for p in found]

    assert parameters(ours) == parameters(theirs)


@pytest.mark.parametrize("name", [name for name in NAMES if "_" not in name and name != "LoRALayer"])
def test_layers_are_the_torch_classes_that_loralibs_are(name: str) -> None:
    def torch_classes(package: ModuleType) -> set[str]:
        return {c.__name__ for c in getattr(package, name).__mro__ if c.__module__.startswith("torch.nn")}

    assert torch_classes(ours) == torch_classes(theirs)
    assert issubclass(getattr(ours, name), ours.LoRALayer)


@pytest.mark.parametrize("case", [*CASES.values(), *PLAIN.values()], ids=[*CASES, *(f"{name}_r0" for name in PLAIN)])
def test_a_seed_gives_the_same_weights(case: Case) -> None:
    mine, other = case.layer(ours), case.layer(theirs)
    after = torch.rand(1)
    assert list(mine.state_dict()) == list(other.state_dict())
    for (name, a), (_, b) in zip(mine.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert (a.stride(), a.requires_grad) == (b.stride(), b.requires_grad), name
    case.layer(ours)
    assert torch.equal(torch.rand(1), after)  # as much of the generator is spent


@each_case
@pytest.mark.parametrize("mode", ["train", "eval", "eval_unmerged"])
def test_outputs_and_gradients_are_loralibs(case: Case, mode: str) -> None:
    options = {"merge_weights": mode != "eval_unmerged"}
    mine, other = case.trained(ours, **options), case.trained(theirs, **options)
    oracle = copy.deepcopy(other).double()
    for layer in (mine, other, oracle):
        layer.train(mode == "train")
        assert layer.merged == (mode == "eval")
    x = case.inputs()
    assert_same(step(mine, x), step(oracle, like(x, oracle)), step(other, x))


@each_case
def test_ten_optimiser_steps_end_where_loralibs_do(case: Case) -> None:
    mine, other = case.trained(ours), case.trained(theirs)
    oracle = copy.deepcopy(other).double()
    for layer in (mine, other, oracle):
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
        for i in range(10):
            x = like(case.inputs(seed=10 + i), layer)
            layer(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    before = dict(case.trained(ours).named_parameters())
    moved = {name for name, p in mine.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in mine.named_parameters() if p.requires_grad}
    assert_same(mine.state_dict(), oracle.state_dict(), other.state_dict())


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
def test_rank_0_is_a_plain_layer(case: Case) -> None:
    mine, other = case.layer(ours), case.layer(theirs)
    assert not [name for name in mine.state_dict() if "lora_" in name]
    assert all(p.requires_grad for p in mine.parameters())
    x = case.inputs()
    expected, found = step(other, x), step(mine, x)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert mine.eval().merged == (other.eval() or other).merged


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_helpers_choose_what_loralibs_choose(bias: str) -> None:
    def model(package: ModuleType) -> nn.Module:
        layers = [
            EVERY[name].layer(package) for name in ("linear", "merged_qv", "embedding", "conv2d", "linear_no_bias")
        ]
        return nn.Sequential(*layers, PLAIN["linear"].layer(package), nn.Linear(3, 4), nn.LayerNorm(4))

    mine, other = model(ours), model(theirs)
    for package, net in ((ours, mine), (theirs, other)):
        package.mark_only_lora_as_trainable(net, bias=bias)
    trainable = [name for name, p in mine.named_parameters() if p.requires_grad]
    assert trainable == [name for name, p in other.named_parameters() if p.requires_grad]
    state, expected = ours.lora_state_dict(mine, bias=bias), theirs.lora_state_dict(other, bias=bias)
    assert list(state) == list(expected)
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)


def test_an_unknown_bias_is_named_and_changes_nothing() -> None:
    model = nn.Sequential(CASES["linear"].layer(ours), nn.Linear(3, 4))
    for helper in (ours.mark_only_lora_as_trainable, ours.lora_state_dict):
        with pytest.raises(NotImplementedError, match="bias must be one of 'none', 'all', 'lora_only', got 'some'"):
            helper(model, bias="some")
    assert model[1].weight.requires_grad


def test_dense_update_of_a_merged_linear_is_loralibs() -> None:
    for name in ("merged_qv", "merged_qv_turned", "merged_all", "merged_last"):
        mine, other = CASES[name].trained(ours).merge_AB(), CASES[name].trained(theirs).merge_AB()
        assert mine.shape == other.shape
        torch.testing.assert_close(mine, other)


def test_a_layer_of_ones_own_may_mix_in_the_options() -> None:
    class Scaled(nn.Linear, ours.LoRALayer):
        def __init__(self) -> None:
            nn.Linear.__init__(self, 4, 3)
            ours.LoRALayer.__init__(self, r=2, lora_alpha=4, lora_dropout=0.5, merge_weights=True)
            self.merged = True

    layer = Scaled()
    assert (layer.r, layer.lora_alpha, layer.merged, layer.merge_weights) == (2, 4, True, True)
    assert layer.lora_dropout.p == 0.5
    ours.mark_only_lora_as_trainable(layer, bias="lora_only")
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)


# How it runs


def test_linear_layers_run_on_fastlora() -> None:
    for name in ("linear", "linear_turned", "merged_qv", "merged_qv_turned"):
        layer, x = CASES[name].trained(ours), CASES[name].inputs()
        with OpLog() as log:
            step(layer, x)
        assert log.count(["fastlora::lora_matmul", "fastlora::rank_grad"]) == {
            "fastlora::lora_matmul": 2,
            "fastlora::rank_grad": 2,
        }, name
        layer.eval()
        with OpLog() as log, torch.no_grad():
            layer(x.flatten(0, 1))
        assert [call for call, _, _ in log.calls if call not in {"aten::t", "aten::permute", "aten::view"}] == [
            "aten::addmm"
        ], name


def test_a_merged_linear_makes_no_dense_update() -> None:
    layer, x = CASES["merged_qv"].trained(ours), CASES["merged_qv"].inputs()
    with OpLog() as log:
        step(layer, x)
    results = (r for _, _, result in log.calls for r in (result if isinstance(result, tuple) else (result,)))
    assert (60, 48) not in {tuple(r.shape) for r in results if isinstance(r, Tensor)}


@pytest.mark.parametrize("name", ["linear_turned", "merged_qv", "embedding", "conv2d"])
def test_compiles_in_one_graph(name: str) -> None:
    layer, x = CASES[name].trained(ours), CASES[name].inputs()
    expected = step(layer, x)
    layer.zero_grad()
    found = step(torch.compile(layer, backend="aot_eager", fullgraph=True), x)
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key.removeprefix("_orig_mod.")])


def test_the_scale_is_read_at_every_call() -> None:
    layer, x = CASES["merged_qv"].trained(ours), CASES["merged_qv"].inputs()
    assert layer.scaling == 2.5
    base, once = F.linear(x, layer.weight, layer.bias), layer(x)
    layer.scaling = 5.0
    torch.testing.assert_close(layer(x) - base, 2 * (once - base))


# What is fixed


@every_case
def test_train_and_eval_return_the_layer(case: Case) -> None:
    layer = case.layer(ours)
    assert layer.eval() is layer
    assert layer.train() is layer


def test_enabling_no_block_is_a_plain_linear() -> None:
    plain = nn.Linear(48, 60)
    for options in ({}, {"enable_lora": [False, False, False]}):
        layer = ours.MergedLinear(48, 60, r=4, **options)
        assert set(layer.state_dict()) == {"weight", "bias"}
        assert layer.weight.requires_grad
        layer.load_state_dict(plain.state_dict())
        x = CASES["merged_qv"].inputs()
        for mode in (True, False, True):
            assert torch.equal(layer.train(mode)(x), plain(x))


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_layers_are_saved_whole_and_copied(case: Case, training: bool) -> None:
    layer, x = case.trained(ours).train(training), case.inputs()
    for twin in (through_a_file(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert (twin.training, twin.merged) == (training, not training)
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(weight_of(twin.train()), weight_of(case.trained(ours)))
        twin.load_state_dict(case.trained(ours, seed=2).state_dict())  # its hooks are its own
        assert torch.equal(twin(x), case.trained(ours, seed=2)(x))


@every_case
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
@pytest.mark.parametrize(("saved_in", "loaded_in"), list(itertools.product(["train", "eval"], repeat=2)))
def test_a_state_dict_means_the_same_in_either_mode(case: Case, saved_in: str, loaded_in: str, assign: bool) -> None:
    source, target = case.trained(ours, seed=1), case.trained(ours, seed=2)
    x = case.inputs()
    in_training, merged = source(x), copy.deepcopy(source).eval()(x)
    state = through_a_file(source.train(saved_in == "train").state_dict())
    assert not [name for name in state if "base" in name]
    target.train(loaded_in == "train")
    target.load_state_dict(state, assign=assign)
    assert target.merged == (loaded_in == "eval")
    assert torch.equal(target.eval()(x), merged)
    assert torch.equal(target.train()(x), in_training)
    torch.testing.assert_close(merged, in_training, rtol=1e-4, atol=1e-5)


@every_case
def test_a_failed_load_leaves_the_layer_as_it_was(case: Case) -> None:
    layer, x = case.trained(ours).eval(), case.inputs()
    expected = layer(x)
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({name: tensor[..., :-1] for name, tensor in layer.state_dict().items()})
    assert layer.merged
    assert torch.equal(layer(x), expected)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_unmerging_restores_every_bit(case: Case, dtype: torch.dtype) -> None:
    layer = case.trained(ours).to(dtype)
    base = weight_of(layer).detach().clone()
    for _ in range(5):
        layer.eval()
        assert not torch.equal(weight_of(layer), base)
        layer.train()
        assert torch.equal(weight_of(layer), base)


@every_case
def test_merging_rounds_once(case: Case) -> None:
    layer = case.trained(ours).to(torch.bfloat16)
    wide = copy.deepcopy(layer).double().eval()
    layer.eval()
    exact = copy.deepcopy(weight_of(wide)).detach()
    assert_close_to_oracle(weight_of(layer), oracle=exact, baseline=exact.to(torch.bfloat16), name="merged weight")


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_of_every_dimension_add_a_low_rank_update(case: Case) -> None:
    layer, x = case.trained(ours), case.inputs()
    k, groups, dimensions = 3, layer.conv.groups, len(case.shape) - 2
    assert layer.lora_A.shape == (6 * k, 6 * k)
    assert layer.lora_B.shape == (8 // groups * k ** (dimensions - 1), 6 * k)
    plain = copy.deepcopy(layer.conv)
    with torch.no_grad():
        plain.weight += 10 / 6 * (layer.lora_B @ layer.lora_A).view_as(plain.weight)
    expected = plain(x)
    assert (layer(x) - layer.conv(x)).abs().max() > 0.1
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert torch.autograd.gradcheck(layer.train().double(), x.double().requires_grad_())


def test_a_reset_forgets_the_update() -> None:
    for name in ("linear", "linear_turned", "merged_qv", "embedding", "conv2d"):
        case = EVERY[name]
        layer = case.trained(ours).eval()
        layer.reset_parameters()
        assert not layer.merged
        update = layer.lora_A if name == "embedding" else layer.lora_B
        assert update.eq(0).all()
        assert torch.equal(layer.state_dict()[next(iter(layer.state_dict()))], weight_of(layer)) or name == "conv2d"
        assert torch.equal(layer.eval().train()(case.inputs()), layer.train()(case.inputs()))


def test_a_turned_layer_is_reset_over_its_own_fan_in() -> None:
    for options in ({"r": 6}, {}):
        layer = ours.Linear(4000, 3, fan_in_fan_out=True, **options)
        layer.reset_parameters()
        assert layer.weight.shape == (4000, 3)
        assert 0.9 / 4000**0.5 < layer.weight.abs().max() <= 1 / 4000**0.5


def test_the_look_up_in_a_honours_max_norm_as_loralib_does() -> None:
    case = CASES["embedding"]
    mine, other = (step(case.trained(package, max_norm=0.5), case.inputs()) for package in (ours, theirs))
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name])


def test_a_sparse_embedding_trains() -> None:
    case = CASES["embedding"]
    sparse, dense = (step(case.trained(ours, sparse=sparse), case.inputs()) for sparse in (True, False))
    assert all(torch.equal(sparse[name], dense[name]) for name in dense)


def test_given_rows_of_an_embedding_are_kept() -> None:
    rows = torch.randn(5, 3)
    assert torch.equal(ours.Embedding.from_pretrained(rows.clone()).weight, rows)


def test_where_the_weight_cannot_hold_the_sum_the_layer_stays_unmerged() -> None:
    layer, x = CASES["linear"].trained(ours), CASES["linear"].inputs()
    torch.nn.utils.parametrizations.weight_norm(layer, "weight")
    expected = layer(x)
    assert not layer.eval().merged
    assert torch.equal(layer(x), expected)


# Dropout


@pytest.mark.parametrize("name", ["linear", "linear_turned", "merged_qv"])
def test_dropout_is_on_the_adapters_input_alone_and_in_every_gradient(name: str) -> None:
    case = CASES[name]
    layer, x = case.trained(ours, lora_dropout=0.4).double(), case.inputs().double().requires_grad_()
    base, update = layer._weight_nk.detach(), layer._b().detach() @ layer.lora_A.detach()
    dropout = upcoming_dropout(0.4)
    y = layer(x)
    dropped = x.detach().flatten(0, 1) * dropout.keep(35, 48) * dropout.rescale
    expected = F.linear(x, base, layer.bias).flatten(0, 1) + layer.scaling * dropped @ update.T
    torch.testing.assert_close(y.flatten(0, 1), expected)
    # y is linear in A, in B, and but for the bias in x: what a gradient must pair to, given the same mask.
    dy = gradient_of(y)
    y.backward(dy)
    paired = (dy * (y - F.linear(x, base, layer.bias))).sum()
    torch.testing.assert_close((layer.lora_A.grad * layer.lora_A).sum(), paired)
    torch.testing.assert_close((layer.lora_B.grad * layer.lora_B).sum(), paired)
    torch.testing.assert_close((x.grad * x).sum(), (dy * (y - layer.bias)).sum())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_drop_as_often_as_asked(p: float) -> None:
    layer = ours.Linear(64, 64, r=64, lora_alpha=32, lora_dropout=p, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(64))
        layer.lora_B.copy_(torch.eye(64))
    x = torch.randn(2000, 64)
    first, second = layer(x), layer(x)
    for y in (first, second):
        kept = y != 0
        assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / x.numel()) ** 0.5
        torch.testing.assert_close(y[kept], 0.5 * x[kept] / (1 - p), rtol=1e-4, atol=0)
    both = ((first != 0) & (second != 0)).double().mean().item()
    assert abs(both - (1 - p) ** 2) < 5 * (0.25 / x.numel()) ** 0.5  # two calls, two masks


def test_dropout_obeys_the_mode_the_seed_and_its_own_p() -> None:
    for name in ("linear", "merged_qv", "conv2d"):
        case = EVERY[name]
        layer, x = case.trained(ours, lora_dropout=0.4, merge_weights=False), case.inputs()
        torch.manual_seed(5)
        first = layer(x)
        assert not torch.equal(layer(x), first)
        torch.manual_seed(5)
        assert torch.equal(layer(x), first)
        still = layer.eval()(x)
        assert torch.equal(layer(x), still)
        layer.train().lora_dropout.p = 0.0
        torch.testing.assert_close(layer(x), still)


@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d"])
def test_a_convolution_honours_dropout_on_its_update(name: str) -> None:
    case = CONVOLUTIONS[name]
    layer, x = case.trained(ours, lora_dropout=0.4).double(), case.inputs().double()
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    update = copy.deepcopy(layer.conv)
    with torch.no_grad():
        update.weight.copy_(10 / 6 * (layer.lora_B @ layer.lora_A).view_as(update.weight))
        update.bias.zero_()
    torch.manual_seed(5)
    torch.testing.assert_close(layer(x), layer.conv(x) + update(dropped))


def test_a_foreign_dropout_module_is_refused_in_words() -> None:
    layer = CASES["linear"].trained(ours)
    layer.lora_dropout = nn.AlphaDropout(0.1)
    with pytest.raises(TypeError, match="lora_dropout is AlphaDropout: expected the nn"):
        layer(CASES["linear"].inputs())


# Checkpoints in loralib's format


class Attention(nn.Module):
    """The layers of the released checkpoints: GPT-2's joint projection, RoBERTa's and DeBERTa's separate ones."""

    def __init__(self, lora: ModuleType) -> None:
        super().__init__()
        self.embedding = lora.Embedding(31, 48, r=3, lora_alpha=6)
        self.c_attn = lora.MergedLinear(
            48, 144, r=4, lora_alpha=32, enable_lora=[True, False, True], fan_in_fan_out=True, merge_weights=False
        )
        self.query = lora.Linear(48, 24, r=8, lora_alpha=16)
        self.value = lora.Linear(48, 24, r=8, lora_alpha=16)
        self.out = nn.Linear(24, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.c_attn(self.embedding(tokens)).chunk(3, dim=-1)
        x = F.scaled_dot_product_attention(q, k, v)
        y: Tensor = self.out(torch.tanh(self.query(x)) * self.value(x))
        return y


@pytest.fixture
def released(tmp_path: Path) -> tuple[Any, Path, Path]:
    """A model as loralib trained it, with its files: the pretrained base, and the adapters alone."""
    torch.manual_seed(11)
    model = Attention(theirs)
    theirs.mark_only_lora_as_trainable(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    base = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    torch.save(base, tmp_path / "base.pt")
    torch.save(theirs.lora_state_dict(model), tmp_path / "lora.pt")
    return model, tmp_path / "base.pt", tmp_path / "lora.pt"


@pytest.mark.parametrize("loaded_in", ["train", "eval"])
def test_a_loralib_checkpoint_loads(released: tuple[Any, Path, Path], loaded_in: str) -> None:
    other, base, adapters = released
    torch.manual_seed(12)
    mine = Attention(ours).train(loaded_in == "train")
    ours.mark_only_lora_as_trainable(mine)
    first = mine.load_state_dict(torch.load(base), strict=False)
    second = mine.load_state_dict(torch.load(adapters), strict=False)
    assert first.unexpected_keys == second.unexpected_keys == []
    assert all("lora_" in name for name in first.missing_keys)
    assert not any("lora_" in name for name in second.missing_keys)
    tokens = torch.randint(31, (3, 6))
    # In float64, where the two agree whatever the CPU: what float32 loses on the way through a model is chance.
    for mode in (True, False):
        found, expected = (step(model.train(mode).double(), tokens) for model in (mine, other))
        assert set(found) == set(expected)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-11, msg=f"{name}, train({mode})")
        mine.zero_grad()
        other.zero_grad()


def test_loralib_loads_ours(released: tuple[Any, Path, Path], tmp_path: Path) -> None:
    other, base, _ = released
    mine = Attention(ours)
    mine.load_state_dict(torch.load(base), strict=False)
    for name, parameter in mine.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    torch.save(ours.lora_state_dict(mine.eval()), tmp_path / "ours.pt")
    other.load_state_dict(torch.load(tmp_path / "ours.pt"), strict=False)
    tokens = torch.randint(31, (3, 6))
    torch.testing.assert_close(mine.train()(tokens), other(tokens))


def test_a_whole_state_dict_goes_both_ways_strictly(released: tuple[Any, Path, Path]) -> None:
    other, mine = released[0], Attention(ours)
    mine.load_state_dict(other.state_dict())
    other.load_state_dict(mine.eval().state_dict())


# Bad input


@pytest.mark.parametrize(
    ("make", "exception", "message"),
    [
        (lambda: ours.Linear(4, 3, r=-1), ValueError, "r must be at least 0, got -1"),
        (lambda: ours.Linear(4, 3, r=2, lora_dropout=1.0), ValueError, r"lora_dropout must be .* got 1\.0"),
        (
            lambda: ours.MergedLinear(4, 5, r=2, enable_lora=[True, False]),
            ValueError,
            "enable_lora has 2 entries.*the 5",
        ),
        (lambda: ours.MergedLinear(4, 5, r=2, enable_lora=[]), ValueError, "enable_lora has 0 entries"),
        (
            lambda: ours.MergedLinear(4, 5, r=2, enable_lora=True),
            TypeError,
            "enable_lora must be a list of bools, one for each block, got True",
        ),
        (lambda: ours.MergedLinear(4, 6, r=2, enable_lora="qkv"), TypeError, "enable_lora must be .*, got 'qkv'"),
        (lambda: ours.Conv2d(4, 5, (3, 3), r=2), TypeError, r"kernel_size must be an int.*got \(3, 3\)"),
    ],
    ids=["rank", "dropout", "blocks", "no_blocks", "no_list", "a_string", "kernel_size"],
)
def test_constructors_name_the_bad_argument(
    make: Callable[[], nn.Module], exception: type[Exception], message: str
) -> None:
    with pytest.raises(exception, match=message):
        make()


def test_prints_what_it_is() -> None:
    expected = "in_features=48, out_features=60, bias=True, r=4, lora_alpha=10, fan_in_fan_out=True"
    printed = str(CASES["merged_qv_turned"].layer(ours))
    assert printed == f"MergedLinear({expected}, enable_lora=[True, False, True])"
    assert str(LoRALinear(4, 3)).startswith("LoRALinear(")


# The page for loralib's users


def test_the_pages_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "loralib.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, "docs/loralib.md", "exec"), names)
    assert isinstance(names["model"].c_proj, ours.Linear)
