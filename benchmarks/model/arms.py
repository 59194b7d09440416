"""The arms of the model benchmark: full fine-tuning, PEFT and fastlora, and the plain LoRA that judges them.

An arm changes the model in place, in the way its users would.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora

from ..cases import SCALE, ModelCase
from ..records.environment import variables_set
from .architectures import Architecture, architecture_named, as_linear, targets

FULL = "full"


@dataclass(frozen=True)
class Adapted:
    """A model ready to train; ``adapters`` are a and b of each adapted layer, by its name in the base."""

    model: nn.Module
    adapters: dict[str, tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What the optimiser gets."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


Adapt = Callable[[nn.Module, Architecture, ModelCase], Adapted]


@dataclass(frozen=True)
class Arm:
    """One arm: ``wide`` says that its adapters are float32 whatever the base is; ``backend`` is forced meanwhile."""

    name: str
    about: str
    adapt: Adapt
    wide: bool = False
    needs: str | None = None
    backend: str = "auto"

    def turn(self) -> AbstractContextManager[None]:
        """Forces the backend for a while; entered and left outside every clock."""
        return variables_set({"FASTLORA_BACKEND": self.backend})

    def refuses(self, case: ModelCase, device: torch.device) -> str | None:
        """Why it has nothing to offer for the case; None where it has."""
        if self.backend in ("triton", "cuda") and device.type != "cuda":
            return "the kernels need a CUDA GPU"
        longest = architecture_named(case.model).longest
        if longest is not None and case.sequence > longest:
            return f"{case.model} takes at most {longest} tokens"
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.wide and case.dtype == "fp32":
            return "the base is float32 already"
        return self._refusal(case, device)

    def _refusal(self, case: ModelCase, device: torch.device) -> str | None:
        """Why the forced backend takes no layer here, however well shaped."""
        if self.backend == "auto":
            return None
        square = torch.empty(16, 16, dtype=case.torch_dtype, device=device)
        with self.turn():
            explanation = fastlora.explain(square, square, square, square)
        if explanation.chosen is not None:
            return None
        return next(verdict.reason for verdict in explanation.verdicts if verdict.kernel.startswith(self.backend))


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


def _fastlora(wide: bool) -> Adapt:
    def adapt(model: nn.Module, architecture: Architecture, case: ModelCase) -> Adapted:
        model.requires_grad_(False)
        adapters = {}
        for name, module in targets(model, architecture):
            layer = fastlora.LoRALinear.from_linear(
                as_linear(module),
                r=case.r,
                lora_alpha=SCALE * case.r,
                lora_dropout=case.dropout,
                adapter_dtype=torch.float32 if wide else None,
            )
            model.set_submodule(name, layer)
            adapters[name] = (layer.lora_A, layer.lora_B)
        return Adapted(model, adapters)

    return adapt


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
    """What every arm is held to, in float64 and in the tested dtype. The adapters' values are yet to be set."""
    model.requires_grad_(False)
    adapters = {}
    for name, module in targets(model, architecture):
        layer = PlainLoRA(as_linear(module), case.r)
        model.set_submodule(name, layer)
        adapters[name] = (layer.a, layer.b)
    return Adapted(model, adapters)


def arms() -> dict[str, Arm]:
    """Every arm by name."""
    known = (
        Arm(FULL, "full fine-tuning: every weight trained", _full),
        Arm("peft-fp32", "PEFT as shipped: float32 adapters on a half-precision base", _peft(True), True, "peft"),
        Arm("peft-same", "PEFT, adapters in the base's dtype", _peft(False), needs="peft"),
        Arm("fastlora", "fastlora, backend chosen by itself", _fastlora(False)),
        Arm("fastlora-fp32", "the same with float32 adapters", _fastlora(True), wide=True),
        Arm("fastlora-triton", "fastlora forced to triton", _fastlora(False), backend="triton"),
        Arm("fastlora-cuda", "fastlora forced to cuda", _fastlora(False), backend="cuda"),
    )
    return {arm.name: arm for arm in known}
