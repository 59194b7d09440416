"""A call as a value (``Product``), the facts that decide what can run it (``Request``), and what runs (``Kernel``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import HALF
from .dropout import Dropout

_EIGHT = "a multiple of 8 elements"


class Product(NamedTuple):
    """One product with its low-rank update: the call that goes from ``lora_linear`` down to a kernel.

        z = scale · D(x) aᵀ,   y = x wᵀ + z bᵀ + bias          the mask on the input
        z = scale · x aᵀ,      y = x wᵀ + D(z bᵀ) + bias       the mask on the product

    The fields are the operator's schema, in its order. At the border x is [..., K], in a kernel [M, K].

    Attributes:
        x: input [M, K].
        w: base weight [N, K], or None for z alone.
        a: down projection [R, K].
        b: up projection [N, R].
        scale: factor on z.
        bias: [N] or None.
        dropout_p: probability of dropping.
        seed: int64 [2] from which the mask is made, or None without dropout.
        on_product: whether the mask is on z bᵀ instead of x.
    """

    x: Tensor
    w: Tensor | None
    a: Tensor
    b: Tensor
    scale: float
    bias: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    on_product: bool = False

    @property
    def mask_x(self) -> Dropout | None:
        """The mask on x, or None."""
        return None if self.seed is None or self.on_product else Dropout(self.dropout_p, self.seed)

    @property
    def mask_product(self) -> Dropout | None:
        """The mask on z bᵀ, or None."""
        return Dropout(self.dropout_p, self.seed) if self.seed is not None and self.on_product else None

    def turned(self, dy: Tensor) -> Product:
        """The backward of a forward, the same verb on turned operands: dx = dy w + D'(t a), t = scale · dy b."""
        w = None if self.w is None else self.w.T
        return Product(dy, w, self.b.T, self.a.T, self.scale, None, self.dropout_p, self.seed, on_product=True)

    def map(self, f: Callable[[Tensor], Tensor]) -> Product:
        """The product with ``f`` of every operand; the seed stays."""
        x, w, a, b, bias = (None if t is None else f(t) for t in (self.x, self.w, self.a, self.b, self.bias))
        return self._replace(x=x, w=w, a=a, b=b, bias=bias)  # type: ignore[arg-type]


class Request(NamedTuple):
    """The facts about one call of a verb, hashable, without its data. M is the token count, R the rank.

    For ``lora_matmul`` K and N are the contracted and the produced width (in the backward these are out_features and
    in_features); for ``rank_grad`` they are the two sides of the gradient.

    Attributes:
        unaligned: why the copy engine of a GPU cannot read one of the 16-bit operands, or None.
        z_only: whether there is no w, so that z alone is made.
        backward: whether the operands of ``lora_matmul`` are turned.
    """

    verb: str
    device: torch.device
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    m: int
    k: int
    n: int
    r: int
    dropout: bool
    unaligned: str | None = None
    z_only: bool = False
    backward: bool = False

    @property
    def direction(self) -> str:
        """``forward`` or ``backward``; of ``rank_grad`` the gradient that its two sides are those of."""
        if self.verb == "rank_grad":
            return "da" if self.k <= self.n else "db"
        return "backward" if self.backward else "forward"

    @staticmethod
    def of_lora_matmul(p: Product) -> Request:
        """The request of ``lora_matmul`` on these operands."""
        x, w = p.x, p.w
        (m, k), n, dtype = x.shape, p.b.shape[0], x.dtype
        unaligned = None
        if dtype in HALF:
            # On the way of every call: one look at the numbers, and words only where something is wrong.
            row, step = x.stride()
            if w is None:
                if step != 1 or row & 7 or row < k or x.data_ptr() & 15:
                    unaligned = _unaligned("x", x)
            else:
                w_row, w_step = w.stride()
                w_columns = k
                if w_step != 1:
                    # The transposed view of a matrix: its rows are that matrix's.
                    w_row, w_step, w_columns = w_step, w_row, n
                wrong_strides = step != 1 or w_step != 1 or (row | w_row | n) & 7 or row < k or w_row < w_columns
                if wrong_strides or (x.data_ptr() | w.data_ptr()) & 15:
                    w_rows = _unaligned("w", w) if w.stride(1) == 1 else _unaligned("wᵀ", w.T)
                    unaligned = _unaligned("x", x) or w_rows or f"N = {n}: rows of y must start on 16 bytes, {_EIGHT}"
        return Request(
            "lora_matmul",
            x.device,
            dtype,
            p.a.dtype,
            m,
            k,
            n,
            p.a.shape[0],
            p.seed is not None,
            unaligned,
            w is None,
            p.on_product,
        )

    @staticmethod
    def of_rank_grad(p: Tensor, q: Tensor, dtype: torch.dtype, dropout: bool) -> Request:
        """The request of ``rank_grad`` on these tensors."""
        k, (m, n) = p.shape[1], q.shape
        unaligned = None
        if q.dtype in HALF:
            p_row, p_step = p.stride()
            q_row, q_step = q.stride()
            wrong_strides = p_step != 1 or q_step != 1 or (p_row | q_row) & 7 or p_row < k or q_row < n
            if wrong_strides or (p.data_ptr() | q.data_ptr()) & 15:
                unaligned = _unaligned("p", p) or _unaligned("q", q)
        return Request("rank_grad", q.device, q.dtype, dtype, m, k, n, min(k, n), dropout, unaligned)


class Together(NamedTuple):
    """A kernel's way with a group: several products of one x [M, K], none of them with a mask on its product.

    Attributes:
        run: y and z of each product.
        gradients: dx, summed, and da and db of each product, from the dy and z of each: for eager code, as
            ``Kernel.gradients``.
    """

    run: Callable[[Sequence[Product]], tuple[list[Tensor], list[Tensor]]]
    gradients: Callable[
        [Sequence[Product], Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, list[Tensor], list[Tensor]]
    ]


class Kernel(NamedTuple):
    """One way to run a verb: the unit that is chosen, proven, timed and named.

    Attributes:
        name: as ``FASTLORA_BACKEND``, the ledger and the benchmarks have it.
        refuses: the reason why it cannot run a request, or None.
        run: the verb.
        tile: the tile it would take for a product, in words; None where it has none of its own.
        gradients: dx, da and db in one call, for eager code, from a product (with x [M, K]), dy [M, N] and z: what the
            two verbs give, for less; on a CPU bit for bit where no form is taken, else perhaps with sums in another
            order, each within the error rule. None where the verbs are called, as traced code always does.
        small: y [M, N] in torch's own differentiable operators, for eager calls in which a Function's time would show;
            returns None for other calls. Takes the product without a seed, and whether dropout is on.
        together: its way with several products of one x; None where they are run one by one.
        forms: other ways of this kernel to the same results, which only a measured table prefers to it; their names
            begin with the kernel's and a colon.
    """

    name: str
    refuses: Callable[[Request], str | None]
    run: Callable[..., Any]
    tile: Callable[[Product], str] | None = None
    gradients: Callable[[Product, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    small: Callable[[Product, bool], Tensor | None] | None = None
    together: Together | None = None
    forms: tuple[Kernel, ...] = ()

    def ways(self, field: str) -> tuple[Kernel, ...]:
        """This kernel, then those of its forms that do something of their own in ``"run"`` or ``"gradients"``."""
        by_function: dict[Any, Kernel] = {}
        for kernel in (self, *self.forms):
            by_function.setdefault(getattr(kernel, field), kernel)
        return tuple(by_function.values())


def runs_anything(request: Request) -> str | None:
    """Refuses nothing: any device, any dtype, any shape."""
    return None


def new_middle(x: Tensor, r: int) -> Tensor:
    """Memory for z [M, R]. Rows of 16-bit elements start on 16 bytes, so that tensor copies can read them.

    That holds on every device and kernel: torch.compile and its caches on disk are told before one is chosen.
    """
    m, dtype = x.shape[0], x.dtype
    padding = -r % 8
    if padding == 0 or dtype not in HALF:
        return torch.empty((m, r), dtype=dtype, device=x.device)
    # Zeros on a CPU, for the reason in whole_rows.
    make = torch.zeros if x.is_cpu else torch.empty
    return make((m, r + padding), dtype=dtype, device=x.device)[:, :r]


def whole_rows(x: Tensor) -> Tensor:
    """x [M, K] without gaps between its rows where a CPU multiplies it from the left in a 16-bit dtype, else x itself.

    On CPUs with AMX, oneDNN before 3.15 (issue 5717; in torch 2.13) reads a row on into what lies behind it and
    multiplies that by zero: NaN there is NaN in the product.
    """
    if x.is_cpu and x.dtype in HALF and x.stride(1) == 1 and x.stride(0) != x.shape[1]:
        return x.contiguous()
    return x


def _unaligned(name: str, rows: Tensor) -> str | None:
    """Why tensor copies cannot read a matrix of 16-bit elements by its rows, or None."""
    row, step = rows.stride()
    if step != 1 or row & 7 or row < rows.shape[1]:
        return f"{name} has strides {(row, step)}: rows must be contiguous and start on 16 bytes, {_EIGHT}"
    if rows.data_ptr() & 15:
        return f"{name} starts at an address that is no multiple of 16 bytes: pass a copy of it"
    return None
