"""``Adapter``: what the active adapters of a PEFT layer compute in a call, as the operands of one product.

Imports peft, through :mod:`fastlora.peft.dora`; imported inside functions only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..gated import is_watched
from ..mergeable import scaled_bias
from ..text import dtype_name
from . import dora
from .reasons import MASKS, WATCHED, Reason, exotic, is_exotic, variant


class Adapter(NamedTuple):
    """One low-rank product: a [R, K], b [N, R], the factor on it and the dropout probability in force.

    ``bias`` is what the adapter adds to the base's: scale · lora_B's bias [N], in float32 or float64; or None.
    ``magnitude`` [N] is DoRA's, else None.
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout_p: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None


def adapter_of(layer: Any, names: list[str]) -> Adapter | Reason:
    """The operands of a layer's active adapters as one product, or the reason why PEFT's own forward must run."""
    adapter = _adapter(layer, names[0])
    return adapter if len(names) == 1 or isinstance(adapter, str) else _fold(layer, names)


def _adapter(layer: Any, name: str) -> Adapter | Reason:
    of_dora = name in layer.lora_variant
    if of_dora and not dora.is_dora(layer, name):
        return variant(layer, name)
    modules: Any = layer._modules
    down: Any = modules["lora_A"]._modules[name]
    up: Any = modules["lora_B"]._modules[name]
    dropout: Any = modules["lora_dropout"]._modules[name]
    if type(down) is not nn.Linear or is_watched(down):
        return WATCHED["lora_A"]
    if type(up) is not nn.Linear or is_watched(up):
        return WATCHED["lora_B"]
    if is_watched(dropout):
        return WATCHED["lora_dropout"]
    a: Any = down._parameters.get("weight")
    b: Any = up._parameters.get("weight")
    if is_exotic(a):
        return exotic("lora_A", a)
    if is_exotic(b):
        return exotic("lora_B", b)
    if down._parameters.get("bias") is not None:
        return "lora_A has a bias"
    own: Any = up._parameters.get("bias")
    if own is not None and (is_exotic(own) or own.dtype is not b.dtype):
        return exotic("lora_B", own) if is_exotic(own) else f"lora_B's bias is {dtype_name(own.dtype)}"

    p = 0.0
    if type(dropout) is nn.Dropout:
        # PEFT's DoRA asks the layer, too.
        if dropout.training and dropout.p > 0 and (layer.training or not of_dora):
            p = dropout.p
            if p >= 1 or dropout.inplace:
                return "the dropout drops everything, or works in place"
    elif type(dropout) is not nn.Identity:
        return f"the dropout is a {type(dropout).__name__}"
    scale = layer.scaling[name]
    if type(scale) is not float and type(scale) is not int:
        return f"the scaling is a {type(scale).__name__} (prepare_model_for_compiled_hotswap), not a float"
    if of_dora:
        magnitude = dora.magnitude_of(layer, name, a, own)
        return magnitude if isinstance(magnitude, str) else Adapter(a, b, scale, p, None, magnitude)
    if own is None:
        return Adapter(a, b, scale, p)
    return Adapter(a, b, scale, p, scaled_bias(own, scale))


def _fold(layer: Any, names: list[str]) -> Adapter | Reason:
    """Joins several adapters into one of the summed rank: Σ sᵢ · x aᵢᵀ bᵢᵀ = x [a₁; a₂; …]ᵀ [s₁ b₁, s₂ b₂, …]ᵀ."""
    adapters: list[Adapter] = []
    for name in names:
        adapter = _adapter(layer, name)
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
    first = adapters[0]
    if any(adapter.magnitude is not None for adapter in adapters):
        return "several adapters are active, and DoRA among them"
    if any(adapter.dropout_p > 0 for adapter in adapters):
        return MASKS
    if any(t.dtype is not first.a.dtype for adapter in adapters for t in adapter[:2]):
        return "the active adapters differ in dtype"
    a = torch.cat([adapter.a for adapter in adapters])
    biases = [adapter.bias for adapter in adapters if adapter.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    if all(adapter.scale == first.scale for adapter in adapters):
        return Adapter(a, torch.cat([adapter.b for adapter in adapters], dim=1), first.scale, 0.0, bias)
    return Adapter(a, torch.cat([adapter.b * adapter.scale for adapter in adapters], dim=1), 1.0, 0.0, bias)
