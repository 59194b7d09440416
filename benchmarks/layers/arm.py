"""An arm of the layer benchmark, and the parts that arms are built from."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from ..cases import Case
from ..measure.failures import AbsentError
from ..records.environment import variables_set
from .operands import Operands


@dataclass(frozen=True)
class Built:
    """A layer ready to call.

    ``trained`` maps the name of each gradient (``da``, ``db``; ``dw``, ``dbias``) to the tensor it belongs to, ``base``
    is whether the layer has no adapter, and ``kernel`` the one that fastlora runs, with its ``tile``.
    """

    layer: Callable[[Tensor], Tensor]
    trained: dict[str, Tensor]
    base: bool = False
    kernel: str | None = None
    tile: str | None = None


@dataclass(frozen=True)
class Arm:
    """One arm.

    ``build`` raises :class:`AbsentError` where the arm has nothing to offer. ``own_mask`` says that its dropout mask is
    fastlora's, so that it can be checked with dropout on. ``variables`` of the environment hold meanwhile; None unsets.
    ``by_name_only`` keeps it out of runs that do not name it: its import changes other libraries in the whole process,
    so that the arms beside it would no longer be what they claim.
    """

    name: str
    about: str
    build: Callable[[Case, Operands, float], Built]
    own_mask: bool = False
    variables: Mapping[str, str | None] = field(default_factory=dict)
    by_name_only: bool = False

    def turn(self) -> AbstractContextManager[None]:
        """Sets the arm's variables for a while; entered and left outside every clock."""
        return variables_set(self.variables)


def imported(module: str, distribution: str | None = None) -> ModuleType:
    """A module of a package that may be missing; ``distribution`` is what pip calls it where that is another name.

    Raises:
        AbsentError: it is not installed, or its import raises, in the words of the exception.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise AbsentError(f"{distribution or package} is not installed")
    try:
        return importlib.import_module(module)
    except Exception as error:
        words = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise AbsentError(f"import {module} raises {words}") from error


def linear_over(o: Operands, trained: bool = False) -> nn.Linear:
    """``nn.Linear`` over the operands' own storage."""
    linear = nn.Linear(o.w.shape[1], o.w.shape[0], bias=o.bias is not None, device="meta")
    linear.weight = nn.Parameter(o.w, requires_grad=trained)
    if o.bias is not None:
        linear.bias = nn.Parameter(o.bias, requires_grad=trained)
    return linear


def adapters(o: Operands, dtype: torch.dtype | None = None) -> tuple[nn.Parameter, nn.Parameter]:
    """Copies of a and b to train, in their own dtype unless told."""
    a, b = (nn.Parameter(tensor.to(dtype or tensor.dtype, copy=True)) for tensor in (o.a, o.b))
    return a, b
