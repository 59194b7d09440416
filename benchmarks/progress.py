"""Progress on stderr: one line that rewrites itself on a terminal, one plain line per case anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from .cases import Case

# Work of a case beyond its products, in multiply-adds: building, checking and the profiler.
_FIXED_WORK = 2e8


class Progress:
    """Counts cases, and guesses the rest of the time from M·K·N."""

    def __init__(self, cases: Sequence[Case], stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._animated = stream.isatty()
        self._work = [case.m * case.k * case.n + _FIXED_WORK for case in cases]
        self._start = time.perf_counter()
        self._index = -1
        self._label = ""

    def case(self, case: Case) -> None:
        """The next case begins."""
        self._index += 1
        self._label = f"[{self._index + 1}/{len(self._work)}] {case}"
        if not self._animated:
            print(f"{self._label}  {self._clock()}", file=self._stream, flush=True)

    def doing(self, what: str) -> None:
        """What goes on inside the case; shown on a terminal alone."""
        if self._animated:
            print(f"\r\x1b[K{self._label}  {what}  {self._clock()}", end="", file=self._stream, flush=True)

    def clear(self) -> None:
        """Leaves the line to others."""
        if self._animated:
            print("\r\x1b[K", end="", file=self._stream, flush=True)

    def _clock(self) -> str:
        elapsed = time.perf_counter() - self._start
        done = sum(self._work[: self._index])
        if not done:
            return f"{_minutes(elapsed)} elapsed"
        left = elapsed * (sum(self._work) / done - 1)
        return f"{_minutes(elapsed)} elapsed, about {_minutes(left)} left"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
