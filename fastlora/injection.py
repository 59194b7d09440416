"""``fastlora.inject``: an adapter put beside the linear layers of a model, planned in whole before anything changes."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .adapted import AdaptedConv1D, AdaptedLinear, add_adapter, features, obstacle
from .adapter_config import AdapterConfig
from .matching import ALL_LINEAR, all_linear, first_match, is_conv1d
from .mergeable import start_adapter
from .switching import State, adapted_layers, set_adapter, shown_names, state_of, unwrapped

_log = logging.getLogger("fastlora")

# These read the weights of the named layers without calling them.
_MAMBA_TYPES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_MAMBA_LAYERS = ("conv1d", "out_proj")


class LayerReport(NamedTuple):
    """One adapted layer: its name, its shape, and the adapter's rank and scale in it."""

    name: str
    in_features: int
    out_features: int
    r: int
    scale: float


@dataclass(frozen=True)
class InjectionReport:
    """What an adapter was put beside, what was refused and why, and how much trains now; ``print`` it."""

    adapter_name: str
    layers: tuple[LayerReport, ...]
    refused: dict[str, str]
    trainable: int
    total: int

    def __str__(self) -> str:
        lines = [
            f"adapter {self.adapter_name!r}: {len(self.layers)} layers; {self.trainable:,} of {self.total:,} "
            f"parameters train ({self.trainable / max(self.total, 1):.2%})"
        ]
        kinds: dict[tuple[Any, ...], int] = {}
        for name, *rest in self.layers:
            kind = (re.sub(r"\d+", "*", name), *rest)
            kinds[kind] = kinds.get(kind, 0) + 1
        for (name, k, n, r, scale), count in kinds.items():
            lines.append(f"  {count} x {name}: {k} -> {n}, r={r}, scale={scale:g}")
        lines += [f"  left alone: {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def inject(
    model: nn.Module,
    target_modules: str | Collection[str],
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    *,
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    exclude_modules: str | Collection[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    init_lora_weights: bool | str = True,
    task_type: str | None = None,
    adapter_name: str = "default",
    adapter_dtype: torch.dtype | None = None,
) -> InjectionReport:
    """Puts an adapter beside every matching linear layer of a model, in place; from then on the adapter alone trains.

    Each layer computes ``y = x Wᵀ + scale · D(x) Aᵀ Bᵀ + bias``. It stays the same object with the same Parameters
    under the same names, so ties and hooks survive, and a checkpoint of the base loads with ``strict=False``. Called
    again with another ``adapter_name``, the model gets one more adapter on the same base, not active until
    :func:`set_adapter`; the first one is active at once.

    Args:
        model: any torch model; its ``nn.Linear`` and transformers' ``Conv1D`` layers can have adapters.
        target_modules: names of layers, or endings of names after a dot; a string is a regular expression for the whole
            name, and ``"all-linear"`` means every linear layer but a transformers model's output embedding.
        r: rank, at least 1.
        lora_alpha: numerator of the scale.
        lora_dropout: probability of dropout on the adapter's input, 0 <= p < 1.
        use_rslora: scale = lora_alpha / sqrt(r) instead of lora_alpha / r.
        rank_pattern: other ranks by regular expression for the end of the name; the first that matches counts.
        alpha_pattern: the same for lora_alpha.
        exclude_modules: names, endings or a regular expression for what gets no adapter.
        layers_to_transform: numbers of the layers that take part, with a list of ``target_modules``.
        layers_pattern: name of the list that these numbers count, such as ``"layers"``.
        init_lora_weights: True for A Kaiming-uniform, ``"gaussian"`` for A normal, both with B zero; False for an
            update that is not zero at the start.
        task_type: PEFT's, such as ``"CAUSAL_LM"``: a note in the saved adapter, and with ``"SEQ_CLS"`` the classifier's
            head is not among ``"all-linear"``.
        adapter_name: what the adapter is called.
        adapter_dtype: dtype of A and B. By default that of the base, and float32 on a half-precision base, where small
            steps would otherwise be lost in rounding.

    Returns:
        A report: the layers, those refused with the reasons (they are logged as warnings too), parameter counts.

    Raises:
        TypeError, ValueError: an option is of the wrong kind or out of range; the name is taken; nothing matches; or
            everything that matches was refused. The model is then as it was.

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685; matching as in PEFT 0.21.2.
    """
    config = AdapterConfig(
        target_modules=_listed(target_modules),
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        exclude_modules=_listed(exclude_modules),
        layers_to_transform=_listed(layers_to_transform),
        layers_pattern=_listed(layers_pattern),
        init_lora_weights=init_lora_weights,
        notes={} if task_type is None else {"task_type": task_type},
    )
    return attach(plan(model, config, adapter_name, adapter_dtype))


def _listed(value: Any) -> Any:
    """A tuple or a set as a list, which JSON has; sets sorted, so that the same call saves the same file."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, (tuple, range)) or hasattr(value, "keys") else value


class PlannedLayer(NamedTuple):
    """One layer that will have an adapter, with the dtype of A and B."""

    name: str
    module: Any
    r: int
    scale: float
    dtype: torch.dtype

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """What A and B measure, by PEFT's names."""
        k, n = features(self.module)
        return {"lora_A": (self.r, k), "lora_B": (n, self.r)}


@dataclass(frozen=True)
class Plan:
    """Everything about an adapter that is to come, checked; nothing is changed yet."""

    model: nn.Module
    adapter_name: str
    config: AdapterConfig
    layers: tuple[PlannedLayer, ...]
    refused: dict[str, str]


def plan(model: nn.Module, config: AdapterConfig, adapter_name: str, adapter_dtype: torch.dtype | None = None) -> Plan:
    """Which layers would get the adapter, and what may speak against it; the errors of :func:`inject`."""
    state = _state_to_write(model)
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
    modules = {name: module for name, module in model.named_modules() if name and not _inside_adapter(name, model)}
    matched = [name for name in modules if config.targets(name)]
    if not matched:
        raise ValueError(
            f"target_modules={_shown(config.target_modules)} matches none of the model's modules; its linear layers "
            f"are {shown_names(all_linear(model)) or 'none'}"
        )
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    refused = {name: reason for name in matched if (reason := _obstacle(model, name, modules, places)) is not None}
    layers = tuple(_planned(name, modules[name], config, adapter_dtype) for name in matched if name not in refused)
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:5])
        raise ValueError(f"target_modules={_shown(config.target_modules)} matches nothing that can have one: {reasons}")
    turned = any(isinstance(layer.module, AdaptedConv1D) or is_conv1d(layer.module) for layer in layers)
    return Plan(model, adapter_name, replace(config, fan_in_fan_out=turned), layers, refused)


def _planned(name: str, module: Any, config: AdapterConfig, dtype: torch.dtype | None) -> PlannedLayer:
    base = module.weight.dtype
    wide = torch.promote_types(base, torch.float32)
    if dtype not in (None, base, wide):
        raise ValueError(
            f"adapter_dtype must be {base}{f' or {wide}' if wide != base else ''}, {name} being {base}; got {dtype}"
        )
    return PlannedLayer(name, module, config.rank(name), config.scale(name), wide if dtype is None else dtype)


def attach(plan: Plan, tensors: dict[str, dict[str, Tensor]] | None = None) -> InjectionReport:
    """Carries a plan out: with a fresh start, or with the given A and B by layer and ``"lora_A"``, ``"lora_B"``."""
    # Everything that can fail, memory above all, comes before the first change of the model.
    adapters = []
    for layer in plan.layers:
        device = layer.module.weight.device
        with torch.no_grad(), torch.inference_mode(False):
            a, b = (torch.empty(shape, dtype=layer.dtype, device=device) for shape in layer.shapes.values())
            if tensors is None:
                start_adapter(a, b, plan.config.init_lora_weights)
            else:
                a.copy_(tensors[layer.name]["lora_A"])
                b.copy_(tensors[layer.name]["lora_B"])
        adapters.append((layer.module, plan.adapter_name, a, b, layer.scale, plan.config.lora_dropout))

    model, name = plan.model, plan.adapter_name
    state = state_of(model)
    first = state is None
    if state is None:
        was_trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        state = State(was_trainable=was_trainable)
        model._fastlora = state  # type: ignore[assignment]
        model.requires_grad_(False)
    disabled = any(layer.adapters_disabled for _, layer in adapted_layers(model))
    for adapter in adapters:
        add_adapter(*adapter)
    state.configs[name] = plan.config
    if first:
        set_adapter(model, name)
    for _, adapted in adapted_layers(model):
        adapted.active_adapter, adapted.adapters_disabled = state.active, disabled
    for option, patterns in (("rank_pattern", plan.config.rank_pattern), ("alpha_pattern", plan.config.alpha_pattern)):
        idle = [key for key in patterns if not any(first_match({key: True}, each.name, False) for each in plan.layers)]
        if idle:
            _log.warning("adapter %r: %s has keys that match none of its layers: %s", name, option, idle)
    for refused, reason in plan.refused.items():
        _log.warning("adapter %r: %s gets none: %s", name, refused, reason)
    return report(model, name, plan.refused)


def report(model: nn.Module, adapter_name: str, refused: dict[str, str]) -> InjectionReport:
    """What there is to say about an adapter that the model has."""
    layers = adapted_layers(model, adapter_name)
    return InjectionReport(
        adapter_name=adapter_name,
        layers=tuple(
            LayerReport(name, *features(layer), layer.lora_A[adapter_name].shape[0], layer.scale[adapter_name])
            for name, layer in layers
        ),
        refused=refused,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
    )


def _obstacle(model: nn.Module, name: str, modules: dict[str, nn.Module], places: Counter[int]) -> str | None:
    module, (parent, _, last) = modules[name], name.rpartition(".")
    if getattr(getattr(model, "config", None), "model_type", None) in _MAMBA_TYPES and last in _MAMBA_LAYERS:
        return "Mamba reads its weight without calling it"
    if places[id(module)] > 1:
        return "one module in several places, where PEFT adapts the first alone: copy.deepcopy it for the others"
    return obstacle(module, modules.get(parent, model))


def _inside_adapter(name: str, model: nn.Module) -> bool:
    parent, _, last = name.rpartition(".")
    return last in ("lora_A", "lora_B") and isinstance(model.get_submodule(parent), AdaptedLinear)


def _state_to_write(model: nn.Module) -> State:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if hasattr(model, "peft_config"):
        raise ValueError(
            "model has PEFT's adapters already: keep using PEFT for it (fastlora.patch_peft makes it fast), or inject "
            "into the bare model"
        )
    if unwrapped(model) is not model:
        raise ValueError(f"model is wrapped in {type(model).__name__}: call this on the model inside, before wrapping")
    return state_of(model) or State()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."
