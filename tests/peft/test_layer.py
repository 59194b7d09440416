"""PEFT's LoRA layers on fastlora: what runs on it is right, and everything else is PEFT's own forward, bit for bit.

Held by the rows of docs/peft.md: each has a test here, and a test that the two agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, distribute_tensor

pytest.importorskip("peft")

from peft.tuners import lora
from torch.nn.utils import parametrizations, weight_norm

import fastlora
from fastlora.peft import Calls, count_calls
from tests.cases import Operands, assert_matches_reference, gradient_of, upcoming_dropout
from tests.peft.peft_models import (
    adapted,
    add_adapter,
    assert_as_good_as,
    assert_same_bits,
    config,
    first,
    step,
    tokens,
    wake,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set", "ignore:.*weight_norm. is deprecated", "ignore:.torch.jit.trace"
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def layer_step(
    layer: Any, x: Tensor, autocast: torch.dtype | None = None
) -> tuple[dict[str, Tensor], Operands, Tensor]:
    """One step of a patched layer, the operands that it had and the incoming gradient."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = layer(x)
    dy = gradient_of(y)
    y.backward(dy)
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = base.weight if type(base) is nn.Linear else base.weight.T
    dtype = autocast or x.dtype
    bias = None if base.bias is None else base.bias.detach().to(dtype)
    operands = Operands(x.detach().to(dtype), weight.detach().to(dtype), a, b, bias)
    return {"y": y, "x": x.grad.to(dtype), "lora_a": a.grad, "lora_b": b.grad}, operands, dy


# On the fast path.

FAST: dict[str, dict[str, Any]] = {
    "plain": {},
    "no base bias": {"bias": False},
    "dropout": {"lora_dropout": 0.3},
    "rsLoRA": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"first": 3}, "alpha_pattern": {"first": 7}},
    "Conv1D": {"conv1d": True},
    "Conv1D, dropout": {"conv1d": True, "lora_dropout": 0.3},
    "bf16": {"dtype": BF16, "autocast_adapter_dtype": False},
    "fp16": {"dtype": FP16, "autocast_adapter_dtype": False},
    "bf16 base, fp32 adapters": {"dtype": BF16},
    "bf16 base, fp32 adapters, dropout": {"dtype": BF16, "lora_dropout": 0.3},
    "fp16 base, fp32 adapters": {"dtype": FP16},
    "Conv1D, bf16 base, fp32 adapters": {"dtype": BF16, "conv1d": True},
    "float64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("case", FAST)
def test_fast_path(case: str) -> None:
    options = FAST[case]
    model = adapted("first", **options)
    layer = first(model)
    assert fastlora.patch_peft(model).patched == ("base_model.model.first",)
    dropout = upcoming_dropout(options.get("lora_dropout", 0))
    with count_calls() as calls:
        actual, operands, dy = layer_step(layer, tokens(dtype=options.get("dtype", FP32)))
    assert (calls.fast.total(), calls.fallback.total()) == (1, 0)
    assert_matches_reference(actual, operands, dy, scale=layer.scaling["default"], dropout=dropout)


@pytest.mark.parametrize("base", [FP32, BF16], ids=["fp32 base", "bf16 base"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast(base: torch.dtype, dtype: torch.dtype, p: float) -> None:
    """PEFT's autocast rounds float32 adapters to the dtype in which the layer runs, and so does the fast path."""
    model = adapted("first", dtype=base, lora_dropout=p)
    fastlora.patch_peft(model, strict_dtype=True)
    dropout = upcoming_dropout(p)
    with count_calls() as calls:
        actual, operands, dy = layer_step(first(model), tokens(dtype=base), autocast=dtype)
    assert (calls.fast.total(), calls.fallback.total(), actual["y"].dtype) == (1, 0, dtype)
    if base is BF16 and dtype is FP16:
        del actual["x"]  # dx leaves in the dtype of x, which is coarser than what autocast computes in
    assert_matches_reference(actual, operands, dy, scale=10 / 6, dropout=dropout)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv1d": True},
        {"use_rslora": True},
        {"rank_pattern": {"first": 3}},
        {"bias": False},
        {"bias_trains": True},
    ],
    ids=str,
)
def test_whole_model_against_peft_in_float64(options: dict[str, Any]) -> None:
    model = adapted(**options)
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    with count_calls() as calls:
        actual = step(model, tokens(16, 9))
    assert (calls.fast.total(), calls.fallback.total()) == (2, 0)
    assert_as_good_as(actual, reference, tokens(16, 9))


@pytest.mark.parametrize("shape", [(9,), (), (2, 3, 4), (0,), (0, 3)], ids=str)
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    model = adapted()
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    x = tokens(*shape) if shape else tokens(1)[0]
    with count_calls() as calls:
        actual = step(model, x)
    assert (calls.fast.total(), calls.fallback.total()) == (2, 0)
    assert_as_good_as(actual, reference, x)


def test_eval_switches_dropout_off() -> None:
    model = adapted(lora_dropout=0.4)
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    with count_calls() as calls:
        assert_as_good_as(step(model.eval(), tokens()), reference.eval(), tokens())
    assert (calls.fast.total(), calls.fallback.total()) == (2, 0)


@pytest.mark.parametrize("alpha", [9, 25], ids=["one scaling", "two scalings"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_several_active_adapters_are_one_product(alpha: int, dtype: torch.dtype) -> None:
    model = adapted(r=2, lora_alpha=3, lora_dropout=0.2, dtype=dtype, autocast_adapter_dtype=False)
    add_adapter(model, "other", config(r=6, lora_alpha=alpha))
    model.base_model.set_adapter(["default", "other"])
    wake(model)
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    x = tokens(dtype=dtype)
    with count_calls() as calls:
        actual = step(model.eval(), x)
    assert (calls.fast.total(), calls.fallback.total()) == (2, 0)
    assert_as_good_as(actual, reference.eval(), x)
    with count_calls() as calls:
        assert_same_bits(step(model.train(), x), step(reference.train(), x))
    assert calls.fast.total() == 0
    assert "a mask of its own" in str(calls)


def test_a_trainable_base_is_right_and_said() -> None:
    model = adapted()
    first(model).base_layer.weight.requires_grad_()
    reference = copy.deepcopy(model)
    with pytest.warns(
        UserWarning, match=r"1 patched layers have a trainable base weight .*first.*requires_grad_\(False"
    ):
        report = fastlora.patch_peft(model)
    assert report.trainable_base == ("base_model.model.first",)
    with count_calls() as calls:
        actual = step(model, tokens())
    assert (calls.fast.total(), calls.fallback.total()) == (2, 0)
    assert "base_model.model.first.base_layer.weight" in actual
    assert_as_good_as(actual, reference, tokens())


def test_scaling_is_read_in_every_call() -> None:
    model = adapted()
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    for each in (model, reference):
        first(each).set_scale("default", 3)
        first(each).scale_layer(0.7)
    assert_as_good_as(step(model, tokens()), reference, tokens())


# Falls back.


def hooked(submodule: str, kind: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = getattr(first(model), submodule)
        module = module["default"] if isinstance(module, nn.ModuleDict) else module
        if kind == "forward":
            plain = module.forward
            module.forward = lambda x: 1.5 * plain(x)
        elif kind == "forward_hook":
            module.register_forward_hook(lambda module, args, y: 1.5 * y)
        elif kind == "forward_pre_hook":
            module.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
        elif kind == "full_backward_hook":
            module.register_full_backward_hook(lambda module, dx, dy: tuple(None if g is None else 1.5 * g for g in dx))
        else:
            module.register_full_backward_pre_hook(lambda module, dy: tuple(1.5 * g for g in dy))

    return change


class Subclassed(nn.Linear):
    """What a quantised layer looks like to PEFT: a subclass whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round(decimals=1)


class WeightSubclass(Tensor):
    """What torchao's quantised weights and DTensors are: a subclass of Tensor."""


def set_weight(of: str, make: Callable[[Tensor], Any]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = getattr(first(model), of)
        module = module["default"] if isinstance(module, nn.ModuleDict) else module
        weight = module.weight
        del module.weight
        module.weight = make(weight)

    return change


def zero3(weight: Tensor) -> nn.Parameter:
    weight = nn.Parameter(weight.detach(), weight.requires_grad)
    weight.ds_id = 7  # type: ignore[attr-defined]
    return weight


def second_adapter(**options: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.add_adapter("other", config("first", "second", **options))
        model.set_adapter("other")
        wake(model)

    return change


def of_first(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda model: change(first(model))


def tensor_scaling(model: Any) -> None:
    first(model).scaling["default"] = torch.tensor(0.9)


def cast_off(layer: Any) -> None:
    layer.cast_input_dtype_enabled = False


# name → (what changes the patched model, the reason, options of the model)
FALLBACK: dict[str, tuple[Callable[[Any], Any], str, dict[str, Any]]] = {
    "merged": (lambda model: model.merge_adapter(), "merged into the base", {}),
    "disabled": (of_first(lambda layer: layer.enable_adapters(False)), "adapters are disabled", {}),
    "merged, then disabled": (
        lambda model: (model.merge_adapter(), first(model).enable_adapters(False)),
        "adapters are disabled",
        {},
    ),
    "no active adapter here": (
        lambda model: (model.add_adapter("other", config("second")), model.set_adapter("other"), wake(model)),
        "none of the active adapters",
        {},
    ),
    "tensor-valued scaling": (tensor_scaling, "scaling is a Tensor", {}),
    "dropout of everything": (
        of_first(lambda layer: setattr(layer.lora_dropout["default"], "p", 1.0)),
        "drops everything",
        {"lora_dropout": 0.2},
    ),
    "another dropout": (
        of_first(lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.2)})),
        "dropout is a AlphaDropout",
        {},
    ),
    "disable_input_dtype_casting": (of_first(cast_off), "disable_input_dtype_casting", {}),
    "parametrised base": (
        of_first(lambda layer: parametrizations.orthogonal(layer.base_layer)),
        "base_layer is a ParametrizedLinear",
        {},
    ),
    "parametrised adapter": (
        of_first(lambda layer: parametrizations.weight_norm(layer.lora_A["default"])),
        "lora_A has hooks, a forward or a class of its own",
        {},
    ),
    "weight_norm of old": (of_first(lambda layer: weight_norm(layer.base_layer)), "base_layer has hooks", {}),
    "base swapped for a quantised one": (
        of_first(lambda layer: setattr(layer.base_layer, "__class__", Subclassed)),
        "base_layer is a Subclassed",
        {},
    ),
    "base weight of a subclass": (
        set_weight("base_layer", lambda w: nn.Parameter(w.detach().as_subclass(WeightSubclass), False)),
        "a weight of base_layer is a WeightSubclass",
        {},
    ),
    "adapter weight that is no Parameter": (
        set_weight("lora_A", lambda w: w.detach().clone()),
        "the weight of lora_A is no Parameter",
        {},
    ),
    "sparse base weight": (
        set_weight("base_layer", lambda w: nn.Parameter(w.detach().to_sparse_csr(), False)),
        "not a plain dense Parameter",
        {},
    ),
    "ZeRO-3 base": (set_weight("base_layer", zero3), "base_layer is partitioned by DeepSpeed's ZeRO-3", {}),
    "ZeRO-3 adapter": (set_weight("lora_B", zero3), "lora_B is partitioned by DeepSpeed's ZeRO-3", {}),
    "adapters narrower than the base": (
        of_first(lambda layer: (layer.lora_A.to(BF16), layer.lora_B.to(BF16))),
        "lora_A is bfloat16 on a float32 base",
        {},
    ),
} | {
    f"{kind} on {submodule}": (hooked(submodule, kind), f"{submodule} has hooks", {"lora_dropout": 0.2})
    for submodule in ("base_layer", "lora_A", "lora_B", "lora_dropout")
    for kind in ("forward", "forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:Already unmerged")
@pytest.mark.parametrize("case", FALLBACK)
def test_falls_back_to_peft_bit_for_bit(case: str) -> None:
    """The state comes after patching, so that the call itself must notice it."""
    change, reason, options = FALLBACK[case]
    model = adapted(**options)
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    with count_calls() as before:
        step(model, tokens())
    assert (before.fast.total(), before.fallback.total()) == (2, 0)

    # The second layer has said its part: alone, the first must give PEFT's bits.
    model.base_model.model.second.__class__ = lora.Linear
    for each in (model, reference):
        torch.manual_seed(11)
        change(each)
    with count_calls() as calls:
        actual = step(model, tokens())
    assert calls.fast.total() == 0
    ((name, said),) = calls.fallback
    assert name == "base_model.model.first"
    assert reason in said
    assert_same_bits(actual, step(reference, tokens()))


def patched_pair(**options: Any) -> tuple[Any, Any]:
    """A patched model, of whose layers only the first is patched, and its unpatched copy."""
    model = adapted("first", **options)
    reference = copy.deepcopy(model)
    fastlora.patch_peft(model)
    return model, reference


def assert_fell_back(calls: Calls, reason: str) -> None:
    assert calls.fast.total() == 0
    ((_, said),) = calls.fallback
    assert reason in said


def test_mixed_batch_falls_back() -> None:
    model, reference = patched_pair()
    for each in (model, reference):
        each.add_adapter("other", config("first", r=3))
        each.eval()
    first(model).lora_B["other"].weight.data.fill_(0.3)
    first(reference).lora_B["other"].weight.data.fill_(0.3)
    first(model).lora_A["other"].load_state_dict(first(reference).lora_A["other"].state_dict())
    names = ["default", "other", "__base__"]
    with count_calls() as calls:
        actual = step(model, tokens(3, 7), adapter_names=names)
    assert_fell_back(calls, "adapter_names")
    assert_same_bits(actual, step(reference, tokens(3, 7), adapter_names=names))


def test_strict_dtype_keeps_peft_float32_branch() -> None:
    model = adapted("first", dtype=BF16)
    reference, default = copy.deepcopy(model), copy.deepcopy(model)
    fastlora.patch_peft(model, strict_dtype=True)
    fastlora.patch_peft(default)
    x = tokens(dtype=BF16)
    with count_calls() as calls:
        strict = step(model, x)
    assert_fell_back(calls, "strict_dtype")
    assert_same_bits(strict, step(reference, x))
    assert not torch.equal(step(default, x)["y"], strict["y"])


def test_dropout_in_place_falls_back() -> None:
    model, reference = patched_pair()
    for each in (model, reference):
        first(each).lora_dropout["default"] = nn.Dropout(0.3, inplace=True)
    with torch.no_grad(), count_calls() as calls:
        torch.manual_seed(5)
        y = model(tokens())
    assert_fell_back(calls, "in place")
    with torch.no_grad():
        torch.manual_seed(5)
        assert torch.equal(y, reference(tokens()))


def test_what_surrounds_a_call_falls_back() -> None:
    """torch.func, forward-mode AD, torch.jit.trace, functional_call, a global hook: each works as without fastlora."""
    model, reference = patched_pair()
    x, v = tokens(), tokens(seed=9)
    cases: dict[str, Callable[[Any], Tensor]] = {
        "torch.func": lambda m: torch.func.vmap(m)(x),
        "torch.func ": lambda m: torch.func.jvp(m, (x,), (v,))[1],
        "is a Tensor, not a plain": lambda m: torch.func.functional_call(
            m, {k: t.detach() for k, t in m.named_parameters()}, x
        ),
        "torch.jit.trace": lambda m: torch.jit.trace(m, x, check_trace=False)(x),
    }
    for reason, run in cases.items():
        with count_calls() as calls:
            actual = run(model)
        assert_fell_back(calls, reason.strip())
        assert torch.equal(actual, run(reference)), reason

    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    with handle, count_calls() as calls:
        model(x)
    assert_fell_back(calls, "global module hook")
    assert seen.count("Linear") == 4


def test_meta_inputs_fall_back() -> None:
    model, _ = patched_pair()
    with count_calls() as calls:
        y = model.to("meta")(tokens().to("meta"))
    assert_fell_back(calls, "no plain dense tensor")
    assert y.shape == (5, 7, 20)


def test_peft_reports_wrong_dtypes_itself() -> None:
    model, reference = patched_pair()
    x = tokens(dtype=BF16)
    with pytest.raises(RuntimeError) as theirs:
        reference(x)
    with count_calls() as calls, pytest.raises(RuntimeError) as ours:
        model(x)
    assert str(ours.value) == str(theirs.value)
    assert_fell_back(calls, "x is bfloat16 and base_layer float32")


def test_dtensor_falls_back() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model, reference = patched_pair(bias=False)
        for each in (model, reference):
            for parent in [module for module in each.modules() if isinstance(module, nn.Linear)]:
                for name, parameter in list(parent.named_parameters(recurse=False)):
                    sharded = distribute_tensor(parameter.data, mesh, [Replicate()])
                    setattr(parent, name, nn.Parameter(sharded, parameter.requires_grad))
        x = distribute_tensor(tokens(), mesh, [Replicate()])
        with count_calls() as calls:
            y = model(x)
        assert_fell_back(calls, "a weight of base_layer is a DTensor")
        assert torch.equal(y.full_tensor(), reference(x).full_tensor())
    finally:
        dist.destroy_process_group()
