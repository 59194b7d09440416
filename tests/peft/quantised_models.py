"""PEFT models on bitsandbytes' layers, and a dense float64 model that says what these should give."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel, get_peft_model
from peft.tuners import lora
from torch import Tensor, nn

from fastlora.accuracy import assert_close_to_oracle
from fastlora.quantised import is_quantised, stored_weight
from tests.peft.peft_models import config, step, wake

# Inputs in multiples of 64, bitsandbytes' block, and outputs of 32: only such weights a CPU can pack anew.
K, HIDDEN, N = 64, 128, 96


class Net(nn.Module):
    """Two layers that are called ``first`` and ``second``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(K, HIDDEN), nn.Linear(HIDDEN, N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def quantised(
    model: nn.Module,
    bits: int = 4,
    *,
    quant_type: str = "nf4",
    compute: torch.dtype | None = torch.float32,
    packed_from: torch.dtype = torch.float32,
    compress_statistics: bool = True,
    threshold: float = 0.0,
    only: tuple[str, ...] = (),
) -> nn.Module:
    """The model with bitsandbytes' layers in the place of its nn.Linear, marked as transformers marks it."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or (only and name not in only):
                continue
            bias = layer.bias is not None
            if bits == 4:
                made: Any = bnb.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=bias,
                    compute_dtype=compute,
                    compress_statistics=compress_statistics,
                    quant_type=quant_type,
                )
            else:
                made = bnb.nn.Linear8bitLt(
                    layer.in_features, layer.out_features, bias=bias, has_fp16_weights=False, threshold=threshold
                )
            made.load_state_dict({key: t.to(packed_from) for key, t in layer.state_dict().items()}, assign=False)
            if packed_from is not torch.float32:
                made.weight.data = made.weight.data.to(packed_from)
            setattr(parent, name, made.to("cpu"))
    marked: Any = model
    setattr(marked, f"is_loaded_in_{bits}bit", True)
    return model.requires_grad_(False)


def adapted(
    *targets: str, adapter_dtype: torch.dtype = torch.float32, net: nn.Module | None = None, **options: Any
) -> PeftModel:
    """A PEFT model around a quantised :class:`Net`, its adapter awake, in training mode."""
    names = ("bits", "quant_type", "compute", "packed_from", "compress_statistics", "threshold", "only")
    chosen = {name: options.pop(name) for name in names if name in options}
    torch.manual_seed(3)
    model = get_peft_model(quantised(net or Net(), **chosen), config(*targets, **options))
    wake(model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    return model.train()


def dense_twin(model: PeftModel) -> PeftModel:
    """The same model on dense float64 layers of the dequantised weights; its adapters in float64, too."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, layer in list(parent.named_children()):
            if is_quantised(layer):
                setattr(parent, name, _dense(layer))
        if isinstance(parent, lora.LoraLayer):
            parent.__class__ = lora.Linear
    return twin.double()


def _dense(base: Any) -> nn.Linear:
    dense = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None).double()
    weight: Any = stored_weight(base)
    dense.weight.data = weight.dense(torch.float32).double()
    if base.bias is not None:
        dense.bias.data = base.bias.data.double()
    return dense.requires_grad_(False)


def assert_as_good_as(
    actual: dict[str, Tensor], model: PeftModel, x: Tensor, autocast: torch.dtype | None = None, **arguments: Any
) -> None:
    """Holds a step to the one error rule: the unpatched model is the baseline, its dense twin in float64 the oracle."""
    oracle = step(dense_twin(model), x.double(), **arguments)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        baseline = step(model, x, **arguments)
    assert actual.keys() == baseline.keys() == oracle.keys()
    for name in actual:
        assert_close_to_oracle(actual[name], oracle=oracle[name], baseline=baseline[name], name=name)
