"""Failures as rows: an exception of an arm is written down, and the others go on."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch

from ..records.rows import Measured

# The messages of CUDA, cuBLAS, Triton and torch's CPU allocator.
_OUT_OF_MEMORY = re.compile("out of memory|ALLOC_FAILED|can't allocate memory", re.IGNORECASE)


class DeviceLostError(Exception):
    """Nothing can run on the GPU any more in this process, such as after an illegal access of memory."""


class AbsentError(Exception):
    """The arm declines the case, or cannot run here: no failure."""


@contextmanager
def failures_into(rows: Sequence[Measured]) -> Iterator[None]:
    """Turns an exception into status and reason of the rows; Ctrl-C passes.

    Raises:
        DeviceLostError: the GPU does not answer any more, and the next arms would fail without a fault of their own.
    """
    verdict = None
    try:
        yield
    except DeviceLostError:
        raise
    except Exception as error:
        verdict = _verdict(error)
    if verdict is not None:
        for row in rows:
            row.fail(*verdict)
        if torch.cuda.is_initialized():
            _check_device(rows, verdict[1])


def _check_device(rows: Sequence[Measured], reason: str) -> None:
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        arm = rows[0].arm if rows else "an arm"
        raise DeviceLostError(f"the GPU is lost to this process after {arm}: {reason}") from None


def _verdict(error: Exception) -> tuple[str, str]:
    if isinstance(error, AbsentError):
        return "absent", str(error)
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return ("oom" if known or _OUT_OF_MEMORY.search(str(error)) else "error"), message


def imported(module: str, distribution: str | None = None) -> ModuleType:
    """A module of a package that may be missing; ``distribution`` is its name for pip where that is another one.

    Raises:
        AbsentError: it is not installed, or its import raises; the message is the exception's.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise AbsentError(f"{distribution or package} is not installed")
    try:
        return importlib.import_module(module)
    except Exception as error:
        words = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise AbsentError(f"import {module} raises {words}") from error
