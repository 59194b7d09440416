"""The adapters of a whole model: makes one active, switches them off and on, takes them out again.

An injected model keeps its :class:`State` as ``_fastlora``. A layer reads the state of the innermost injected model
around it, so that a part that was injected on its own keeps its own switches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from torch import nn

from .. import gated
from ..mergeable import Mergeable
from ..ownership import unwrapped
from ..text import shown_names
from .config import AdapterConfig
from .layer import AdaptedLinear, parts_of
from .state import State
from .swap import remove_adapter, restore


def state_of(model: nn.Module) -> State | None:
    """Returns the state that ``inject`` keeps on the model; None where it was never called."""
    return model.__dict__.get("_fastlora")


def injected_models(model: nn.Module) -> Iterator[tuple[nn.Module, State]]:
    """Yields the model and its parts that were injected on their own, with their states; outer ones first."""
    for module in model.modules():
        if (state := state_of(module)) is not None:
            yield module, state


def share_states(model: nn.Module) -> None:
    """Gives every adapted layer the state of the innermost injected model around it."""
    for part, state in injected_models(model):
        for _, layer in adapted_layers(part):
            layer._state = state


def adapted_model(model: nn.Module) -> tuple[nn.Module, State]:
    """Returns the unwrapped model and its state, and shares the state with layers that were added since.

    Raises:
        ValueError: the model has no adapters of fastlora's.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("model has PEFT's adapters, not fastlora's: use PEFT's own methods, such as save_pretrained")
    model = unwrapped(model)
    state = state_of(model)
    if state is None:
        own = next((module for module in model.modules() if isinstance(module, Mergeable)), None)
        if own is not None and not isinstance(own, AdaptedLinear):
            raise ValueError(
                f"model has no named adapters: its {type(own).__name__} layers keep theirs themselves, so save and "
                "load the lora_ keys of model.state_dict(), and call layer.merge() and layer.unmerge()"
            )
        raise ValueError(
            "model has no adapters: call fastlora.inject or fastlora.load_adapter on this very module first (a part of "
            "it, or a model around it, has its own)"
        )
    share_states(model)
    return model, state


def adapted_layers(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, AdaptedLinear]]:
    """Yields names and layers that have adapters, or that have this one."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear) and (adapter_name is None or adapter_name in module.lora_A):
            yield name, module


def checked_name(state: State, adapter_name: str) -> AdapterConfig:
    """Returns the options of an adapter.

    Raises:
        ValueError: the model has none of that name.
    """
    if adapter_name not in state.configs:
        raise ValueError(f"adapter_name {adapter_name!r} is unknown: the model has {shown_names(state.configs)}")
    return state.configs[adapter_name]


def set_adapter(model: nn.Module, adapter_name: str | None) -> None:
    """Makes this adapter the active one, and the only one that trains; None leaves the base alone.

    Switching costs nothing: the base is one and the same, and is not copied.

    Raises:
        ValueError: the model has no adapter of that name.
        RuntimeError: another adapter is merged into the base.
    """
    model, state = adapted_model(model)
    if adapter_name is not None:
        checked_name(state, adapter_name)
    check_merged(model, adapter_name)
    for _, layer in adapted_layers(model):
        for name in layer.scale:
            for parameter in parts_of(layer, name).values():
                parameter.requires_grad_(name == adapter_name)
    for _, state in injected_models(model):
        state.active = adapter_name


def check_merged(model: nn.Module, adapter_name: str | None) -> None:
    """Raises RuntimeError where an adapter of another name is merged into the base."""
    for _, layer in adapted_layers(model):
        if layer.merged and layer.active_adapter != adapter_name:
            raise RuntimeError(
                f"adapter {layer.active_adapter!r} is merged into the base: call fastlora.unmerge_adapter first"
            )


@dataclass(frozen=True)
class AdapterStatus:
    """The adapters of a model; ``print`` it.

    Attributes:
        names: of all adapters, in the order in which they came.
        active: the name of the active one, or None.
        disabled: whether the adapters are switched off.
        merged: the name of the one that is merged into the base, or None.
    """

    names: tuple[str, ...]
    active: str | None
    disabled: bool
    merged: str | None

    def __str__(self) -> str:
        marks: dict[str, list[str]] = {name: [] for name in self.names}
        for name, mark in ((self.active, "active"), (self.merged, "merged")):
            if name in marks:
                marks[name].append(mark)
        listed = ", ".join(f"{name!r} ({', '.join(said)})" if said else repr(name) for name, said in marks.items())
        return f"adapters: {listed}" + ("; all are switched off" if self.disabled else "")


def adapter_status(model: nn.Module) -> AdapterStatus:
    """Tells which adapters a model has, which one is active, and whether they are switched off or merged.

    Raises:
        ValueError: the model has no adapters.
    """
    model, state = adapted_model(model)
    merged = next((layer.active_adapter for _, layer in adapted_layers(model) if layer.merged), None)
    return AdapterStatus(tuple(state.configs), state.active, state.disabled, merged)


def disable(model: nn.Module) -> AbstractContextManager[object]:
    """Switches all adapters of a model off: the base alone computes. Merged or not, to the bit.

    Works at once, and as a context manager until its end: ``with fastlora.disable(model): ...``. ``fastlora.enable``
    switches them on again. Which adapter is active and what trains stay as they are.

    Raises:
        ValueError: the model has no adapters.
    """
    model, _ = adapted_model(model)
    before = ExitStack()
    for _, state in injected_models(model):
        before.callback(setattr, state, "disabled", state.disabled)
        state.disabled = True
    return before


def enable(model: nn.Module) -> None:
    """Switches the adapters on again after :func:`disable`.

    Raises:
        ValueError: the model has no adapters.
    """
    for _, state in injected_models(adapted_model(model)[0]):
        state.disabled = False


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Removes one adapter. If it was active, none is afterwards; if it was the last, the model is as it was before.

    Raises:
        ValueError: the model has no adapter of that name.
    """
    model, state = adapted_model(model)
    checked_name(state, adapter_name)
    if len(state.configs) == 1:
        unload(model)
        return
    for _, layer in list(adapted_layers(model, adapter_name)):
        remove_adapter(layer, adapter_name)
    del state.configs[adapter_name]
    if state.active == adapter_name:
        set_adapter(model, None)


def unload(model: nn.Module) -> nn.Module:
    """Removes all adapters: layers, base weights (bit for bit) and what trains are as they were before the first one.

    Returns:
        The model, which is the one given, unwrapped.

    Raises:
        ValueError: the model has no adapters.
    """
    model, _ = adapted_model(model)
    for _, layer in list(adapted_layers(model)):
        layer.unmerge()
        restore(layer)
    for module in model.modules():
        gated.restore(module)
    for part, state in injected_models(model):
        parameters = dict(part.named_parameters())
        for name in state.was_trainable:
            if name in parameters:
                parameters[name].requires_grad_(True)
        del part._fastlora
    return model
