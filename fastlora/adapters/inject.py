"""``fastlora.inject``: puts an adapter beside the linear layers of a model, into all of them or into none."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import gated
from ..gated import GatedMLP
from ..mergeable import base_weight
from ..ops.norms import forget_norms, row_norms, zero_row
from ..sibling_names import Groups
from ..start import is_above_full, start_adapter, start_bias
from ..text import listed, starred
from . import groups as grouping
from . import unmatched
from .config import AdapterConfig, check_task_type
from .groups import Grouping
from .layer import features, is_turned
from .model import adapted_layers, check_merged, set_adapter, share_states, state_of
from .plan import Plan, PlannedLayer, plan
from .state import State
from .swap import add_adapter
from .unmatched import Unmatched

_log = logging.getLogger("fastlora")


class LayerReport(NamedTuple):
    """One adapted layer: its name, its shape, and the adapter's rank and scale in it."""

    name: str
    in_features: int
    out_features: int
    r: int
    scale: float


@dataclass(frozen=True)
class InjectionReport:
    """The layers that got an adapter, the layers refused with the reasons, and parameter counts; ``print`` it.

    ``groups`` has the names of the layers that compute together where they are called with one input, of all adapters,
    ``ungrouped`` the name of each layer that could have been in a group → the reason why it is in none, and ``mlps``
    the names of the gated MLPs that run as one product. ``unmatched`` has, by option, the entries that match nothing.
    """

    adapter_name: str
    layers: tuple[LayerReport, ...]
    refused: dict[str, str]
    trainable: int
    total: int
    groups: tuple[tuple[str, ...], ...] = ()
    ungrouped: dict[str, str] = field(default_factory=dict)
    mlps: tuple[str, ...] = ()
    unmatched: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"adapter {self.adapter_name!r}: {len(self.layers)} layers; {self.trainable:,} of {self.total:,} "
            f"parameters train ({self.trainable / max(self.total, 1):.2%})"
        ]
        kinds: dict[tuple[Any, ...], int] = {}
        for name, *rest in self.layers:
            kind = (starred(name), *rest)
            kinds[kind] = kinds.get(kind, 0) + 1
        for (name, k, n, r, scale), count in kinds.items():
            lines.append(f"  {count} x {name}: {k} -> {n}, r={r}, scale={scale:g}")
        lines += gated.report(self.groups, self.mlps, self.ungrouped)
        lines += [f"  matches nothing: {name}: {listed(map(repr, idle))}" for name, idle in self.unmatched.items()]
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
    lora_bias: bool = False,
    use_dora: bool = False,
    task_type: str | None = None,
    adapter_name: str = "default",
    adapter_dtype: torch.dtype | None = None,
    groups: Groups = "auto",
    mlp: bool = False,
) -> InjectionReport:
    """Puts an adapter beside every matching linear layer of a model, in place; from then on the adapter alone trains.

    Each layer computes ``y = x Wᵀ + scale · D(x) Aᵀ Bᵀ + bias``. It stays the same object with the same Parameters
    under the same names, so ties and hooks survive, and a checkpoint of the base loads with ``strict=False``. Make the
    optimiser afterwards: an older one has no adapter in it, and moves none, without an error. Called again with another
    ``adapter_name``, the model gets one more adapter on the same base, not active until :func:`set_adapter`; the first
    one is active at once.

    Args:
        model: any torch model; its ``nn.Linear`` layers, transformers' ``Conv1D`` and bitsandbytes' ``Linear4bit`` and
            ``Linear8bitLt`` can have adapters. A quantised weight stays packed: it is made dense for each product.
        target_modules: names of layers, or endings of names after a dot; a string is a regular expression for the whole
            name, and ``"all-linear"`` means every linear layer but a transformers model's output embedding.
        r: rank, at least 1.
        lora_alpha: numerator of the scale.
        lora_dropout: probability of dropout on the adapter's input, 0 <= p < 1.
        use_rslora: scale = lora_alpha / sqrt(r) instead of lora_alpha / r.
        rank_pattern: other ranks by regular expression for the end of the name; the first that matches counts.
        alpha_pattern: the same for lora_alpha.
        exclude_modules: names, endings or a regular expression for layers that get no adapter.
        layers_to_transform: numbers of the layers that take part, with a list of ``target_modules``.
        layers_pattern: name of the list that these numbers count, such as ``"layers"``.
        init_lora_weights: True for A Kaiming-uniform, ``"gaussian"`` for A normal, both with B zero; False for an
            update that is not zero at the start.
        lora_bias: True for a bias of the adapter's own: scale · lora_bias [N] is added; it trains too, and starts as
            zeros. A layer without a bias can have one, but not merge it. Such layers are in no group.
        use_dora: True for DoRA (:func:`fastlora.dora_linear`): the length of each row of W + scale · B A is learned by
            itself, a vector ``lora_magnitude`` [N] more, which starts as what that length is. Such layers are in no
            group.
        task_type: PEFT's, such as ``"CAUSAL_LM"``: a note in the saved adapter, and with ``"SEQ_CLS"`` the classifier's
            head is not among ``"all-linear"``.
        adapter_name: name of the adapter.
        adapter_dtype: dtype of A and B. By default that of the base, and float32 on a half-precision or quantised base,
            where small steps would otherwise be lost in rounding.
        groups: layers that compute together, as :func:`fastlora.lora_linear_group`, in calls with one input: the first
            of them that is called computes all, and the others take their part where they prove that it is theirs.
            ``"auto"`` for children of one parent named q_proj, k_proj, v_proj; query, key, value; gate_proj, up_proj;
            or w1, w3; but not of cross attention. Tuples of other names, such as ``[("wq", "wk", "wv")]``, which stay
            when a later call says ``"auto"``; or None. Said of the whole model, whichever adapter is active.
        mlp: run modules whose forward is, by its source, ``down(act(gate(x)) * up(x))`` with silu or gelu as
            :func:`fastlora.lora_swiglu_mlp`, which keeps half as much for the backward, until the adapters are
            unloaded; their three layers are not called then. Calls in which one of these has hooks, is merged or has no
            part in the active adapter run the module's own forward.

    Returns:
        A report: the layers, those refused with the reasons and the entries of options that match nothing (both are
        logged as warnings too), parameter counts, and the groups.

    Raises:
        TypeError, ValueError: an option is of the wrong kind or out of range; the name is taken; nothing matches; or
            everything that matches was refused; names in ``groups`` are of different parents, or match nothing. The
            model is then as it was.
        RuntimeError: with ``use_dora``, another adapter is merged into the base.

    Source: Hu et al., 2021, https://arxiv.org/abs/2106.09685; matching as in PEFT 0.21.2.
    """
    check_task_type(task_type)
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
        lora_bias=lora_bias,
        use_dora=use_dora,
        notes={} if task_type is None else {"task_type": task_type},
    )
    return attach(plan(model, config, adapter_name, adapter_dtype), groups, mlp)


def _listed(value: Any) -> Any:
    """Makes lists of tuples and sets, for JSON; sets are sorted, so that the same call saves the same file."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, (tuple, range)) or hasattr(value, "keys") else value


def attach(
    plan: Plan, groups: Groups, mlp: bool, tensors: dict[str, dict[str, Tensor]] | None = None
) -> InjectionReport:
    """Carries a plan out, with initial values or with those given by layer and part, such as ``"lora_A"``."""
    # Everything that can fail, memory above all, comes before the first change of the model.
    found = grouping.find(plan.model, groups, mlp, [layer.module for layer in plan.layers])
    adapters = []
    for layer in plan.layers:
        device = layer.module.weight.device
        with torch.no_grad(), torch.inference_mode(False):
            parts = {part: torch.empty(shape, dtype=layer.dtype, device=device) for part, shape in layer.shapes.items()}
            if tensors is None:
                _start(layer, parts, plan.config)
            else:
                for part, values in parts.items():
                    values.copy_(tensors[layer.name][part])
        adapters.append((layer, parts))

    model, name = plan.model, plan.adapter_name
    state = state_of(model)
    first = state is None
    if state is None:
        check_merged(model, name)
        state = State(
            disabled=any(layer.adapters_disabled for _, layer in adapted_layers(model)),
            was_trainable=[name for name, p in model.named_parameters() if p.requires_grad],
        )
        model._fastlora = state  # type: ignore[assignment]
        model.requires_grad_(False)
    for layer, parts in adapters:
        add_adapter(layer.module, state, name, parts, layer.scale, plan.config.lora_dropout)
    share_states(model)
    state.configs[name] = plan.config
    if first:
        set_adapter(model, name)
    grouping.form(model, found)
    idle = [*plan.unmatched, *found.unmatched]
    unmatched.warn(name, idle)
    if plan.config.lora_bias and (bare := [each.name for each in plan.layers if each.module.bias is None]):
        _log.warning("adapter %r: lora_bias cannot be merged into layers that have no bias: %s", name, listed(bare))
    if high := [each.name for each in plan.layers if is_above_full(each.r, *features(each.module))]:
        _log.warning(
            "adapter %r: the rank is above min(in_features, out_features) in %s: no update of these has a higher one, "
            "and the adapter is larger than the layer",
            name, listed(high),
        )  # fmt: skip
    for refused, reason in plan.refused.items():
        _log.warning("adapter %r: %s gets none: %s", name, refused, reason)
    return report(model, name, plan.refused, found, idle)


def _start(layer: PlannedLayer, parts: dict[str, Tensor], config: AdapterConfig) -> None:
    """Fills the parts of a new adapter as PEFT does."""
    start_adapter(parts["lora_A"], parts["lora_B"], config.init_lora_weights)
    if "lora_bias" in parts:
        start_bias(parts["lora_bias"], layer.r, config.init_lora_weights)
    if "lora_magnitude" in parts:
        parts["lora_magnitude"].copy_(_lengths(layer, parts))


def _lengths(layer: PlannedLayer, parts: dict[str, Tensor]) -> Tensor:
    """‖W + scale · B A‖ of each row [N]."""
    forget_norms(layer.module.weight)
    weight = base_weight(layer.module)
    weight = weight.T if is_turned(layer.module) else weight
    norms = row_norms(weight, parts["lora_A"], parts["lora_B"], layer.scale)
    if (row := zero_row(norms)) is not None:
        raise ValueError(
            f"use_dora: row {row} of {layer.name}.weight is zero, and DoRA divides by the length of each row: leave "
            f"{layer.name} out (exclude_modules)"
        )
    return norms


def _elements(parameter: Tensor) -> int:
    """The numbers that a Parameter stands for: of a packed one, those it is made dense to."""
    return math.prod(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))


def report(
    model: nn.Module, adapter_name: str, refused: dict[str, str], found: Grouping, idle: Sequence[Unmatched]
) -> InjectionReport:
    """Makes the report on an adapter and groups that the model has."""
    groups = grouping.formed(model)
    grouped = {name for names in groups for name in names}
    layers = adapted_layers(model, adapter_name)
    return InjectionReport(
        adapter_name=adapter_name,
        layers=tuple(
            LayerReport(name, *features(layer), layer.lora_A[adapter_name].shape[0], layer.scale[adapter_name])
            for name, layer in layers
        ),
        refused=refused,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(map(_elements, model.parameters())),
        groups=groups,
        ungrouped={name: reason for name, reason in found.chosen.refused.items() if name not in grouped},
        mlps=tuple(name for name, module in model.named_modules() if isinstance(module, GatedMLP)),
        unmatched=unmatched.by_option(idle),
    )
