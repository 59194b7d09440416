"""What PEFT's DoRA has in a layer, for ``fastlora.dora_linear``.

Imports peft; imported inside functions only.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor

from ..gated import is_watched
from ..text import dtype_name
from .reasons import Reason, exotic, is_exotic


def is_dora(layer: Any, name: str) -> bool:
    """Whether an adapter is DoRA itself, no other variant of LoRA."""
    return type(layer.lora_variant.get(name)) is DoraLinearVariant


def magnitude_of(layer: Any, name: str, a: Tensor, bias: Tensor | None) -> Tensor | Reason:
    """The magnitude [N] of an adapter whose a is [R, K] and whose lora_B has that bias, or the reason against it."""
    holder: Any = layer._modules["lora_magnitude_vector"]._modules.get(name)
    if type(holder) is not DoraLinearLayer or is_watched(holder):
        return "lora_magnitude_vector has hooks, a forward or a class of its own"
    magnitude: Any = holder._parameters.get("weight")
    if is_exotic(magnitude):
        return exotic("lora_magnitude_vector", magnitude)
    if bias is not None:
        return "DoRA with a bias in lora_B"
    if magnitude.dtype is not a.dtype:
        return f"lora_magnitude_vector is {dtype_name(magnitude.dtype)} and lora_A {dtype_name(a.dtype)}"
    if magnitude.device != a.device or magnitude.device != layer.base_layer.weight.device:
        return "DoRA's parts are on several devices (ephemeral_gpu_offload)"
    kept: Tensor = magnitude
    return kept
