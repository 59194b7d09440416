"""Finds the modules that an adapter is for, by PEFT's rules on their names.

A name is matched by ``exclude_modules`` first, then by ``target_modules``: a string is a regular expression for the
whole name, a list holds names and their endings (``"q_proj"`` is ``"q_proj"`` and ``"….q_proj"``), and
``"all-linear"`` is the list of every linear layer but the output embedding. ``layers_to_transform`` keeps, of a
list's endings, those whose first number in the name is one of the given.

Source: ``check_target_module_exists``, ``get_pattern_key`` and ``_maybe_include_all_linear_layers`` of PEFT 0.21.2.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

ALL_LINEAR = "all-linear"

# Heads of sequence classifiers: freshly initialised, so an adapter beside them would train against noise.
_CLASSIFIER_HEADS = ("score", "classifier")

_Value = TypeVar("_Value")


def is_target(
    name: str,
    target_modules: str | Collection[str],
    exclude_modules: str | Collection[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
) -> bool:
    """Returns True if the module of this name gets an adapter.

    Args:
        name: the module's full name.
        target_modules: regular expression for the whole name, or a collection of names and endings.
        exclude_modules: the same, for modules that get none whatever else matches.
        layers_to_transform: the layer number or numbers that take part; of a name, its first number counts.
        layers_pattern: name or names of the list of layers that the number belongs to, such as ``"layers"``.
    """
    if exclude_modules and matches(name, exclude_modules):
        return False
    if isinstance(target_modules, str) or name in target_modules:
        return matches(name, target_modules)
    if not matches(name, target_modules):
        return False
    if layers_to_transform is None or layers_to_transform == []:
        return True
    index = layer_index(name, layers_pattern)
    if isinstance(layers_to_transform, int):
        return index == layers_to_transform
    return index in layers_to_transform


def matches(name: str, modules: str | Collection[str]) -> bool:
    """Whether a regular expression matches the whole name, or one of several names is the name or its ending."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return name in modules or any(name.endswith(f".{ending}") for ending in modules)


def layer_index(name: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """The number in the name that ``layers_to_transform`` compares; None where it has none."""
    # The lazy .*? finds the first number: that of the layer, not that of an expert inside it.
    if not layers_pattern:
        patterns: Iterable[str] = (r".*?\.[^.]*",)
    else:
        layers_pattern = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
        patterns = (rf"(?:^|.*?\.){pattern}" for pattern in layers_pattern)
    for pattern in patterns:
        match = re.match(rf"{pattern}\.(?P<index>\d+)\.", name)
        if match:
            return int(match["index"])
    return None


def first_match(patterns: Mapping[str, _Value], name: str, default: _Value) -> _Value:
    """The value of the first key that matches the end of the name, from a dot on: ``rank_pattern``'s rule."""
    key = first_key(patterns, name)
    return default if key is None else patterns[key]


def first_key(patterns: Iterable[str], name: str) -> str | None:
    """The first key that matches the end of the name, from a dot on; None where none does."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def is_linear(module: nn.Module) -> bool:
    """Returns True for ``nn.Linear`` and ``Conv1D``, adapted or not, and their subclasses."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Returns True for transformers' ``Conv1D``: a linear layer that stores its weight as [in, out]."""
    # Without transformers imported there can be no such layer, and fastlora imports no optional dependency to ask.
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D)


def all_linear(model: nn.Module, task_type: str | None = None) -> list[str]:
    """Lists the layers that ``"all-linear"`` stands for in this model, by full name, sorted.

    Args:
        model: the whole model; one of transformers says itself which is its output embedding.
        task_type: PEFT's; with ``"SEQ_CLS"`` and no output embedding, the classifier's head is left out.
    """
    names = {name for name, module in model.named_modules() if is_linear(module)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is None and task_type == "SEQ_CLS" and hasattr(model, "get_output_embeddings"):
        heads = (getattr(model, head, None) for head in _CLASSIFIER_HEADS)
        output = next((head for head in heads if head is not None), None)
    return sorted(names - {name for name, module in model.named_modules() if module is output})
