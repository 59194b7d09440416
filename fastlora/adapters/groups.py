"""Adapted layers that compute together, groups and gated MLPs: found before the model changes, formed afterwards."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch import nn

from .. import gated, siblings
from ..sibling_names import Chosen, Groups, choose
from .layer import AdaptedLinear
from .model import adapted_layers
from .unmatched import Unmatched


class Grouping(NamedTuple):
    """What a model is to compute together: groups found now, whether they were asked for by names, and gated MLPs."""

    chosen: Chosen
    asked: bool
    mlps: dict[str, nn.Module]
    unmatched: tuple[Unmatched, ...] = ()


def find(model: nn.Module, groups: Groups, mlp: bool, planned: Collection[nn.Module] = ()) -> Grouping:
    """Finds siblings and, for ``mlp``, gated MLPs of layers that have adapters or are ``planned`` to; changes nothing.

    Raises:
        TypeError, ValueError: ``groups`` is something else, or has names that match nothing.
    """
    new = set(planned)

    def bare(layer: nn.Module) -> str | None:
        return None if layer in new or isinstance(layer, AdaptedLinear) else "it has no adapter"

    def unfit(layer: nn.Module) -> str | None:
        kept = groups == "auto" and _is_asked_for(layer)
        return bare(layer) or ("it is in a group that was asked for by names" if kept else None)

    chosen = choose(model, groups, unfit)
    mlps = gated.find(model, bare) if mlp else {}
    idle = (Unmatched("mlp", True, gated.why_none(model)),) if mlp and not mlps else ()
    return Grouping(chosen, groups != "auto", mlps, idle)


def form(model: nn.Module, grouping: Grouping) -> None:
    """Groups the adapted layers of a model anew; what was asked for by names stays until other names, or none, are."""
    for _, layer in adapted_layers(model):
        if grouping.asked or not _is_asked_for(layer):
            siblings.dissolve(layer)
    for _, parent, names in grouping.chosen.formed:
        siblings.form(parent, names, asked=grouping.asked)
    for module in grouping.mlps.values():
        gated.swap(module)


def formed(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of the layers of each group of a model."""
    names: dict[int, list[str]] = {}
    for name, layer in adapted_layers(model):
        if (group := siblings.group_of(layer)) is not None:
            names.setdefault(id(group), []).append(name)
    return tuple(tuple(each) for each in names.values())


def _is_asked_for(layer: nn.Module) -> bool:
    group = siblings.group_of(layer)
    return group is not None and group.asked
