"""An arm's forward, backward or step on a case's operands: the calls to time, and the memory they take."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlora.clock import Work
from fastlora.memory import allocation

from ..cases import COPIES
from .arm import Built, outputs
from .operands import Operands, Together, frozen_tensors


def prepare(mode: str, built: Built, operands: Operands | Together, call: int) -> Work:
    """Makes a call to be timed: its tensors exist, and for ``backward`` the forward has run.

    ``call`` picks the copy of x and dy: with one more each time, no call finds its x where the last one left it.
    """
    x, dy = operands.xs[call % COPIES], operands.dys[call % COPIES]
    leaves = (x, *built.trained.values())
    layer = built.layer
    if mode == "forward":
        return lambda: layer(x)
    if mode == "step":
        return lambda: torch.autograd.grad(layer(x), leaves, dy)
    y = layer(x)
    return lambda: torch.autograd.grad(y, leaves, dy)


def broken(built: Built, operands: Operands | Together) -> str | None:
    """Names a result of one step of the timed layer that is missing, not finite or all zero; None where all are sound.

    The gate knows no mask but fastlora's and checks other arms without dropout: this check runs with it.
    """
    x, dy = operands.xs[0], operands.dys[0]
    y = built.layer(x)
    gradients = torch.autograd.grad(y, (x, *built.trained.values()), dy, allow_unused=True)
    for name, tensor in (outputs(y) | dict(zip(("dx", *built.trained), gradients, strict=True))).items():
        if tensor is None:
            return f"{name}: no gradient arrived"
        if not tensor.isfinite().all():
            return f"{name}: not finite"
        if not tensor.any():
            return f"{name}: all zero"
    return None


def peak_bytes(built: Built, operands: Operands | Together) -> int:
    """The most that one step holds at a time beyond inputs and parameters: y, gradients and temporaries."""
    return allocation(prepare("step", built, operands, 0), operands.xs[0].device).peak


def kept_bytes(built: Built, operands: Operands | Together) -> int:
    """Bytes that the forward keeps for the backward beyond x, w, bias and the adapters, each storage once.

    Counts what autograd is given to save; tensors hidden elsewhere (attributes of a graph node) would be missed.
    """
    x = operands.xs[0]
    known = [x, *frozen_tensors(operands), *built.trained.values()]
    free = {tensor.untyped_storage().data_ptr() for tensor in known}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = built.layer(x)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    del y
    return sum(size for pointer, size in storages.items() if pointer not in free)
