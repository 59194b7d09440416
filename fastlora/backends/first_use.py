"""The check at first use: what lets ``auto`` take the skinny kernels on a GPU where nobody has proven them.

They have no flags, no tensor copies and no waiting, so a right result at small sizes says much about the large ones.
Before a process first uses them for a dtype, a rank, with or without dropout, each of them is run on small inputs,
outputs poisoned with NaN, and held to the reference on the CPU by the error rule: milliseconds, once they are compiled.
A wrong result, or an exception when one is compiled or launched (no C compiler for Triton's launcher, a cache directory
that cannot be written), is logged in one line, and ``library`` runs on that device from then on. Nothing is checked
while a CUDA graph is captured or code is traced: ``library`` runs there until a call outside has passed.
``FASTLORA_CHECK=0`` takes the kernels unchecked.

The launches in which the branches of a group go together have a check of their own, for each set of ranks, on top of
that of each branch; until it has passed the branches go one by one.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch

from ..eager import is_eager
from . import triton
from .first_use_checks import Gated, GroupVariant, Variant, faults, group_faults, mask_faults, swiglu_faults
from .request import Request

_log = logging.getLogger("fastlora")

# The kernels that the check is for, by verb.
KERNELS = {"lora_matmul": "triton-skinny", "rank_grad": "triton"}

LATER = "not yet checked: a call outside graph capture and tracing checks it"
_UNCHECKED = "not checked, as FASTLORA_CHECK=0 asks"

Key = Variant | GroupVariant | Gated | torch.device

passed: set[Key] = set()
failed: dict[Gated | torch.device, str] = {}
_lock = threading.RLock()


def forget() -> None:
    """Lets everything be checked anew."""
    passed.clear()
    failed.clear()


def objection(request: Request) -> str | None:
    """None where the kernels passed their check, which this may run, else the reason why ``auto`` passes them over."""
    variant = Variant.of(request)
    return _objection(request.device, variant, lambda: faults(variant), "library runs in its place")


def objection_to_group(requests: Sequence[Request]) -> str | None:
    """The same for the launches in which the branches of a group go together; that of each branch is None."""
    from ..kernels import branches

    for part in branches.parts([request.adapter_dtype for request in requests]):
        if part.stop - part.start == 1:
            continue
        variant = GroupVariant.of(requests[part])
        check = functools.partial(group_faults, variant)
        if why := _objection(variant.device, variant, check, "library runs in its place"):
            return why
    return None


def objection_to_masks(device: torch.device) -> str | None:
    """The same for the kernel that makes dropout masks."""
    refusal = triton.refuses_masks(device)
    return refusal or _objection(device, device, lambda: mask_faults(device), "torch operators make them")


def objection_to_swiglu(gated: Gated) -> str | None:
    """The same for the kernels of a gated activation."""
    if gated.dtype is torch.float64:
        return "float64: the kernels compute in float32"
    refusal = triton.refuses_masks(gated.device)
    return refusal or _objection(gated.device, gated, lambda: swiglu_faults(gated), "torch operators make it")


def state(request: Request) -> str:
    """How the check stands, in words; runs nothing."""
    if _is_off():
        return _UNCHECKED
    if why := failed.get(request.device):
        return why
    return "passed its check at first use" if Variant.of(request) in passed else "not yet checked at first use"


def _objection(device: torch.device, key: Key, check: Callable[[], Iterator[str]], instead: str) -> str | None:
    if _is_off():
        return None
    family: Gated | torch.device = key if isinstance(key, Gated) else device
    if family in failed:
        return failed[family]
    if key in passed:
        return None
    if _nobody_may_compute():
        return LATER
    with _lock:
        if key not in passed and family not in failed:
            try:
                fault = _first_fault(check)
            except torch.OutOfMemoryError:
                return LATER
            if fault is None:
                passed.add(key)
            else:
                what = "dropout masks" if key == device else str(key)
                failed[family] = f"failed its check at first use on {device} ({what}): {fault}"
                kernels = "gated activation" if isinstance(key, Gated) else "skinny kernels"
                _log.warning("Triton's %s: %s; %s", kernels, failed[family], instead)
    return failed.get(family)


def _is_off() -> bool:
    return os.environ.get("FASTLORA_CHECK") == "0"


def _nobody_may_compute() -> bool:
    """Whether a graph is being captured, or a tracer or dispatch mode would see the check's own operators."""
    return (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()) or not is_eager()


def _first_fault(check: Callable[[], Iterator[str]]) -> str | None:
    with ExitStack() as plainly:
        plainly.enter_context(torch.no_grad())
        plainly.enter_context(torch.autocast("cpu", enabled=False))
        try:
            return next(check(), None)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return " ".join(f"{type(error).__name__}: {error}".split())
