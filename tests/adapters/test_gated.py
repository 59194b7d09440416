"""``inject(mlp=True)``: gated MLPs of adapted layers as one product, on proof in each call, until they are unloaded."""

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
from fastlora import gated
from fastlora.adapters.layer import AdaptedLinear
from fastlora.gated import GatedMLP


class Mlp(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(24, 40),
            nn.Linear(24, 40, bias=False),
            nn.Linear(40, 20),
        )
        self.act = act or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.other = Mlp(), Mlp(nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) * self.other(x)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def injected(mlp: bool, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    model = net()
    settings: dict[str, Any] = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6, "init_lora_weights": False}
    fastlora.inject(model, **settings | options, mlp=mlp)
    return model.train()


def inputs() -> Tensor:
    return torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def step(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    x = inputs().requires_grad_()
    torch.manual_seed(5)
    y = model(x)
    y.square().sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-9, msg=name)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activation of each call that ran as one product."""
    calls: list[str] = []
    run = gated.lora_swiglu_mlp

    def noted(*arguments: Any, activation: str) -> Tensor:
        calls.append(activation)
        return run(*arguments, activation=activation)

    monkeypatch.setattr(gated, "lora_swiglu_mlp", noted)
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_is_that_of_the_layers(dropout: float, fused: list[str]) -> None:
    one, three = injected(True, lora_dropout=dropout), injected(False, lora_dropout=dropout)
    assert_same(step(one), step(three))
    assert fused == ["silu", "gelu"]
    assert isinstance(one.mlp, Mlp)
    assert one.state_dict().keys() == three.state_dict().keys()


def test_it_is_reported() -> None:
    model = net()
    report = fastlora.inject(model, "all-linear", mlp=True)
    assert report.mlps == ("mlp", "other")
    assert "  2 gated MLPs: mlp, other" in str(report)
    assert fastlora.inject(net(), "all-linear").mlps == ()


def test_where_none_is_found_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    report = fastlora.inject(net(), ["gate_proj", "up_proj"], mlp=True)
    assert report.mlps == ()
    assert report.unmatched == {"mlp": (True,)}
    assert "mlp: True finds no gated MLP to run: mlp, other has a layer of its three that does not run" in caplog.text
    caplog.clear()
    fastlora.inject(nn.Sequential(nn.Linear(6, 4)), ["0"], mlp=True)
    assert "mlp: True finds no module whose forward is down(act(gate(x)) * up(x))" in caplog.text


def test_it_stays_for_other_adapters_and_goes_with_the_last(fused: list[str]) -> None:
    model = injected(True)
    assert fastlora.inject(model, ["mlp.gate_proj"], adapter_name="other").mlps == ("mlp", "other")
    fastlora.set_adapter(model, "other")
    model(inputs())
    assert fused == []  # up and down have no part in it
    fastlora.set_adapter(model, "default")
    model(inputs())
    assert fused == ["silu", "gelu"]
    fastlora.delete_adapter(model, "other")
    fastlora.unload(model)
    assert (type(model.mlp), type(model.mlp.gate_proj)) == (Mlp, nn.Linear)
    assert not any(isinstance(module, (GatedMLP, AdaptedLinear)) for module in model.modules())
    assert torch.equal(model(inputs()), net()(inputs()))


@pytest.mark.parametrize(
    "change",
    [
        fastlora.merge_adapter,
        lambda model: fastlora.set_adapter(model, None),
        lambda model: (
            model.mlp.up_proj.register_forward_hook(lambda module, args, y: 2 * y)
            and model.other.act.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        ),
    ],
    ids=["merged", "none_active", "hooks"],
)
def test_where_the_layers_do_something_else_the_modules_own_forward_runs(
    change: Callable[[Any], object], fused: list[str]
) -> None:
    one, three = injected(True), injected(False)
    for model in (one, three):
        change(model)
    with torch.no_grad():
        torch.testing.assert_close(one(inputs()), three(inputs()))
    assert fused == []


def test_disabled_and_enabled(fused: list[str]) -> None:
    model = injected(True)
    with fastlora.disable(model):
        assert torch.equal(model(inputs()), net()(inputs()))
    assert fused == []
    model(inputs())
    assert fused == ["silu", "gelu"]


def test_merged_and_unloaded_it_is_the_class_it_was() -> None:
    model = injected(True)
    expected = model.eval()(inputs())
    plain = fastlora.merge_and_unload(model)
    assert type(plain.mlp) is Mlp
    torch.testing.assert_close(plain(inputs()), expected)


def test_copies_and_pickles(fused: list[str]) -> None:
    model = injected(True)
    expected = step(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(step(made), expected)
    assert fused == ["silu", "gelu"] * 3


def test_a_loaded_adapter(tmp_path: Path, fused: list[str]) -> None:
    pytest.importorskip("safetensors")
    fastlora.save_adapter(injected(False), tmp_path / "a")
    model = net()
    assert fastlora.load_adapter(model, tmp_path / "a", mlp=True).mlps == ("mlp", "other")
    model(inputs())
    assert fused == ["silu", "gelu"]
