"""A base weight that is stored otherwise than as a matrix of floats, such as in 4 bits: it is made dense on demand.

    y  = x Wᵀ + z Bᵀ + bias      W made dense for this product
    dx = dy W + D'(t A)          W made dense again

No dense copy is kept between forward and backward, and no kernel knows of it. A weight that can be written into given
memory is written into a workspace that the next layer uses again.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import dispatch
from ..backends.request import Product
from ..eager import is_eager
from ..text import dtype_name
from . import autograd, flops


class StoredWeight(ABC):
    """A frozen base weight [N, K] that gives itself as a dense matrix when it is asked.

    ``lora_linear`` and its kin take one in the place of ``weight``. It is a snapshot for one call: it is asked again in
    the backward, and must still hold what it was made of. No gradient goes to it.

    Attributes:
        shape: (N, K).
        device: where the dense matrix is made.
        fills: whether :meth:`dense` writes into memory that it is given.
        source: a tensor that lives as long as the weight, by which others keep what they know of it; None for nothing.
    """

    shape: torch.Size
    device: torch.device
    fills = False
    source: Tensor | None = None

    @abstractmethod
    def dense(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """W [N, K] in ``dtype``; in ``out``, which is [N, K], where :attr:`fills` says so."""

    @abstractmethod
    def state(self) -> Hashable:
        """What is equal for two that give the same matrix: identity and version of what they are made of."""

    def is_changed(self) -> bool:
        """Whether what the weight is made of was changed in place since, so that a backward would be another's."""
        return False

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which products with x are computed: autocast's where it is on, else that of x."""
        autocast = torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64
        return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype

    def multiplies(self, m: int) -> bool:
        """Whether the library's own :meth:`product` is the way for m tokens, and no dense matrix."""
        return False

    def product(self, x_mk: Tensor, bias: Tensor | None) -> Tensor:
        """The library's own x Wᵀ + bias [M, N], in memory of its own; asked for where :meth:`multiplies` says so."""
        raise NotImplementedError

    def dim(self) -> int:
        """How many dimensions :attr:`shape` has, as a matrix says: two."""
        return len(self.shape)


class _Workspaces(threading.local):
    """Memory for dense weights, of each thread: what is enqueued on a stream comes in order within one alone."""

    def __init__(self) -> None:
        self.by_place: dict[Hashable, Tensor] = {}


_workspaces = _Workspaces()


def forget_workspaces() -> None:
    """Frees this thread's workspaces, which otherwise stay for as long as it lives."""
    _workspaces.by_place.clear()


def opened(w: Any, dtype: torch.dtype, place: int = 0) -> Any:
    """A dense w: what it is already, or made by a stored weight.

    Args:
        w: matrix, stored weight, or None.
        dtype: of the dense matrix.
        place: which of the workspaces of this shape; products that are made together need one each.

    Raises:
        RuntimeError: the stored weight gave something else than it says of itself; kernels would read past its end.
    """
    if not isinstance(w, StoredWeight):
        return w
    if not torch.compiler.is_compiling() and w.is_changed():
        raise RuntimeError(
            f"the tensors of a {type(w).__name__} weight were changed in place between forward and backward: change a "
            "base weight before the forward, or after the backward"
        )
    dense = w.dense(dtype, _workspace(w, dtype, place) if w.fills else None)
    # A trace is told of every size that is looked at.
    if torch._C._get_tracing_state() is None and (dense.shape != w.shape or dense.dtype is not dtype):
        raise RuntimeError(
            f"{type(w).__name__}.dense gave {list(dense.shape)} in {dtype_name(dense.dtype)}: expected "
            f"{list(w.shape)}, its shape, in {dtype_name(dtype)}, the dtype that it was asked for"
        )
    return dense


def _workspace(w: StoredWeight, dtype: torch.dtype, place: int) -> Tensor | None:
    """This thread's memory for a dense w on its stream; None where somebody looks on, or a graph is captured."""
    if not is_eager():
        return None
    stream = None
    if w.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(w.device).cuda_stream
    key = (w.device, stream, dtype, tuple(w.shape), place)
    memory = _workspaces.by_place.get(key)
    if memory is None:
        with torch.inference_mode(False):
            memory = torch.empty(w.shape, dtype=dtype, device=w.device)
        _workspaces.by_place[key] = memory
    return memory


def lora_matmul(p: Product, eager: bool = True) -> tuple[Tensor, Tensor]:
    """(y, z) of a product with x [M, K] whose w may be a stored weight."""
    run, _ = autograd.verbs(eager)
    w: Any = p.w
    if not isinstance(w, StoredWeight):
        return run(p)
    if w.multiplies(p.x.shape[0]):
        y_mn = w.product(p.x, p.bias)
        _, z_mr = run(p._replace(w=None, bias=None))
        # In place, but for compilers, which refuse an output that lies in what came before it.
        out = y_mn if eager else None
        return torch.addmm(y_mn, z_mr.to(y_mn.dtype), p.b.T.to(y_mn.dtype), out=out), z_mr
    return run(p._replace(w=opened(w, p.x.dtype)))


def lora_matmul_group(products: Sequence[Product]) -> tuple[list[Tensor], list[Tensor]]:
    """y and z of each of several products of one x [M, K], whose w may be stored weights."""
    ws: list[Any] = [p.w for p in products]
    if any(isinstance(w, StoredWeight) and w.multiplies(p.x.shape[0]) for w, p in zip(ws, products, strict=True)):
        ys, zs = zip(*map(lora_matmul, products), strict=True)
        return list(ys), list(zs)
    dense = [p._replace(w=opened(w, p.x.dtype, i)) for i, (w, p) in enumerate(zip(ws, products, strict=True))]
    return dispatch.lora_matmul_group(dense)


def common_dtype(x: Tensor, weights: Sequence[Tensor | StoredWeight]) -> torch.dtype | None:
    """The one dtype in which all compute with x; None where they differ, some are matrices, or x is no float."""
    if not x.is_floating_point():
        return None
    dtypes = {w.compute_dtype(x) if isinstance(w, StoredWeight) else None for w in weights}
    return dtypes.pop() if len(dtypes) == 1 else None


def matrix_of(w: Any) -> Tensor | None:
    """What a node of the graph keeps of a w among its tensors: the matrix that it is, nothing of a stored weight."""
    return None if isinstance(w, StoredWeight) else w


def stored_of(w: Any) -> StoredWeight | None:
    """What a node of the graph keeps of a w beside its tensors: the stored weight that it is, nothing of a matrix."""
    return w if isinstance(w, StoredWeight) else None


def multiply(p: Product, eager: bool, dtype: torch.dtype) -> Tensor:
    """y [..., N] of a product whose w is a stored weight, in ``dtype``; ``eager`` where :func:`is_eager` holds."""
    if not eager and not torch.compiler.is_compiling():
        flops.register()
    with without_autocast(p.x.device.type):
        if torch.is_grad_enabled():
            y: Tensor = _Stored.apply(p.x, None, p.a, p.b, p.bias, p, eager)  # type: ignore[no-untyped-call]
        else:
            y = autograd.unrows(lora_matmul(autograd.by_rows(p), eager)[0], p.x)
    return y.to(dtype)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A block in which operands keep the dtypes that were settled at the border."""
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


class _Stored(torch.autograd.Function):
    """The chain rule of a product with a stored weight; its arguments begin as those of the dense one do."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: None, a: Tensor, b: Tensor, bias: Tensor | None, p: Product, eager: bool
    ) -> Tensor:
        y_mn, z_mr = lora_matmul(autograd.by_rows(p), eager)
        ctx.base = p.w
        autograd.save(ctx, p._replace(w=None), z_mr)
        return autograd.unrows(y_mn, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, _, a, b, z_mr, seed = ctx.saved_tensors
        with without_autocast(dy.device.type):
            w = opened(ctx.base, dy.dtype) if ctx.needs_input_grad[0] else None
            return (*autograd.gradients(ctx, dy, (x, w, a, b, z_mr, seed)), None)
