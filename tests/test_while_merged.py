"""``fastlora.merged``: in the block every layer is plain and holds its sum; then every base is back, to the bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import LoRALinear, loralib, mergeable
from fastlora.accuracy import assert_close_to_oracle
from tests.adapters.tiny_models import adapted, fill, llama, toy
from tests.test_mergeable import LAYERS, inputs, weight_of
from tests.test_mergeable import made as made_layer

each_keep = pytest.mark.parametrize("keep", ["device", "cpu"])
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def made(name: str) -> nn.Sequential:
    return nn.Sequential(made_layer(name))


def mixed() -> nn.ModuleDict:
    """Layers of several kinds, with a plain one between them."""
    model = nn.ModuleDict({"in": nn.Linear(24, 20), "plain": nn.Linear(20, 24), "norm": nn.LayerNorm(24)})
    fastlora.inject(model, ["in"], r=3, lora_alpha=7)
    model["loralib"] = loralib.Linear(24, 20, r=3, lora_alpha=7, merge_weights=False)
    model["unadapted"] = loralib.Linear(20, 24, r=0)
    model["module"] = LoRALinear(24, 20, r=3, lora_alpha=7)
    fill(model)
    return model


def run_mixed(model: nn.ModuleDict, x: Tensor) -> Tensor:
    x = model["norm"](model["plain"](model["in"](x)))
    return model["module"](model["unadapted"](model["loralib"](x)))


class Snapshot:
    """The values, objects and addresses of all parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.objects = dict(model.named_parameters())
        self.bits = {name: self.of(p) for name, p in self.objects.items()}
        self.addresses = {name: p.data_ptr() for name, p in self.objects.items()}

    @staticmethod
    def of(parameter: Tensor) -> Tensor:
        return parameter.detach().clone().contiguous().view(torch.uint8)

    def changed(self) -> set[str]:
        return {name for name, p in self.model.named_parameters() if not torch.equal(self.bits[name], self.of(p))}

    def moved(self) -> set[str]:
        return {name for name, p in self.model.named_parameters() if self.addresses[name] != p.data_ptr()}

    def check(self) -> None:
        """All as it was, in the same objects and the same memory."""
        now = dict(self.model.named_parameters())
        assert now.keys() == self.objects.keys()
        assert all(now[name] is p for name, p in self.objects.items())
        assert self.changed() == self.moved() == set()


@each_keep
@each_dtype
@pytest.mark.parametrize("name", LAYERS)
def test_in_the_block_a_layer_is_plain_and_afterwards_what_it_was(name: str, dtype: torch.dtype, keep: Any) -> None:
    model = made(name).to(dtype)
    x = inputs(name)
    x = x.to(dtype) if x.is_floating_point() else x
    before, twin, oracle = Snapshot(model), copy.deepcopy(model), copy.deepcopy(model).double()
    with torch.no_grad():
        unmerged = model(x)
        expected = nn.Sequential(twin[0].merge())(x)
        with fastlora.merged(model, keep=keep):
            y = model(x)
            assert model[0].merged
            (changed,) = before.changed()
            assert before.moved() == ({changed} if keep == "device" else set())
            assert torch.equal(weight_of(model[0]), weight_of(twin[0]))
        assert not model[0].merged
        before.check()
        assert torch.equal(y, expected)
        exact = oracle(x.double() if x.is_floating_point() else x)
        assert_close_to_oracle(y, oracle=exact, baseline=unmerged, name="y")
        assert torch.equal(model(x), unmerged)


class Products(TorchDispatchMode):
    """Counts the products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


@each_keep
def test_a_model_of_all_kinds(keep: Any) -> None:
    model, x = mixed(), torch.randn(7, 24)
    before = Snapshot(model)
    with torch.no_grad():
        unmerged, exact = run_mixed(model, x), run_mixed(copy.deepcopy(model).double(), x.double())
        with fastlora.merged(model, keep=keep), Products() as products:
            y = run_mixed(model, x)
    assert products.count == 5
    assert_close_to_oracle(y, oracle=exact, baseline=unmerged, name="y")
    before.check()


@each_keep
def test_an_exception_in_the_block_puts_all_back(keep: Any) -> None:
    model = mixed()
    before = Snapshot(model)

    def fails() -> None:
        assert before.changed() == {"in.weight", "loralib.weight", "module.weight"}
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), fastlora.merged(model, keep=keep):
        fails()
    before.check()


@each_keep
@pytest.mark.parametrize("where", ["folded", "set_aside", "fill"])
def test_a_failure_in_the_middle_of_merging_puts_all_back(
    where: str, keep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixed()
    before, calls = Snapshot(model), []
    real = getattr(mergeable, where)

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return real(*args)

    monkeypatch.setattr(mergeable, where, failing)
    with pytest.raises(torch.OutOfMemoryError), fastlora.merged(model, keep=keep):
        raise AssertionError("the block ran")
    before.check()
    assert not any(getattr(layer, "merged", False) for layer in model.values())


@each_keep
def test_an_adapter_that_is_not_finite_is_named_and_changes_nothing(keep: Any) -> None:
    model = mixed()
    with torch.no_grad():
        model["module"].lora_A[1, 2] = float("nan")
    before = Snapshot(model)
    with (
        pytest.raises(ValueError, match=r"the weight of module merged is not finite in float32"),
        fastlora.merged(model, keep=keep),
    ):
        raise AssertionError("the block ran")
    before.check()


def test_with_cpu_one_sum_at_a_time_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive, sums = mixed(), [], []
    real = mergeable.folded

    def watched(*args: Any) -> Tensor:
        alive.append(sum(each() is not None for each in sums))
        total = real(*args)
        sums.append(ref(total))
        return total

    monkeypatch.setattr(mergeable, "folded", watched)
    with fastlora.merged(model, keep="cpu"):
        assert alive == [0, 0, 0]
        assert all(each() is None for each in sums)


@each_keep
def test_a_thousand_cycles_in_bfloat16_change_no_bit(keep: Any) -> None:
    model = nn.Sequential(LoRALinear(24, 20, r=3, lora_alpha=7, dtype=torch.bfloat16))
    fill(model)
    before = Snapshot(model)
    for _ in range(1000):
        with fastlora.merged(model, keep=keep):
            pass
    before.check()


@each_keep
def test_training_goes_on_as_if_nothing_had_been(keep: Any) -> None:
    model, x = mixed(), torch.randn(7, 24)
    twin = copy.deepcopy(model)
    for each in (model, twin):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            run_mixed(each, x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if each is model:
                with fastlora.merged(each, keep=keep), torch.no_grad():
                    run_mixed(each, x)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_was_merged_stays_merged_and_an_inner_block_does_nothing() -> None:
    model = mixed()
    model["in"].merge()
    before = Snapshot(model)
    with fastlora.merged(model):
        outer = Snapshot(model)
        with fastlora.merged(model, keep="cpu"):
            outer.check()
        outer.check()
        assert model["loralib"].merged
    before.check()
    assert model["in"].merged
    assert not model["loralib"].merged


def test_where_no_adapter_is_active_nothing_is_done() -> None:
    model = nn.Sequential(nn.Linear(24, 20))
    fastlora.inject(model, ["0"], r=3, lora_alpha=7)
    fill(model)
    before = Snapshot(model)
    with fastlora.disable(model), fastlora.merged(model):
        before.check()
    fastlora.set_adapter(model, None)
    with fastlora.merged(model):
        before.check()


@each_keep
def test_what_is_done_in_the_block_finds_the_base(keep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = mixed(), torch.randn(7, 24)
    base = {name: t.clone() for name, t in model.state_dict().items()}
    before = Snapshot(model)
    with torch.no_grad(), fastlora.merged(model, keep=keep):
        assert all(torch.equal(t, base[name]) for name, t in model.state_dict().items())
        with fastlora.disable(model):
            y = model["in"](x)
            assert torch.equal(y, nn.functional.linear(x, base["in.weight"], base["in.bias"]))
        model.load_state_dict(base)
        assert model["in"].merged
        assert before.moved() == ({"in.weight", "loralib.weight", "module.weight"} if keep == "device" else set())
        assert copy.deepcopy(model)["in"].unmerge().weight.equal(base["in.weight"])
        model.train()
    before.check()


@each_keep
@pytest.mark.parametrize("unload", [fastlora.unload, fastlora.merge_and_unload])
def test_a_model_that_is_unloaded_in_the_block_stays_so(unload: Any, keep: Any) -> None:
    model, other = (adapted(toy(), ["up"]) for _ in range(2))
    other.load_state_dict(model.state_dict())
    unload(other)
    with fastlora.merged(model, keep=keep):
        unload(model)
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


@each_keep
def test_a_tied_weight_is_refused(keep: Any) -> None:
    model = adapted(toy(), ["head", "up"])
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"head\.weight is tied to embed\.weight"), fastlora.merged(model, keep=keep):
        raise AssertionError("the block ran")
    before.check()


def test_memory_that_another_tensor_has_too_is_not_written_over() -> None:
    linear = nn.Linear(24, 20)
    model = nn.ModuleDict({"linear": linear, "adapted": LoRALinear.from_linear(linear, r=3, lora_alpha=7)})
    fill(model)
    before = Snapshot(model)
    with (
        pytest.raises(ValueError, match=r"adapted\.weight shares its memory with linear\.weight"),
        fastlora.merged(model, keep="cpu"),
    ):
        raise AssertionError("the block ran")
    before.check()
    with fastlora.merged(model):
        assert before.changed() == {"adapted.weight"}
    before.check()


def test_parts_of_one_storage_are_written_each_for_itself() -> None:
    model = nn.Sequential(LoRALinear(24, 20, r=3, bias=False), LoRALinear(24, 20, r=3, bias=False))
    both = torch.randn(40, 24)
    model[0].weight.data, model[1].weight.data = both.split(20)
    fill(model)
    before = Snapshot(model)
    with fastlora.merged(model, keep="cpu"):
        assert before.changed() == {"0.weight", "1.weight"}
    before.check()


def weight_normed() -> nn.Module:
    layer = LoRALinear(24, 20, r=3)
    return nn.ModuleDict({"inside": torch.nn.utils.parametrizations.weight_norm(layer)})


def on_meta() -> nn.Module:
    return nn.ModuleDict({"inside": LoRALinear(24, 20, r=3, device="meta")})


def partitioned() -> nn.Module:
    model = nn.ModuleDict({"inside": LoRALinear(24, 20, r=3)})
    model["inside"].lora_A.ds_id = 1
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (weight_normed, "inside cannot be merged: weight is parametrised"),
        (on_meta, "inside cannot be merged: its weight is on the meta device"),
        (partitioned, "inside cannot be merged: its adapter is sharded over ranks"),
    ],
)
def test_a_weight_that_can_hold_no_sum_is_refused(build: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(RuntimeError, match=why), fastlora.merged(build()):
        raise AssertionError("the block ran")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"model has no adapters: expected layers of PEFT's LoRA, of fastlora\.inject"):
        fastlora.merged(nn.Sequential(nn.Linear(24, 20))).__enter__()
    with pytest.raises(ValueError, match="keep must be 'device' or 'cpu', got 'disk'"):
        fastlora.merged(mixed(), keep="disk").__enter__()  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        fastlora.merged("model").__enter__()  # type: ignore[arg-type]


def test_a_call_that_would_train_warns_once_and_no_other_does() -> None:
    model, x = nn.Sequential(LoRALinear(24, 20, r=3)).train(), torch.randn(7, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fastlora.merged(model):
            with torch.no_grad():
                model(x)
            with torch.inference_mode():
                model(x)
            model.eval()(x)
            model.train()
    with fastlora.merged(model), warnings.catch_warnings(record=True, action="always") as warned:
        model(x)
        model(x)
    assert [str(warning.message)[:48] for warning in warned] == ["the model was called in training mode with gradi"]
    assert not model._forward_pre_hooks


@each_keep
def test_in_inference_mode(keep: Any) -> None:
    model = mixed()
    before = Snapshot(model)
    with torch.inference_mode(), fastlora.merged(model, keep=keep):
        assert before.changed() == {"in.weight", "loralib.weight", "module.weight"}
    before.check()
    run_mixed(model, torch.randn(7, 24)).sum().backward()


@each_keep
def test_generation_in_the_block_is_that_outside_of_it(keep: Any) -> None:
    pytest.importorskip("transformers")
    model = adapted(llama())
    ids = torch.arange(5, 12)[None]
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **options)
    before = Snapshot(model)
    with fastlora.merged(model, keep=keep):
        assert torch.equal(model.generate(ids, **options), expected)
    before.check()
    with fastlora.disable(model):
        assert not torch.equal(model.generate(ids, **options), expected)
