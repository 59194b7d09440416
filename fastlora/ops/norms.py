"""Row norms of a weight with a low-rank update, ``‖W + s B A‖``, without a dense B A.

    ‖w_n + s Aᵀ b_n‖² = ‖w_n‖² + 2 s ⟨b_n, A w_n⟩ + s² ⟨b_n, A Aᵀ b_n⟩

They take the [N, R] product W Aᵀ, which is a read of W, and O(N R + R²) memory. ‖w_n‖² of a weight that asks for no
gradient is made once and kept, as long as the weight lives and is not changed (:func:`forget_norms`). All sums are in
float32, or in float64 for float64. Where an update takes away most of a row the difference would be rounding error: on
a CPU such rows are made by their elements. Elsewhere finding them would make the host wait, so there the norm of a row
of which the update leaves the share d has a relative error of about ε / d².

Source of the norm: Liu et al., 2024, https://arxiv.org/abs/2402.09353, equation (5), its gradient left out as in 4.3.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.request import whole_rows
from ..dtypes import wide_of
from ..eager import is_eager

_ops = torch.library.Library("fastlora", "FRAGMENT")
_ops.define("row_norms(Tensor w, Tensor a, Tensor b, float scale) -> Tensor")

# Elements of a weight that are widened at a time.
_BLOCK = {"cpu": 1 << 17}
_BLOCK_DEFAULT = 1 << 24

# A row is made by its elements where less than this share of its squares is left: its own and those of the update.
_LEFT = 1 / 16


def row_norms(w: Tensor, a: Tensor, b: Tensor, scale: float, source: Tensor | None = None) -> Tensor:
    """‖W + scale · B A‖ of each row [N], without a gradient; w [N, K], a [R, K], b [N, R].

    ``source`` is the tensor that w was made of, by which ‖w_n‖² is kept; None where that is w itself.
    """
    with torch.no_grad():
        if not is_eager():
            traced: Tensor = torch.ops.fastlora.row_norms(w, a, b, scale)
            return traced
        return _row_norms(w, a, b, scale, source)


def zero_row(norms: Tensor) -> int | None:
    """The first row whose norm [N] is zero, by which DoRA cannot divide; None where none is, or on the meta device."""
    if norms.is_meta or bool(norms.all()):
        return None
    return int((norms == 0).nonzero()[0])


def forget_norms(weight: Tensor) -> None:
    """Lets the norms of a weight be made anew at its next call.

    For whoever changes a weight behind torch's back: in-place changes of ``weight.data`` do not count in its version,
    and a new ``weight.data`` may lie where an older one did. Other changes are noticed.

    Args:
        weight: a weight that was given to :func:`fastlora.dora_linear`, or the ``source`` of a stored one.
    """
    _kept.pop(id(_whole(weight)), None)


def _row_norms(w: Tensor, a: Tensor, b: Tensor, scale: float, source: Tensor | None = None) -> Tensor:
    with torch.autocast(w.device.type, enabled=False):
        wide = wide_of(w.dtype)
        a, b = a.to(wide), b.to(wide)
        of_weight = _squares_of(w, w if source is None else source)
        of_update = (torch.mm(b, torch.mm(a, a.T)).mul_(b)).sum(1).mul_(scale * scale)
        along = _times(w, a.T).mul_(b).sum(1).mul_(2 * scale)
        whole = of_weight + of_update
        squares = along.add_(whole)
        if w.is_cpu:
            _mend(squares, whole, w, a, b, scale)
        return squares.clamp_min_(0).sqrt_()


def _row_norms_fake(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return w.new_empty(w.shape[0], dtype=wide_of(w.dtype))


_ops.impl("row_norms", _row_norms, "CompositeExplicitAutograd")
torch.library.register_fake("fastlora::row_norms", _row_norms_fake, lib=_ops)


def _times(w: Tensor, a_kr: Tensor) -> Tensor:
    """W Aᵀ [N, R] in the dtype of ``a_kr``, W widened a few rows at a time."""
    if w.dtype is a_kr.dtype:
        return torch.mm(w, a_kr)
    if w.dtype is torch.bfloat16 and w.is_cpu and _has_tiles():
        return _times_by_tiles(w, a_kr)
    product = a_kr.new_empty(w.shape[0], a_kr.shape[1])
    for rows in row_blocks(w, _BLOCK):
        torch.mm(w[rows].to(a_kr.dtype), a_kr, out=product[rows])
    return product


def _times_by_tiles(w: Tensor, a_kr: Tensor) -> Tensor:
    """The same by products in bfloat16, to 16 bits: a CPU with AMX makes these by far faster than those in float32.

    Sums are in float32 and only what they come to is rounded. So a second product, less what the first was rounded to,
    is the first's rest; and A is its own rounding and a rest likewise.
    """
    r = a_kr.shape[1]
    high = a_kr.bfloat16()
    both = torch.cat((high, (a_kr - high).bfloat16()), dim=1)
    w = whole_rows(w)
    rounded = torch.mm(w, both)
    product = rounded.float() + torch.addmm(rounded, w, both, beta=-1)
    return product[:, :r] + product[:, r:]


@functools.cache
def _has_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 in AMX tiles."""
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(torch.backends.mkldnn.is_available() and capabilities.get("amx_bf16", False))


def _squares(w: Tensor) -> Tensor:
    """‖w_n‖² of each row [N]."""
    wide = wide_of(w.dtype)
    squares = w.new_empty(w.shape[0], dtype=wide)
    # By blocks, since on a CPU a norm in a wider dtype first makes a copy.
    for rows in row_blocks(w, _BLOCK):
        torch.linalg.vector_norm(w[rows], dim=1, dtype=wide, out=squares[rows])
    return squares.square_()


def _mend(squares: Tensor, whole: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Makes those ‖W + scale · B A‖² by their elements, in place, that are the small difference of large numbers."""
    few = (squares < _LEFT * whole).nonzero().squeeze(1)
    for rows in few.split(_rows_at_once(w, _BLOCK)) if few.numel() else ():
        dense = torch.addmm(w[rows].to(a.dtype), b[rows], a, alpha=scale)
        squares[rows] = dense.square_().sum(1)


def row_blocks(t: Tensor, block: Mapping[str, int]) -> list[slice]:
    """The rows of a matrix, as many at a time as are widened: ``block`` elements by device type, else 2²⁴."""
    step = _rows_at_once(t, block)
    return [slice(first, first + step) for first in range(0, t.shape[0], step)]


def _rows_at_once(t: Tensor, block: Mapping[str, int]) -> int:
    return max(1, block.get(t.device.type, _BLOCK_DEFAULT) // max(t.shape[1], 1))


class _Kept(NamedTuple):
    """What is known of a weight, and what would be otherwise were it another or changed."""

    weight: weakref.ref[Tensor]
    state: tuple[Any, ...]
    squares: Tensor


_PLAIN = (Tensor, nn.Parameter)
_kept: dict[int, _Kept] = {}
_MOST_KEPT = 4096


def _squares_of(w: Tensor, source: Tensor) -> Tensor:
    """The squares of a weight's rows: those that are kept for its source, or new ones."""
    weight = _whole(source)
    # A weight that trains changes at every step, under sharding behind its version. A CUDA graph must hold its own.
    if weight.requires_grad or source.requires_grad or source.is_inference() or type(w) not in _PLAIN:
        return _squares(w)
    if w.is_cuda and torch.cuda.is_current_stream_capturing():
        return _squares(w)
    key = id(weight)
    state = (source.data_ptr(), source.shape, source.stride(), source.dtype, w.dtype, source.device, source._version)
    kept = _kept.get(key)
    if kept is not None and kept.state == state and kept.weight() is weight:
        return kept.squares
    squares = _squares(w)
    if len(_kept) >= _MOST_KEPT:
        _kept.pop(next(iter(_kept)), None)
    _kept[key] = _Kept(weakref.ref(weight, functools.partial(_drop, key)), state, squares)
    return squares


def _whole(source: Tensor) -> Tensor:
    """The weight that lives from call to call: of one that is stored [K, N] a call gets a view, which does not."""
    base = source._base
    return source if base is None or type(base) not in _PLAIN or base.numel() != source.numel() else base


def _drop(key: int, weight: weakref.ref[Tensor]) -> None:
    """Forgets a weight that is gone, unless another has its place already."""
    kept = _kept.get(key)
    if kept is not None and kept.weight is weight:
        del _kept[key]
