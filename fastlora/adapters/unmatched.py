"""Names the entries of an adapter's options that match nothing in the model, with the names that may have been meant.

A typo among several names is no error, as a list may be made for several models; but it is never left unsaid.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from ..text import nearest, shown_names, suggestion
from .config import AdapterConfig
from .matching import first_key, is_linear, layer_index, matches

_log = logging.getLogger("fastlora")


class Unmatched(NamedTuple):
    """One entry of an option that matches nothing, and what is to be said of it."""

    option: str
    entry: Any
    why: str


def find(config: AdapterConfig, modules: Mapping[str, nn.Module], layers: Collection[str]) -> list[Unmatched]:
    """The entries of the options that match nothing.

    Args:
        config: the options of an adapter.
        modules: the model's modules by name, without the adapters' own.
        layers: the names of those that have the adapter, or would have it.
    """
    return [
        *_targets(config, modules),
        *_exclusions(config, modules),
        *_numbers(config, modules),
        *_layers_patterns(config, modules),
        *patterns(config, layers, modules),
    ]


def patterns(config: AdapterConfig, layers: Collection[str], names: Iterable[str] = ()) -> Iterator[Unmatched]:
    """The keys of ``rank_pattern`` and ``alpha_pattern`` that are the first to match none of the adapter's layers.

    Args:
        config: the options of an adapter.
        layers: the names of its layers.
        names: the names of all modules of the model, where they are known.
    """
    for option, keys in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        reached = {first_key(keys, name) for name in layers}
        for key in keys:
            if key in reached:
                continue
            shadowed = next((name for name in layers if first_key([key], name) is not None), None)
            other = next((name for name in names if first_key([key], name) is not None), None)
            if shadowed is not None:
                why = f"is never reached: {first_key(keys, shadowed)!r}, which comes before it, matches the same layers"
            elif other is not None:
                why = f"matches none of the adapter's layers, but others of the model, such as {other}"
            else:
                why = f"matches none of the adapter's layers: {suggestion(key, layers)}"
            yield Unmatched(option, key, why)


def warn(adapter_name: str, found: Iterable[Unmatched]) -> None:
    """Logs a warning for each entry."""
    for option, entry, why in found:
        _log.warning("adapter %r: %s: %r %s", adapter_name, option, entry, why)


def by_option(found: Iterable[Unmatched]) -> dict[str, tuple[Any, ...]]:
    """The entries by option."""
    entries: dict[str, tuple[Any, ...]] = {}
    for option, entry, _ in found:
        entries[option] = (*entries.get(option, ()), entry)
    return entries


def remedy(config: AdapterConfig, modules: Mapping[str, nn.Module], linear: Sequence[str]) -> str:
    """What to say where ``target_modules`` matches nothing that the other options leave, with the linear layers."""
    every = replace(config, exclude_modules=None, layers_to_transform=None, layers_pattern=None)
    if any(map(every.targets, modules)):
        idle = [*_numbers(config, modules), *_layers_patterns(config, modules)]
        said = [f"{option}: {entry!r} {why}" for option, entry, why in idle]
        return "; ".join([" that exclude_modules and layers_to_transform leave", *said])
    wanted = config.target_modules
    text = f"; its linear layers are {shown_names(linear) or 'none'}"
    if isinstance(wanted, str) and wanted in _endings(modules):
        return f"{text}. A string is a regular expression for the whole name: [{wanted!r}] would match its ending"
    near = {entry: nearest(entry, linear) for entry in ([wanted] if isinstance(wanted, str) else wanted)}
    meant = [f"{' or '.join(names)} for {entry!r}" for entry, names in near.items() if names]
    return f"{text}. Did you mean {', '.join(meant)}?" if meant else text


def _targets(config: AdapterConfig, modules: Mapping[str, nn.Module]) -> Iterator[Unmatched]:
    if isinstance(config.target_modules, str):
        return  # one expression: where it matches nothing, that is an error
    yield from _missing("target_modules", config.target_modules, modules)


def _exclusions(config: AdapterConfig, modules: Mapping[str, nn.Module]) -> Iterator[Unmatched]:
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        if excluded and not any(matches(name, excluded) for name in modules):
            yield _nothing("exclude_modules", excluded, modules)
    elif excluded:
        yield from _missing("exclude_modules", excluded, modules)
        around = _endings(modules) - _endings(name for name, module in modules.items() if not _is_around(module))
        for entry in dict.fromkeys(excluded):
            if entry in around:
                inside = rf"(.*\.)?{re.escape(entry)}\..*"
                why = f"matches no layer, but what is around layers: the string {inside!r} would exclude these"
                yield Unmatched("exclude_modules", entry, why)


def _is_around(module: nn.Module) -> bool:
    """Whether a module is no layer itself: its name was meant for the layers in it."""
    return bool(module._modules) and not (module._parameters or module._buffers or is_linear(module))


def _missing(option: str, entries: Sequence[str], modules: Mapping[str, nn.Module]) -> Iterator[Unmatched]:
    known = _endings(modules)
    for entry in dict.fromkeys(entries):
        if entry not in known:
            yield _nothing(option, entry, modules)


def _nothing(option: str, entry: str, modules: Mapping[str, nn.Module]) -> Unmatched:
    linear = [name for name, module in modules.items() if is_linear(module)]
    return Unmatched(option, entry, f"matches no module of the model: {suggestion(entry, linear)}")


def _endings(names: Iterable[str]) -> set[str]:
    """All that a list of names could hold to match one of these: itself, and what is behind each dot."""
    endings = set()
    for name in names:
        parts = name.split(".")
        endings |= {".".join(parts[first:]) for first in range(len(parts))}
    return endings


def _numbered(config: AdapterConfig, modules: Mapping[str, nn.Module]) -> list[str]:
    """The names that take part or not by their number."""
    every = replace(config, layers_to_transform=None, layers_pattern=None)
    return [name for name in modules if name not in config.target_modules and every.targets(name)]


def _numbers(config: AdapterConfig, modules: Mapping[str, nn.Module]) -> Iterator[Unmatched]:
    wanted = config.layers_to_transform
    if wanted is None:
        return
    found = {layer_index(name, config.layers_pattern) for name in _numbered(config, modules)} - {None}
    for number in dict.fromkeys(wanted if isinstance(wanted, list) else [wanted]):
        if number not in found:
            there = f"there are {_ranges(found)}" if found else "no name of a target has a number"
            yield Unmatched("layers_to_transform", number, f"selects no layer: {there}")


def _ranges(numbers: Collection[int | None]) -> str:
    """Writes numbers as ``0 to 11``, or each where there are gaps."""
    inside = sorted(number for number in numbers if number is not None)
    if len(inside) > 2 and inside[-1] - inside[0] == len(inside) - 1:
        return f"{inside[0]} to {inside[-1]}"
    return ", ".join(map(str, inside))


def _layers_patterns(config: AdapterConfig, modules: Mapping[str, nn.Module]) -> Iterator[Unmatched]:
    wanted = config.layers_pattern
    if not wanted:
        return
    entries = list(dict.fromkeys([wanted] if isinstance(wanted, str) else wanted))
    names = _numbered(config, modules)
    reached = {next((e for e in entries if layer_index(name, e) is not None), None) for name in names}
    lists = [name.rpartition(".")[0] for name in modules if name.rpartition(".")[2].isdecimal() and "." in name]
    for entry in entries:
        if entry in reached:
            continue
        if any(layer_index(name, entry) is not None for name in names):
            why = "is never reached: an entry before it matches the same layers"
        else:
            why = f"is before the number of no target: {suggestion(entry, dict.fromkeys(lists))}"
        yield Unmatched("layers_pattern", entry, why)
