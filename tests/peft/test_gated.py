"""``patch_peft(mlp=True)``: gated MLPs of transformers as one product, on proof in each call, and put back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import gated
from fastlora.gated import GatedMLP
from tests.peft.peft_models import assert_same_bits, step, tokens, wake
from tests.peft.test_groups import assert_same

TARGETS = ["gate_proj", "up_proj", "down_proj"]
WIDTHS: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 2}


def kinds() -> list[tuple[str, str]]:
    return [
        ("llama", "silu"),
        ("mistral", "silu"),
        ("qwen2", "silu"),
        ("gemma", "gelu_pytorch_tanh"),
        ("llama", "gelu"),
    ]


def mlp(kind: str = "llama", activation: str = "silu") -> nn.Module:
    """A layer's MLP, which both its config's activation names decide."""
    names = {"hidden_act": activation, "hidden_activation": activation}
    config = transformers.AutoConfig.for_model(
        kind, **WIDTHS, **(names if kind == "gemma" else {"hidden_act": activation})
    )
    module = __import__(f"transformers.models.{kind}.modeling_{kind}", fromlist=["x"])
    made: nn.Module = getattr(module, f"{kind.capitalize()}MLP")(config)
    return made


def adapted(net: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(3)
    settings = {"target_modules": TARGETS, "r": 6, "lora_alpha": 10, "rank_pattern": {"up_proj": 4}}
    model = get_peft_model(nn.Sequential(net or mlp()), LoraConfig(**settings | options))
    wake(model)
    return model.double().train()


def inner(model: PeftModel) -> Any:
    return model.base_model.model[0]


def inputs() -> Tensor:
    return tokens(dtype=torch.float64)


class Fused:
    """Counts the calls that ran as one product."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        run = gated.lora_swiglu_mlp

        def noted(*arguments: Any, **options: Any) -> Tensor:
            self.count += 1
            return run(*arguments, **options)

        monkeypatch.setattr(gated, "lora_swiglu_mlp", noted)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Fused:
    return Fused(monkeypatch)


@pytest.mark.parametrize(("kind", "activation"), kinds())
def test_a_step_is_pefts(kind: str, activation: str, fused: Fused) -> None:
    model = adapted(mlp(kind, activation))
    plain = copy.deepcopy(model)
    report = fastlora.patch_peft(model, mlp=True)
    assert report.mlps == ("base_model.model.0",)
    assert "  1 gated MLPs: base_model.model.*" in str(report)
    assert isinstance(inner(model), type(inner(plain)))
    assert_same(step(model, inputs()), step(plain, inputs()))
    assert fused.count == 1


def test_it_is_asked_for() -> None:
    model = adapted()
    assert fastlora.patch_peft(model).mlps == ()
    assert not isinstance(inner(model), GatedMLP)


def test_no_wide_tensor_but_two_is_kept() -> None:
    kept: dict[bool, list[int]] = {}
    for one in (False, True):
        model = adapted()
        fastlora.patch_peft(model, mlp=one)
        wide = kept[one] = []

        def pack(t: Tensor, wide: list[int] = wide) -> Tensor:
            if t.shape[-1] == WIDTHS["intermediate_size"] and t.numel() == 35 * t.shape[-1]:
                wide.append(t.untyped_storage().data_ptr())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(inputs())
    assert (len(set(kept[False])), len(set(kept[True]))) == (4, 2)


def test_it_is_put_back() -> None:
    model = adapted()
    kind = type(inner(model))
    with fastlora.patched_peft(model, mlp=True):
        assert isinstance(inner(model), GatedMLP)
    assert type(inner(model)) is kind
    fastlora.patch_peft(model, mlp=True)
    fastlora.patch_peft(model, mlp=True)
    assert isinstance(inner(model), GatedMLP)
    with fastlora.patched_peft(model):
        assert type(inner(model)) is kind
    assert isinstance(inner(model), GatedMLP)
    fastlora.patch_peft(model)
    assert type(inner(model)) is kind
    fastlora.patch_peft(model, mlp=True)
    fastlora.unpatch_peft(model)
    assert type(inner(model)) is kind


def test_copies_and_pickles_are_what_it_is(fused: Fused) -> None:
    model = adapted()
    fastlora.patch_peft(model, mlp=True)
    expected = step(model, inputs())
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(inner(made)) is type(inner(model))
        assert inner(made).gate_proj is not inner(model).gate_proj
        assert_same(step(made, inputs()), expected)
    assert fused.count == 3
    assert {type(inner(model)).__name__, type(inner(model)).__qualname__} == {"LlamaMLP"}


@pytest.mark.parametrize("part", [*TARGETS, "act_fn"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_a_hook_on_a_part_fires(part: str, kind: str, fused: Fused) -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model, mlp=True)
    fired: list[int] = []
    hooks: dict[str, Callable[..., Any]] = {
        "forward": lambda module, args, y: (fired.append(1), 2 * y)[1],
        "forward_pre": lambda module, args: (fired.append(1), (2 * args[0],))[1],
        "full_backward": lambda module, grad_input, grad_output: fired.append(1),
    }
    for each in (model, plain):
        getattr(getattr(inner(each), part), f"register_{kind}_hook")(hooks[kind])
    assert_same(step(model, inputs()), step(plain, inputs()))
    assert (fused.count, fired) == (0, [1, 1])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: inner(model).up_proj.merge(),
        lambda model: setattr(inner(model), "act_fn", nn.ReLU()),
        lambda model: setattr(inner(model), "down_proj", nn.Linear(36, 24, dtype=torch.float64)),
    ],
    ids=["disabled", "merged", "another_activation", "another_layer"],
)
def test_what_changes_afterwards_is_seen(change: Callable[[Any], object], fused: Fused) -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model, mlp=True)
    for each in (model, plain):
        torch.manual_seed(1)
        change(each)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()), plain(inputs()))
    assert fused.count == 0


def test_an_activation_that_changed_is_the_new_one(fused: Fused) -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model, mlp=True)
    for each in (model, plain):
        inner(each).act_fn = nn.GELU(approximate="tanh")
    assert_same(step(model, inputs()), step(plain, inputs()))
    assert fused.count == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool, fused: Fused) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.mlp, x, use_reentrant=reentrant)
            return y

    model = adapted(Checkpointed(), lora_dropout=0.2)
    fastlora.patch_peft(model, mlp=True)
    first = step(model, inputs())
    assert fused.count == 2
    assert_same_bits(step(model, inputs()), first)


def test_compiled_code_runs_the_modules_own(fused: Fused) -> None:
    model = adapted()
    plain = copy.deepcopy(model)
    fastlora.patch_peft(model, mlp=True)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(inputs())
    torch.testing.assert_close(y, plain(inputs()))
    assert fused.count == 0


def test_a_module_of_which_a_layer_is_not_adapted_stays() -> None:
    model = adapted(target_modules=["gate_proj", "up_proj"])
    with pytest.warns(UserWarning, match=r"mlp=True finds no gated MLP to run: \S+ has a layer of its three that"):
        assert fastlora.patch_peft(model, mlp=True).mlps == ()


def test_a_whole_llama_trains(fused: Fused) -> None:
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(
        "llama", num_hidden_layers=2, num_key_value_heads=1, vocab_size=32, **WIDTHS
    )
    base = transformers.AutoModelForCausalLM.from_config(config)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.0)).double()
    wake(model)
    plain = copy.deepcopy(model)
    assert len(fastlora.patch_peft(model, mlp=True).mlps) == 2
    ids = torch.arange(16).view(2, 8)
    for each in (model, plain):
        each(input_ids=ids, labels=ids).loss.backward()
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-8, msg=name)
    assert fused.count == 2
