"""The two verbs on the CUDA kernels: what they refuse, and how they are called through ``csrc/fastlora.h``.

``FASTLORA_CUDA_LIBRARY`` names another library than the package's own, read once, when one
is first needed. The host model (``tests/csrc/host_model``) runs the kernels' source on the CPU and takes CPU tensors.
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
from .request import Kernel, Product, Request, new_middle

ABI = 2
MAX_RANK = 256

_LIBRARY = Path(__file__).parent.with_name("libfastlora_cuda.so")
# Who makes the middle z: jobs of their own in the one launch, or a launch before it.
DESIGNS = ("z_jobs", "serial")

_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_MASK_INPUT, _MASK_PRODUCT = 1, 2
_NO_MASK = (0, 0, 1.0, 0)
_HOST_MODEL_SMS = 4


class _Mask(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("threshold", ctypes.c_int32),
        ("rescale", ctypes.c_float),
        ("seed", ctypes.c_void_p),
    )


class _LoraMatmul(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("r", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("w_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
        ("z_stride", ctypes.c_int64),
        ("a_stride_r", ctypes.c_int64),
        ("a_stride_k", ctypes.c_int64),
        ("b_stride_n", ctypes.c_int64),
        ("b_stride_r", ctypes.c_int64),
        ("w_transposed", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("adapter_dtype", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("mask", _Mask),
        ("design", ctypes.c_int32),
        ("tile_columns", ctypes.c_int32),
    )


class _RankGrad(ctypes.Structure):
    _fields_ = (
        ("wide", ctypes.c_void_p),
        ("narrow", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("c", ctypes.c_int64),
        ("r", ctypes.c_int64),
        ("wide_stride", ctypes.c_int64),
        ("narrow_stride", ctypes.c_int64),
        ("grad_stride_r", ctypes.c_int64),
        ("grad_stride_c", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("grad_dtype", ctypes.c_int32),
        ("mask", _Mask),
    )


_CODES = {ctypes.c_void_p: "P", ctypes.c_int64: "q", ctypes.c_int32: "i", ctypes.c_float: "f"}


def _format(structure: type[ctypes.Structure]) -> str:
    """How ``struct`` packs a structure: in a quarter of the time that ctypes takes to fill one, and NULL is 0."""
    fields = (field[1] for field in structure._fields_)
    members = (_format(kind) if issubclass(kind, ctypes.Structure) else _CODES[kind] for kind in fields)
    return f"0P{''.join(members)}0P"


_pack_lora_matmul = struct.Struct(_format(_LoraMatmul)).pack
_pack_rank_grad = struct.Struct(_format(_RankGrad)).pack


class _Verb(NamedTuple):
    """The two functions of one verb: bytes of workspace for a packed call, and the call itself."""

    workspace: Callable[[bytes], int]
    launch: Callable[[bytes, int | None, int, int, int | None], bytes | None]


class _Library(NamedTuple):
    """A library that was loaded; ``obstacle`` is what this machine lacks, ``on_host`` that it is the host model."""

    lora_matmul: _Verb
    rank_grad: _Verb
    obstacle: str | None
    on_host: bool


def refuses(request: Request) -> str | None:
    """The reason why these kernels cannot run a request, or None."""
    device = request.device
    if device.type == "cuda" and torch.version.hip:
        return "AMD GPUs: the kernels are written for NVIDIA's Hopper"
    if device.type != "cuda" and "FASTLORA_CUDA_LIBRARY" not in os.environ:
        return f"x is on {device.type}: the kernels need a CUDA GPU of sm_90, such as an H100 or H200"
    library = _library()
    if isinstance(library, str):
        return library
    if library.on_host:
        if device.type != "cpu":
            return f"x is on {device.type}: FASTLORA_CUDA_LIBRARY is the host model, which takes CPU tensors"
    elif device.type != "cuda":
        return f"x is on {device.type}: the kernels need a CUDA GPU of sm_90, such as an H100 or H200"
    elif (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return "sm_{}{}: the kernels use wgmma and TMA of sm_90a, which H100 and H200 have".format(*capability)
    elif library.obstacle is not None:
        return library.obstacle
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(request.dtype).removeprefix('torch.')}: the kernels are for bfloat16 and float16"
    if 0 in (request.m, request.k, request.n):
        return f"nothing to compute: M={request.m} K={request.k} N={request.n}"
    if max(request.m, request.k, request.n) >= 2**31:
        return f"M={request.m} K={request.k} N={request.n}: the kernels count to 2^31 - 1"
    # Under a mask q is the wide side, whatever its width.
    rank = request.k if request.verb == "rank_grad" and request.dropout else request.r
    if rank > MAX_RANK:
        return f"rank {rank}: the kernels hold at most {MAX_RANK}"
    return request.unaligned


def lora_matmul(p: Product, design: int = 0) -> tuple[Tensor | None, Tensor]:
    """x [M, K], w [N, K] or None for z alone, a [R, K], b [N, R], bias [N] → y [M, N], z [M, R].

    The rows of x, and those of w or of the matrix whose transposed view it is, are contiguous and start on 16 bytes,
    and N is a multiple of 8.
    """
    library = _loaded()
    x, w, a, b, bias = p.x, p.w, p.a, p.b, p.bias
    device, dtype = x.device, x.dtype
    (m, k), (n, r) = x.shape, b.shape
    z = new_middle(x, r)
    a_stride_r, a_stride_k = a.stride()
    y: Tensor | None = None
    w_at = b_at = bias_at = y_at = 0
    n_made = w_stride = b_stride_n = b_stride_r = w_transposed = 0
    if w is not None:
        y = torch.empty((m, n), dtype=dtype, device=device)
        w_stride, step = w.stride()
        if step != 1:
            w_stride, w_transposed = step, 1
        b_stride_n, b_stride_r = b.stride()
        w_at, b_at, y_at, n_made = w.data_ptr(), b.data_ptr(), y.data_ptr(), n
        if bias is not None:
            bias = bias.contiguous()
            if bias.data_ptr() % 4:
                bias = bias.clone()  # the kernels read it two elements at a time
            bias_at = bias.data_ptr()
    mask = _NO_MASK
    if (dropout := p.mask_x) is not None:
        mask = _mask(_MASK_INPUT, dropout)
    elif w is not None and (dropout := p.mask_product) is not None:
        mask = _mask(_MASK_PRODUCT, dropout)
    call = _pack_lora_matmul(
        x.data_ptr(), w_at, a.data_ptr(), b_at, bias_at, y_at, z.data_ptr(),
        m, k, n_made, r,
        x.stride(0), w_stride, n_made, z.stride(0),
        a_stride_r, a_stride_k, b_stride_n, b_stride_r,
        w_transposed, _DTYPES[dtype], _DTYPES[a.dtype], p.scale,
        *mask,
        design, 0,
    )  # fmt: skip
    _launch(library.lora_matmul, call, device)
    return y, z


def rank_grad(p: Tensor, q: Tensor, *, dtype: torch.dtype, dropout: Dropout | None = None) -> Tensor:
    """p [M, P], q [M, Q] → pᵀ D(q) [P, Q] in ``dtype``. Rows of p and q are contiguous and start on 16 bytes."""
    library = _loaded()
    (m, columns), rows = q.shape, p.shape[1]
    grad = torch.empty((rows, columns), dtype=dtype, device=q.device)
    if dropout is not None or columns >= rows:
        wide, narrow, c, r, stride_r, stride_c = q, p, columns, rows, columns, 1
    else:
        wide, narrow, c, r, stride_r, stride_c = p, q, rows, columns, 1, columns
    call = _pack_rank_grad(
        wide.data_ptr(), narrow.data_ptr(), grad.data_ptr(),
        m, c, r,
        wide.stride(0), narrow.stride(0), stride_r, stride_c,
        _DTYPES[q.dtype], _DTYPES[dtype],
        *(_NO_MASK if dropout is None else _mask(_MASK_INPUT, dropout)),
    )  # fmt: skip
    _launch(library.rank_grad, call, q.device)
    return grad


def _mask(kind: int, dropout: Dropout) -> tuple[int, int, float, int]:
    return kind, dropout.threshold, dropout.rescale, dropout.seed.data_ptr()


def _launch(verb: _Verb, call: bytes, device: torch.device) -> None:
    """Allocates the workspace and launches on the current stream; the caller keeps the tensors of the call alive."""
    size = verb.workspace(call)
    if device.type == "cuda":
        with torch.cuda.device(device):
            # Freed on return, used until the stream has passed: torch hands it out again on the same stream only.
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            stream = torch.cuda.current_stream(device)
            index = stream.device_index
            words = verb.launch(call, workspace.data_ptr(), index, _sms(index), stream.cuda_stream)
    else:
        workspace = torch.empty(size + 256, dtype=torch.uint8)
        words = verb.launch(call, (workspace.data_ptr() + 255) & ~255, 0, _HOST_MODEL_SMS, None)
    if words is not None:
        raise RuntimeError(f"the CUDA kernels refuse a call: {words.decode()}")


@functools.cache
def _sms(device: int) -> int:
    """Streaming multiprocessors: the CTAs of a persistent grid."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _loaded() -> _Library:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    return library


@functools.cache
def _library() -> _Library | str:
    """The library, or why there is none."""
    named = os.environ.get("FASTLORA_CUDA_LIBRARY")
    if named is not None:
        if not Path(named).is_file():
            return f"FASTLORA_CUDA_LIBRARY={named} is no file: unset it, or name a library that csrc/build.py made"
        return _load(named)
    if not _LIBRARY.is_file():
        return (
            "the CUDA kernels are not built: install the CUDA toolkit, 12.5 or newer, and install fastlora again with "
            "FASTLORA_BUILD_CUDA=1, or run `python csrc/build.py` in a clone"
        )
    return _load(str(_LIBRARY))


def _load(path: str) -> _Library | str:
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        return f"the CUDA kernels do not load: {error}"
    try:
        abi = library.fastlora_abi()
        if abi != ABI:
            return f"{path} has ABI {abi}, this fastlora needs {ABI}: build it again with `python csrc/build.py`"
        verbs = _verb(library, "fastlora_lora_matmul"), _verb(library, "fastlora_rank_grad")
        library.fastlora_obstacle.restype = ctypes.c_char_p
        words = library.fastlora_obstacle()
    except AttributeError as error:
        return f"{path} is no library of fastlora's kernels: {error}"
    obstacle = None if words is None else words.decode()
    return _Library(*verbs, obstacle, on_host=hasattr(library, "fastlora_model_configure"))


def _verb(library: ctypes.CDLL, name: str) -> _Verb:
    workspace, launch = library[f"{name}_workspace"], library[f"{name}_sm90"]
    workspace.argtypes, workspace.restype = (ctypes.c_void_p,), ctypes.c_size_t
    launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)
    launch.restype = ctypes.c_char_p
    return _Verb(workspace, launch)


LORA_MATMUL = tuple(
    Kernel(f"cuda-{name}", refuses, functools.partial(lora_matmul, design=design))
    for design, name in enumerate(DESIGNS)
)
RANK_GRAD = (Kernel("cuda", refuses, rank_grad),)
