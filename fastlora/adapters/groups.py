"""Groups of adapted layers, which compute together: found before the model changes, formed once it has the adapter."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from torch import nn

from .. import siblings
from .layer import AdaptedLinear
from .model import adapted_layers

# What ``fastlora.inject`` and ``load_adapter`` take.
Groups = Literal["auto"] | None | Sequence[Sequence[str]]


class Grouping(NamedTuple):
    """The groups that a model is to have: those found now, and whether they were asked for by names."""

    chosen: siblings.Chosen
    asked: bool


def find(model: nn.Module, groups: Groups, planned: Collection[nn.Module] = ()) -> Grouping:
    """Finds siblings among the layers that have adapters and those ``planned`` to get one; changes nothing.

    Raises:
        TypeError, ValueError: ``groups`` is something else, or has names that match nothing.
    """
    new = set(planned)

    def unfit(layer: nn.Module) -> str | None:
        if layer not in new and not isinstance(layer, AdaptedLinear):
            return "it has no adapter"
        return "it is in a group that was asked for by names" if groups == "auto" and _is_asked_for(layer) else None

    return Grouping(siblings.choose(model, groups, unfit), groups != "auto")


def form(model: nn.Module, grouping: Grouping) -> None:
    """Groups the adapted layers of a model anew; what was asked for by names stays until other names, or none, are."""
    for _, layer in adapted_layers(model):
        if grouping.asked or not _is_asked_for(layer):
            siblings.dissolve(layer)
    for _, parent, names in grouping.chosen.formed:
        siblings.form(parent, names, asked=grouping.asked)


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
