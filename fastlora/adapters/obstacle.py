"""Says which modules cannot have an adapter, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import FLOATING
from ..ownership import owner_of
from ..quantised import is_quantised, why_not_stored
from ..text import class_name, dtype_name
from .layer import AdaptedLinear
from .matching import is_conv1d


def obstacle(module: nn.Module, parent: nn.Module | None = None) -> str | None:
    """Gives the reason why this module cannot have an adapter, with the remedy; None where it can.

    Args:
        module: any module.
        parent: the module that holds it.
    """
    kind = class_name(module)
    weight: Any = module._parameters.get("weight")
    if isinstance(module, AdaptedLinear):
        return _owned(module, weight)
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it"
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        return (
            "nn.TransformerEncoderLayer reads its weight without calling it in eval mode: call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )
    quantised = is_quantised(module)
    if (
        type(module) is not nn.Linear
        and not (is_conv1d(module) and type(module).__name__ == "Conv1D")
        and not quantised
    ):
        if isinstance(module, nn.Linear) or is_conv1d(module):
            return f"{kind} is a subclass, which may store something else as its weight: dequantise or unwrap it first"
        return f"{kind} is no linear layer: fastlora adapts nn.Linear, transformers' Conv1D and bitsandbytes' layers"
    if "forward" in module.__dict__:
        return "its forward was replaced (by accelerate's hooks, for one): inject before that"
    if (reason := _owned(module, weight)) is not None:
        return reason
    if quantised:
        return why_not_stored(module)
    if weight is None:
        return "its weight is no Parameter of its own (weight_norm computes it, for one): remove that first"
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return f"its weight is {type(weight.data).__name__}, not a plain tensor: dequantise it first"
    if weight.dtype not in FLOATING:
        return f"its weight is {dtype_name(weight.dtype)}: fastlora adapts floating-point weights"
    return None


def _owned(layer: nn.Module, weight: Tensor) -> str | None:
    owner = owner_of(layer, weight)
    return None if owner is None else f"its weight belongs to {owner}: inject before the model is sharded"
