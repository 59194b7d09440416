"""Which kernel wins at a size: by rounds in which each was timed, beyond the noise that the run itself shows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# Of its rounds a winner is ahead in so many; of twenty, equal code is in 18 or more once in five thousand times.
_ROUNDS = 0.9

# And by so much at least, whatever the noise was.
_LEAST = 0.02


class Winner(NamedTuple):
    """The kernel that is faster than the rule's, or None; ``ahead`` is the next one's median over its own, else 1."""

    kernel: str | None
    ahead: float


def winner(samples: Mapping[str, Sequence[float]], rule: str, again: Sequence[float]) -> Winner:
    """The fastest kernel, where it beats the rule's in nine of ten rounds and by more than the noise.

    The noise is how far the rule's kernel, timed twice a round, is from itself.

    Args:
        samples: times of each kernel, one a round, the rule's among them.
        rule: the kernel to beat.
        again: the other times of that one.
    """
    medians = {kernel: statistics.median(times) for kernel, times in samples.items()}
    best = min(medians, key=lambda kernel: medians[kernel])
    if best == rule:
        return Winner(None, 1.0)
    ratios = [slow / fast for slow, fast in zip(samples[rule], samples[best], strict=True)]
    noise = abs(statistics.median(b / a for a, b in zip(samples[rule], again, strict=True)) - 1)
    faster = sum(ratio > 1 for ratio in ratios) / len(ratios)
    if faster < _ROUNDS or statistics.median(ratios) - 1 <= max(noise, _LEAST):
        return Winner(None, 1.0)
    following = min(median for kernel, median in medians.items() if kernel != best)
    return Winner(best, round(following / medians[best], 4))
