"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Source: PEFT 0.21.2, ``save_pretrained`` and ``get_peft_model_state_dict``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ownership import owner_of, unwrapped
from ..sibling_names import Groups
from ..text import shown_names
from . import groups as grouping
from . import sharded, unmatched
from .config import AdapterConfig, check_task_type
from .folder import WEIGHTS, Adapters, key_of, read_adapter, write_adapter
from .inject import InjectionReport, attach, report
from .layer import base_dtypes, parts_of, shapes_of
from .model import adapted_layers, adapted_model, checked_name, state_of
from .plan import Plan, PlannedLayer, modules_of, plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    task_type: str | None = None,
) -> None:
    """Writes an adapter as PEFT does: ``PeftModel.from_pretrained(base, folder)`` and :func:`load_adapter` read it.

    ``AutoPeftModel.from_pretrained(folder)`` reads it too, where the model was loaded from a folder or by a name.

    A process that is killed at any moment leaves the old adapter whole. Other files in the folder stay. Where several
    processes hold the model whole, one of them saves. Where it is sharded (``fully_shard``, ``fastlora.parallel``), all
    ranks of its mesh call this: the tensors are gathered one by one, the first rank writes them, and the others wait.

    Args:
        model: a model with adapters of :func:`fastlora.inject`'s, in torch.compile's or DDP's wrapper too.
        folder: folder to write; made where it is missing.
        adapter_name: name of the adapter.
        task_type: PEFT's, such as ``"CAUSAL_LM"``, by which ``AutoPeftModelForCausalLM`` and its kin wrap the model; by
            default that of ``inject`` or of the file that was loaded. Without any, the model's class is noted.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the model has no such adapter, it is a PEFT model, or the adapter is not finite or not whole;
            ``task_type`` is unknown.
        NotADirectoryError: ``folder`` is a file.
        RuntimeError: the adapter is sharded, and another rank could not check or write it; the message quotes it.
    """
    check_task_type(task_type)
    model, state = adapted_model(model)
    config = checked_name(state, adapter_name)
    sharded.reshard(model)
    parts = list(_parts(model, config, adapter_name))
    config = replace(config, notes=_notes(model, config, task_type))
    mesh = sharded.mesh_of(part.parameter for part in parts)
    if mesh is None:
        write_adapter(Path(folder), config, {part.key: part.whole(part.parameter.detach()) for part in parts})
    else:
        _save_together(Path(folder), config, parts, mesh)


def _notes(model: nn.Module, config: AdapterConfig, task_type: str | None) -> dict[str, Any]:
    """The notes of a saved adapter: its own, the name of the base, and the task or else the class of the model."""
    notes = {"base_model_name_or_path": getattr(model, "name_or_path", None) or None} | config.notes
    if task_type is not None:
        notes["task_type"] = task_type
    kind = sharded.kind_of(model)
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return notes | {"auto_mapping": None if notes.get("task_type") else mapping}


class _Part(NamedTuple):
    """One tensor of the file: its key, its name in messages, and the Parameter and the shape that it has whole."""

    key: str
    name: str
    parameter: Tensor
    shape: tuple[int, ...]

    def whole(self, tensor: Tensor) -> Tensor:
        """The tensor as it is written; raises ValueError where it is not whole or not finite."""
        if tensor.device.type == "meta" or tuple(tensor.shape) != self.shape or type(tensor) is not Tensor:
            raise ValueError(
                f"{self.name} is no whole tensor {list(self.shape)} here, but {type(tensor).__name__} "
                f"{list(tensor.shape)} on {tensor.device}: gather the shards first"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{self.name} holds values that are not finite: the training diverged; nothing was written"
            )
        return tensor.contiguous()


def _save_together(folder: Path, config: AdapterConfig, parts: Sequence[_Part], mesh: DeviceMesh) -> None:
    """Gathers the parts on all ranks of the mesh, and writes them on the first; an error is raised on all."""
    is_first = sharded.is_first(mesh)
    tensors: dict[str, Tensor] = {}
    error: Exception | None = None
    for part in parts:
        tensor = sharded.gathered(part.parameter)
        try:
            tensor = part.whole(tensor)
            if is_first:
                tensors[part.key] = tensor.cpu()
        except Exception as failure:
            error = error or failure
    sharded.agree(mesh, error)
    try:
        if is_first:
            write_adapter(folder, config, tensors)
    except Exception as failure:
        error = failure
    sharded.agree(mesh, error)


def _parts(model: nn.Module, config: AdapterConfig, adapter_name: str) -> Iterator[_Part]:
    for name, layer in adapted_layers(model, adapter_name):
        shapes = shapes_of(layer, config.rank(name), config.parts)
        for part, parameter in parts_of(layer, adapter_name).items():
            yield _Part(key_of(name, part), f"{name}.{part}", parameter, shapes[part])


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    adapter_dtype: torch.dtype | None = None,
    *,
    groups: Groups = "auto",
    mlp: bool = False,
) -> InjectionReport:
    """Puts an adapter that PEFT or :func:`save_adapter` wrote into a model, as :func:`fastlora.inject` would.

    The first adapter is active and trains; a further one waits for :func:`fastlora.set_adapter`. Where the model has an
    adapter of this name already, its values are replaced, the Parameters staying the same. Everything is checked before
    anything changes.

    Args:
        model: the base model, or one with adapters.
        folder: a local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: name that the adapter gets.
        adapter_dtype: dtype of A and B; by default that of the file where it goes with the base, otherwise float32 (or
            that of the base, if wider).
        groups: layers that compute together, as in :func:`fastlora.inject`.
        mlp: run gated MLPs as one product, as there.

    Returns:
        The report of :func:`fastlora.inject`.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a file is damaged or no adapter's; an option is not supported; the adapter belongs to another model;
            it is not finite; the model is sharded; or ``groups`` is refused.
        TypeError: ``groups`` is neither "auto", None, nor tuples of names.
        RuntimeError: the adapter is a DoRA, and another is merged into the base.
    """
    config, adapters = read_adapter(folder)
    source = str(Path(folder) / WEIGHTS)
    inner = unwrapped(model) if isinstance(model, nn.Module) else model
    state = state_of(inner) if isinstance(inner, nn.Module) else None
    if state is not None and adapter_name in state.configs:
        model = inner
        found = grouping.find(model, groups, mlp)
        if adapter_dtype is not None:
            raise ValueError(
                f"adapter_dtype: the model has an adapter {adapter_name!r} already, whose dtype stays: leave it out"
            )
        replace_values(model, adapter_name, config, adapters, source)
        grouping.form(model, found)
        idle = [*unmatched.find(config, modules_of(model), list(adapters)), *found.unmatched]
        unmatched.warn(adapter_name, idle)
        return report(model, adapter_name, {}, found, idle)
    try:
        planned = plan(model, config, adapter_name, adapter_dtype)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    _check_fit(planned.model, adapters, {layer.name: layer.shapes for layer in planned.layers}, planned.refused, source)
    for layer in planned.layers:
        if layer.module.weight.device.type == "meta":
            raise ValueError(f"{layer.name} is on the meta device, which holds no data: load the base model first")
    if adapter_dtype is None:
        planned = _in_dtype_of_file(planned, adapters)
    return attach(planned, groups, mlp, adapters)


def _in_dtype_of_file(planned: Plan, adapters: Adapters) -> Plan:
    def kept(layer: PlannedLayer) -> PlannedLayer:
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in adapters[layer.name].values()))
        return layer._replace(dtype=dtype) if dtype in base_dtypes(layer.module) else layer

    return replace(planned, layers=tuple(map(kept, planned.layers)))


def replace_values(model: nn.Module, name: str, config: AdapterConfig, adapters: Adapters, source: str) -> None:
    """Copies what was read of ``source`` into an adapter that the model has.

    Raises:
        ValueError: it does not fit, or the adapter is merged or sharded; nothing is changed then.
    """
    layers = dict(adapted_layers(model, name))
    if any(layer.merged and layer.active_adapter == name for layer in layers.values()):
        raise ValueError(f"adapter {name!r} is merged into the base: call fastlora.unmerge_adapter first")
    for key, layer in layers.items():
        owners = (owner_of(layer, parameter) for parameter in parts_of(layer, name).values())
        if (owner := next(filter(None, owners), None)) is not None:
            raise ValueError(f"adapter {name!r} in {key} belongs to {owner}: load it before the model is sharded")
    known = next(iter(layers.values()), None)
    if known is not None and tuple(parts_of(known, name)) != config.parts:
        raise ValueError(
            f"{source} has {', '.join(config.parts)}, and the model's adapter {name!r} "
            f"{', '.join(parts_of(known, name))}: load it under another adapter_name"
        )
    shapes = {
        key: {part: tuple(values.shape) for part, values in parts_of(layer, name).items()}
        for key, layer in layers.items()
    }
    _check_fit(model, adapters, shapes, {}, source)
    for key, layer in layers.items():
        if config.scale(key) != layer.scale[name]:
            raise ValueError(
                f"{source} has scale {config.scale(key):g} in {key} (lora_alpha, use_rslora), and the model's adapter "
                f"{name!r} {layer.scale[name]:g}: load it under another adapter_name"
            )
    with torch.no_grad():
        for key, layer in layers.items():
            for part, values in parts_of(layer, name).items():
                values.copy_(adapters[key][part])


def _check_fit(
    model: nn.Module,
    adapters: Adapters,
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    refused: Mapping[str, str],
    source: str,
) -> None:
    """Raises ValueError unless the layers of the file are those of the adapter, with the same shapes."""
    for layer, parts in adapters.items():
        key = key_of(layer, "lora_A")
        if layer in refused:
            raise ValueError(f"{source}: {key} is for a layer that cannot have an adapter: {refused[layer]}")
        if layer not in shapes:
            known = any(name == layer for name, _ in model.named_modules())
            raise ValueError(
                f"{source}: {key} is for another model: "
                + (f"{layer} is not among the layers of the adapter" if known else f"the model has no {layer}")
                + f"; expected {shown_names(shapes)}"
            )
        for part, tensor in parts.items():
            if tuple(tensor.shape) != tuple(shapes[layer][part]):
                raise ValueError(
                    f"{source}: {key_of(layer, part)} has shape {list(tensor.shape)}: the model "
                    f"expects {list(shapes[layer][part])}, so the adapter is for another model or of another rank"
                )
    missing = [layer for layer in shapes if layer not in adapters]
    if missing:
        raise ValueError(
            f"{source} has no {key_of(missing[0], 'lora_A')}: the adapter is for another model, or cut short "
            f"({len(missing)} of {len(shapes)} layers are missing)"
        )
