"""Finds a model's safetensors files, reads their headers, and reads or writes one tensor at a time.

The format is eight bytes of length, a JSON header with dtype, shape and place of every tensor, and the tensors' bytes.
A merged checkpoint has the header of its base, so that it is a copy in which some bytes change: memory stays at one
tensor, whatever a file's size.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .folder import NO_FOLDER, safetensors

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_CHUNK = 1 << 22


class Entry(NamedTuple):
    """One tensor of a file: its place, and its dtype and shape by the header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Checkpoint(NamedTuple):
    """The safetensors files of a model and their tensors by name."""

    files: tuple[Path, ...]
    tensors: dict[str, Entry]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Finds the files by their index, or the single one, and reads their headers.

    Raises:
        FileNotFoundError: the folder, its safetensors files or one that the index names is missing.
        ValueError: a file or the index is damaged, or more than one model lies in the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"base '{folder}' {NO_FOLDER}")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    single = sorted(folder.glob("*.safetensors"))
    if len(indices) > 1:
        raise ValueError(f"base '{folder}' holds several models ({', '.join(i.name for i in indices)}): expected one")
    if indices:
        files = _files_of_index(indices[0])
    elif (folder / "model.safetensors") in single:
        files = [folder / "model.safetensors"]
    elif len(single) == 1:
        files = single
    elif single:
        raise ValueError(f"base '{folder}' holds {len(single)} safetensors files and no index: expected one of either")
    else:
        raise FileNotFoundError(
            f"base '{folder}' holds no safetensors file, and nothing else is read (a pickle can run any code): load "
            "the model and save it again with save_pretrained"
        )
    tensors: dict[str, Entry] = {}
    for file in files:
        tensors |= _header(file)
    return Checkpoint(tuple(files), tensors)


def _files_of_index(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({type(error).__name__}: {error}): copy it again") from None
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index} names {name}, which is not in its folder: the download is incomplete")
    return [index.parent / name for name in names]


def _header(file: Path) -> dict[str, Entry]:
    try:
        # Not for its tensors: the library checks that header and file fit together.
        with safetensors().safe_open(file, framework="pt"):
            pass
    except safetensors().SafetensorError as error:
        raise ValueError(f"{file} is damaged, cut short or no safetensors file ({error}): copy it again") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: Entry(
            file, each["dtype"], tuple(each["shape"]), 8 + length + each["data_offsets"][0],
            each["data_offsets"][1] - each["data_offsets"][0],
        )
        for name, each in header.items()
    }  # fmt: skip


def is_floating(entry: Entry) -> bool:
    """Returns True if a low-rank update can be added to this tensor."""
    return entry.dtype in _DTYPES


def read_tensor(stream: BinaryIO, entry: Entry) -> Tensor:
    """Reads the tensor from an open file.

    Raises:
        ValueError: the file is shorter than its header said.
    """
    tensor = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
    stream.seek(entry.start)
    if stream.readinto(_bytes_of(tensor)) != entry.size:  # type: ignore[attr-defined]
        raise ValueError(f"{entry.file} changed while it was read")
    return tensor


def write_tensor(stream: BinaryIO, entry: Entry, tensor: Tensor) -> None:
    """Writes the tensor's bytes to the place that the header gives."""
    assert tensor.is_contiguous()
    assert tensor.dtype == _DTYPES[entry.dtype]
    stream.seek(entry.start)
    stream.write(_bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> Any:
    # numpy would do the same, but torch runs without it.
    return (ctypes.c_char * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())


def copy_file(source: Path, target: Path, step: Callable[[int], None]) -> None:
    """Copies a file in pieces, and calls ``step`` with the bytes of each."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
            step(len(chunk))
