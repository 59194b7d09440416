"""The kernel on the vendor's GEMM, for every call: its verbs, its group, its way with few tokens, and its forms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .library_group import gradients_group, lora_matmul_group
from .library_products import gradients, lora_matmul, rank_grad
from .library_small import small
from .request import Kernel, Together, runs_anything

_run_last = functools.partial(lora_matmul, last=True)
_gradients_last = functools.partial(gradients, last=True)


def _form(words: str, run: Callable[..., Any] = lora_matmul, backward: Callable[..., Any] = gradients) -> Kernel:
    return Kernel(f"library:{words}", runs_anything, run, gradients=backward, small=small)


# Where a form does what one before it does, forward or backward, both have one function there.
_FORMS = (
    _form("addmm", functools.partial(lora_matmul, addmm=True)),
    _form("last", _run_last, _gradients_last),
    _form("addmm,last", functools.partial(lora_matmul, addmm=True, last=True), _gradients_last),
    _form("narrow", backward=functools.partial(gradients, narrow=True)),
    _form("wide", backward=functools.partial(gradients, narrow=False)),
    _form("last,narrow", _run_last, functools.partial(gradients, last=True, narrow=True)),
    _form("last,wide", _run_last, functools.partial(gradients, last=True, narrow=False)),
)
_RANK_GRAD_FORMS = (
    Kernel("library:narrow", runs_anything, functools.partial(rank_grad, narrow=True)),
    Kernel("library:wide", runs_anything, functools.partial(rank_grad, narrow=False)),
)
LORA_MATMUL = (
    Kernel(
        "library",
        runs_anything,
        lora_matmul,
        gradients=gradients,
        small=small,
        together=Together(lora_matmul_group, gradients_group),
        forms=_FORMS,
    ),
)
RANK_GRAD = (Kernel("library", runs_anything, rank_grad, forms=_RANK_GRAD_FORMS),)
