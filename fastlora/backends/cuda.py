"""The two verbs on the CUDA kernels: which requests they refuse, and what they pass to the library."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from ..text import dtype_name
from . import cuda_abi
from .cuda_abi import DTYPES, MASK_INPUT, MASK_PRODUCT, NO_MATRIX, mask
from .dropout import Dropout
from .request import Kernel, Product, Request, new_middle

MAX_RANK = 256

# Who makes the middle z: jobs of its own in the launch that makes y, or a launch before it. By the header's codes.
DESIGNS = ("z_jobs", "serial")

_HOPPER = "the kernels need a CUDA GPU of sm_90, such as an H100 or H200"


def refuses(request: Request) -> str | None:
    """The reason why these kernels cannot run a request, or None."""
    device = request.device
    if device.type == "cuda" and torch.version.hip:
        return "AMD GPUs: the kernels are written for NVIDIA's Hopper"
    if device.type != "cuda" and "FASTLORA_CUDA_LIBRARY" not in os.environ:
        return f"x is on {device.type}: {_HOPPER}"
    library = cuda_abi.find_library()
    if isinstance(library, str):
        return library
    if device.type != library.device_type:
        if library.device_type == "cuda":
            return f"x is on {device.type}: {_HOPPER}"
        return f"x is on {device.type}: FASTLORA_CUDA_LIBRARY takes {library.device_type.upper()} tensors"
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return "sm_{}{}: the kernels use wgmma and TMA of sm_90a, which H100 and H200 have".format(*capability)
    if library.obstacle is not None:
        return library.obstacle
    if request.dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype_name(request.dtype)}: the kernels are for bfloat16 and float16"
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
    library = cuda_abi.require_library()
    x, w, b, bias = p.x, p.w, p.b, p.bias
    z = new_middle(x, b.shape[1])
    y = None if w is None else x.new_empty((x.shape[0], b.shape[0]))
    if bias is not None:
        bias = bias.contiguous()
        if bias.data_ptr() % 4:
            bias = bias.clone()  # the kernels read it two elements at a time
    cuda_abi.launch(library.lora_matmul, _packed(p, y, z, bias, design), x)
    return y, z


def tile(p: Product) -> str:
    """The tile that the library would take for a product with a w."""
    # Neither y nor z decides it: x stands for both.
    words = cuda_abi.require_library().lora_matmul_tile(_packed(p, p.x, p.x, None, 0), max(p.x.get_device(), 0))
    return (words or b"").decode()


def _packed(p: Product, y: Tensor | None, z: Tensor, bias: Tensor | None, design: int) -> bytes:
    x, w, a, b = p.x, p.w, p.a, p.b
    (m, k), (n, r) = x.shape, b.shape
    dropped = p.mask_x
    w_matrix = y_matrix = NO_MATRIX
    if w is not None and y is not None:
        w_matrix, y_matrix = (w.data_ptr(), *w.stride()), (y.data_ptr(), *y.stride())
        dropped = dropped or p.mask_product
    return cuda_abi.pack_lora_matmul(
        x.data_ptr(), *x.stride(),
        *w_matrix,
        a.data_ptr(), *a.stride(),
        b.data_ptr(), *b.stride(),
        *y_matrix,
        z.data_ptr(), *z.stride(),
        0 if bias is None else bias.data_ptr(),
        m, k, n, r,
        DTYPES[x.dtype], DTYPES[a.dtype],
        p.scale,
        *mask(dropped, MASK_PRODUCT if p.on_product else MASK_INPUT),
        design,
        0,  # columns of a tile: the library chooses
    )  # fmt: skip


def rank_grad(p: Tensor, q: Tensor, *, dtype: torch.dtype, dropout: Dropout | None = None) -> Tensor:
    """p [M, P], q [M, Q] → pᵀ D(q) [P, Q] in ``dtype``. Rows of p and q are contiguous and start on 16 bytes."""
    library = cuda_abi.require_library()
    grad = q.new_empty((p.shape[1], q.shape[1]), dtype=dtype)
    wide, narrow, strides = q, p, grad.stride()
    if dropout is None and p.shape[1] > q.shape[1]:
        wide, narrow, strides = p, q, strides[::-1]
    call = cuda_abi.pack_rank_grad(
        wide.data_ptr(), *wide.stride(),
        narrow.data_ptr(), *narrow.stride(),
        grad.data_ptr(), *strides,
        *wide.shape, narrow.shape[1],
        DTYPES[q.dtype], DTYPES[dtype],
        *mask(dropout, MASK_INPUT),
    )  # fmt: skip
    cuda_abi.launch(library.rank_grad, call, q)
    return grad


LORA_MATMUL = tuple(
    Kernel(f"cuda-{name}", refuses, functools.partial(lora_matmul, design=code), tile)
    for code, name in enumerate(DESIGNS)
)
RANK_GRAD = (Kernel("cuda", refuses, rank_grad),)
