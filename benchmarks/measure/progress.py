"""Progress on stderr: one line that rewrites itself on a terminal, one plain line per case anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO


class Progress:
    """Counts cases, and guesses the rest of the time from the work in each: any unit, one number per case."""

    def __init__(self, work: Sequence[float], stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._animated = stream.isatty()
        self._work = work
        self._start = time.perf_counter()
        self._index = self._skipped = 0
        self._label = ""

    def skip(self) -> None:
        """Counts a case that is done already."""
        self._skipped += 1
        self._index += 1

    def case(self, case: object) -> None:
        """Begins the next case."""
        self._index += 1
        self._label = f"[{self._index}/{len(self._work)}] {case}"
        if not self._animated:
            print(f"{self._label}  {self._clock()}", file=self._stream, flush=True)

    def doing(self, what: str) -> None:
        """Shows the present step of the case, on a terminal alone."""
        if self._animated:
            print(f"\r\x1b[K{self._label}  {what}  {self._clock()}", end="", file=self._stream, flush=True)

    def clear(self) -> None:
        """Clears the line for other output."""
        if self._animated:
            print("\r\x1b[K", end="", file=self._stream, flush=True)

    def _clock(self) -> str:
        elapsed = time.perf_counter() - self._start
        done = sum(self._work[self._skipped : self._index - 1])
        if not done:
            return f"{_minutes(elapsed)} elapsed"
        left = elapsed * sum(self._work[self._index - 1 :]) / done
        return f"{_minutes(elapsed)} elapsed, about {_minutes(left)} left"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
