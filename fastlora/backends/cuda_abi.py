"""The C ABI of the CUDA kernels: the mirror of ``csrc/fastlora.h``, the library that has it, and a call into it.

``FASTLORA_CUDA_LIBRARY`` names another library than the package's own, such as the host model of the tests, which runs
the kernels' source on the CPU. It is read once, when a library is first needed.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .dropout import Dropout

ABI = 4
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
MASK_NONE, MASK_INPUT, MASK_PRODUCT = 0, 1, 2
NO_MATRIX: tuple[int, ...] = (0, 0, 0)

_PACKAGE_LIBRARY = Path(__file__).parent.with_name("libfastlora_cuda.so")


class Matrix(ctypes.Structure):
    """``fastlora_matrix``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
    )


class Mask(ctypes.Structure):
    """``fastlora_mask``."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("threshold", ctypes.c_int32),
        ("rescale", ctypes.c_float),
        ("seed", ctypes.c_void_p),
    )


class LoraMatmul(ctypes.Structure):
    """``fastlora_lora_matmul``."""

    _fields_ = (
        ("x", Matrix),
        ("w", Matrix),
        ("a", Matrix),
        ("b", Matrix),
        ("y", Matrix),
        ("z", Matrix),
        ("bias", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("r", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("adapter_dtype", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("mask", Mask),
        ("design", ctypes.c_int32),
        ("tile_columns", ctypes.c_int32),
    )


class RankGrad(ctypes.Structure):
    """``fastlora_rank_grad``."""

    _fields_ = (
        ("wide", Matrix),
        ("narrow", Matrix),
        ("grad", Matrix),
        ("m", ctypes.c_int64),
        ("c", ctypes.c_int64),
        ("r", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("mask", Mask),
    )


_CODES = {ctypes.c_void_p: "P", ctypes.c_int64: "q", ctypes.c_int32: "i", ctypes.c_float: "f"}


def _format(structure: type[ctypes.Structure]) -> str:
    """The format by which ``struct`` packs a structure, in an eighth of the time that ctypes takes to fill one."""
    fields = (field[1] for field in structure._fields_)
    members = (_format(kind) if issubclass(kind, ctypes.Structure) else _CODES[kind] for kind in fields)
    return f"0P{''.join(members)}0P"


# Take a structure's numbers in order, those of its matrices and its mask among them; NULL is 0.
pack_lora_matmul = struct.Struct(_format(LoraMatmul)).pack
pack_rank_grad = struct.Struct(_format(RankGrad)).pack


def mask(dropout: Dropout | None, kind: int) -> tuple[int, int, float, int]:
    """The numbers of a ``Mask``."""
    if dropout is None:
        return MASK_NONE, 0, 1.0, 0
    return kind, dropout.threshold, dropout.rescale, dropout.seed.data_ptr()


class Verb(NamedTuple):
    """The two functions of one verb: bytes of workspace for a packed call, and the call itself."""

    workspace: Callable[[bytes], int]
    run: Callable[[bytes, int, int, int | None], bytes | None]


class Library(NamedTuple):
    """A library that was loaded.

    ``lora_matmul_tile`` says the tile of a packed call on a device; ``obstacle`` is the reason why no call can succeed
    on this machine, or None.
    """

    lora_matmul: Verb
    rank_grad: Verb
    lora_matmul_tile: Callable[[bytes, int], bytes | None]
    device_type: str
    obstacle: str | None


def launch(verb: Verb, call: bytes, x: Tensor) -> None:
    """Launches a packed call on the current stream of the device of x; the caller keeps the call's tensors alive.

    Raises:
        RuntimeError: the library refuses the call.
    """
    # Freed on return, used until the stream has passed: torch hands it out again on the same stream only.
    workspace = x.new_empty(verb.workspace(call), dtype=torch.uint8)
    ordinal = x.get_device()  # -1 on a CPU, which has no streams
    with torch.cuda.device(ordinal):  # the library makes its device this thread's
        stream = None if ordinal < 0 else torch.cuda.current_stream(ordinal).cuda_stream
        error = verb.run(call, workspace.data_ptr(), ordinal, stream)
    if error is not None:
        raise RuntimeError(f"the CUDA kernels refuse a call: {error.decode()}")


def require_library() -> Library:
    """The library.

    Raises:
        RuntimeError: there is none, with the reason.
    """
    library = find_library()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


def library_path() -> Path:
    """Where the library is, or would be."""
    return Path(os.environ.get("FASTLORA_CUDA_LIBRARY", _PACKAGE_LIBRARY))


@functools.cache
def find_library() -> Library | str:
    """The library, or the reason why there is none."""
    named = os.environ.get("FASTLORA_CUDA_LIBRARY")
    if named is not None:
        if not Path(named).is_file():
            return f"FASTLORA_CUDA_LIBRARY={named} is no file: unset it, or name a library that csrc/build.py made"
        return load(named)
    if not _PACKAGE_LIBRARY.is_file():
        return (
            "the CUDA kernels are not built: install the CUDA toolkit, 12.5 or newer, and install fastlora again with "
            "FASTLORA_BUILD_CUDA=1, or run `python csrc/build.py` in a clone"
        )
    return load(str(_PACKAGE_LIBRARY))


def load(path: str) -> Library | str:
    """Loads a library, or gives the reason why it cannot be used."""
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        return f"the CUDA kernels do not load: {error}"
    try:
        abi = library.fastlora_abi()
        if abi != ABI:
            return f"{path} has ABI {abi}, this fastlora needs {ABI}: build it again with `python csrc/build.py`"
        tile = library.fastlora_lora_matmul_tile
        tile.argtypes, tile.restype = (ctypes.c_void_p, ctypes.c_int32), ctypes.c_char_p
        return Library(
            lora_matmul=_verb(library, "fastlora_lora_matmul"),
            rank_grad=_verb(library, "fastlora_rank_grad"),
            lora_matmul_tile=tile,
            device_type=_text(library, "fastlora_device_type"),
            obstacle=_text(library, "fastlora_obstacle") or None,
        )
    except AttributeError as error:
        return f"{path} is no library of fastlora's kernels: {error}"


def _verb(library: ctypes.CDLL, name: str) -> Verb:
    workspace, run = library[f"{name}_workspace"], library[f"{name}_sm90"]
    workspace.argtypes, workspace.restype = (ctypes.c_void_p,), ctypes.c_size_t
    run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p), ctypes.c_char_p
    return Verb(workspace, run)


def _text(library: ctypes.CDLL, name: str) -> str:
    function = library[name]
    function.restype = ctypes.c_char_p
    return (function() or b"").decode()
