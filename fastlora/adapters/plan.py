"""Finds the layers an adapter applies to and checks everything before any change."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..dtypes import wide_of
from ..ownership import unwrapped
from ..text import shown
from . import unmatched
from .config import AdapterConfig
from .layer import PARTS, AdaptedLinear, base_dtypes, is_turned, shapes_of
from .matching import ALL_LINEAR, all_linear
from .model import state_of
from .obstacle import obstacle
from .state import State
from .unmatched import Unmatched

# These read the weights of the named layers without calling them.
_MAMBA_TYPES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_MAMBA_LAYERS = ("conv1d", "out_proj")


class PlannedLayer(NamedTuple):
    """One layer that will have an adapter, with the dtype and the names of its parts."""

    name: str
    module: Any
    r: int
    scale: float
    dtype: torch.dtype
    parts: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the adapter's parts."""
        return shapes_of(self.module, self.r, self.parts)


@dataclass(frozen=True)
class Plan:
    """A checked adapter that is not in the model yet."""

    model: nn.Module
    adapter_name: str
    config: AdapterConfig
    layers: tuple[PlannedLayer, ...]
    refused: dict[str, str]
    unmatched: tuple[Unmatched, ...]


def plan(model: nn.Module, config: AdapterConfig, adapter_name: str, adapter_dtype: torch.dtype | None = None) -> Plan:
    """Finds and checks the layers that would get the adapter; raises the errors of :func:`fastlora.inject`."""
    model, state = _to_write(model)
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"adapter_name must be a word without dots, got {adapter_name!r}")
    if hasattr(nn.ParameterDict, adapter_name):
        raise ValueError(f"adapter_name must not be {adapter_name!r}, a name that torch uses itself: choose another")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"model: {name} has no shape yet: run one batch through the model first")
    if adapter_name in state.configs:
        raise ValueError(f"adapter_name: the model has an adapter {adapter_name!r} already: delete_adapter removes it")

    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        names = all_linear(model, config.notes.get("task_type"))
        if not names:
            raise ValueError(f"target_modules={ALL_LINEAR!r} matches nothing: the model has no linear layer")
        config = replace(config, target_modules=names)
    modules = modules_of(model)
    matched = [name for name in modules if config.targets(name)]
    targets = shown(config.target_modules, most=200)
    if not matched:
        remedy = unmatched.remedy(config, modules, all_linear(model))
        raise ValueError(f"target_modules={targets} matches none of the model's modules{remedy}")
    if config.use_dora:
        _check_unmerged([modules[name] for name in matched])
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    refused = {name: reason for name in matched if (reason := _obstacle(model, name, modules, places)) is not None}
    layers = tuple(_planned(name, modules[name], config, adapter_dtype) for name in matched if name not in refused)
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        raise ValueError(f"target_modules={targets} matches nothing that can have one: {reasons}")
    turned = any(is_turned(layer.module) for layer in layers)
    idle = unmatched.find(config, modules, [layer.name for layer in layers])
    return Plan(model, adapter_name, replace(config, fan_in_fan_out=turned), layers, refused, tuple(idle))


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name, without the model itself and what its adapters are made of."""
    return {name: module for name, module in model.named_modules() if name and not _inside_adapter(name, model)}


def _check_unmerged(layers: list[nn.Module]) -> None:
    """Raises RuntimeError where a base is not what DoRA's magnitudes belong to."""
    for layer in layers:
        if isinstance(layer, AdaptedLinear) and layer.merged:
            raise RuntimeError(
                f"use_dora: adapter {layer.active_adapter!r} is merged into the base, and DoRA's magnitudes are the "
                "lengths of the base's rows: call fastlora.unmerge_adapter first"
            )


def _planned(name: str, module: Any, config: AdapterConfig, dtype: torch.dtype | None) -> PlannedLayer:
    base = base_dtypes(module)
    wide = wide_of(base[0])
    if dtype not in (None, *base, wide):
        allowed = " or ".join(map(str, dict.fromkeys((*base, wide))))
        raise ValueError(f"adapter_dtype must be {allowed}, {name} being {' or '.join(map(str, base))}; got {dtype}")
    rank, scale = config.rank(name), config.scale(name)
    return PlannedLayer(name, module, rank, scale, wide if dtype is None else dtype, config.parts)


def _obstacle(model: nn.Module, name: str, modules: dict[str, nn.Module], places: Counter[int]) -> str | None:
    module, (parent, _, last) = modules[name], name.rpartition(".")
    if getattr(getattr(model, "config", None), "model_type", None) in _MAMBA_TYPES and last in _MAMBA_LAYERS:
        return "Mamba reads its weight without calling it"
    if places[id(module)] > 1:
        return "one module in several places, where PEFT adapts the first alone: copy.deepcopy it for the others"
    return obstacle(module, modules.get(parent, model))


def _inside_adapter(name: str, model: nn.Module) -> bool:
    parent, _, last = name.rpartition(".")
    return last in PARTS and isinstance(model.get_submodule(parent), AdaptedLinear)


def _to_write(model: nn.Module) -> tuple[nn.Module, State]:
    """The model inside of what torch.compile made of it, which compiles anew, and its state."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inner = unwrapped(model)
    if hasattr(inner, "peft_config"):
        raise ValueError(
            "model has PEFT's adapters already: keep using PEFT for it (fastlora.patch_peft makes it fast), or inject "
            "into the bare model"
        )
    while model is not inner:
        if "_orig_mod" not in model._modules:
            raise ValueError(
                f"model is wrapped in {type(model).__name__}, which would not know the new Parameters: call this on "
                "the model inside, before wrapping"
            )
        model = model._orig_mod  # type: ignore[assignment]
    return inner, state_of(inner) or State()
