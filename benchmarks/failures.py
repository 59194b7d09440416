"""Failures as rows: what a provider raises is written down, and the others go on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .rows import Measured


class AbsentError(Exception):
    """This provider cannot run this case here, by its own word: no failure."""


@contextmanager
def failures_into(rows: Sequence[Measured]) -> Iterator[None]:
    """An exception ends up as status and reason of the rows; Ctrl-C passes."""
    verdict = None
    try:
        yield
    except Exception as error:
        verdict = _verdict(error)
    if verdict is not None:
        for row in rows:
            row.fail(*verdict)
        if verdict[0] == "oom" and torch.cuda.is_available():
            torch.cuda.empty_cache()


def _verdict(error: Exception) -> tuple[str, str]:
    if isinstance(error, AbsentError):
        return "absent", str(error)
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    return ("oom" if out_of_memory else "error"), message
