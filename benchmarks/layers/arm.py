"""Arms, the ways to train LoRA that are compared: their common part, a layer's own, and the kernels they force."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastlora
from fastlora.backends import dispatch

from ..cases import Case
from ..measure.failures import AbsentError, imported
from ..records.environment import variables_set
from .operands import Operands, Together

# The package's kernels: each may be forced.
KERNELS = tuple(kernel.name for kernel in dispatch.KERNELS["lora_matmul"] if kernel.name != "reference")

Require = Callable[[torch.device], object]


def anywhere(device: torch.device) -> None:
    """Requires nothing of a device."""


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison.

    Attributes:
        name, about: for tables and lists.
        kernel: the kernel of fastlora that it forces; None leaves the choice to fastlora.
        require: raises :class:`AbsentError` where the arm can take part in no case on the device.
    """

    name: str
    about: str
    kernel: str | None = field(default=None, kw_only=True)
    require: Require = field(default=anywhere, kw_only=True)

    def turn(self) -> AbstractContextManager[None]:
        """Forces the kernel for a while; entered and left outside every clock."""
        return variables_set(forcing(self.kernel))

    def absence(self, device: torch.device) -> str | None:
        """The reason why the arm takes part in no case on the device; None where it may."""
        try:
            with self.turn():
                self.require(device)
        except AbsentError as absent:
            return str(absent)
        return None


def absent(arms: Iterable[Arm], device: torch.device) -> dict[str, str]:
    """The arms that take part in no case on the device, with the reason of each."""
    return {arm.name: reason for arm in arms if (reason := arm.absence(device)) is not None}


# What a layer computes: the base alone, or with an update.
Formula = Literal["base", "lora", "dora"]


@dataclass(frozen=True)
class Built:
    """A layer ready to call, an MLP, or several of one input, which give a tuple.

    ``trained`` maps the name of each gradient (``da``, ``db``; ``dw``, ``dbias``; of several layers with the number
    behind it) to the tensor it belongs to, ``formula`` is what the layer computes, and ``kernel`` the one that fastlora
    runs, with its ``tile``.
    """

    layer: Callable[[Tensor], Any]
    trained: dict[str, Tensor]
    formula: Formula = "lora"
    kernel: str | None = None
    tile: str | None = None


Build = Callable[[Case, Operands | Together, float], Built]


def outputs(y: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What a layer gave by its name: ``y``; of several ``y0``, ``y1``, ..."""
    return {"y": y} if isinstance(y, Tensor) else {f"y{i}": part for i, part in enumerate(y)}


def each_layer(build: Callable[[Case, Operands, float], Built]) -> Build:
    """Builds several layers, too: each by itself, called one after the other, in an MLP with torch between them."""

    @functools.wraps(build)
    def build_all(case: Case, o: Operands | Together, p: float) -> Built:
        if isinstance(o, Operands):
            return build(case, o, p)
        parts = [build(of, operands, p) for of, operands in zip(case.branches, o.branches, strict=True)]
        layers = [part.layer for part in parts]
        if case.is_mlp:
            gate, up, down = layers
            return combined(parts, lambda x: down(F.silu(gate(x)) * up(x)))
        return combined(parts, lambda x: tuple(layer(x) for layer in layers))

    return build_all


def combined(parts: Sequence[Built], layer: Callable[[Tensor], Any]) -> Built:
    """Several layers as one, which ``layer`` calls."""
    trained = {f"{name}{i}": tensor for i, part in enumerate(parts) for name, tensor in part.trained.items()}
    return Built(
        layer, trained, parts[0].formula, _all_of(part.kernel for part in parts), _all_of(p.tile for p in parts)
    )


def _all_of(names: Iterable[str | None]) -> str | None:
    """The distinct names, or None where there is none."""
    return "+".join(dict.fromkeys(name for name in names if name)) or None


@dataclass(frozen=True)
class LayerArm(Arm):
    """An arm that builds a case's layers over its operands, with dropout of this probability.

    ``build`` raises :class:`AbsentError` where it declines the case. ``own_mask`` says that its dropout mask is
    fastlora's, so that it can be checked with dropout on. ``by_name_only`` keeps it out of runs that do not name it:
    its import changes other libraries in the whole process, and the arms beside it would no longer be themselves.
    ``variants`` says that it takes quantised bases and DoRA too.
    """

    build: Build
    own_mask: bool = False
    by_name_only: bool = False
    variants: bool = False

    def require_case(self, case: Case) -> None:
        """Raises :class:`AbsentError` for a quantised base, or DoRA, where it is not built for them."""
        if not self.variants and not case.is_plain:
            raise AbsentError(f"not built for {'DoRA' if case.is_dora else f'a base in {case.quantised}'}")


def forcing(kernel: str | None) -> dict[str, str | None]:
    """The environment variables that make fastlora run this kernel, or choose by itself."""
    return {"FASTLORA_BACKEND": kernel or "auto"}


class Choice(NamedTuple):
    """The kernel that fastlora would run, with the text of its tile; or the refusal of the one that is forced."""

    kernel: str | None
    tile: str | None = None
    refusal: str | None = None


def choice(x: Tensor, w: Tensor, a: Tensor, b: Tensor, *, bias: Tensor | None = None, dropout_p: float = 0.0) -> Choice:
    """Asks fastlora about a call in the present environment."""
    explanation = fastlora.explain(x, w, a, b, bias=bias, dropout_p=dropout_p)
    if explanation.chosen is None:
        return Choice(None, refusal=dict(explanation.verdicts)[os.environ["FASTLORA_BACKEND"]])
    return Choice(explanation.chosen, explanation.tile)


def refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    """The reason why the forced kernel runs no layer of this dtype, however well shaped; None where it may."""
    square = torch.empty(16, 16, dtype=dtype, device=device)
    return choice(square, square, square, square).refusal


def needs_kernel(kernel: str) -> Require:
    """Requires that the forced kernel runs on the device at all."""

    def require(device: torch.device) -> None:
        if kernel != "library":
            require_gpu(device)
        if reason := refusal(torch.bfloat16, device):
            raise AbsentError(reason)

    return require


def needs_module(module: str, distribution: str | None = None, gpu: bool = False) -> Require:
    """Requires a module of a package that may be missing, and for ``gpu`` a CUDA device."""

    def require(device: torch.device) -> None:
        imported(module, distribution)
        if gpu:
            require_gpu(device)

    return require


def require_gpu(device: torch.device) -> None:
    """Raises :class:`AbsentError` on anything but CUDA: an interpreter's time, or a host model's, means nothing."""
    if device.type != "cuda":
        raise AbsentError("needs a CUDA GPU")
