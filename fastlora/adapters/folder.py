"""Reads and writes an adapter in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Tensors are named ``base_model.model.<layer>.lora_A.weight`` [R, K] and ``….lora_B.weight`` [N, R]; with ``lora_bias``
also ``….lora_B.bias`` [N], with ``use_dora`` ``….lora_magnitude_vector`` [N]. Only safetensors is read: a pickle
(``adapter_model.bin``) can run any code when opened.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..atomic import new_file, new_folder
from ..dtypes import FLOATING
from ..text import dtype_name
from .config import AdapterConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
# Said of what was named as a folder.
NO_FOLDER = (
    "does not exist or is no folder: fastlora reads local folders (huggingface_hub's snapshot_download brings one)"
)
# The ends of the names in the file, by the names of the parts in a layer.
_ENDS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_bias": "lora_B.bias",
    "lora_magnitude": "lora_magnitude_vector",
}
_PARTS = {end: part for part, end in _ENDS.items()}
_KEY = re.compile(rf"base_model\.model\.(?P<layer>.+)\.(?P<end>{'|'.join(map(re.escape, _PARTS))})")

# The tensors by layer, under the names of their parts, such as "lora_A" and "lora_B".
Adapters = dict[str, dict[str, Tensor]]


def key_of(layer: str, part: str) -> str:
    """The name of a tensor in the file."""
    return f"base_model.model.{layer}.{_ENDS[part]}"


def read_adapter(folder: str | os.PathLike[str]) -> tuple[AdapterConfig, Adapters]:
    """Reads the options and tensors of an adapter, and checks them as far as possible without its base.

    Raises:
        ImportError: safetensors is not installed.
        FileNotFoundError: the folder or one of its two files is missing.
        ValueError: a file is damaged or no adapter's, an option is not supported, or a tensor is not finite.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder '{folder}' {NO_FOLDER}")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            remedy = "expected a folder that PEFT or fastlora.save_adapter wrote"
            if name == WEIGHTS and (folder / _PICKLE).exists():
                remedy = (
                    f"{_PICKLE} is a pickle, which can run any code when opened, so fastlora does not read it: load it "
                    "with PEFT where you trust it and save it again (save_pretrained writes safetensors)"
                )
            raise FileNotFoundError(f"folder '{folder}' has no {name}: {remedy}")
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    try:
        text = config_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{config_file} is not text ({error}): it is damaged, or no PEFT adapter's") from None
    config = AdapterConfig.from_json(text, str(config_file))
    try:
        tensors: dict[str, Tensor] = safetensors("torch").load_file(weights_file)
    except safetensors().SafetensorError as error:
        raise ValueError(
            f"{weights_file} is damaged, cut short or no safetensors file ({error}): copy it again, whole (a git-lfs "
            "pointer holds no weights: git lfs pull)"
        ) from None
    return config, _sorted_into_layers(tensors, config, str(weights_file))


def _sorted_into_layers(tensors: Mapping[str, Tensor], config: AdapterConfig, source: str) -> Adapters:
    adapters: Adapters = {}
    for key, tensor in tensors.items():
        layer, part = _layer_and_part(key, config, source)
        _check_tensor(f"{source}: {key}", part, tensor)
        adapters.setdefault(layer, {})[part] = tensor
    if not adapters:
        raise ValueError(f"{source} holds no tensors: expected {key_of('<layer>', 'lora_A')} and its partners")
    for layer, parts in adapters.items():
        _check_together(layer, parts, config, source)
        adapters[layer] = {part: parts[part] for part in config.parts}
    return adapters


def _layer_and_part(key: str, config: AdapterConfig, source: str) -> tuple[str, str]:
    """The layer and the part that a tensor of the file is for, by its key."""
    match = _KEY.fullmatch(key)
    if match is None or (part := _PARTS[match["end"]]) not in config.parts:
        ends = " and ".join(f".{_ENDS[part]}" for part in config.parts)
        raise ValueError(
            f"{source} has the key {key!r}, which fastlora does not support with the options in {CONFIG}: expected "
            f"base_model.model.<layer>{ends} alone"
        )
    return match["layer"], part


def _check_tensor(name: str, part: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that its part cannot be, whatever the others are."""
    is_matrix = part in ("lora_A", "lora_B")
    if tensor.dtype not in FLOATING or tensor.dim() != (2 if is_matrix else 1):
        raise ValueError(
            f"{name} is {dtype_name(tensor.dtype)} {list(tensor.shape)}: expected a floating-point "
            f"{'matrix' if is_matrix else 'vector'}"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite: the training that wrote it diverged")


def _check_together(layer: str, parts: Mapping[str, Tensor], config: AdapterConfig, source: str) -> None:
    """Raises ValueError where a part of a layer is missing, or has another shape than the others or the options say."""
    for part in config.parts:
        if part not in parts:
            raise ValueError(
                f"{source} has no {key_of(layer, part)}, the partner of what it has for {layer}: it is incomplete"
            )
    for part, dim in (("lora_A", 0), ("lora_B", 1)):
        if parts[part].shape[dim] != config.rank(layer):
            raise ValueError(
                f"{source}: {key_of(layer, part)} has shape {list(parts[part].shape)}, so rank "
                f"{parts[part].shape[dim]}: expected rank {config.rank(layer)}, as {CONFIG} says (r, rank_pattern)"
            )
    for part in config.parts[2:]:
        if parts[part].shape[0] != parts["lora_B"].shape[0]:
            raise ValueError(
                f"{source}: {key_of(layer, part)} has shape {list(parts[part].shape)}: expected "
                f"[{parts['lora_B'].shape[0]}], the rows of {key_of(layer, 'lora_B')}"
            )


def write_adapter(folder: Path, config: AdapterConfig, tensors: dict[str, Tensor]) -> None:
    """Writes the two files of an adapter, so that at no moment one is new and the other old.

    Raises:
        ImportError: safetensors is not installed.
        NotADirectoryError: ``folder`` is a file.
    """
    torch_files = safetensors("torch")
    _replace_files(
        folder, config.to_json(), lambda path: torch_files.save_file(tensors, path, metadata={"format": "pt"})
    )


def _replace_files(folder: Path, config: str, write_weights: Callable[[Path], object]) -> None:
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


def safetensors(part: str | None = None) -> Any:
    """The safetensors package, or a module of it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("safetensors" if part is None else f"safetensors.{part}")
    except ImportError as error:
        raise ImportError("adapters on disk need safetensors: pip install 'safetensors>=0.4'") from error
