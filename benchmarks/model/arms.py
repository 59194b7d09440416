"""The arms of the model benchmark: full fine-tuning, PEFT and fastlora, and the plain LoRA that judges them.

An arm changes the model in place, in the way its users would.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora

from ..cases import SCALE, ModelCase
from ..layers.arm import KERNELS, Arm, needs_kernel, needs_module, refusal
from .architectures import Architecture, architecture_named, as_linear, targets

FULL = "full"


@dataclass(frozen=True)
class Adapted:
    """A model ready to train; ``adapters`` are a and b of each adapted layer, by its name in the base."""

    model: nn.Module
    adapters: dict[str, tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters of the optimiser."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


Adapt = Callable[[nn.Module, Architecture, ModelCase], Adapted]


@dataclass(frozen=True)
class ModelArm(Arm):
    """An arm that adapts a model in place; ``wide`` says that its adapters are float32 whatever the base is."""

    adapt: Adapt
    wide: bool = False

    def refuses(self, case: ModelCase, device: torch.device) -> str | None:
        """The reason why it declines the case; None where it takes it."""
        if reason := self.absence(device):
            return reason
        longest = architecture_named(case.model).longest
        if longest is not None and case.sequence > longest:
            return f"{case.model} takes at most {longest} tokens"
        if self.wide and case.dtype == "fp32":
            return "the base is float32 already"
        with self.turn():
            return refusal(case.torch_dtype, device) if self.kernel else None


def _full(model: nn.Module, architecture: Architecture, case: ModelCase) -> Adapted:
    return Adapted(model)


def _peft(wide: bool) -> Adapt:
    def adapt(model: nn.Module, architecture: Architecture, case: ModelCase) -> Adapted:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        config = LoraConfig(
            r=case.r,
            lora_alpha=SCALE * case.r,  # type: ignore[arg-type]
            lora_dropout=case.dropout,
            target_modules=list(architecture.targets),
            fan_in_fan_out=architecture.kind == "gpt2",
        )
        with warnings.catch_warnings():
            # PEFT asks transformers whether activations are checkpointed by a name that is about to go.
            warnings.simplefilter("ignore", FutureWarning)
            adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=wide)
        layers: dict[str, Any] = {n: m for n, m in adapted.named_modules() if isinstance(m, LoraLayer)}
        return Adapted(
            adapted,
            {
                name.removeprefix("base_model.model."): (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
                for name, layer in layers.items()
            },
        )

    return adapt


def _fastlora(wide: bool = False, groups: Literal["auto"] | None = "auto", mlp: bool = False) -> Adapt:
    def adapt(model: nn.Module, architecture: Architecture, case: ModelCase) -> Adapted:
        names = [name for name, _ in targets(model, architecture)]
        fastlora.inject(
            model,
            names,
            r=case.r,
            lora_alpha=SCALE * case.r,
            lora_dropout=case.dropout,
            adapter_dtype=torch.float32 if wide else case.torch_dtype,
            groups=groups,
            mlp=mlp,
        )
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in names}
        return Adapted(model, {n: (layer.lora_A["default"], layer.lora_B["default"]) for n, layer in layers.items()})

    return adapt


def _patched(model: nn.Module, architecture: Architecture, case: ModelCase) -> Adapted:
    adapted = _peft(False)(model, architecture, case)
    fastlora.patch_peft(adapted.model)
    return adapted


class PlainLoRA(nn.Module):
    """``x wᵀ + bias + scale · (x aᵀ) bᵀ`` in plain torch, no dropout."""

    def __init__(self, linear: nn.Linear, r: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.a = nn.Parameter(linear.weight.new_empty(r, linear.in_features))
        self.b = nn.Parameter(linear.weight.new_empty(linear.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> y [..., N]."""
        return F.linear(x, self.weight, self.bias) + SCALE * F.linear(F.linear(x, self.a), self.b)


def plain(model: nn.Module, architecture: Architecture, case: ModelCase) -> Adapted:
    """Plain LoRA, which judges every arm, in float64 and in the tested dtype. The caller sets its a and b."""
    model.requires_grad_(False)
    adapters = {}
    for name, module in targets(model, architecture):
        layer = PlainLoRA(as_linear(module), case.r)
        model.set_submodule(name, layer)
        adapters[name] = (layer.a, layer.b)
    return Adapted(model, adapters)


def arms() -> dict[str, ModelArm]:
    """Every arm by name."""
    peft = needs_module("peft")
    shipped = "PEFT as shipped: float32 adapters on a half-precision base"
    known = (
        ModelArm(FULL, "full fine-tuning: every weight trained", _full),
        ModelArm("peft-fp32", shipped, _peft(True), wide=True, require=peft),
        ModelArm("peft-same", "PEFT, adapters in the base's dtype", _peft(False), require=peft),
        ModelArm("patched", "peft-same under fastlora.patch_peft, siblings together", _patched, require=peft),
        ModelArm("fastlora", "fastlora.inject, siblings together, kernel chosen by itself", _fastlora()),
        ModelArm("fastlora-alone", "the same with every layer by itself", _fastlora(groups=None)),
        ModelArm("fastlora-mlp", "fastlora with gated MLPs as one product, too", _fastlora(mlp=True)),
        ModelArm("fastlora-fp32", "fastlora with float32 adapters", _fastlora(True), wide=True),
        *map(_forced, KERNELS),
    )
    return {arm.name: arm for arm in known}


def _forced(kernel: str) -> ModelArm:
    name, about = f"fastlora-{kernel}", f"fastlora forced to {kernel}"
    return ModelArm(name, about, _fastlora(), kernel=kernel, require=needs_kernel(kernel))
