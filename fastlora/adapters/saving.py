"""Adapters on disk, in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Source: PEFT 0.21.2, ``save_pretrained`` and ``get_peft_model_state_dict``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic import new_file, new_folder
from ..siblings import Groups
from ..text import shown_names
from . import groups as grouping
from . import unmatched
from .config import AdapterConfig
from .folder import CONFIG, WEIGHTS, Adapters, key_of, read_adapter, safetensors
from .inject import InjectionReport, attach, report
from .layer import features
from .model import adapted_layers, adapted_model, checked_name, state_of
from .plan import Plan, PlannedLayer, modules_of, plan


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Writes an adapter as PEFT does: ``PeftModel.from_pretrained(base, folder)`` and :func:`load_adapter` read it.

    A process that is killed at any moment leaves the old adapter whole. Other files in the folder stay. Where several
    processes hold the model, one of them saves.

    Args:
        model: a model with adapters of :func:`fastlora.inject`'s, in torch.compile's or DDP's wrapper too.
        folder: folder to write; made where it is missing.
        adapter_name: name of the adapter.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the model has no such adapter, it is a PEFT model, or the adapter is not finite or not whole.
        NotADirectoryError: ``folder`` is a file.
    """
    torch_files = safetensors("torch")
    model, state = adapted_model(model)
    config = checked_name(state, adapter_name)
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted_layers(model, adapter_name):
        k, n = features(layer)
        r = config.rank(name)
        for part, parameter, shape in (
            ("lora_A", layer.lora_A[adapter_name], (r, k)),
            ("lora_B", layer.lora_B[adapter_name], (n, r)),
        ):
            _check_writable(f"{name}.{part}", parameter, shape)
            tensors[key_of(name, part)] = parameter.detach().contiguous()
    base = getattr(model, "name_or_path", None)
    if base and "base_model_name_or_path" not in config.notes:
        config = replace(config, notes=config.notes | {"base_model_name_or_path": base})
    _write(Path(folder), config.to_json(), lambda path: torch_files.save_file(tensors, path, metadata={"format": "pt"}))


def _check_writable(name: str, parameter: Tensor, shape: tuple[int, int]) -> None:
    if parameter.device.type == "meta" or tuple(parameter.shape) != shape or type(parameter.data) is not Tensor:
        raise ValueError(
            f"{name} is no whole tensor {list(shape)} here, but {type(parameter.data).__name__} "
            f"{list(parameter.shape)} on {parameter.device}: gather the shards first"
        )
    if not parameter.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite: the training diverged; nothing was written")


def _write(folder: Path, config: str, write_weights: Any) -> None:
    """Replaces two files that belong together, so that at no moment one is new and the other old."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder must be a folder, got the file {folder}")
    old = folder / CONFIG
    if folder.exists() and not old.exists():
        # There is no old adapter to protect, and the new one counts from its config on.
        with new_file(folder / WEIGHTS) as file:
            write_weights(file)
        with new_file(old) as file:
            file.write_text(config, encoding="utf-8")
    elif folder.exists() and old.read_bytes() == config.encode():
        # The usual case while training goes on: one rename does it.
        with new_file(folder / WEIGHTS) as file:
            write_weights(file)
    else:
        with new_folder(folder) as temporary:
            if folder.exists():
                shutil.copytree(folder, temporary, symlinks=True, copy_function=_link, dirs_exist_ok=True)
            for name in (CONFIG, WEIGHTS):
                (temporary / name).unlink(missing_ok=True)  # a link to the old content, not to be written into
            write_weights(temporary / WEIGHTS)
            (temporary / CONFIG).write_text(config, encoding="utf-8")


def _link(source: str, destination: str) -> str:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)
    return destination


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
            it is not finite; or ``groups`` is refused.
        TypeError: ``groups`` is neither "auto", None, nor tuples of names.
    """
    config, adapters = read_adapter(folder)
    source = str(Path(folder) / WEIGHTS)
    state = state_of(model) if isinstance(model, nn.Module) else None
    if state is not None and adapter_name in state.configs:
        found = grouping.find(model, groups, mlp)
        _replace_values(model, adapter_name, config, adapters, adapter_dtype, source)
        grouping.form(model, found)
        idle = [*unmatched.find(config, modules_of(model), list(adapters)), *found.unmatched]
        unmatched.warn(adapter_name, idle)
        return report(model, adapter_name, {}, found, idle)
    try:
        planned = plan(model, config, adapter_name, adapter_dtype)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    _check_fit(model, adapters, {layer.name: layer.shapes for layer in planned.layers}, planned.refused, source)
    for layer in planned.layers:
        if layer.module.weight.device.type == "meta":
            raise ValueError(f"{layer.name} is on the meta device, which holds no data: load the base model first")
    if adapter_dtype is None:
        planned = _in_dtype_of_file(planned, adapters)
    return attach(planned, groups, mlp, adapters)


def _in_dtype_of_file(planned: Plan, adapters: Adapters) -> Plan:
    def kept(layer: PlannedLayer) -> PlannedLayer:
        a, b = adapters[layer.name].values()
        dtype = torch.promote_types(a.dtype, b.dtype)
        return layer._replace(dtype=dtype) if dtype == layer.module.weight.dtype else layer

    return replace(planned, layers=tuple(map(kept, planned.layers)))


def _replace_values(
    model: nn.Module, name: str, config: AdapterConfig, adapters: Adapters, dtype: torch.dtype | None, source: str
) -> None:
    layers = dict(adapted_layers(model, name))
    if dtype is not None:
        raise ValueError(f"adapter_dtype: the model has an adapter {name!r} already, whose dtype stays: leave it out")
    if any(layer.merged and layer.active_adapter == name for layer in layers.values()):
        raise ValueError(f"adapter {name!r} is merged into the base: call fastlora.unmerge_adapter first")
    shapes = {
        key: {"lora_A": tuple(layer.lora_A[name].shape), "lora_B": tuple(layer.lora_B[name].shape)}
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
            layer.lora_A[name].copy_(adapters[key]["lora_A"])
            layer.lora_B[name].copy_(adapters[key]["lora_B"])


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
