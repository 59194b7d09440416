"""Gives a layer the class that has adapters and takes it away again: the object stays, its class changes."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .. import siblings
from ..quantised import is_quantised
from . import packed
from .layer import PARTS, AdaptedConv1D, AdaptedLinear, parts_of
from .matching import is_conv1d
from .packed import AdaptedQuantised
from .state import State

# What bitsandbytes' layers have and nn.Linear has not.
_OF_BITSANDBYTES = (
    "compute_dtype", "compute_type_is_set", "index", "quant_state", "quant_storage", "state",
    "support_avx512bf16_for_cpu",
)  # fmt: skip


def add_adapter(
    layer: nn.Module, state: State, name: str, parts: Mapping[str, Tensor], scale: float, lora_dropout: float
) -> None:
    """Adds an adapter, by its parts, to a layer that has no :func:`obstacle`; it does not train yet.

    The first adapter of a layer makes it read the model's ``state``.
    """
    if not isinstance(layer, AdaptedLinear):
        layer.__class__ = _class_for(layer)
        assert isinstance(layer, AdaptedLinear)
        layer.lora_A, layer.lora_B = nn.ParameterDict(), nn.ParameterDict()
        layer.scale, layer.lora_dropout = {}, {}
        layer._state = state
        layer._become_mergeable()
    for part, values in parts.items():
        if part not in layer._modules:
            setattr(layer, part, nn.ParameterDict())
        getattr(layer, part)[name] = nn.Parameter(values, requires_grad=False)
    layer.scale[name], layer.lora_dropout[name] = scale, lora_dropout


def remove_adapter(layer: AdaptedLinear, name: str) -> None:
    """Removes one adapter; with the last one, the layer becomes what it was."""
    if layer.active_adapter == name:
        layer.unmerge()
    for part in parts_of(layer, name):
        del getattr(layer, part)[name]
        if not getattr(layer, part) and part not in PARTS[:2]:
            delattr(layer, part)
    del layer.scale[name], layer.lora_dropout[name]
    if not layer.lora_A:
        restore(layer)


def restore(layer: Any) -> None:
    """Removes all adapters: the layer gets its old class and attributes back and keeps its weight as it is now."""
    siblings.dissolve(layer)
    layer._become_plain()
    for name in (*(part for part in PARTS if part in layer._modules), "scale", "lora_dropout", "_state"):
        delattr(layer, name)
    if isinstance(layer, AdaptedQuantised):
        layer.__class__ = layer.base_kind
    elif isinstance(layer, AdaptedConv1D):
        layer.__class__ = importlib.import_module("transformers.pytorch_utils").Conv1D
    else:
        layer.__class__ = nn.Linear


def make_dense(layer: Any, weight: Tensor) -> None:
    """Makes a plain ``nn.Linear`` of a quantised layer that has no adapters any more, with this weight [N, K]."""
    layer.__class__ = nn.Linear
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(weight.dtype)
    for name in _OF_BITSANDBYTES:
        layer.__dict__.pop(name, None)
    hooks = layer._load_state_dict_pre_hooks
    for key in [key for key, each in hooks.items() if each.hook.__module__.startswith("bitsandbytes.")]:
        del hooks[key]


def _class_for(layer: nn.Module) -> type[AdaptedLinear]:
    if is_quantised(layer):
        return packed.class_of(layer)
    return AdaptedConv1D if is_conv1d(layer) else AdaptedLinear
