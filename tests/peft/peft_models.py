"""PEFT models the PEFT tests share: small, never square, b never zero, scaling never 1."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora.accuracy import assert_close_to_oracle

K, HIDDEN, N = 24, 36, 20


class Net(nn.Module):
    """Two linear layers with something between them; ``first`` is what most tests adapt."""

    def __init__(self, conv1d: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.first = Conv1D(HIDDEN, K) if conv1d else nn.Linear(K, HIDDEN, bias=bias)
        self.second = nn.Linear(HIDDEN, N)
        if conv1d:
            nn.init.normal_(self.first.weight, std=0.2)
            nn.init.normal_(self.first.bias, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def config(*targets: str, r: int = 6, lora_alpha: int = 10, **options: Any) -> LoraConfig:
    return LoraConfig(target_modules=list(targets or ("first", "second")), r=r, lora_alpha=lora_alpha, **options)


def wake(model: nn.Module) -> None:
    """An update as large as the base: LoRA starts with b = 0, which hides every mistake."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)


def adapted(
    *targets: str,
    conv1d: bool = False,
    bias: bool = True,
    bias_trains: bool = False,
    dtype: torch.dtype = torch.float32,
    autocast_adapter_dtype: bool = True,
    **options: Any,
) -> PeftModel:
    """A PEFT model around :class:`Net`, its adapter awake, in training mode; ``bias_trains``: the first base's too."""
    torch.manual_seed(3)
    net = Net(conv1d, bias).to(dtype)
    model = get_peft_model(net, config(*targets, **options), autocast_adapter_dtype=autocast_adapter_dtype)
    wake(model)
    if bias_trains:
        first(model).base_layer.bias.requires_grad_()
    return model.train()


def add_adapter(model: PeftModel, name: str, config: LoraConfig) -> None:
    """Another adapter, in the dtype of the base: PEFT before 0.19 has no option for that."""
    model.add_adapter(name, config)
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            for part in (layer.lora_A, layer.lora_B):
                part[name].to(layer.base_layer.weight.dtype)


def first(model: PeftModel) -> Any:
    return model.base_model.model.first


def tokens(*lead: int, k: int = K, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*(lead or (5, 7)), k, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(model: nn.Module, x: Tensor, seed: int = 5, **arguments: Any) -> dict[str, Tensor]:
    """y, dx and the gradient of every parameter that got one, from one forward and backward."""
    model.zero_grad()
    x = x.detach().requires_grad_(x.is_floating_point())
    torch.manual_seed(seed)
    y = model(x, **arguments)
    result = {"y": y.detach()}
    if y.requires_grad:
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        (y * weights.to(y.dtype)).sum().backward()
        result |= {} if x.grad is None else {"x": x.grad}
        result |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return result


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in actual if not torch.equal(actual[name], expected[name])]
    assert different == []


def assert_as_good_as(actual: dict[str, Tensor], model: nn.Module, x: Tensor, **arguments: Any) -> None:
    """Holds a step to the one error rule: the unpatched ``model`` is the baseline, its float64 copy the oracle."""
    baseline = step(model, x, **arguments)
    oracle = step(copy.deepcopy(model).double(), x.double(), **arguments)
    assert actual.keys() == baseline.keys() == oracle.keys()
    for name in actual:
        assert_close_to_oracle(actual[name], oracle=oracle[name], baseline=baseline[name], name=name)
