"""Numbers for people: bytes, and the mean of ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def readable_bytes(count: int | None) -> str:
    """Such as ``24.0 KiB``; a dash where nothing was measured."""
    if count is None:
        return "-"
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} B"


def geometric_mean(ratios: Sequence[float]) -> float:
    """The mean of ratios: that of the inverses is its inverse."""
    return math.exp(statistics.fmean(math.log(r) for r in ratios))
